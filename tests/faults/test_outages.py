"""A database that goes away and comes back, as the visitors of an application meet it."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from anyio.lowlevel import checkpoint

from sqlsessions.backends.sqlalchemy import SQLAlchemyBackend
from sqlsessions.errors import BackendUnavailable
from sqlsessions.record import Record
from sqlsessions.testing import MINUTE, START, expecting, following, make_record
from tests.faults.crowd import Crowd
from tests.faults.ways import DEADLINE, LINUX, SLACK, Way
from tests.faults.worker import Worker
from tests.looking import PATIENCE, closing, everything, pids, sql
from tests.proxy import Mode, Proxy, proxied
from tests.servers import PostgresServer, StopMode

pytestmark = pytest.mark.anyio

LIMIT = (DEADLINE + SLACK).total_seconds()


@dataclass(frozen=True)
class Scene:
    """An application, its database, and what is between the two."""

    server: PostgresServer
    url: str
    proxy: Proxy
    worker: Worker
    #: The most connections that the application may have.
    connections: int


@pytest.fixture(scope="module")
async def scene(
    way: Way, victim: PostgresServer, victim_url: str, tmp_path_factory: pytest.TempPathFactory, anyio_backend: str
) -> AsyncIterator[Scene]:
    """One application for the whole module: what one fault has done to it, the next one finds."""
    async with proxied(victim_url) as (proxy, url):
        with way.worker(tmp_path_factory.mktemp("worker"), url) as worker:
            yield Scene(victim, victim_url, proxy, worker, way.connections)


Fault = Callable[[Scene], AbstractContextManager[None]]


def gone(how: StopMode) -> Fault:
    """No server is there while the block runs."""

    @contextmanager
    def fault(scene: Scene) -> Iterator[None]:
        scene.server.stop(how)
        try:
            yield
        finally:
            scene.server.start()

    return fault


def network(mode: Mode) -> Fault:
    """The network between is in this mode while the block runs."""

    @contextmanager
    def fault(scene: Scene) -> Iterator[None]:
        scene.proxy.mode = mode
        try:
            yield
        finally:
            scene.proxy.mode = "pass"

    return fault


#: What says nothing, and costs whoever asks the deadline.
SILENT: dict[str, Fault] = {
    "frozen": lambda scene: scene.server.frozen(),
    "stalled": network("stall"),
    "swallowed": network("drop"),
}
#: What says no.
REFUSING: dict[str, Fault] = {
    "stopped": gone("fast"),
    "crashed": gone("immediate"),
    "killed": gone("kill"),
    "reset": network("reset"),
}
REQUESTS = [("GET", "/"), ("POST", "/count"), ("POST", "/login/bob"), ("POST", "/logout")]


async def refused(browser: httpx.AsyncClient, method: str, path: str) -> float:
    """Assert that a request is answered in time with a 503 that leaves the cookie alone; return the seconds it took."""
    begun = time.monotonic()
    answer = await browser.request(method, path)
    took = time.monotonic() - begun
    assert (answer.status_code, answer.text) == (503, "Service Unavailable"), path
    assert int(answer.headers["retry-after"]) >= 1
    assert "set-cookie" not in answer.headers
    assert took < LIMIT, path
    return took


async def unaffected(browser: httpx.AsyncClient) -> None:
    """Assert that a route that uses no session is served in time."""
    begun = time.monotonic()
    answer = await browser.get("/public")
    assert (answer.status_code, answer.json(), "set-cookie" in answer.headers) == (200, "public", False)
    assert time.monotonic() - begun < LIMIT


async def recovered(browser: httpx.AsyncClient) -> float:
    """Wait until the health route says so; return the seconds it took."""
    begun = time.monotonic()
    while (await browser.get("/health")).json() != {"database": "ok"}:
        await checkpoint()
        assert time.monotonic() < begun + PATIENCE
    return time.monotonic() - begun


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=LINUX if name == "frozen" else ()) for name in SILENT | REFUSING]
)
async def test_a_database_that_goes_away_and_comes_back(
    scene: Scene, fault: str, observed: Callable[[str], None]
) -> None:
    """While it is away, what uses the session is a 503 within the deadline, and nobody is logged out; when it is back,
    all is as before, without a restart (R73, R74, R76, R77, R78).

    An outage does not cost every request its deadline. A database that said nothing is asked again after a second.
    """
    async with scene.worker.browser() as browser, scene.worker.browser() as stranger:
        await browser.post("/login/alice")
        assert (await browser.post("/count")).json() == 1
        before = dict(browser.cookies)
        took: list[float] = []
        with (SILENT | REFUSING)[fault](scene):
            for _ in range(2):
                took += await asyncio.gather(*(refused(browser, *request) for request in REQUESTS * 2))
                took.append(await refused(stranger, "POST", "/login/carol"))
                await unaffected(stranger)
                await unaffected(browser)
            # The circuit is open: no more than a try a second is let through to wait.
            assert sum(seconds > DEADLINE.total_seconds() for seconds in took[len(took) // 2 :]) <= 2
            assert (await browser.get("/health")).json() != {"database": "ok"}
        back = await recovered(browser) if fault in SILENT else 0.0
        assert dict(browser.cookies) == before
        assert not stranger.cookies
        answer = await browser.get("/")
        assert (answer.status_code, answer.json()["user_id"]) == (200, "alice")
        assert dict(browser.cookies) == before
        for visitor, path in ((browser, "/count"), (stranger, "/login/carol")):
            assert (await visitor.post(path)).status_code == 200
        assert (await browser.get("/health")).json() == {"database": "ok"}
    assert len(await pids(scene.url)) <= scene.connections
    observed(
        f"answered after {sorted(took)[len(took) // 2]:.2f} s (median), {max(took):.2f} s (longest);"
        f" healthy {back:.2f} s after the end"
    )


async def test_connections_that_were_killed(scene: Scene) -> None:
    """Nobody notices that the server has closed its idle connections (R74)."""
    async with scene.worker.browser() as browser:
        await browser.post("/login/alice")
        for _ in range(3):
            await asyncio.gather(*(browser.get("/") for _ in range(10)))
            await sql(
                scene.url,
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()",
            )
            answers = await asyncio.gather(*(browser.request(*request) for request in REQUESTS[:2] * 5))
            assert {answer.status_code for answer in answers} == {200}


async def test_a_slow_network(scene: Scene) -> None:
    """A slow network costs its latency, once for the load and once for the write."""
    async with scene.worker.browser() as browser:
        await browser.post("/login/alice")
        for method, path, statements in (("GET", "/", 1), ("POST", "/count", 2)):
            await browser.request(method, path)
            sent = scene.proxy.statements
            scene.proxy.delay = 0.05
            with network("slow")(scene):
                assert (await browser.request(method, path)).status_code == 200
            assert scene.proxy.statements == sent + statements


async def test_a_server_that_crashes_under_load(scene: Scene, observed: Callable[[str], None]) -> None:
    """A crash fails what is in flight, and nothing that was acknowledged is lost; all goes on when it is back (R74)."""
    crowd = Crowd([scene.worker])
    visits = asyncio.create_task(crowd.come_and_go())
    await crowd.busy.wait()
    await asyncio.to_thread(scene.server.stop, "immediate")
    await crowd.noticed.wait()
    scene.server.start()
    crowd.over.set()
    await visits
    observed(str(crowd))


async def test_a_database_that_is_not_there_at_the_start(
    way: Way, victim: PostgresServer, victim_url: str, tmp_path: Path
) -> None:
    """An application starts without its database, serves what needs none, and finds it when it is there (R76, R77)."""
    victim.stop()
    try:
        with way.worker(tmp_path, victim_url) as worker:
            async with worker.browser() as browser:
                await unaffected(browser)
                await refused(browser, "POST", "/login/alice")
                victim.start()
                assert (await browser.post("/login/alice")).status_code == 200
                assert (await browser.get("/")).json() == {"user_id": "alice"}
    finally:
        victim.stop()
        victim.start()


#: Every operation on a record.
OPERATIONS: dict[str, Callable[[SQLAlchemyBackend, Record], Awaitable[object]]] = {
    "load": lambda backend, record: backend.load(record.id, START),
    "insert": lambda backend, _: backend.insert(make_record()),
    "replace": lambda backend, record: backend.replace(following(record), expecting(record)),
    "touch": lambda backend, record: backend.touch(
        record.id, record.secret_hash, now=START + MINUTE, expires_at=record.expires_at
    ),
    "delete": lambda backend, record: backend.delete(record.id),
    "delete unchanged": lambda backend, record: backend.delete(record.id, expecting(record)),
    "ping": lambda backend, _: backend.ping(),
}


@pytest.mark.parametrize("name", OPERATIONS)
async def test_at_most_one_retry(way: Way, postgres_sessions_url: str, name: str) -> None:
    """While every answer is lost an operation is tried once more at most (R74)."""
    record = make_record()
    async with proxied(postgres_sessions_url) as (proxy, url), closing(way.backend(url)) as backend:
        await backend.insert(record)
        sent, proxy.answers_to_lose = proxy.statements, 99
        with pytest.raises(BackendUnavailable):
            await OPERATIONS[name](backend, record)
        # A statement that may run twice; or one that may not, and twice the question what has become of it.
        assert 2 <= proxy.statements - sent <= 3
        proxy.answers_to_lose = 0
        await everything(backend)
