"""The demo, served by a real uvicorn as `python3 dev.py demo` serves it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.commands import ENVIRONMENT, ROOT, command

#: Without one in the environment, the demo would write a file beside its database.
KEY = "x7Rr1Yq2-TzZ0bK4wQ9nVd3LmE6sHc8uA5fGjPiOeXk"


class DemoServer:
    """A uvicorn process that can be killed and started again on the same port."""

    def __init__(self, **variables: str) -> None:
        self._variables = variables
        self.database = variables["SQLSESSIONS_URL"]
        self._process: subprocess.Popen[str] | None = None
        #: Where it is served; known once it has been started.
        self.url = "http://127.0.0.1:0"

    def start(self) -> None:
        """Start serving; return when requests are answered."""
        arguments = ["examples.demo:app", "--host", "127.0.0.1", "--port", self.url.rpartition(":")[2]]
        leash = [sys.executable, "-I", "-S", str(Path(__file__).with_name("leash.py")), str(os.getpid()), ""]
        self._process = subprocess.Popen(
            [*leash, *command("uvicorn", *arguments, "--no-access-log")],
            cwd=ROOT,
            env={**ENVIRONMENT, **self._variables},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        said = ""
        for line in self._process.stderr:
            said += line
            if found := re.search(r"running on (http://127\.0\.0\.1:[0-9]+) ", line):
                self.url = found[1]
                return
        raise AssertionError(said)

    def kill(self) -> None:
        """End it as `kill -9` does; a no-op if it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@contextmanager
def serving(**variables: str) -> Iterator[DemoServer]:
    """Serve the demo with these environment variables inside the block."""
    server = DemoServer(**variables)
    try:
        server.start()
        yield server
    finally:
        server.kill()
