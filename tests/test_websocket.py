"""Sessions of WebSockets: loaded at the handshake, committed with its answer, late while the socket is open (R67)."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from sqlsessions import CurrentSession, HeadersSent, Session, SessionGone, SessionMiddleware, SQLAlchemyBackend
from sqlsessions.errors import BackendUnavailable
from sqlsessions.payload import decode
from tests.asgi import KEY, SetCookie, serve
from tests.staging import PATIENCE, Browser, Site, Staged

pytestmark = pytest.mark.anyio

Handler = Callable[[WebSocket], Awaitable[None]]

#: The extension of ASGI with which a server lets a handshake be refused by a response.
DENIAL: dict[str, Any] = {"websocket.http.response": {}}


class Socket:
    """The client's end of a WebSocket."""

    def __init__(self) -> None:
        #: What the application has sent.
        self.sent: list[Message] = []
        self.to_app: asyncio.Queue[Message] = asyncio.Queue()
        self._sent: asyncio.Queue[Message] = asyncio.Queue()

    async def send(self, message: Message) -> None:
        """Be the server's `send`."""
        assert "websocket.close" not in self.types, "uvicorn does not take a message after the close"
        self.sent.append(message)
        self._sent.put_nowait(message)

    async def next(self) -> Message:
        """Return the next message from the application."""
        async with asyncio.timeout(PATIENCE):
            return await self._sent.get()

    def say(self, text: str) -> None:
        """Send a text."""
        self.to_app.put_nowait({"type": "websocket.receive", "text": text})

    def leave(self) -> None:
        """Close."""
        self.to_app.put_nowait({"type": "websocket.disconnect", "code": 1001})

    @property
    def types(self) -> list[str]:
        """The types of the messages sent, without their common prefix."""
        return [message["type"] for message in self.sent]

    @property
    def set_cookies(self) -> list[SetCookie]:
        """The cookies that the answer to the handshake sets."""
        headers = [header for message in self.sent for header in message.get("headers", ())]
        return [SetCookie.parse(value.decode()) for key, value in headers if key == b"set-cookie"]


@asynccontextmanager
async def connected(
    browser: Browser, handler: Handler, *, extensions: dict[str, Any] = DENIAL
) -> AsyncIterator[Socket]:
    """Have *handler* serve a WebSocket of *browser* around the block, and wait for its end."""
    socket = Socket()
    cookie = "; ".join(f"{name}={value}" for name, value in browser.cookies.items()).encode()
    scope = {
        "type": "websocket",
        "scheme": "wss",
        "path": "/",
        "query_string": b"",
        "headers": [(b"cookie", cookie)] if cookie else [],
        "subprotocols": [],
        "extensions": extensions,
        "handler": handler,
    }
    socket.to_app.put_nowait({"type": "websocket.connect"})
    task = asyncio.ensure_future(browser.app(scope, socket.to_app.get, socket.send))
    try:
        yield socket
    finally:
        async with asyncio.timeout(PATIENCE):
            await asyncio.wait({task})
    await task


async def by_handler(scope: Scope, receive: Receive, send: Send) -> None:
    """Serve a WebSocket by the handler that it brought along, and requests as ever."""
    if scope["type"] == "websocket":
        await scope["handler"](WebSocket(scope, receive, send))
    else:
        await serve(scope, receive, send)


@pytest.fixture
def site(sessions_url: str) -> Site:
    """A site with WebSockets, on each database."""
    site = Site(Staged(SQLAlchemyBackend(sessions_url)))
    site.app.app = by_handler
    return site


def session_of(socket: WebSocket) -> Session:
    """Return the session of a WebSocket."""
    session = socket.session
    assert isinstance(session, Session)
    return session


async def test_the_session_is_loaded_for_the_handshake(site: Site) -> None:
    """A WebSocket sees the session of its cookie, for one SELECT, and is anonymous without one (R67)."""
    browser = await site.filled(user_id="somebody")
    seen: list[object] = []

    async def handler(socket: WebSocket) -> None:
        seen.append(dict(socket.session))
        await socket.accept()
        await socket.close()

    for visitor in (browser, site.browser()):
        async with connected(visitor, handler) as socket:
            pass
        assert socket.types == ["websocket.accept", "websocket.close"]
        assert socket.set_cookies == []
    assert seen == [{"user_id": "somebody"}, {}]
    assert site.statements == ["load"]


async def test_accept_commits_and_carries_the_cookie(site: Site) -> None:
    """What is set before the acceptance is stored when it is sent, and its headers set the cookie (R67)."""

    async def handler(socket: WebSocket) -> None:
        socket.session["cart"] = [1]
        await socket.accept(headers=[(b"x-app", b"1")], subprotocol="chat")
        await socket.receive_text()
        await socket.close()

    browser = site.browser()
    async with connected(browser, handler) as socket:
        accept = await socket.next()
        assert decode((await site.record()).data) == {"cart": [1]}  # while the socket is open
        socket.say("go on")
    assert (accept["subprotocol"], accept["headers"][0]) == ("chat", (b"x-app", b"1"))
    (cookie,) = socket.set_cookies
    browser.cookies[cookie.name] = cookie.value
    assert await browser.data() == {"cart": [1]}


async def test_login_before_the_acceptance_renews(site: Site) -> None:
    """A login in a handshake renews the secret, and the old one is dead (R26, R67)."""
    browser = await site.filled(cart=[1])

    async def handler(socket: WebSocket) -> None:
        session_of(socket).login("somebody")
        await socket.accept()
        await socket.close()

    async with connected(browser, handler) as socket:
        pass
    (cookie,) = socket.set_cookies
    assert await browser.data() == {}
    browser.cookies[cookie.name] = cookie.value
    assert await browser.data() == {"cart": [1], "user_id": "somebody"}


async def test_a_denial_response_carries_the_cookie(site: Site) -> None:
    """A handshake refused by a response commits with it as HTTP does: a cookie for 403, nothing for 500 (R56, R67)."""

    async def deny(socket: WebSocket) -> None:
        socket.session["attempts"] = 1
        await socket.send_denial_response(PlainTextResponse("no", status_code=status))

    for status, kept in ((500, 0), (403, 1)):
        async with connected(site.browser(), deny) as socket:
            pass
        assert socket.types == ["websocket.http.response.start", "websocket.http.response.body"]
        assert socket.sent[0]["status"] == status
        assert len(socket.set_cookies) == len(await site.records()) == kept


async def test_a_logout_in_a_refused_handshake(site: Site) -> None:
    """clear() is heeded by a denial, its cookie expired where a header can do it, and by a mere close (R28, R67)."""

    async def deny(socket: WebSocket) -> None:
        socket.session.clear()
        await socket.send_denial_response(PlainTextResponse("bye", status_code=401))

    async def close(socket: WebSocket) -> None:
        socket.session.clear()
        await socket.close()

    for handler, expires in ((deny, [{"max-age": "0"}]), (close, [])):
        async with connected(await site.filled(cart=[1]), handler) as socket:
            pass
        assert [{"max-age": cookie.attributes["max-age"]} for cookie in socket.set_cookies] == expires
        assert await site.records() == []


async def test_no_new_session_in_a_refused_handshake(site: Site) -> None:
    """A session that would begin with a close of a handshake could have no cookie, and is not stored (R58, R67)."""

    async def close(socket: WebSocket) -> None:
        socket.session.clear()
        socket.session["new"] = 1
        await socket.close()

    browser = await site.filled(cart=[1])
    with pytest.raises(HeadersSent):
        async with connected(browser, close):
            pass
    assert await site.records() == []


async def test_a_close_before_the_acceptance_commits(site: Site) -> None:
    """A change to an existing session is committed before a close that refuses the handshake (R67)."""
    browser = await site.filled(attempts=1)

    async def handler(socket: WebSocket) -> None:
        socket.session["attempts"] += 1
        await socket.close(1008)

    async with connected(browser, handler) as socket:
        await socket.next()
        assert decode((await site.record()).data) == {"attempts": 2}
    assert socket.sent == [{"type": "websocket.close", "code": 1008, "reason": ""}]


async def test_a_close_cannot_carry_a_new_session(site: Site) -> None:
    """A new session whose handshake is refused by a close has no way to its browser: that is an error (R67)."""

    async def handler(socket: WebSocket) -> None:
        socket.session["attempts"] = 1
        await socket.close()

    with pytest.raises(HeadersSent):
        async with connected(site.browser(), handler) as socket:
            pass
    assert socket.sent == []
    assert await site.records() == []


async def test_changes_while_open_are_committed_at_the_end(site: Site) -> None:
    """An open socket commits by save() at once, and at its end what else was changed (R58, R67)."""
    browser = await site.filled(cart=[1])
    seen: list[object] = []

    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        socket.session["cart"].append(2)
        await session_of(socket).save()
        await socket.send_text("saved")
        await socket.receive_text()
        socket.session["cart"].append(3)
        await socket.close()

    async with connected(browser, handler) as socket:
        while "text" not in await socket.next():
            pass
        seen.append(await browser.data())
        socket.say("go on")
    assert seen == [{"cart": [1, 2]}]
    assert await browser.data() == {"cart": [1, 2, 3]}
    assert socket.set_cookies == []


@pytest.mark.parametrize("caught", [True, False])
async def test_a_client_that_leaves_ends_a_socket_well(site: Site, caught: bool) -> None:
    """Changes made while a socket was open are kept when the client closes it, caught or not (R58, R67).

    Starlette reports the normal end of a socket by WebSocketDisconnect, which the usual loop around receive_text()
    lets through.
    """
    browser = await site.filled(cart=[1])

    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        try:
            while True:
                socket.session["cart"].append(await socket.receive_text())
        except WebSocketDisconnect:
            if not caught:
                raise

    async def talk() -> None:
        async with connected(browser, handler) as socket:
            socket.say("hello")
            socket.leave()

    if caught:
        await talk()
    else:
        with pytest.raises(WebSocketDisconnect):
            await talk()
    assert await browser.data() == {"cart": [1, "hello"]}


async def test_an_error_while_open_drops_what_was_not_saved(site: Site) -> None:
    """When the application fails, what it had not saved is dropped, as with HTTP (R56, R67)."""
    browser = await site.filled(cart=[1])

    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        socket.session["cart"].append(2)
        raise LookupError

    with pytest.raises(LookupError):
        async with connected(browser, handler):
            pass
    assert await browser.data() == {"cart": [1]}


@pytest.mark.parametrize(
    "do",
    [lambda session: session.update(cart=[]), Session.renew, lambda session: session.login("somebody")],
)
async def test_a_session_cannot_begin_while_open(site: Site, do: Callable[[Session], None]) -> None:
    """After the acceptance no cookie can be set: what would need one raises HeadersSent at once (R58, R67)."""

    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        with pytest.raises(HeadersSent):
            do(session_of(socket))
        await socket.close()

    async with connected(site.browser(), handler):
        pass
    assert site.statements == []


async def test_revoking_while_open(site: Site) -> None:
    """A socket can end its session, and one whose session is ended elsewhere learns so by save() (R29, R67)."""
    browser = await site.filled(cart=[1])

    async def end(socket: WebSocket) -> None:
        await socket.accept()
        session_of(socket).revoke()
        await session_of(socket).save()
        assert await site.records() == []
        await socket.close()

    async with connected(browser, end):
        pass
    assert await browser.data() == {}

    async def outlive(socket: WebSocket) -> None:
        await socket.accept()
        await site.backend.revoke((await site.record()).id)
        socket.session["late"] = True
        with pytest.raises(SessionGone):
            await session_of(socket).save()
        await socket.close()

    async with connected(await site.filled(cart=[1]), outlive):
        pass
    assert await site.records() == []
    assert site.kinds == ["gone"]


@pytest.mark.parametrize("extensions", [DENIAL, {}], ids=["denial", "close"])
async def test_an_outage_refuses_the_handshake(site: Site, extensions: dict[str, Any]) -> None:
    """A session that cannot be loaded or committed: 503 with Retry-After where the server can, else 1013 (R67, R76).

    The application accepted, but its acceptance is not sent, and no cookie is.
    """
    browser = await site.filled(cart=[1])

    async def handler(socket: WebSocket) -> None:
        socket.session["late"] = True
        await socket.accept()

    for verb in ("load", "replace"):
        site.backend.failing = {verb: BackendUnavailable("where it is")}
        async with connected(browser, handler, extensions=extensions) as socket:
            pass
        if extensions:
            start, body = socket.sent
            assert (start["type"], start["status"]) == ("websocket.http.response.start", 503)
            assert dict(start["headers"])[b"retry-after"] == b"2"
            assert (body["type"], body["body"]) == ("websocket.http.response.body", b"Service Unavailable")
        else:
            assert socket.sent == [{"type": "websocket.close", "code": 1013}]
        assert socket.set_cookies == []


@pytest.mark.parametrize(("extensions", "kind"), [(DENIAL, "websocket.http.response.start"), ({}, "websocket.close")])
async def test_a_session_that_ends_during_the_handshake(
    sessions_url: str, extensions: dict[str, Any], kind: str
) -> None:
    """With on_gone="raise", a change to it refuses the handshake: by a 409, or by a close that is final (R32)."""
    site = Site(Staged(SQLAlchemyBackend(sessions_url)), on_gone="raise")
    site.app.app = by_handler

    async def handler(socket: WebSocket) -> None:
        await site.backend.revoke((await site.record()).id)
        socket.session["late"] = True
        await socket.accept()

    async with connected(await site.filled(cart=[1]), handler, extensions=extensions) as socket:
        pass
    assert socket.types[0] == kind
    assert socket.sent[0].get("status", 409) == 409
    assert socket.sent[0].get("code", 1008) == 1008
    assert site.kinds == ["gone"]


async def test_an_outage_while_open_closes_the_socket(site: Site) -> None:
    """A BackendError that the handler of an open socket lets through closes it with 1013, "try again later" (R67)."""

    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        socket.session["late"] = True
        site.backend.failing["replace"] = BackendUnavailable()
        await session_of(socket).save()

    async with connected(await site.filled(cart=[1]), handler) as socket:
        pass
    assert socket.sent[1:] == [{"type": "websocket.close", "code": 1013}]
    assert site.kinds == ["unavailable"]


@pytest.mark.parametrize("explicit", [True, False], ids=["save()", "the end"])
async def test_an_outage_after_the_close_is_raised(site: Site, explicit: bool) -> None:
    """What cannot be committed after the socket was closed is an error for the log; it is not closed twice (R58)."""

    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        socket.session["late"] = True
        site.backend.failing["replace"] = BackendUnavailable()
        await socket.close()
        if explicit:
            await session_of(socket).save()

    with pytest.raises(BackendUnavailable):
        async with connected(await site.filled(cart=[1]), handler) as socket:
            pass
    assert socket.types == ["websocket.accept", "websocket.close"]


async def test_an_application_that_does_not_answer(site: Site) -> None:
    """If nothing answers, a logout is heeded, and nothing else is stored: it could not be told to the browser (R28)."""

    async def clear(socket: WebSocket) -> None:
        socket.session.clear()

    async def fill(socket: WebSocket) -> None:
        socket.session["cart"] = []

    async with connected(await site.filled(cart=[1]), clear) as socket:
        pass
    assert (socket.sent, await site.records()) == ([], [])
    async with connected(site.browser(), fill) as socket:
        pass
    assert (socket.sent, await site.records()) == ([], [])


def test_fastapi_sockets(sessions_url: str) -> None:
    """FastAPI's WebSocket routes and dependencies work, and Starlette's TestClient keeps the cookie (R67)."""
    app = FastAPI()
    app.add_middleware(
        SessionMiddleware, secret_key=KEY, backend=SQLAlchemyBackend(sessions_url), cookie_https_only=False
    )

    @app.websocket("/count")
    async def count(socket: WebSocket, session: CurrentSession) -> None:
        session["count"] = session.get("count", 0) + 1
        await socket.accept()
        await socket.send_json(session["count"])
        await socket.close()

    with TestClient(app) as client:
        for number in (1, 2, 3):
            with client.websocket_connect("/count") as socket:
                assert socket.receive_json() == number
                for name, value in [header.split("=", 1) for header in _set(socket.extra_headers)]:
                    client.cookies.set(name, value.partition(";")[0])


def _set(headers: list[tuple[bytes, bytes]] | None) -> list[str]:
    return [value.decode() for key, value in headers or () if key == b"set-cookie"]
