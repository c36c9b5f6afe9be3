"""A uvicorn worker with `tests.faults.shop`, and the browsers that visit it."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import sqlalchemy as sa

from tests.commands import ENVIRONMENT, ROOT, command

#: Seconds in which a process has to start.
PATIENCE = 30

LEASH = ROOT / "tests" / "leash.py"


class Worker:
    """The shop under uvicorn, in a process of its own, while the block runs."""

    def __init__(self, folder: Path, url: str | sa.URL, *, deadline: timedelta, options: Mapping[str, Any]) -> None:
        self.url = sa.make_url(url).render_as_string(hide_password=False)
        self._variables = {"DEADLINE": str(deadline.total_seconds()), "OPTIONS": json.dumps(options)}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._log = folder / f"uvicorn-{self.port}.log"

    def __enter__(self) -> Self:
        leash = [sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), ""]
        uvicorn = command("uvicorn", "tests.faults.shop:app", "--port", str(self.port), "--no-access-log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*leash, *uvicorn],
                cwd=ROOT,
                env={**ENVIRONMENT, **self._variables, "URL": self.url},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        end = time.monotonic() + PATIENCE
        while not self._accepts():
            assert self._process.poll() is None, self.log
            assert time.monotonic() < end, self.log
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def log(self) -> str:
        """What it has said."""
        return self._log.read_text()

    def browser(self) -> httpx.AsyncClient:
        """Return a client with a cookie jar."""
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", trust_env=False, timeout=PATIENCE)

    def _accepts(self) -> bool:
        time.sleep(0.02)  # another process: there is nothing to wait on
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
