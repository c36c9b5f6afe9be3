"""A browser before an ASGI application, with no server between them: what is sent and received is what is looked at."""

import asyncio
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Self
from uuid import UUID

import sqlalchemy as sa
from starlette import requests
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sqlsessions.backends.base import Backend
from sqlsessions.backends.memory import InMemoryBackend
from sqlsessions.backends.sqlalchemy import SQLAlchemyBackend
from sqlsessions.events import Event
from sqlsessions.middleware import SessionMiddleware
from sqlsessions.record import Expected, Record
from sqlsessions.session import Session

KEY = bytes(range(32))
OTHER_KEY = bytes(range(32, 64))
COOKIE = "__Host-session"


class Request(requests.Request):
    """Starlette's request, which knows whose session it has."""

    @property
    def session(self) -> Session:
        """What `starlette.requests.Request.session` returns."""
        session = super().session
        assert isinstance(session, Session)
        return session


#: What a request does on the server; a result that is no Response is sent as JSON.
Handler = Callable[[Request], object]
Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class SetCookie:
    """One Set-Cookie header; the attributes' names in lower case."""

    name: str
    value: str
    attributes: dict[str, str]

    @classmethod
    def parse(cls, header: str) -> Self:
        """Read a header in which no attribute stands twice (R17)."""
        (name, _, value), *attributes = (part.strip().partition("=") for part in header.split(";"))
        read = {key.lower(): found for key, _, found in attributes}
        assert len(read) == len(attributes)
        assert len(name) + len(value) < 200  # R19 asks for 4096
        return cls(name, value, read)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""

    def all(self, name: str) -> list[str]:
        """Return the value of each header of this name."""
        return [value.decode("latin-1") for key, value in self.headers if key.decode("latin-1").lower() == name]

    def header(self, name: str) -> str | None:
        """Return the values of the headers of this name as one, or None."""
        return ", ".join(self.all(name)) or None

    def json(self) -> Any:
        """Return what the body says."""
        return json.loads(self.body)

    @property
    def set_cookies(self) -> list[SetCookie]:
        """The Set-Cookie headers, of which no two are of one name (R17)."""
        read = [SetCookie.parse(header) for header in self.all("set-cookie")]
        assert len({cookie.name for cookie in read}) == len(read)
        return read

    @property
    def set_cookie(self) -> SetCookie | None:
        """The one Set-Cookie header there may be, or None."""
        assert len(self.set_cookies) <= 1
        return next(iter(self.set_cookies), None)


async def ask(
    app: ASGIApp,
    path: str = "/",
    *,
    method: str = "GET",
    headers: Headers = (),
    body: bytes = b"",
    raises: type[Exception] | None = None,
    **scope: Any,
) -> Answer:
    """Put one request to *app* and return what it sent; with *raises*, make sure that it raised such an error, too."""
    path, _, query = path.partition("?")
    sent: list[Message] = []

    received: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not received:
            await asyncio.Event().wait()  # the client stays
        return received.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    whole = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "https",
        "path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
        "headers": [(b"host", b"app.example.com"), *headers], "client": ("192.0.2.1", 50000),
        "server": ("app.example.com", 443), **scope,
    }  # fmt: skip
    raised: Exception | None = None
    try:
        await app(whole, receive, send)
    except Exception as error:
        if raises is None:
            raise
        raised = error
    assert raises is None or isinstance(raised, raises), f"{raises} was not raised, but {raised!r}"
    if not sent:
        return Answer()
    assert sent[0]["type"] == "http.response.start"
    assert all(message["type"] == "http.response.body" for message in sent[1:])
    return Answer(
        sent[0]["status"], list(sent[0]["headers"]), b"".join(message.get("body", b"") for message in sent[1:])
    )


class Browser:
    """Keeps cookies, and sends them back."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.cookies: dict[str, str] = {}

    async def visit(self, handler: Handler | None = None, path: str = "/", **options: Any) -> Answer:
        """Put one request to the application; see `ask`. With *handler*, that is what `serve` will do."""
        cookie = "; ".join(f"{name}={value}" for name, value in self.cookies.items()).encode("latin-1")
        headers = [*options.pop("headers", ()), *([(b"cookie", cookie)] if cookie else [])]
        answer = await ask(self.app, path, headers=headers, handler=handler, **options)
        for set_cookie in answer.set_cookies:
            self.cookies[set_cookie.name] = set_cookie.value
            if set_cookie.attributes.get("max-age") == "0":
                del self.cookies[set_cookie.name]
        return answer

    def twin(self) -> "Browser":
        """Return another browser with the same cookies: a second tab, or a thief."""
        twin = Browser(self.app)
        twin.cookies |= self.cookies
        return twin


async def serve(scope: Scope, receive: Receive, send: Send) -> None:
    """Do what the request's own handler does."""
    result = scope["handler"](Request(scope, receive))
    if inspect.isawaitable(result):
        result = await result
    response = result if isinstance(result, Response) else JSONResponse(result)
    await response(scope, receive, send)


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        """Tell the time."""
        return self.now

    def advance(self, **span: float) -> None:
        """Let as much time pass as a timedelta of these arguments is long."""
        self.now += timedelta(**span)


class TellingBackend(InMemoryBackend):
    """The backend in memory, which notes the statement that each operation is on a database."""

    def __init__(self, statements: list[str]) -> None:
        super().__init__()
        self._statements = statements

    async def load(self, id: UUID, now: datetime) -> Record | None:  # noqa: A002
        """One SELECT."""
        self._statements.append("SELECT")
        return await super().load(id, now)

    async def insert(self, record: Record) -> None:
        """One INSERT."""
        self._statements.append("INSERT")
        await super().insert(record)

    async def replace(self, record: Record, expected: Expected) -> bool:
        """One UPDATE."""
        self._statements.append("UPDATE")
        return await super().replace(record, expected)

    async def touch(self, id: UUID, secret_hash: bytes, *, now: datetime, expires_at: datetime) -> bool:  # noqa: A002
        """One UPDATE."""
        self._statements.append("UPDATE")
        return await super().touch(id, secret_hash, now=now, expires_at=expires_at)

    async def delete(self, id: UUID, expected: Expected | None = None) -> bool:  # noqa: A002
        """One DELETE."""
        self._statements.append("DELETE")
        return await super().delete(id, expected)

    async def trim_for_user(self, user_id: str | int, limit: int, *, newest: UUID, now: datetime) -> int:
        """One DELETE."""
        self._statements.append("DELETE")
        return await super().trim_for_user(user_id, limit, newest=newest, now=now)


async def records(backend: Backend) -> list[Record]:
    """Return every row there is, expired ones too."""
    if isinstance(backend, InMemoryBackend):
        return list(backend._records.values())
    assert isinstance(backend, SQLAlchemyBackend)
    statement = sa.select(*[backend._statements.table.c[name] for name in Record._fields])
    return list(await backend._run(lambda turn: turn.records(statement, {})))


class Site:
    """`SessionMiddleware` around `serve`: each visit brings the handler along that it wants to be served by."""

    def __init__(self, backend: Backend, statements: list[str], **options: Any) -> None:
        self.backend = backend
        #: The first word of each statement that the backend has been asked for.
        self.statements = statements
        self.events: list[Event] = []
        self.clock = Clock()
        usual: dict[str, Any] = {"secret_key": KEY, "purge_interval": None, "clock": self.clock}
        self.options = usual | {"on_event": self.events.append} | options
        self.app = SessionMiddleware(serve, backend=backend, **self.options)

    def browser(self) -> Browser:
        """Return a browser that has never been here."""
        return Browser(self.app)

    async def visitor(self, handler: Handler | None = None) -> Browser:
        """Return a browser with a session, filled by *handler*; what was noted about it is forgotten."""
        browser = self.browser()
        await browser.visit(handler or fill)
        self.forget()
        return browser

    def reconfigured(self, **options: Any) -> "Site":
        """Return the site as it is after a restart with other settings."""
        site = Site(self.backend, self.statements, **self.options | options)
        site.events, site.clock = self.events, self.clock
        return site

    def forget(self) -> None:
        """Begin to note statements and events anew."""
        self.statements.clear()
        self.events.clear()

    @property
    def kinds(self) -> list[str]:
        """The kinds of the events noted."""
        return [event.kind for event in self.events]

    async def records(self) -> list[Record]:
        """Return every row there is, without a note in `statements`."""
        noted = len(self.statements)
        found = await records(self.backend)
        del self.statements[noted:]
        return found

    async def record(self) -> Record:
        """Return the only row there is."""
        (record,) = await self.records()
        return record


def fill(request: Request) -> None:
    """Put something into the session."""
    request.session["n"] = 1


def read(request: Request) -> dict[str, Any]:
    """Return what is in the session."""
    return dict(request.session)


def ignore(request: Request) -> None:
    """Leave the session alone."""


def headed(*headers: tuple[str, str], status: int = 200) -> Response:
    """Return an empty response with these headers and no others."""
    response = Response(status_code=status)
    response.raw_headers[:] = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    return response


def cookie_header(*values: str, name: str = COOKIE) -> Headers:
    """Return one Cookie header with these values of the session cookie."""
    return [(b"cookie", "; ".join(f"{name}={value}" for value in values).encode("latin-1"))]
