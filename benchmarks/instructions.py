"""How many instructions a request takes, counted by callgrind: counts repeat where times do not.

    python -m benchmarks.instructions

Looked at is what sqlsessions adds to a bare Starlette, as a multiple of what Starlette's cookie middleware adds: that
hardly depends on the machine, and little on the version of Python. The sessions are in memory, so no database has a
part in it.
"""

import asyncio
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware as CookieMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from benchmarks.driver import Client
from benchmarks.endpoints import KEY, Endpoint, login, none, read, write
from sqlsessions import InMemoryBackend, SessionMiddleware
from tests.servers import Unavailable

#: The most that sqlsessions may add, as a multiple of what the cookie middleware adds: some 3 in a hundred more than it
#: does on Python 3.13, where the cookie middleware takes fewer than on 3.11.
LIMITS: Mapping[Endpoint, float] = {"/read": 0.76, "/write": 0.6}

_CASES: tuple[tuple[str, Endpoint], ...] = (
    ("bare", "/none"),
    ("cookie", "/read"),
    ("cookie", "/write"),
    ("sqlsessions", "/read"),
    ("sqlsessions", "/write"),
)

#: Counted are twice as many requests less this many, so that what a run takes besides is left out.
_REQUESTS = 100

_ROOT = Path(__file__).resolve().parent.parent


def ratios(counts: Mapping[tuple[str, Endpoint], float]) -> dict[Endpoint, float]:
    """Return what the limits are for."""

    def added(application: str, endpoint: Endpoint) -> float:
        return counts[application, endpoint] - counts["bare", "/none"]

    return {endpoint: added("sqlsessions", endpoint) / added("cookie", endpoint) for endpoint in LIMITS}


def count() -> dict[tuple[str, Endpoint], float]:
    """Return the instructions of one request, for each application and endpoint; raise Unavailable without valgrind."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise Unavailable("no valgrind on PATH")
    with TemporaryDirectory(prefix="sqlsessions-") as folder:
        # Importing would take a minute if it was counted, too.
        options = ["-q", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/%p"]
        said = subprocess.run(
            [valgrind, *options, sys.executable, "-m", "benchmarks.instructions", "--counted"],
            cwd=_ROOT,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        runs = [json.loads(line) for line in said.splitlines()]
        totals = {(application, path, number): _total(Path(folder, pid)) for application, path, number, pid in runs}
    return {case: (totals[*case, 2 * _REQUESTS] - totals[*case, _REQUESTS]) / _REQUESTS for case in _CASES}


def _total(path: Path) -> int:
    found = re.search(r"^summary: ([1-9][0-9]*)$", path.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError("callgrind has counted nothing: vgdb could not switch it on")
    return int(found[1])


def _counted() -> None:
    """Run every case, in a process of its own; print which. This is what runs under callgrind."""
    _switch_on()
    for case in _CASES:
        # What valgrind has translated here, it need not translate again in each process.
        asyncio.run(_ask(*case, 1))
        for number in (_REQUESTS, 2 * _REQUESTS):
            pid = os.fork()
            if not pid:
                _run_and_exit(*case, number)
            if os.waitpid(pid, 0)[1]:
                sys.exit(1)
            print(json.dumps([*case, number, str(pid)]), flush=True)


def _switch_on() -> None:
    command = ["vgdb", f"--pid={os.getpid()}", "instrumentation", "on"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as vgdb:
        # Valgrind looks for messages while it runs code; woken up from waiting it would have to be with ptrace.
        while vgdb.poll() is None:
            pass


def _run_and_exit(application: str, endpoint: Endpoint, number: int) -> None:
    code = 1
    try:
        asyncio.run(_ask(application, endpoint, number))
        code = 0
    except BaseException:  # noqa: BLE001 - whatever it is, it ends here
        traceback.print_exc()
    finally:
        os._exit(code)


async def _ask(application: str, endpoint: Endpoint, number: int) -> None:
    client = Client(_application(application))
    if application != "bare":
        await client.get("/login")
        client.keep_cookie()
    gc.collect()
    gc.freeze()
    for _ in range(number):
        await client.get(endpoint)


def _application(name: str) -> Starlette:
    middleware = {
        "bare": [],
        "cookie": [Middleware(CookieMiddleware, secret_key=KEY)],
        "sqlsessions": [
            Middleware(SessionMiddleware, secret_key=KEY, backend=InMemoryBackend(), cookie_https_only=False)
        ],
    }
    handlers = {"/none": none, "/read": read, "/write": write, "/login": login}
    routes = [Route(path, _responding(handler)) for path, handler in handlers.items()]
    return Starlette(routes=routes, middleware=middleware[name])


def _responding(handler: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[JSONResponse]]:
    async def respond(request: Request) -> JSONResponse:
        return JSONResponse(await handler(request))

    return respond


def _main() -> None:
    counts = count()
    for (application, endpoint), instructions in counts.items():
        print(f"{application:11} {endpoint:6} {instructions:9,.0f} instructions")
    for endpoint, ratio in ratios(counts).items():
        print(f"{endpoint} adds {ratio:.2f} x what the cookie middleware adds; the limit is {LIMITS[endpoint]:.2f}")


if __name__ == "__main__":
    _counted() if sys.argv[1:] == ["--counted"] else _main()
