"""What a browser is told while the database is sick: that it is, and nothing about its session or the database."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sqlsessions import InMemoryBackend, Session, SessionMiddleware, SQLAlchemyBackend, load_session
from sqlsessions.errors import (
    BackendError,
    BackendReadOnly,
    BackendTimeout,
    BackendUnavailable,
    InvalidData,
    SchemaMissing,
    SessionError,
)
from sqlsessions.events import Complaints
from sqlsessions.payload import decode
from tests.asgi import KEY, Answer, Browser, ask, serve
from tests.servers import PostgresServer
from tests.staging import Do, Site, Staged

pytestmark = pytest.mark.anyio

SECRETS = "SELECT secret_hash FROM web_sessions at db.internal"


@pytest.fixture
def site(sqlite_sessions_url: str) -> Site:
    """A site whose backend can be made to fail."""
    return Site(Staged(SQLAlchemyBackend(sqlite_sessions_url)))


@contextmanager
def stopped(server: PostgresServer) -> Iterator[None]:
    """Have no server while the block runs."""
    server.stop()
    try:
        yield
    finally:
        server.start()


def read(session: Session) -> None:
    """Look into the session."""
    session.get("cart")


def write(session: Session) -> None:
    """Change the session."""
    session["late"] = True


def log_in(session: Session) -> None:
    """Change the session and its secret."""
    session.login("somebody")


async def count(session: Session) -> None:
    """Update the session atomically."""
    await session.atomic(lambda data: data.update(count=1))


#: Uses of a session, and the statement after loading that they need.
USES: list[tuple[Do, str]] = [(write, "replace"), (log_in, "replace"), (count, "replace"), (Session.clear, "delete")]


def is_a_plain_503(answer: Answer) -> bool:
    """Tell whether the answer is 503, with a time to come back, and says nothing else (R110)."""
    assert (answer.status, answer.body, answer.header("retry-after")) == (503, b"Service Unavailable", "2")
    assert {name for name, _ in answer.headers} == {
        b"content-type",
        b"content-length",
        b"cache-control",
        b"retry-after",
    }
    return True


def sorry(_: Request, error: Exception) -> Response:
    """Answer an error."""
    return JSONResponse({"sorry": type(error).__name__}, 503, {"retry-after": "60"})


async def sorry_later(request: Request, error: Exception) -> Response:
    """Answer an error, from a coroutine, with a stream."""
    answer = sorry(request, error)

    async def body() -> Any:
        yield answer.body

    return StreamingResponse(body(), answer.status_code, {"retry-after": "60"})


# A server that is not there.


async def test_a_server_that_is_stopped(postgres: PostgresServer, postgres_sessions_url: str) -> None:
    """Without its database, whatever uses the session is a 503, what does not works, and the cookie is left alone.

    R76, R77, R78: when the server is back, so is the session.
    """
    site = Site(Staged(SQLAlchemyBackend(postgres_sessions_url)))
    browser = await site.filled(user_id="somebody", cart=[1])
    before = dict(browser.cookies)
    with stopped(postgres):
        for use in (read, write, log_in, count, Session.clear):
            assert is_a_plain_503(await browser.do(use))
        assert is_a_plain_503(await site.browser().do(log_in))  # nothing to load, but nowhere to put it
        for _ in range(10):
            assert (await browser.visit(lambda _: "public")).json() == "public"
            assert (await site.browser().do(read)).status == 200  # anonymous: nothing to ask the database
    assert browser.cookies == before
    assert await browser.data() == {"user_id": "somebody", "cart": [1]}
    assert (await browser.do(write)).status == 200
    assert set(site.kinds) == {"unavailable"}


async def test_a_table_that_is_not_there(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A database without our table is a 503 like any other, and tells the handler which command creates it (R75).

    Whoever runs the application finds it in the log as well: once, and not for each request.
    """
    site = Site(Staged(SQLAlchemyBackend(database_url)))
    browser = (await Site(Staged(InMemoryBackend())).filled(cart=[1])).twin(site.app)
    assert is_a_plain_503(await browser.do(read))
    assert is_a_plain_503(await site.browser().do(write))
    told: list[str] = []

    def ask_why(request: Request) -> None:
        with pytest.raises(SchemaMissing) as caught:
            request.session.get("cart")
        told.append(str(caught.value))

    assert (await browser.visit(ask_why)).status == 200
    assert "alembic upgrade head" in told[0]
    (record,) = [record for record in caplog.records if record.name == "sqlsessions"]
    assert record.levelno == logging.ERROR
    assert record.getMessage() == f"sqlsessions: {site.backend!r} failed: SchemaMissing: {told[0]}"
    assert {event.detail for event in site.events} == {"SchemaMissing"}


# Loading fails.


@pytest.mark.parametrize("error", [BackendUnavailable, BackendTimeout, BackendReadOnly, SchemaMissing, BackendError])
async def test_the_first_use_of_a_session_that_could_not_be_loaded(site: Site, error: type[BackendError]) -> None:
    """Whatever is wrong with the backend is the same 503 to the browser, which learns nothing of it (R76, R110)."""
    browser = await site.filled(cart=[1])
    before = dict(browser.cookies)
    site.backend.failing["load"] = error(SECRETS)
    assert is_a_plain_503(await browser.do(read))
    assert is_a_plain_503(await browser.do(Session.clear))
    assert browser.cookies == before
    assert [(event.kind, event.detail) for event in site.events] == [("unavailable", error.__name__)] * 2
    site.backend.failing.clear()
    assert await browser.data() == {"cart": [1]}


class Numbered(BackendError):
    """An error of somebody's own backend, made from something else than a message."""

    def __init__(self, host: str, *, port: int) -> None:
        super().__init__(f"{host}:{port}")


async def test_an_error_of_somebodys_own_backend(site: Site) -> None:
    """Whatever it is made from, it is a 503 as well (R76)."""
    browser = await site.filled(cart=[1])
    site.backend.failing["load"] = Numbered("db.internal", port=5432)
    assert is_a_plain_503(await browser.do(read))


async def test_errors_of_several_tasks(site: Site) -> None:
    """A task group raises its errors as one: that is a 503 if all are ours, and else the application's to hear."""
    browser = await site.filled(n=0)
    site.backend.failing["replace"] = BackendUnavailable()

    async def bug(_: Session) -> None:
        raise LookupError

    async def together(session: Session, *works: Callable[[Session], Any]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for work in works:
                tasks.create_task(work(session))

    assert is_a_plain_503(await browser.do(lambda session: together(session, count, count)))
    with pytest.raises(ExceptionGroup) as caught:
        await browser.do(lambda session: together(session, bug, count))
    assert caught.group_contains(LookupError)


async def test_routes_without_a_session_do_not_care(site: Site) -> None:
    """A route that never touches the session answers as ever, without a Vary or a cookie (R77)."""
    browser = await site.filled(cart=[1])
    site.backend.failing["load"] = BackendUnavailable()
    answer = await browser.visit(lambda _: "public")
    assert (answer.status, answer.json()) == (200, "public")
    assert answer.all("vary") == answer.all("set-cookie") == []


async def test_loading_later_fails_later(sqlite_sessions_url: str) -> None:
    """Without autoload, the failure of load_session() is a 503 as well (R76)."""
    site = Site(Staged(SQLAlchemyBackend(sqlite_sessions_url)), autoload_cookie=False)

    async def begin(request: Request) -> None:
        (await load_session(request))["cart"] = [1]

    async def later(request: Request) -> list[Any]:
        return list(await load_session(request))

    browser: Browser = site.browser()
    await browser.visit(begin)
    site.backend.failing["load"] = BackendUnavailable()
    assert is_a_plain_503(await browser.visit(later))
    site.backend.failing.clear()
    assert (await browser.visit(later)).json() == ["cart"]


@pytest.mark.parametrize("handled", [BackendUnavailable, BackendError, SessionError])
async def test_the_applications_own_page(site: Site, handled: Any) -> None:
    """Where loading failed, the application's own exception handler for our errors wins (R76)."""

    async def page(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"sorry": type(error).__name__}, status_code=503)

    app = FastAPI()
    app.add_exception_handler(handled, page)

    @app.get("/")
    async def index(request: Request) -> Any:
        return request.session.get("cart")

    site.app.app = app
    browser: Browser = site.browser()
    filled = Site(site.backend)
    browser.cookies = (await filled.filled(cart=[1])).cookies
    site.backend.failing["load"] = BackendUnavailable(SECRETS)
    answer = await browser.visit()
    assert (answer.status, answer.json()) == (503, {"sorry": "BackendUnavailable"})
    assert answer.set_cookies == []


async def relayed(request: Request) -> Any:
    """Update the session, and raise an error of the application's own from ours."""
    try:
        await updated(request)
    except BackendUnavailable as error:
        raise LookupError from error


async def updated(request: Request) -> Any:
    """Update the session."""
    return await request.session.atomic(lambda data: data | {"n": 1})  # type: ignore[attr-defined]


@pytest.mark.parametrize("verb", ["load", "replace"])
@pytest.mark.parametrize("handler", [updated, relayed])
async def test_a_mounted_application_with_an_error_page_of_its_own(site: Site, verb: str, handler: Any) -> None:
    """A FastAPI application mounted below ours turns what it does not know into a 500; the browser still gets a 503."""
    inner, outer = FastAPI(), FastAPI()
    inner.get("/")(handler)

    outer.mount("/inner", inner)
    site.app.app = outer
    browser: Browser = site.browser()
    browser.cookies = (await Site(site.backend).filled(cart=[1])).cookies
    site.backend.failing[verb] = BackendUnavailable(SECRETS)
    answer = await browser.visit(path="/inner/")
    assert is_a_plain_503(answer)
    assert answer.set_cookies == []


async def test_a_500_of_the_applications_own(site: Site) -> None:
    """A 500 that has nothing to do with the session stays what it is."""
    answer = await site.browser().visit(lambda _: PlainTextResponse("mine", status_code=500))
    assert (answer.status, answer.body) == (500, b"mine")


async def refused(request: Request) -> None:
    """Have an atomic update fail, and go on all the same."""
    with pytest.raises(BackendUnavailable):
        await request.session.atomic(lambda data: data | {"n": 1})  # type: ignore[attr-defined]


async def test_a_500_after_an_error_of_ours_that_was_handled(site: Site) -> None:
    """So it does after the application has dealt with an error of ours."""
    browser = await site.filled(cart=[1])
    site.backend.failing["replace"] = BackendUnavailable(SECRETS)

    async def handle(request: Request) -> Response:
        await refused(request)
        return PlainTextResponse("mine", status_code=500)

    answer = await browser.visit(handle)
    assert (answer.status, answer.body) == (500, b"mine")


async def test_a_bug_after_an_error_of_ours_that_was_handled(site: Site) -> None:
    """A mounted application's own error is the server's to hear, whatever of ours it has dealt with before."""
    inner, outer = FastAPI(), FastAPI()

    @inner.get("/")
    async def index(request: Request) -> Any:
        await refused(request)
        raise LookupError

    outer.mount("/inner", inner)
    browser = await site.filled(cart=[1])
    site.app.app = outer
    site.backend.failing["replace"] = BackendUnavailable(SECRETS)
    with pytest.raises(LookupError):
        await browser.visit(path="/inner/")


@pytest.mark.parametrize("on_error", [None, sorry, sorry_later])
@pytest.mark.parametrize("begun", [True, False])
async def test_a_cookie_that_was_made_before_the_failure(site: Site, on_error: Any, begun: bool) -> None:
    """A secret that was stored before the outage reaches the browser with the 503: it would be nobody else (R78)."""
    site = Site(site.backend, on_error=on_error)
    browser = (await site.filled(user_id="somebody", n=1)) if begun else site.browser()

    async def renew(session: Session) -> None:
        if begun:
            session.renew()
            await session.save()
        else:
            await session.atomic(lambda data: data | {"user_id": "somebody", "n": 1})
        site.backend.failing["replace"] = BackendUnavailable(SECRETS)
        session["late"] = True

    answer = await browser.do(renew)
    assert (answer.status, len(answer.set_cookies), answer.header("cache-control")) == (503, 1, "no-store")
    assert await browser.data() == {"user_id": "somebody", "n": 1}


# Committing fails.


async def test_the_commit_is_before_the_headers(site: Site) -> None:
    """Nothing of a response leaves before its session is committed (R57)."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "scheme": "https", "path": "/", "query_string": b"", "headers": []}
    handler: Callable[[Request], None] = lambda request: request.session.update(cart=[1])  # noqa: E731

    async def request() -> None:
        await site.app({**scope, "handler": handler}, _receive, send)

    async with site.backend.hold("insert", request()) as running:
        assert sent == []
    await running
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


def plain(do: Do, _: list[str]) -> ASGIApp:
    """Return an application without a framework."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await _done(do, scope["session"])
        await PlainTextResponse("done", headers={"set-cookie": "app=1"})(scope, receive, send)

    return app


def stubborn(do: Do, ran: list[str]) -> ASGIApp:
    """Return an application that swallows every exception, and goes on sending."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await _done(do, scope["session"])
        for message in (
            {"type": "http.response.start", "status": 200},
            {"type": "http.response.body", "body": b"done"},
        ):
            for _ in range(2):
                with suppress(Exception):
                    await send(message)
                    ran.append("sent")

    return app


def replacing(do: Do, ran: list[str]) -> ASGIApp:
    """Return an application that answers every exception with a page of its own."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await plain(do, ran)(scope, receive, send)
        except Exception:  # noqa: BLE001 - that is the point
            await PlainTextResponse("mine", 200)(scope, receive, send)

    return app


def framework(do: Do, ran: list[str]) -> ASGIApp:
    """Return a Starlette application with handlers for everything, which answer 200."""

    async def handle(_: Request, __: Exception) -> Response:
        return PlainTextResponse("handled")

    async def endpoint(request: Request) -> Response:
        await _done(do, request.session)
        return PlainTextResponse("done", background=BackgroundTask(ran.append, "background"))

    handlers: Any = dict.fromkeys((Exception, 500, 503, BackendError, SessionError, RuntimeError), handle)
    return Starlette(routes=[Route("/", endpoint)], exception_handlers=handlers)


def fast_framework(do: Do, ran: list[str]) -> ASGIApp:
    """Return a FastAPI application that streams, with handlers for everything, and a middleware that answers errors."""

    async def handle(_: Request, __: Exception) -> Response:
        return PlainTextResponse("handled")

    async def answer_errors(request: Request, call_next: RequestResponseEndpoint) -> Response:
        try:
            return await call_next(request)
        except Exception:  # noqa: BLE001 - that is the point
            return PlainTextResponse("mine")

    app = FastAPI(middleware=[Middleware(BaseHTTPMiddleware, dispatch=answer_errors)])
    for error in (Exception, BackendError, SessionError):
        app.add_exception_handler(error, handle)

    @app.get("/")
    async def endpoint(request: Request) -> StreamingResponse:
        await _done(do, request.session)

        async def body() -> Any:
            yield b"done"
            ran.append("streamed")

        return StreamingResponse(body())

    return app


async def _done(do: Do, session: Any) -> None:
    done = do(session)
    if asyncio.iscoroutine(done):
        await done


async def _receive() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


@pytest.mark.parametrize("app", [plain, stubborn, replacing, framework, fast_framework])
@pytest.mark.parametrize(("do", "verb"), [(write, "replace"), (log_in, "replace"), (Session.clear, "delete")])
async def test_a_commit_that_fails_is_a_503_whatever_the_application_does(
    site: Site, app: Callable[[Do, list[str]], ASGIApp], do: Do, verb: str
) -> None:
    """No handler of Exception or of our errors, and nobody who swallows them, can make a 200 of it (R57, R78).

    There is one response on the wire, it is ours, and nothing of the application's goes with it.
    """
    browser = await site.filled(cart=[1])
    before, record = dict(browser.cookies), await site.record()
    ran: list[str] = []
    site.app.app = app(do, ran)
    site.backend.failing[verb] = BackendUnavailable(SECRETS)
    assert is_a_plain_503(await browser.visit())
    assert (browser.cookies, ran) == (before, [])
    site.backend.failing.clear()
    assert await site.record() == record
    site.app.app = serve
    assert await browser.data() == {"cart": [1]}


@pytest.mark.parametrize("app", [plain, stubborn, replacing, framework, fast_framework])
async def test_a_login_that_cannot_be_stored(site: Site, app: Callable[[Do, list[str]], ASGIApp]) -> None:
    """Nobody is given the cookie of a session that was not committed (R79)."""
    site.app.app = app(log_in, [])
    site.backend.failing["insert"] = BackendTimeout(SECRETS)
    browser: Browser = site.browser()
    assert is_a_plain_503(await browser.visit())
    assert browser.cookies == {}


@pytest.mark.parametrize(("do", "verb"), USES)
@pytest.mark.parametrize("error", [BackendUnavailable, BackendTimeout, BackendReadOnly, SchemaMissing, BackendError])
async def test_each_error_of_a_commit(site: Site, do: Do, verb: str, error: type[BackendError]) -> None:
    """Whatever is wrong while committing is the same 503, and an event that names the class (R75, R110)."""
    browser = await site.filled(cart=[1])
    site.backend.failing[verb] = error(SECRETS)
    assert is_a_plain_503(await browser.do(do))
    assert [(event.kind, event.detail) for event in site.events] == [("unavailable", error.__name__)]


async def test_a_cancellation_after_a_commit_that_failed(site: Site) -> None:
    """A request that is cancelled is not answered instead (R71)."""
    browser = await site.filled(cart=[1])
    site.backend.failing["replace"] = BackendUnavailable(SECRETS)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["session"]["late"] = True
        with suppress(Exception):
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise asyncio.CancelledError

    site.app.app = app
    with pytest.raises(asyncio.CancelledError):
        await browser.visit()


async def test_an_answer_to_head_has_no_body(site: Site) -> None:
    """HEAD is told the same, without a body (RFC 9110 §9.3.2)."""
    site.backend.failing["insert"] = BackendUnavailable()
    answer = await site.browser().visit(lambda request: request.session.update(cart=[1]), method="HEAD")
    assert (answer.status, answer.body, answer.header("content-length")) == (503, b"", "19")


async def test_a_touch_that_fails(site: Site) -> None:
    """A touch that fails is an event, and the response is as good as without it (R80)."""
    browser = await site.filled(cart=[1])
    before = await site.record()
    site.clock.advance(hours=1)
    site.backend.failing["touch"] = BackendReadOnly()
    answer = await browser.do(read)
    assert (answer.status, answer.set_cookies) == (200, [])
    assert [(event.kind, event.detail) for event in site.events] == [("unavailable", "BackendReadOnly")]
    assert await site.record() == before


async def test_a_logout_that_fails_beside_a_failure(site: Site) -> None:
    """A logout that could not be carried out is a 503 even where the application answers 500 (R28, R78)."""
    browser = await site.filled(cart=[1])
    site.backend.failing["delete"] = BackendUnavailable()
    assert is_a_plain_503(await browser.do(Session.clear, status=500))
    assert len(browser.cookies) == 1


async def test_an_error_of_the_applications_own_comes_first(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """If the application raises and its logout fails as well, its own error is what the server hears of (R28, R56)."""
    browser = await site.filled(cart=[1])
    site.backend.failing["delete"] = BackendUnavailable("no connection")

    def fail(session: Session) -> None:
        session.clear()
        raise LookupError

    with pytest.raises(LookupError):
        await browser.do(fail)
    assert site.kinds == ["unavailable"]
    assert "could not be ended" in caplog.text


async def test_the_log_is_not_flooded(caplog: pytest.LogCaptureFixture) -> None:
    """Of each kind of error the first is told at once, and then one a minute, with how many there were."""
    complaints = Complaints("backend", clock=iter([0, 1, 2, 59.9, 60, 121]).__next__)
    for error in (
        BackendTimeout("a"),
        BackendTimeout("b"),
        BackendReadOnly("c"),
        BackendTimeout("d"),
        BackendTimeout("e"),
        BackendTimeout(),
    ):
        complaints.add(error)
    assert [record.getMessage() for record in caplog.records] == [
        "sqlsessions: 'backend' failed: BackendTimeout: a",
        "sqlsessions: 'backend' failed: BackendReadOnly: c",
        "sqlsessions: 'backend' failed: BackendTimeout: e (and 2 times more since the last line about it)",
        "sqlsessions: 'backend' failed: BackendTimeout",
    ]


async def test_data_that_cannot_be_stored_is_the_applications_error(site: Site) -> None:
    """What a handler put into the session is its own mistake: raised through the application, not a 503, not a 200."""
    browser = await site.filled(cart=[1])
    with pytest.raises(InvalidData, match=r"session\['cart'\]\[1\]"):
        await browser.do(lambda session: session["cart"].append(object()))
    assert decode((await site.record()).data) == {"cart": [1]}


# Anonymous during an outage, for those who want that.


@pytest.fixture
def lenient(sqlite_sessions_url: str) -> Site:
    """A site with on_unavailable="anonymous"."""
    return Site(Staged(SQLAlchemyBackend(sqlite_sessions_url)), on_unavailable="anonymous")


async def test_reading_falls_back_to_anonymous(lenient: Site) -> None:
    """With on_unavailable="anonymous" a session that cannot be loaded reads as empty; the cookie is kept (R76, R78)."""
    browser = await lenient.filled(user_id="somebody")
    lenient.backend.failing["load"] = BackendUnavailable()
    answer = await browser.visit(lambda request: [dict(request.session), request.session.user_id])
    assert (answer.status, answer.json(), answer.set_cookies) == (200, [{}, None], [])
    assert lenient.kinds == ["unavailable"]
    lenient.backend.failing.clear()
    assert await browser.data() == {"user_id": "somebody"}


@pytest.mark.parametrize("do", [write, log_in, count, Session.clear, Session.revoke])
async def test_writing_does_not_fall_back(lenient: Site, do: Do) -> None:
    """An empty stand-in for a session is not written over it, and cannot be logged out: 503, no new cookie (R78)."""
    browser = await lenient.filled(user_id="somebody")
    before, record = dict(browser.cookies), await lenient.record()
    lenient.backend.failing["load"] = BackendUnavailable()
    assert is_a_plain_503(await browser.do(do))
    assert browser.cookies == before
    assert await lenient.records() == [record]
    assert lenient.statements == ["load"]


async def test_without_a_cookie_nothing_needs_to_fall_back(lenient: Site) -> None:
    """A visitor without a cookie may begin a session as ever."""
    lenient.backend.failing["load"] = BackendUnavailable()
    browser = lenient.browser()
    assert (await browser.do(write)).status == 200
    assert len(browser.cookies) == 1


async def test_a_second_try_of_loading(site: Site) -> None:
    """load_session() asks again where the autoload failed, so that a short failure need not fail the request (R74)."""
    browser = await site.filled(cart=[1])
    site.backend.failing["load"] = BackendUnavailable()

    async def try_again(request: Request) -> Any:
        site.backend.failing.clear()
        return dict(await load_session(request))

    assert (await browser.visit(try_again)).json() == {"cart": [1]}


async def test_a_reload_after_a_failure(lenient: Site) -> None:
    """reload() asks for a session that could not be loaded before, as a WebSocket does that outlives an outage."""
    browser = await lenient.filled(cart=[1])
    lenient.backend.failing["load"] = BackendTimeout()

    async def outlive(request: Request) -> Any:
        session: Session = request.session  # type: ignore[assignment]
        seen = [session.copy()]
        for failing in (True, False):
            if not failing:
                lenient.backend.failing.clear()
            await session.reload()
            seen.append(session.copy())
        return seen

    assert (await browser.visit(outlive)).json() == [{}, {}, {"cart": [1]}]


async def test_no_second_try_after_a_deadline(site: Site) -> None:
    """Where the autoload has waited out the deadline load_session() does not wait for another (R73)."""
    browser = await site.filled(cart=[1])
    site.backend.failing["load"] = BackendTimeout()

    async def try_again(request: Request) -> Any:
        return dict(await load_session(request))

    assert is_a_plain_503(await browser.visit(try_again))
    assert site.statements == ["load"]


# An answer of the application's own.


@pytest.mark.parametrize("on_error", [sorry, sorry_later])
@pytest.mark.parametrize("app", [plain, stubborn, replacing, framework, fast_framework])
async def test_an_answer_in_place_of_ours(site: Site, app: Callable[[Do, list[str]], ASGIApp], on_error: Any) -> None:
    """With on_error an application answers a commit that failed in its own words, and the cookie is left alone: none of
    its exception handlers is told of that (R76, R78).
    """
    site = Site(site.backend, on_error=on_error)
    browser = await site.filled(cart=[1])
    before = dict(browser.cookies)
    site.app.app = app(write, [])
    site.backend.failing["replace"] = BackendUnavailable(SECRETS)
    answer = await browser.visit()
    assert (answer.status, answer.json()) == (503, {"sorry": "BackendUnavailable"})
    assert answer.header("retry-after") == "60"
    assert browser.cookies == before


@pytest.mark.parametrize("on_error", [sorry, sorry_later])
async def test_an_answer_to_a_session_that_could_not_be_loaded(site: Site, on_error: Any) -> None:
    """So it does where loading failed and the application has no handler for that."""
    site = Site(site.backend, on_error=on_error)
    browser = await site.filled(cart=[1])
    site.backend.failing["load"] = BackendUnavailable(SECRETS)
    for do in (read, Session.clear):
        assert (await browser.do(do)).json() == {"sorry": "BackendUnavailable"}
    assert len(browser.cookies) == 1


async def test_an_answer_to_a_session_that_is_gone(site: Site) -> None:
    """on_error is asked what to say to a session that ended meanwhile, too."""
    site = Site(site.backend, on_gone="raise", on_error=sorry)
    browser = await site.filled(cart=[1])

    async def end_and_write(session: Session) -> None:
        assert session.id
        await site.backend.delete(session.id)
        session["late"] = True

    assert (await browser.do(end_and_write)).json() == {"sorry": "SessionGone"}


async def test_errors_of_the_applications_own_are_not_answered(site: Site) -> None:
    """on_error is asked about our errors only: an application's own go their way."""
    site = Site(site.backend, on_error=sorry)

    def fail(_: Session) -> None:
        raise LookupError

    with pytest.raises(LookupError):
        await site.browser().do(fail)


async def test_an_answer_that_fails(site: Site) -> None:
    """An error of on_error's own is one like any other of the application's: raised to the server."""

    def fail(_: Request, __: Exception) -> Response:
        raise LookupError

    site = Site(site.backend, on_error=fail)
    site.backend.failing["insert"] = BackendUnavailable()
    with pytest.raises(LookupError):
        await site.browser().do(write)


async def test_the_answer_is_ours_without_any_framework() -> None:
    """The 503 is valid ASGI for the barest of applications: a start and a body (R57)."""
    backend = Staged(InMemoryBackend())
    backend.failing["insert"] = BackendUnavailable()
    app = SessionMiddleware(plain(write, []), secret_key=KEY, backend=backend)
    assert is_a_plain_503(await ask(app))
