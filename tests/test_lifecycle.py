"""How the middleware lives within an application: its purge, its connections, and the messages that pass through it."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, Request
from sqlalchemy import event, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sqlsessions import InMemoryBackend, Session, SessionMiddleware, SQLAlchemyBackend
from sqlsessions.errors import BackendUnavailable
from sqlsessions.payload import decode
from sqlsessions.purge import purge_forever
from tests.asgi import KEY, Browser, serve
from tests.servers import PostgresServer
from tests.staging import PATIENCE, Do, Site, Staged

pytestmark = pytest.mark.anyio


class Intervals:
    """Stands in for the sleep between two purges."""

    def __init__(self) -> None:
        self._begun: asyncio.Queue[float] = asyncio.Queue()
        self._over: asyncio.Queue[None] = asyncio.Queue()

    async def sleep(self, seconds: float) -> None:
        """Wait until the test says that the time has passed."""
        self._begun.put_nowait(seconds)
        await self._over.get()

    async def next(self) -> float:
        """Return how long the purger wants to sleep, as soon as it does."""
        async with asyncio.timeout(PATIENCE):
            return await self._begun.get()

    def end(self) -> None:
        """Let the time have passed."""
        self._over.put_nowait(None)


@pytest.fixture
def intervals(monkeypatch: pytest.MonkeyPatch) -> Intervals:
    """The sleep of every purger."""
    intervals = Intervals()
    monkeypatch.setattr("sqlsessions.middleware.purge_forever", partial(purge_forever, sleep=intervals.sleep))
    return intervals


@pytest.fixture
def backend(sessions_url: str) -> Staged:
    """A backend on each database, with gates in front of its statements."""
    return Staged(SQLAlchemyBackend(sessions_url))


@pytest.fixture
def memory() -> Staged:
    """A backend in memory, with gates in front of its statements."""
    return Staged(InMemoryBackend())


@asynccontextmanager
async def lifespan(app: ASGIApp) -> AsyncIterator[list[Message]]:
    """Run the lifespan of *app* around the block; the messages it sends are in the list."""
    heard: asyncio.Queue[Message] = asyncio.Queue()
    said: list[Message] = []
    answered = asyncio.Event()

    async def send(message: Message) -> None:
        said.append(message)
        answered.set()

    async with asyncio.timeout(PATIENCE):
        task = asyncio.create_task(_call(app, {"type": "lifespan", "state": {}}, heard.get, send))
        heard.put_nowait({"type": "lifespan.startup"})
        await answered.wait()
        try:
            yield said
        finally:
            heard.put_nowait({"type": "lifespan.shutdown"})
            await task


async def _call(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


def starlette(app: ASGIApp) -> Starlette:
    """Return an application that has a lifespan and hands its requests on to *app*."""
    return Starlette(routes=[Mount("/", app)])


def purgers() -> list["asyncio.Task[Any]"]:
    """Return the purge tasks of this event loop."""
    return [task for task in asyncio.all_tasks() if task.get_name() == "sqlsessions purge"]


# The purge.


async def test_the_purge_runs_within_the_application(backend: Staged, intervals: Intervals) -> None:
    """Between startup and shutdown, expired sessions are deleted every interval, and it is told how many (R87)."""
    site = Site(backend, purge_interval=timedelta(minutes=5))
    site.app.app = starlette(serve)
    async with lifespan(site.app) as said:
        await site.filled(cart=[])
        browser = await site.filled(user_id="somebody")
        site.clock.advance(days=13)
        await browser.do(Session.mark_accessed)
        site.clock.advance(days=2)
        assert 150 <= await intervals.next() <= 450  # of five minutes, so that workers do not purge in step
        intervals.end()
        await intervals.next()
        assert [record.user_id for record in await site.records()] == ["somebody"]
        assert [(event.kind, event.count) for event in site.events] == [("purged", 1)]
        intervals.end()
        await intervals.next()
        assert site.kinds == ["purged"]  # nothing to tell
    assert [message["type"] for message in said] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert purgers() == []


async def test_a_purge_that_fails_tries_again(
    memory: Staged, intervals: Intervals, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of the backend is logged, and the next interval comes as ever (R87)."""
    site = Site(memory, purge_interval=timedelta(minutes=5))
    await site.filled(cart=[])
    site.clock.advance(days=15)
    memory.failing["purge"] = BackendUnavailable("no connection")
    for _ in range(2):
        await intervals.next()
        intervals.end()
    await intervals.next()
    assert [record.getMessage() for record in caplog.records] == [
        "sqlsessions: purge failed (BackendUnavailable: no connection); trying again in about 0:05:00"
    ] * 2
    memory.failing.clear()
    intervals.end()
    await intervals.next()
    assert await site.records() == []


async def test_shutdown_does_not_wait_for_a_purge(memory: Staged, intervals: Intervals) -> None:
    """A purge in the middle of a batch is cancelled and awaited by the shutdown, which is not held up (R87)."""
    site = Site(memory, purge_interval=timedelta(minutes=5))
    site.app.app = starlette(serve)
    gate = memory.gate("purge")
    async with lifespan(site.app):
        await intervals.next()
        intervals.end()
        await gate.full()
    assert purgers() == []


async def test_shutdown_waits_for_a_commit_whose_client_has_gone(memory: Staged) -> None:
    """What a disconnected client's request is committing is committed before the shutdown completes (R72, R87)."""
    site = Site(memory)
    gate = memory.gate("insert")
    browser = site.browser()
    request = asyncio.create_task(browser.do(lambda session: session.update(cart=[])))
    await gate.full()
    request.cancel()
    await asyncio.wait({request})
    site.app.app = starlette(serve)
    async with lifespan(site.app) as said:
        asyncio.get_running_loop().call_soon(gate.open)
    assert said[-1]["type"] == "lifespan.shutdown.complete"
    assert decode((await site.record()).data) == {"cart": []}


async def test_without_a_lifespan_the_first_request_starts_the_purge(memory: Staged, intervals: Intervals) -> None:
    """A mounted application has no lifespan: there the first request starts the one purge task (R87)."""
    site = Site(memory, purge_interval=timedelta(minutes=5))
    outer = Starlette(routes=[Mount("/app", site.app)])
    assert purgers() == []
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(_with_handler(outer)), base_url="https://test"
    ) as client:
        for _ in range(3):
            assert (await client.get("/app/")).status_code == 200
    assert len(purgers()) == 1
    assert await intervals.next()


async def test_the_purge_can_be_left_to_others(memory: Staged) -> None:
    """With purge_interval=None there is no purge task, neither at startup nor at a request."""
    site = Site(memory, purge_interval=None)
    async with lifespan(starlette(site.app)):
        await site.browser().do(Session.mark_accessed)
        assert purgers() == []


async def test_only_one_event_loop_purges(memory: Staged) -> None:
    """A second event loop beside the first gets no purge task of its own, and one after it does (R65)."""
    site = Site(memory, purge_interval=timedelta(minutes=5))

    async def visit() -> int:
        await site.browser().do(Session.mark_accessed)
        return len(purgers())

    assert await asyncio.to_thread(asyncio.run, visit()) == 1
    assert await visit() == 1
    assert await asyncio.to_thread(asyncio.run, visit()) == 0


# Test clients, event loops and connections.


def shop(backend: SQLAlchemyBackend, **options: Any) -> FastAPI:
    """Return an application with a login, a page of one's own, and a logout."""
    app = FastAPI()
    app.add_middleware(SessionMiddleware, secret_key=KEY, backend=backend, cookie_https_only=False, **options)

    @app.post("/login")
    async def login(request: Request) -> None:
        request.session["user_id"] = 123

    @app.get("/me")
    def me(request: Request) -> Any:
        return request.session.get("user_id")

    @app.post("/logout")
    async def logout(request: Request) -> None:
        request.session.clear()

    return app


def stroll(client: TestClient) -> None:
    """Log in, look, log out, look."""
    assert client.post("/login").status_code == 200
    assert client.get("/me").json() == 123
    assert client.post("/logout").status_code == 200
    assert client.get("/me").json() is None


@pytest.mark.parametrize("with_lifespan", [True, False], ids=["with lifespan", "without"])
def test_a_test_client_leaves_nothing_open(
    sessions_url: str, with_lifespan: bool, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """TestClient works as a context manager and bare, again and again, and no task or connection is left (R65, R87).

    Bare, every request has an event loop of its own.
    """
    app = shop(SQLAlchemyBackend(sessions_url))
    for _ in range(3):
        if with_lifespan:
            with TestClient(app) as client:
                stroll(client)
        else:
            stroll(TestClient(app))
    gc.collect()  # a ResourceWarning would fail the test, "Task was destroyed" is a log message
    assert [record.getMessage() for record in caplog.records if record.name in ("asyncio", "sqlsessions")] == []
    if sessions_url.startswith("postgresql"):
        nobody_is_connected(request.getfixturevalue("postgres"), sessions_url)


def test_test_clients_in_each_other(sessions_url: str) -> None:
    """A second test client meanwhile, in an event loop beside the first, works on the same application (R65)."""
    app = shop(SQLAlchemyBackend(sessions_url))
    with TestClient(app) as outer:
        assert outer.post("/login").status_code == 200
        with TestClient(app) as inner:
            stroll(inner)
        stroll(TestClient(app))
        assert outer.get("/me").json() == 123


def test_a_loop_that_ends_without_a_lifespan_closes_its_connections(
    postgres: PostgresServer, postgres_sessions_url: str
) -> None:
    """When an event loop ends that had no lifespan, no connection of it is left on the server."""
    app = SessionMiddleware(serve, secret_key=KEY, backend=SQLAlchemyBackend(postgres_sessions_url))

    async def visit() -> None:
        await asyncio.gather(*(Browser(app).visit(lambda request: request.session.update(n=1)) for _ in range(10)))

    for _ in range(2):
        asyncio.run(visit())
        gc.collect()
    nobody_is_connected(postgres, postgres_sessions_url)


def nobody_is_connected(server: PostgresServer, url: str) -> None:
    """Make sure of it: PostgreSQL copies a database only when nobody is, and waits a little for those who are going."""
    name = str(make_url(url).database)
    server.create_database(f"{name}_copy", name)
    server.drop_database(f"{name}_copy")


# Beside the application's own connections and transactions.


async def test_a_pool_of_one_that_every_request_holds(sessions_url: str) -> None:
    """Twenty parallel requests that hold the application's only connection beyond the headers do not deadlock (R61).

    FastAPI leaves a yield dependency after the response; the session has to be committed before it.
    """
    engine = create_async_engine(sessions_url, pool_size=1, max_overflow=0, pool_timeout=PATIENCE / 4)
    held: list[int] = []
    app = FastAPI()
    app.add_middleware(
        SessionMiddleware,
        secret_key=KEY,
        backend=SQLAlchemyBackend(engine),
        on_event=lambda _: held.append(engine.sync_engine.pool.checkedout()),  # type: ignore[attr-defined]
    )

    async def get_db() -> AsyncIterator[AsyncSession]:
        async with AsyncSession(engine) as db:
            await db.execute(text("SELECT 1"))
            yield db

    @app.post("/")
    async def handler(request: Request, db: Annotated[AsyncSession, Depends(get_db)]) -> int:
        request.session["cart"] = [(await db.execute(text("SELECT 1"))).scalar_one()]
        return 1

    async with _client(app) as client, asyncio.timeout(PATIENCE):
        replies = await asyncio.gather(*(client.post("/") for _ in range(20)))
    assert {reply.status_code for reply in replies} == {200}
    assert held == [1] * 20  # when the session was created, somebody held the connection
    await engine.dispose()


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize(
    ("do", "kept"), [(Session.clear, []), (lambda session: session.update(order=1), [{"cart": [], "order": 1}])]
)
async def test_the_applications_rollback_is_its_own(
    sessions_url: str, do: Do, kept: list[dict[str, Any]], status: int
) -> None:
    """A rollback of the application undoes no logout; and a failure of the application saves no change (R60)."""
    engine = create_async_engine(sessions_url)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE orders (id integer)"))
    site = Site(Staged(SQLAlchemyBackend(engine)))
    browser = await site.filled(cart=[])

    async def order_in_vain(session: Session) -> None:
        async with engine.connect() as connection:
            await connection.execute(text("INSERT INTO orders VALUES (1)"))
            do(session)
            await connection.rollback()

    await browser.do(order_in_vain, status=status)
    saved = kept if status == 200 or do is Session.clear else [{"cart": []}]
    assert [decode(record.data) for record in await site.records()] == saved
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM orders"))).scalar_one() == 0
    await engine.dispose()


# What passes through.


async def test_a_lifespan_passes_through() -> None:
    """Startup and shutdown of the application inside run, with its state, and its failures are passed on (R68)."""
    seen: list[str] = []

    @asynccontextmanager
    async def inner(_: Starlette) -> AsyncIterator[dict[str, str]]:
        seen.append("up")
        yield {"key": "value"}
        seen.append("down")

    app = SessionMiddleware(Starlette(lifespan=inner), secret_key=KEY, backend=InMemoryBackend())
    async with lifespan(app):
        assert (seen, len(purgers())) == (["up"], 1)
    assert seen == ["up", "down"]

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "lifespan.startup.failed", "message": "no"})

    async with lifespan(SessionMiddleware(fail, secret_key=KEY, backend=InMemoryBackend())) as said:
        assert said == [{"type": "lifespan.startup.failed", "message": "no"}]
        assert purgers() == []


async def test_unknown_scopes_pass_untouched() -> None:
    """A scope that is neither HTTP nor WebSocket nor lifespan goes to the application as it is (R68)."""
    seen: list[tuple[Scope, Receive, Send]] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((scope, receive, send))

    scope = {"type": "mqtt"}
    await SessionMiddleware(inner, secret_key=KEY, backend=InMemoryBackend())(scope, _receive, _send)
    assert seen == [(scope, _receive, _send)]
    assert scope == {"type": "mqtt"}


async def test_unknown_messages_pass_untouched() -> None:
    """Early hints, trailers, sent files and whatever comes next pass in order; only the headers are added to (R68)."""
    messages: list[Message] = [
        {"type": "http.response.debug", "info": {}},
        {"type": "http.response.early_hint", "links": [b"</style.css>; rel=preload"]},
        {"type": "http.response.start", "status": 200, "headers": [(b"x", b"1")], "trailers": True},
        {"type": "http.response.zerocopysend", "file": 3},
        {"type": "http.response.pathsend", "path": "/file"},
        {"type": "http.response.trailers", "headers": [(b"y", b"2")]},
        {"type": "http.response.unheard_of"},
    ]

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        scope["session"]["cart"] = []
        for message in messages:
            await send(message)

    sent = await _messages(SessionMiddleware(inner, secret_key=KEY, backend=InMemoryBackend()))
    start = sent[2]
    assert [*sent[:2], *sent[3:]] == [*messages[:2], *messages[3:]]
    assert all(out is message for out, message in zip(sent[3:], messages[3:], strict=True))
    assert {**start, "headers": None} == {**messages[2], "headers": None}
    assert start["headers"][0] == (b"x", b"1")
    assert b"set-cookie" in dict(start["headers"])


async def test_streams_are_not_buffered() -> None:
    """The first chunk is out before the application produces the second (R68)."""
    arrived = asyncio.Event()

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        scope["session"]["cart"] = []
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"1", "more_body": True})
        async with asyncio.timeout(PATIENCE):
            await arrived.wait()
        await send({"type": "http.response.body", "body": b"2"})

    async def send(message: Message) -> None:
        if message.get("body") == b"1":
            arrived.set()

    app = SessionMiddleware(inner, secret_key=KEY, backend=InMemoryBackend())
    await app(_scope(), _receive, send)


@pytest.mark.parametrize("headers", [[(b"vary", b"Accept")], ((b"vary", b"Accept"),), None])
async def test_the_applications_own_objects_are_not_changed(headers: Any) -> None:
    """A message that the application keeps and sends again, with whatever kind of headers, stays as it was (R68)."""
    message = {"type": "http.response.start", "status": 200}
    if headers is not None:
        message["headers"] = headers
    before = repr(message)

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        scope["session"]["cart"] = []
        await send(message)
        await send({"type": "http.response.body"})

    app = SessionMiddleware(inner, secret_key=KEY, backend=InMemoryBackend())
    for _ in range(2):
        start = (await _messages(app))[0]
        assert b"set-cookie" in dict(start["headers"])
    assert repr(message) == before


@pytest.mark.parametrize("place", ["around", "inside"])
async def test_beside_a_middleware_with_a_task_of_its_own(memory: Staged, place: str) -> None:
    """BaseHTTPMiddleware, which runs what is inside in another task, may stand on either side (R68)."""

    async def dispatch(request: Request, call_next: RequestResponseEndpoint) -> Response:
        if place == "inside":
            request.session["before"] = True
        response = await call_next(request)
        if place == "inside":
            request.session["after"] = True  # the response has not begun for those outside
        return response

    async def endpoint(request: Request) -> JSONResponse:
        request.session["count"] = request.session.get("count", 0) + 1
        return JSONResponse(request.session["count"])

    site = Site(memory)
    app: ASGIApp = Starlette(routes=[Route("/", endpoint)])
    site.app.app = BaseHTTPMiddleware(app, dispatch) if place == "inside" else app
    app = BaseHTTPMiddleware(site.app, dispatch) if place == "around" else site.app
    browser = Browser(app)
    for count in (1, 2):
        assert (await browser.visit()).json() == count
    kept = {"before": True, "count": 2, "after": True} if place == "inside" else {"count": 2}
    assert decode((await site.record()).data) == kept


@pytest.mark.parametrize("place", ["around", "inside"])
async def test_a_failed_commit_beside_a_middleware_with_a_task_of_its_own(memory: Staged, place: str) -> None:
    """Nor does BaseHTTPMiddleware keep a commit that fails from being answered with 503 (R57)."""

    async def dispatch(request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)

    site = Site(memory)
    app: ASGIApp = serve
    site.app.app = BaseHTTPMiddleware(app, dispatch) if place == "inside" else app
    app = BaseHTTPMiddleware(site.app, dispatch) if place == "around" else site.app
    memory.failing["insert"] = BackendUnavailable()
    answer = await Browser(app).visit(lambda request: request.session.update(cart=[]))
    assert (answer.status, answer.set_cookies) == (503, [])


# Clients that go away.


async def save(session: Session) -> None:
    """Change something and commit it at once."""
    session["cart"] = [2]
    await session.save()


GOING: list[tuple[Do, str, list[dict[str, Any]]]] = [
    (lambda session: session.update(cart=[2]), "replace", [{"cart": [2]}]),
    (Session.clear, "delete", []),
    (lambda session: session.pop("cart"), "delete", []),
    (Session.renew, "replace", [{"cart": [1]}]),
    (lambda session: session.atomic(lambda data: data.update(cart=[2])), "replace", [{"cart": [2]}]),
    (save, "replace", [{"cart": [2]}]),
]


@pytest.mark.parametrize("after", [False, True], ids=["before the statement", "after it"])
@pytest.mark.parametrize(("do", "verb", "kept"), GOING)
async def test_a_commit_survives_the_client(
    memory: Staged, do: Do, verb: str, kept: list[dict[str, Any]], after: bool
) -> None:
    """A request cancelled while it commits ends as cancelled, at once, and its commit goes on to the end (R71, R72)."""
    site = Site(memory)
    browser = await site.filled(cart=[1])
    version = (await site.record()).version
    async with memory.hold(verb, browser.do(do), after=after) as request:
        request.cancel()
        if do is not Session.clear:  # a logout is waited for
            await asyncio.wait({request})
    await asyncio.wait({request})
    assert request.cancelled()
    await site.app._manager.drain()
    assert [decode(record.data) for record in await site.records()] == kept
    assert [record.version for record in await site.records()] != [version]


async def test_a_login_survives_the_client(memory: Staged) -> None:
    """A session that is just being created is created, though nobody will ever have its cookie (R72)."""
    site = Site(memory)
    async with memory.hold("insert", site.browser().do(lambda session: session.login("somebody"))) as request:
        request.cancel()
        await asyncio.wait({request})
        assert request.cancelled()
    await site.app._manager.drain()
    assert (await site.record()).user_id == "somebody"


async def test_a_logout_asked_for_before_the_client_went(memory: Staged) -> None:
    """A handler that is cancelled after clear() has logged out nevertheless (R28, R72)."""
    site = Site(memory)
    browser = await site.filled(cart=[1])
    cleared = asyncio.Event()

    async def clear_and_linger(session: Session) -> None:
        session["late"] = True
        session.clear()
        cleared.set()
        await asyncio.Event().wait()

    request = asyncio.create_task(browser.do(clear_and_linger))
    await cleared.wait()
    request.cancel()
    await asyncio.wait({request})
    assert request.cancelled()
    assert await site.records() == []


async def test_clients_that_go_away_burn_no_connections(postgres_sessions_url: str) -> None:
    """Fifty requests, each cancelled a little later than the one before, cost no connection (R70, R72)."""
    engine = create_async_engine(postgres_sessions_url)
    connections: list[object] = []
    event.listen(engine.sync_engine, "connect", lambda connection, _: connections.append(connection))
    site = Site(Staged(SQLAlchemyBackend(engine, pool_size=2)))
    browser = await site.filled(count=0)
    for steps in range(0, 1000, 20):
        request = asyncio.create_task(
            browser.twin().do(lambda session: session.update(count=session["count"] + 1, pad="x" * session["count"]))
        )
        for _ in range(steps):
            await asyncio.sleep(0)
        request.cancel()
        await asyncio.wait({request})
    await site.app._manager.drain()
    data = await browser.data()
    assert 0 < data["count"] <= 50
    assert len(data["pad"]) == data["count"] - 1
    assert len(connections) <= 2
    await engine.dispose()


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)


@asynccontextmanager
async def _client(app: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="https://test") as client:
        yield client


def _with_handler(app: ASGIApp) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "handler": lambda request: bool(request.session)}, receive, send)

    return call


async def _messages(app: ASGIApp) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await app(_scope(), _receive, send)
    return sent


def _scope() -> Scope:
    return {"type": "http", "method": "GET", "scheme": "https", "path": "/", "query_string": b"", "headers": []}


async def _receive() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _send(_: Message) -> None: ...
