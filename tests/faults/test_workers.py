"""Workers that are killed, terminated, or left by their clients in the middle of a request."""

import asyncio
import os
import random
import signal
import subprocess
import textwrap
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from sqlsessions import SQLAlchemyBackend
from sqlsessions.payload import decode
from tests.asgi import records
from tests.commands import ENVIRONMENT, command
from tests.looking import PATIENCE, closing, pids, sql

pytestmark = pytest.mark.anyio

#: More kills, or others: TEST_KILLS=1000 TEST_KILLS_SEED=7.
KILLS = int(os.environ.get("TEST_KILLS", "24"))
SEED = int(os.environ.get("TEST_KILLS_SEED", "1"))

WORKERS = 2
CLIENTS = 8
#: Seconds that a worker may take to stop.
GRACE = 5

APPLICATION = """
    import asyncio, ctypes, os, signal, socket, sys
    from collections import Counter
    from datetime import timedelta

    import uvicorn
    from sqlalchemy import event
    from sqlalchemy.ext.asyncio import create_async_engine
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route
    from sqlsessions import SessionMiddleware, SQLAlchemyBackend

    engine = create_async_engine(os.environ["URL"])
    backend = SQLAlchemyBackend(engine, deadline=timedelta(minutes=1))  # what is held up on purpose is given its time
    counts = Counter()

    @event.listens_for(engine.sync_engine, "connect")
    def connected(connection, record):
        counts["connections"] += 1

    async def login(request):
        request.session.login(request.path_params["user"])
        await request.session.save()
        return JSONResponse(str(request.session.id))

    async def put(request):
        request.session["value"] = request.path_params["value"]
        return JSONResponse(None)

    async def add(request):
        data = await request.session.atomic(lambda data: data.update(n=data.get("n", 0) + 1))
        return JSONResponse(data["n"])

    async def logout(request):
        request.session.clear()
        counts["cleared"] += 1
        if request.url.path == "/logout/and/linger":
            await asyncio.Event().wait()
        return JSONResponse(None)

    async def show(request):
        return JSONResponse(dict(request.session))

    async def show_counts(request):
        return JSONResponse(counts)

    class HangUp:
        # Cancels what a client has asked for who hangs up, as many applications do.
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            if scope["type"] != "http" or scope["path"] == "/counts":
                return await self.app(scope, receive, send)
            message = await receive()
            answer = asyncio.create_task(self.app(scope, lambda: asyncio.sleep(0, message), send))
            gone = asyncio.create_task(receive())
            patient = {answer} if scope["path"] == "/logout" else {answer, gone}
            await asyncio.wait(patient, return_when=asyncio.FIRST_COMPLETED)
            counts["left"] += answer.cancel()
            gone.cancel()
            await asyncio.wait({answer, gone})
            counts["ended"] += 1
            if not answer.cancelled():
                answer.result()

    app = Starlette(routes=[
        Route("/login/{user}", login, methods=["POST"]),
        Route("/put/{value:int}", put, methods=["POST"]),
        Route("/add", add, methods=["POST"]),
        Route("/logout", logout, methods=["POST"]),
        Route("/logout/and/linger", logout, methods=["POST"]),
        Route("/", show),
        Route("/counts", show_counts),
    ])
    settings = {"secret_key": bytes(range(32)), "cookie_https_only": False, "skip": ["/counts"]}
    app.add_middleware(SessionMiddleware, backend=backend, **settings)
    app.add_middleware(HangUp)

    # Forked after all imports, as by gunicorn --preload: hundreds of workers start in the time of one interpreter.
    listener = socket.create_server(("127.0.0.1", 0))
    parent = os.getpid()
    leash = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: None
    leash(1, signal.SIGKILL)

    def work():
        if pid := os.fork():
            print(pid, flush=True)
            return
        leash(1, signal.SIGKILL)
        if os.getppid() == parent:
            uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
        os._exit(0)

    print(listener.getsockname()[1], flush=True)
    for _ in range(int(sys.argv[1])):
        work()
    if sys.argv[2] == "forever":
        while True:
            os.wait()
            work()
    listener.close()
    for _ in range(int(sys.argv[1])):
        os.wait()
"""


class Workers:
    """The application under uvicorn in several processes, while the block runs."""

    def __init__(self, folder: Path, url: str, *, workers: int = WORKERS, respawned: bool = False) -> None:
        (folder / "workers.py").write_text(textwrap.dedent(APPLICATION))
        self.folder = folder
        self.url = url
        #: The process ids of those who work.
        self.pids: list[int] = []
        self._count = workers
        self._life = "forever" if respawned else "once"
        self._log = folder / "log"

    async def __aenter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command("workers", str(self._count), self._life),
                cwd=self.folder,
                env={**ENVIRONMENT, "PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}:{self.folder}", "URL": self.url},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self.port = await self._number()
        for _ in range(self._count):
            self.pids.append(await self._number())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process.returncode is None:
            self._process.kill()
            for pid in self.pids:
                with suppress(ProcessLookupError):  # the leash was faster
                    os.kill(pid, signal.SIGKILL)
        await self._process.wait()

    @property
    def log(self) -> str:
        """What they have said."""
        return self._log.read_text()

    def browser(self) -> httpx.AsyncClient:
        """Return a client with a cookie jar."""
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", trust_env=False, timeout=PATIENCE)

    async def kill(self, pid: int) -> None:
        """Kill one, as the out-of-memory killer does, and return when another has begun in its place."""
        os.kill(pid, signal.SIGKILL)
        self.pids.remove(pid)
        self.pids.append(await self._number())

    async def ended(self) -> int:
        """Return the exit status when all have ended by themselves."""
        async with asyncio.timeout(PATIENCE):
            return await self._process.wait()

    async def _number(self) -> int:
        assert self._process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            line = await self._process.stdout.readline()
        assert line, self.log
        return int(line)


def make_backend(url: str) -> SQLAlchemyBackend:
    """Return the backend that looks at what the workers have left."""
    return SQLAlchemyBackend(url)


@pytest.fixture(params=["sqlite_sessions_url", "postgres_sessions_url"], ids=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """The URL of a database with our table, on each engine in turn."""
    return str(request.getfixturevalue(request.param))


Data = dict[str, Any]


@dataclass
class Shopper:
    """A client who knows what must be in the session, however the workers end."""

    name: str
    browser: httpx.AsyncClient
    random: random.Random
    #: How many requests were acknowledged, and how many were not, of all clients.
    told: Counter[str]
    acknowledged: asyncio.Condition
    #: What the session may hold: one thing, unless the last request was not answered.
    possible: list[Data] = field(default_factory=lambda: [{}])
    handle: str = ""
    #: The handles of sessions that have ended.
    over: list[str] = field(default_factory=list)

    async def step(self) -> bool:
        """Make a request that does something to the session; tell whether it was answered."""
        (data,) = self.possible
        login, add = f"/login/{self.name}", {**data, "n": data.get("n", 0) + 1}
        if not data:
            return await self.ask(login, {"user_id": self.name})
        value = self.random.randrange(1000)
        steps = {f"/put/{value}": {**data, "value": value}, "/add": add, "/logout": {}, login: data}
        (path,) = self.random.choices(list(steps), [10, 10, 1, 2])
        return await self.ask(path, steps[path])

    async def ask(self, path: str, after: Data) -> bool:
        """Make a request that makes *after* of the data; tell whether it was answered."""
        try:
            reply = await self.browser.post(path)
        except httpx.TransportError:
            self.told["lost"] += 1
            # By a login it may have got a secret that nobody was told.
            self.possible += [after, {}] if path.startswith("/login") else [after]
            return False
        assert reply.status_code == 200, path
        self.possible = [after]
        if path.startswith("/login"):
            self.handle = reply.json()
        elif path == "/logout":
            self.over.append(self.handle)
        async with self.acknowledged:
            self.told["acknowledged"] += 1
            self.acknowledged.notify_all()
        return True

    async def look(self) -> None:
        """Find out what is stored, from whichever worker survives the question."""
        while True:
            try:
                reply = await self.browser.get("/")
            except httpx.TransportError:
                continue
            assert reply.status_code == 200
            assert reply.json() in self.possible
            self.possible = [reply.json()]
            return


@asynccontextmanager
async def shoppers(workers: Workers) -> AsyncIterator[list[Shopper]]:
    """Give clients of the workers, who count together."""
    told, acknowledged = Counter[str](), asyncio.Condition()
    made = [
        Shopper(f"user{number}", workers.browser(), random.Random(SEED + number), told, acknowledged)  # noqa: S311
        for number in range(CLIENTS)
    ]
    try:
        yield made
    finally:
        for shopper in made:
            await shopper.browser.aclose()


async def assert_stored(url: str, shoppers: list[Shopper]) -> None:
    """Assert that the table is whole, has what was acknowledged, and nothing that has ended."""
    async with closing(make_backend(url)) as backend:
        stored = {str(record.id): decode(record.data) for record in await records(backend)}
    for shopper in shoppers:
        assert stored.get(shopper.handle, {}) in shopper.possible
        assert not stored.keys() & set(shopper.over)
    assert all(data["user_id"] for data in stored.values())
    if url.startswith("sqlite"):
        assert await sql(url, "PRAGMA integrity_check") == [("ok",)]
    else:
        assert await sql(url, "SELECT 1 FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'") == []


async def test_killed_under_load(tmp_path: Path, url: str) -> None:
    """Workers are killed under load, one after the other: what they acknowledged is stored, the rest was done whole or
    not at all, and the next request is served (R27, R84).
    """
    dice = random.Random(SEED)  # noqa: S311
    async with Workers(tmp_path, url, respawned=True) as workers, shoppers(workers) as clients:
        told, acknowledged = clients[0].told, clients[0].acknowledged
        killed: list[int] = []

        async def shop(shopper: Shopper) -> None:
            while len(killed) < KILLS:
                if not await shopper.step():
                    await shopper.look()

        async def kill() -> None:
            while len(killed) < KILLS:
                async with acknowledged, asyncio.timeout(PATIENCE):
                    for _ in range(dice.randrange(2, 25)):
                        await acknowledged.wait()
                killed.append(dice.choice(workers.pids))
                await workers.kill(killed[-1])

        await asyncio.gather(kill(), *(shop(shopper) for shopper in clients))
        assert told["lost"] >= KILLS  # not only idle ones were killed
        for shopper in clients:
            await shopper.look()
            assert await shopper.step()
        await assert_stored(url, clients)
        assert "Traceback" not in workers.log


async def test_terminated_under_load(tmp_path: Path, url: str) -> None:
    """SIGTERM under load stops every worker within five seconds, and loses nothing that was acknowledged (R87)."""
    async with Workers(tmp_path, url) as workers, shoppers(workers) as clients:
        told, acknowledged = clients[0].told, clients[0].acknowledged
        for shopper in clients:
            # uvicorn tells the connections that there are to end. One that it accepts in that very moment is not among
            # them, and is served for as long as its client goes on.
            shopper.browser.headers["connection"] = "close"

        async def shop(shopper: Shopper) -> None:
            while await shopper.step():
                pass

        async def terminate() -> None:
            async with acknowledged, asyncio.timeout(PATIENCE):
                await acknowledged.wait_for(lambda: told["acknowledged"] >= 100)
            begun = time.monotonic()
            for pid in workers.pids:
                os.kill(pid, signal.SIGTERM)
            assert await workers.ended() == 0
            assert time.monotonic() - begun < GRACE

        await asyncio.gather(terminate(), *(shop(shopper) for shopper in clients))
        await assert_stored(url, clients)
        for complaint in ("Traceback", "Warning", "destroyed", "never"):
            assert complaint not in workers.log


class Caller:
    """Who sends one request, and hangs up."""

    async def call(self, port: int, path: str, cookies: httpx.Cookies) -> Self:
        """Send the request."""
        _, self._writer = await asyncio.open_connection("127.0.0.1", port)
        cookie = "; ".join(f"{name}={value}" for name, value in cookies.items())
        self._writer.write(f"POST {path} HTTP/1.1\r\nHost: test\r\nCookie: {cookie}\r\n\r\n".encode())
        await self._writer.drain()
        return self

    async def hang_up(self) -> None:
        """Go."""
        self._writer.close()
        await self._writer.wait_closed()


async def counts(browser: httpx.AsyncClient, **least: int) -> dict[str, int]:
    """Return what the only worker has counted, as soon as that is so much."""
    async with asyncio.timeout(PATIENCE):
        while True:
            counted = (await browser.get("/counts")).json()
            if all(counted.get(what, 0) >= count for what, count in least.items()):
                return dict(counted)


@pytest.mark.parametrize("mode", ["ACCESS EXCLUSIVE", "EXCLUSIVE"], ids=["loading", "committing"])
async def test_clients_that_hang_up(tmp_path: Path, postgres_sessions_url: str, mode: str) -> None:
    """Fifty clients that hang up on an application that cancels their requests then cost it no connection (R72)."""
    engine = create_async_engine(postgres_sessions_url)
    async with Workers(tmp_path, postgres_sessions_url, workers=1) as workers, workers.browser() as browser:
        await browser.post("/login/somebody")
        await asyncio.gather(*(browser.get("/") for _ in range(20)))
        before = await counts(browser, ended=21)
        served = await pids(postgres_sessions_url)
        async with engine.begin() as connection:
            await connection.execute(sa.text(f"LOCK TABLE web_sessions IN {mode} MODE"))
            callers = [await Caller().call(workers.port, f"/put/{number}", browser.cookies) for number in range(50)]
            await asyncio.gather(*(caller.hang_up() for caller in callers))
            await counts(browser, left=50)
        after = await counts(browser, ended=71)
        assert after["connections"] <= before["connections"] + 2
        assert served <= await pids(postgres_sessions_url)
        assert (await browser.get("/")).json()["user_id"] == "somebody"
    await engine.dispose()


@pytest.mark.parametrize("path", ["/logout", "/logout/and/linger"])
async def test_logouts_of_clients_that_hang_up(tmp_path: Path, url: str, path: str) -> None:
    """Who hangs up at once is logged out, and so is whose request is cancelled after its clear() (R28, R72)."""
    async with Workers(tmp_path, url, workers=1) as workers, workers.browser() as browser:
        callers = []
        for _ in range(20):
            await browser.post("/login/somebody")
            caller = await Caller().call(workers.port, path, browser.cookies)
            if path == "/logout":
                await caller.hang_up()
            callers.append(caller)
            browser.cookies.clear()
        await counts(browser, cleared=20)
        await asyncio.gather(*(caller.hang_up() for caller in callers))
        await counts(browser, ended=40)
        async with closing(make_backend(url)) as backend:
            assert await records(backend) == []
