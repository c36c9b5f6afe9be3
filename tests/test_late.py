"""After the headers: what can still be committed is, what would need a cookie is an error at once; never silence."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, Request
from fastapi.responses import PlainTextResponse
from starlette.background import BackgroundTask
from starlette.responses import Response, StreamingResponse

from sqlsessions import HeadersSent, Session, SessionConflict, SessionGone, SQLAlchemyBackend
from sqlsessions.errors import BackendUnavailable
from sqlsessions.payload import decode
from tests.asgi import Browser as Visitor
from tests.staging import Browser, Do, Site, Staged

pytestmark = pytest.mark.anyio


@pytest.fixture
def site(sessions_url: str) -> Site:
    """A site on each database."""
    return Site(Staged(SQLAlchemyBackend(sessions_url)))


def streaming(late: Do) -> Callable[[Request], Response]:
    """Return a handler that does *late* to its session between two chunks of the body."""

    def handler(request: Request) -> Response:
        session: Any = request.session

        async def body() -> AsyncIterator[bytes]:
            yield b"1"
            await _done(late, session)
            yield b"2"

        return StreamingResponse(body())

    return handler


def in_background(late: Do) -> Callable[[Request], Response]:
    """Return a handler that does *late* to its session in a background task."""

    def handler(request: Request) -> Response:
        session: Any = request.session
        return PlainTextResponse("12", background=BackgroundTask(_done, late, session))

    return handler


async def _done(late: Do, session: Session) -> None:
    done = late(session)
    if asyncio.iscoroutine(done):
        await done


LATE = pytest.mark.parametrize("late", [streaming, in_background])


@LATE
async def test_late_changes_are_committed_at_the_end(site: Site, late: Callable[[Do], Any]) -> None:
    """A change to an existing session in a streaming body or a background task is saved (R58)."""
    browser = await site.filled(cart=[1])
    answer = await browser.visit(late(lambda session: session.update(late=True)))
    assert (answer.body, answer.set_cookies) == (b"12", [])
    assert await browser.data() == {"cart": [1], "late": True}


@LATE
async def test_nested_late_changes_are_committed_too(site: Site, late: Callable[[Do], Any]) -> None:
    """A change inside an object that was taken from the session before the headers is saved (R55, R58)."""
    browser = await site.filled(cart=[1])

    def handler(request: Request) -> Any:
        cart = request.session["cart"]
        cart.append(2)
        return late(lambda _: cart.append(3))(request)

    await browser.visit(handler)
    assert await browser.data() == {"cart": [1, 2, 3]}


@LATE
async def test_save_commits_before_the_end(site: Site, late: Callable[[Do], Any]) -> None:
    """What save() was awaited for is stored while the response still runs (R58)."""
    browser = await site.filled(cart=[1])
    seen: list[object] = []

    async def save(session: Session) -> None:
        session["late"] = True
        await session.save()
        seen.append(await browser.twin().data())
        session["later"] = True

    await browser.visit(late(save))
    assert seen == [{"cart": [1], "late": True}]
    assert await browser.data() == {"cart": [1], "late": True, "later": True}


@LATE
async def test_atomic_works_late(site: Site, late: Callable[[Do], Any]) -> None:
    """atomic() updates an existing session after the headers (R53, R58)."""
    browser = await site.filled(count=1)
    await browser.visit(late(lambda session: session.atomic(lambda data: data.update(count=data["count"] + 1))))
    assert await browser.data() == {"count": 2}


@LATE
async def test_late_changes_are_merged(site: Site, late: Callable[[Do], Any]) -> None:
    """A late commit merges with what others wrote since the headers, as any commit (R52, R58)."""
    browser = await site.filled(cart=[1])

    async def write(session: Session) -> None:
        await browser.twin().do(lambda other: other.update(theirs=True))
        session["ours"] = True

    await browser.visit(late(write))
    assert await browser.data() == {"cart": [1], "theirs": True, "ours": True}


async def set_up_later(session: Session) -> None:
    """Begin a session by atomic()."""
    await session.atomic(lambda data: data.update(late=True))


@LATE
@pytest.mark.parametrize(
    "do",
    [
        lambda session: session.update(late=True),
        lambda session: session.setdefault("late", True),
        lambda session: session.login("somebody"),
        Session.renew,
        set_up_later,
    ],
)
async def test_a_session_cannot_begin_late(site: Site, late: Callable[[Do], Any], do: Do) -> None:
    """A session that would need a cookie is refused at once after the headers, and nothing is stored (R58)."""
    answer = await site.browser().visit(late(_raises_headers_sent(do)))
    assert (answer.body, answer.set_cookies) == (b"12", [])
    assert site.statements == []


def begin_anew(session: Session) -> None:
    """End the session and begin another."""
    session.clear()
    session["again"] = True


@LATE
@pytest.mark.parametrize(
    "do",
    [
        Session.renew,
        lambda session: session.login("somebody"),
        lambda session: session.login("another"),
        lambda session: session.update(user_id="another"),
        lambda session: session.pop("user_id"),
        lambda session: setattr(session, "persistent", True),
        begin_anew,
    ],
)
async def test_a_late_change_of_the_secret_is_refused(site: Site, late: Callable[[Do], Any], do: Do) -> None:
    """renew(), login(), another user and persistence need a cookie: refused at once, and nothing is written (R58)."""
    browser = await site.filled(user_id="somebody")
    before = await site.records()
    await browser.visit(late(_raises_headers_sent(do)))
    ended = do is begin_anew  # heeded as far as it went
    assert site.statements[1:] == (["delete"] if ended else [])
    assert await site.records() == ([] if ended else before)


@LATE
@pytest.mark.parametrize("end", [Session.clear, Session.revoke])
async def test_revoking_works_late(site: Site, late: Callable[[Do], Any], end: Do) -> None:
    """A session can be ended after the headers; its cookie is dead, though the browser still has it (R28, R58)."""
    browser = await site.filled(cart=[1])
    answer = await browser.visit(late(end))
    assert (answer.status, answer.set_cookies) == (200, [])
    assert await site.records() == []
    assert await browser.data() == {}


@LATE
async def test_emptying_works_late(site: Site, late: Callable[[Do], Any]) -> None:
    """A session whose last key is deleted after the headers is deleted (R58)."""
    browser = await site.filled(cart=[1])
    await browser.visit(late(lambda session: session.pop("cart")))
    assert await site.records() == []


@LATE
async def test_a_late_failure_of_the_backend_is_raised(site: Site, late: Callable[[Do], Any]) -> None:
    """The response has gone out, so a backend that fails late is an error for the server's log, never silent (R58)."""
    browser = await site.filled(cart=[1])
    site.backend.failing["replace"] = BackendUnavailable("gone fishing")
    await browser.visit(late(lambda session: session.update(late=True)), raises=BackendUnavailable)
    assert site.kinds == ["unavailable"]


@LATE
async def test_a_late_failure_of_save_is_the_handlers(site: Site, late: Callable[[Do], Any]) -> None:
    """A save() that fails late raises where it is awaited; what it did not commit is tried again at the end (R58)."""
    browser = await site.filled(cart=[1])

    async def save(session: Session) -> None:
        session["late"] = True
        site.backend.failing["replace"] = BackendUnavailable()
        with pytest.raises(BackendUnavailable):
            await session.save()
        site.backend.failing.clear()

    await browser.visit(late(save))
    assert await browser.data() == {"cart": [1], "late": True}


@LATE
async def test_a_session_that_ends_late(site: Site, late: Callable[[Do], Any]) -> None:
    """A change after the headers to a session that has ended is dropped with an event, and save() raises (R29, R32)."""

    async def write(session: Session) -> None:
        await site.backend.revoke((await site.record()).id)
        session["late"] = True

    async def save(session: Session) -> None:
        await write(session)
        with pytest.raises(SessionGone):
            await session.save()

    for do in (write, save):
        browser = await site.filled(cart=[1])
        answer = await browser.visit(late(do))
        assert (answer.status, answer.set_cookies) == (200, [])
        assert await site.records() == []
        assert site.kinds == ["gone"]


@LATE
async def test_on_gone_raise_is_loud_late(sessions_url: str, late: Callable[[Do], Any]) -> None:
    """With on_gone="raise", a change dropped after the headers is raised to the server, there being no 409 (R32)."""
    site = Site(Staged(SQLAlchemyBackend(sessions_url)), on_gone="raise")
    browser = await site.filled(cart=[1])

    async def too_late(session: Session) -> None:
        await browser.twin().do(Session.clear)
        session["late"] = True

    answer = await browser.visit(late(too_late), raises=SessionGone)
    assert answer.status == 200


@LATE
async def test_an_error_drops_late_changes_and_keeps_late_endings(site: Site, late: Callable[[Do], Any]) -> None:
    """When the application raises late, its late changes are dropped, and its clear() is heeded (R28, R56)."""
    browser = await site.filled(cart=[1])

    def change_and_fail(session: Session) -> None:
        session["late"] = True
        raise LookupError

    await browser.visit(late(change_and_fail), raises=LookupError)
    assert await browser.data() == {"cart": [1]}

    def end_and_fail(session: Session) -> None:
        session.clear()
        raise LookupError

    await browser.visit(late(end_and_fail), raises=LookupError)
    assert await site.records() == []


async def test_a_failed_response_saves_nothing_late_but_what_was_asked_for(site: Site) -> None:
    """After a 5xx, late changes are dropped like all of that request; save() says otherwise, and is heeded (R56)."""
    browser = await site.filled(cart=[1])

    async def save(session: Session) -> None:
        session["saved"] = True
        await session.save()

    for do, kept in ((lambda session: session.update(late=True), {}), (save, {"saved": True})):
        background = in_background(do)

        def handler(request: Request, background: Any = background) -> Response:
            response: Response = background(request)
            response.status_code = 500
            return response

        await browser.visit(handler)
        assert await browser.data() == {"cart": [1], **kept}


async def test_a_late_touch_that_needs_a_cookie_waits(sessions_url: str) -> None:
    """The expiry of a persistent session is not extended behind its cookie's back, but by the next request (R36).

    Else the browser would drop the cookie before the server ends the session.
    """
    site = Site(Staged(SQLAlchemyBackend(sessions_url)), cookie_persistent=True)
    browser = await site.filled(cart=[1])
    before = await site.record()

    def handler(request: Request) -> Response:
        session: Any = request.session

        async def body() -> AsyncIterator[bytes]:
            site.clock.advance(hours=1)
            yield session["cart"][0].to_bytes()

        return StreamingResponse(body())

    assert (await browser.visit(handler)).body == b"\x01"
    assert await site.record() == before
    answer = await browser.do(Session.mark_accessed)
    assert answer.set_cookies[0].attributes["max-age"] == "1209600"
    assert (await site.record()).last_seen_at == site.clock()


async def test_a_touch_that_waits_for_a_private_response_is_not_made_up_for_late(sessions_url: str) -> None:
    """A shared response keeps its Set-Cookie to itself, and the touch that needs it waits for another one (R104)."""
    site = Site(Staged(SQLAlchemyBackend(sessions_url)), cookie_persistent=True)
    browser = await site.filled(cart=[1])
    site.clock.advance(hours=1)
    answer = await browser.visit(
        lambda request: Response(str(request.session["cart"]), headers={"cache-control": "public"})
    )
    assert answer.set_cookies == []
    assert site.statements == ["load"]
    assert len((await browser.do(Session.mark_accessed)).set_cookies) == 1


async def test_a_long_stream_keeps_its_session_alive(site: Site) -> None:
    """A session that is used until late in a long response is touched at its end (R33, R36)."""
    browser = await site.filled(cart=[1])
    await browser.visit(streaming(lambda _: site.clock.advance(hours=1)))
    assert (await site.record()).last_seen_at == site.clock()


async def test_exits_of_yield_dependencies_are_late(site: Site) -> None:
    """What a FastAPI dependency does after its yield, which is after the response, is saved, or raises (R58)."""
    app = FastAPI()
    site.app.app = app
    raised: list[type[Exception]] = []

    async def visits(request: Request) -> AsyncIterator[None]:
        yield
        try:
            request.session["visits"] = request.session.get("visits", 0) + 1
        except HeadersSent as error:
            raised.append(type(error))

    @app.get("/", dependencies=[Depends(visits)])
    async def index() -> None: ...

    @app.post("/", dependencies=[Depends(visits)])
    async def begin(request: Request) -> None:
        request.session["cart"] = []

    browser: Visitor = site.browser()
    await browser.visit()
    assert (raised, site.statements) == ([HeadersSent], [])
    await browser.visit(method="POST")
    await browser.visit()
    assert decode((await site.record()).data) == {"cart": [], "visits": 2}
    assert len(raised) == 1


async def test_a_dependency_that_still_has_its_session(site: Site) -> None:
    """A dependency that hands out what is in the session sees the handler's changes after the response (R58)."""
    app = FastAPI()
    site.app.app = app
    log: list[Any] = []

    async def cart(request: Request) -> AsyncIterator[list[int]]:
        cart = request.session.setdefault("cart", [])
        yield cart
        log.append(list(cart))
        cart.append(-1)

    @app.post("/")
    async def add(cart: Annotated[list[int], Depends(cart)]) -> None:
        cart.append(1)

    browser: Visitor = site.browser()
    await browser.visit(method="POST")
    await browser.visit(method="POST")
    assert log == [[1], [1, -1, 1]]
    assert decode((await site.record()).data) == {"cart": [1, -1, 1, -1]}


async def test_losing_for_ever_late_is_raised(site: Site) -> None:
    """A late commit that other writers always overtake ends in SessionConflict, not in silence (R58)."""
    browser = await site.filled(cart=[1])
    site.backend.failing["replace"] = SessionConflict()
    await browser.visit(streaming(lambda session: session.update(late=True)), raises=SessionConflict)


def _raises_headers_sent(do: Do) -> Do:
    async def late(session: Session) -> None:
        with pytest.raises(HeadersSent):
            await _done(do, session)

    return late


_: type[Visitor] = Browser
