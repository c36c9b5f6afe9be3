"""An application under uvicorn, in a process of its own, and the browsers that visit it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from tests.commands import ENVIRONMENT, ROOT, command

#: Seconds in which a process has to start or to stop.
PATIENCE = 30

LEASH = ROOT / "tests" / "leash.py"


class Uvicorn:
    """*application* under uvicorn, while the block runs: imported in *cwd*, given *variables*, its log in *folder*."""

    def __init__(self, application: str, folder: Path, *, cwd: Path, variables: Mapping[str, str]) -> None:
        self._application = application
        self._cwd = cwd
        self._variables = variables
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._log = folder / f"uvicorn-{self.port}.log"

    def __enter__(self) -> Self:
        leash = [sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), ""]
        uvicorn = command("uvicorn", self._application, "--port", str(self.port), "--no-access-log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*leash, *uvicorn],
                cwd=self._cwd,
                env={**ENVIRONMENT, **self._variables},
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

    def end(self, how: signal.Signals) -> int:
        """Send a signal, and return the exit status."""
        self._process.send_signal(how)
        return self._process.wait(PATIENCE)

    def _accepts(self) -> bool:
        time.sleep(0.02)  # another process: there is nothing to wait on
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
