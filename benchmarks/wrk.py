"""wrk before a uvicorn with one worker, for each row in a process of its own."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.endpoints import Endpoint
from benchmarks.report import Cell, Results, Sample
from benchmarks.rows import Row
from tests.servers import Unavailable

_HERE = Path(__file__).resolve().parent
_LEASH = _HERE.parent / "tests" / "leash.py"

CONNECTIONS = 32

#: Sessions in turn: so many that no two requests under way have the same one.
_SESSIONS = 8 * CONNECTIONS

_ENDPOINTS: tuple[Endpoint, ...] = ("/read", "/write")


def measure(
    urls: Mapping[Row, str], results: Results, *, rounds: int, seconds: int, say: Callable[[str], None]
) -> None:
    """Measure every row, in rounds that each go over all of them."""
    wrk = shutil.which("wrk")
    if wrk is None:
        raise Unavailable("no wrk on PATH")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="sqlsessions-")))
        served: dict[Row, list[str]] = {}
        for row, url in urls.items():
            say(f"over HTTP: {row.title} starts")
            port = stack.enter_context(_serving(row, url))
            cookies = folder / f"{row.key}.cookies"
            cookies.write_text("".join(f"{_cookie(row, port)}\n" for _ in range(_SESSIONS)))
            served[row] = [wrk, "-t1", f"-c{CONNECTIONS}", "-s", str(_HERE / "wrk.lua"), str(port), str(cookies)]
            _sample(served[row], row.path("/read"), 1)
        for number in range(rounds):
            for endpoint in _ENDPOINTS:
                say(f"round {number + 1} of {rounds}: {endpoint}, over HTTP")
                # To and fro, so that no row always has the same neighbour before it.
                for row, command in list(served.items())[:: -1 if number % 2 else 1]:
                    found = _sample(command, row.path(endpoint), seconds)
                    results.add(Cell(row.key, endpoint, "HTTP"), found)


@contextmanager
def _serving(row: Row, url: str) -> Iterator[int]:
    """Serve a row on some port; yield the port when requests are answered."""
    options = ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_LEASH), str(os.getpid()), "", sys.executable, "-m", "uvicorn", *options,
         "--factory", "benchmarks.rows:served"],
        cwd=_HERE.parent,
        env={**os.environ, "BENCHMARK_ROW": row.key, "BENCHMARK_URL": url},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        yield _port(process)
    finally:
        process.terminate()
        process.communicate()


def _port(process: "subprocess.Popen[str]") -> int:
    said = ""
    for line in process.stderr or ():
        said += line
        if found := re.search(r"running on http://127\.0\.0\.1:([0-9]+) ", line):
            return int(found[1])
    raise RuntimeError(f"uvicorn did not start:\n{said}")


def _cookie(row: Row, port: int) -> str:
    """Return the cookie of a new session, or "" where there are none."""
    connection = HTTPConnection("127.0.0.1", port)
    connection.request("GET", row.path("/login"))
    with connection.getresponse() as answer:
        values = answer.headers.get_all("set-cookie", [])
    connection.close()
    return "; ".join(value.partition(";")[0] for value in values)


def _sample(command: list[str], endpoint: Endpoint, seconds: int) -> Sample:
    *wrk, port, cookies = command
    arguments = [f"-d{seconds}s", f"http://127.0.0.1:{port}{endpoint}", "--", cookies]
    said = subprocess.run([*wrk, *arguments], check=True, capture_output=True, text=True).stdout
    seen = json.loads(said.splitlines()[-1])
    if seen["errors"]:
        raise RuntimeError(f"{endpoint} failed {seen['errors']} times")
    return Sample(1e6 * seen["requests"] / seen["duration"], seen["p50"] / 1e6, seen["p99"] / 1e6)
