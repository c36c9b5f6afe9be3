"""The ASGI shell: scope → manager → send. It decides nothing about sessions, and holds no connection while a handler
runs.
"""

import asyncio
import inspect
import json
import logging
import re
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from http import HTTPStatus
from typing import Literal

from starlette.datastructures import Headers, Secret
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from sqlsessions import cookies
from sqlsessions.backends.base import Backend
from sqlsessions.backends.memory import InMemoryBackend
from sqlsessions.cookies import CookieSettings, SameSite
from sqlsessions.credentials import CookieSigner
from sqlsessions.errands import Commit
from sqlsessions.errors import BackendError, ConfigurationError, SessionConflict, SessionGone
from sqlsessions.events import Event, EventHook
from sqlsessions.manager import CookieChange, OnUnavailable, SessionManager, UserKey, Visit
from sqlsessions.payload import Limits
from sqlsessions.purge import purge, purge_forever
from sqlsessions.record import Timeouts, is_span, utc_now
from sqlsessions.session import Session

logger = logging.getLogger("sqlsessions")

#: A path or the beginning of one, up to a slash; or a pattern that has to match all of it.
PathRule = str | re.Pattern[str]

#: Scope key: the cookie names that already have a session here, and their visits.
_VISITS = "sqlsessions"

_SERVED = frozenset({"http", "websocket"})
#: Messages with which a response begins and headers leave.
_BEGINNINGS = frozenset({"http.response.start", "websocket.accept", "websocket.close", "websocket.http.response.start"})
_ANSWERED = (BackendError, SessionConflict, SessionGone)
_RETRY_AFTER = b"2"
#: As a plain int: comparing with a member of the enumeration takes three times as long.
_SERVER_ERROR = int(HTTPStatus.INTERNAL_SERVER_ERROR)

#: Makes the answer to an error of these, as an exception handler of Starlette's does.
ErrorHandler = Callable[[Request, BackendError | SessionConflict | SessionGone], Response | Awaitable[Response]]


class SessionMiddleware:
    """Gives every request and WebSocket a ``session`` that is kept in *backend* and committed before the response
    headers leave.

    Add it below ``CORSMiddleware`` (so that a browser may see a 503) and above whatever uses the session. Settings
    are checked here and raise `ConfigurationError`. Without *backend*, sessions live in this process's memory, and it
    says so.

    *secret_key*: at least 32 random bytes, shared by all workers; *previous_secret_keys* still verify, and their
    cookies are re-issued. *audience*: sessions of one are refused by another, for tenants that share a key.
    *anonymous_idle_timeout*: how long sessions without a user live unused, where that is not *idle_timeout*.
    *user_key*: the key of the data that holds the user, a function of the data, or None.
    *max_sessions_per_user*: a login ends the user's sessions beyond so many, those unused for longest. *skip*: paths
    that never load a session. *on_gone*: what becomes of a change to a session that ended while the request ran:
    ``"drop"`` it with an event, or ``"raise"`` it as a 409. *on_unavailable*: ``"raise"`` answers 503 on the first use
    of a session that could not be loaded, ``"anonymous"`` shows an empty one that cannot be written. *on_error*: makes
    the response to an HTTP request in place of that plain 503 or 409, from the request and the error. *on_event*:
    called with each `Event`. *purge_interval*: how often expired sessions are deleted, or None. *record_client*: keep
    address and user agent.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        secret_key: str | bytes | Secret,
        previous_secret_keys: Sequence[str | bytes | Secret] = (),
        audience: str = "",
        backend: Backend | None = None,
        cookie_name: str | None = None,
        cookie_https_only: bool = True,
        cookie_same_site: SameSite = "lax",
        cookie_domain: str | None = None,
        cookie_path: str | None = "/",
        cookie_partitioned: bool = False,
        cookie_persistent: bool = False,
        idle_timeout: timedelta = timedelta(days=14),
        absolute_timeout: timedelta = timedelta(days=30),
        anonymous_idle_timeout: timedelta | None = None,
        user_key: UserKey = "user_id",
        max_sessions_per_user: int | None = None,
        autoload_cookie: bool = True,
        skip: Iterable[PathRule] = (),
        on_gone: Literal["drop", "raise"] = "drop",
        on_unavailable: OnUnavailable = "raise",
        on_error: ErrorHandler | None = None,
        on_event: EventHook | None = None,
        purge_interval: timedelta | None = timedelta(minutes=5),
        record_client: bool = False,
        max_bytes: int = 64 * 1024,
        max_keys: int = 1024,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        _one_of("on_gone", on_gone, ("drop", "raise"))
        _one_of("on_unavailable", on_unavailable, ("raise", "anonymous"))
        if purge_interval is not None and not is_span(purge_interval, timedelta(seconds=1)):
            raise ConfigurationError(
                f"purge_interval must be a timedelta of at least one second, or None, not {purge_interval!r:.80}"
            )
        if on_error is not None and not callable(on_error):
            raise ConfigurationError(f"on_error must be a function of a request and an error, not {on_error!r:.80}")
        self.app = app
        self._cookie = CookieSettings(
            cookie_name or "", cookie_https_only, cookie_same_site, cookie_domain, cookie_path, cookie_partitioned
        )
        self._cookie_name = self._cookie.name.encode()
        self._manager = SessionManager(
            backend=_forgetful() if backend is None else backend,
            signer=CookieSigner(
                secret_key, previous_secret_keys=previous_secret_keys, cookie_name=self._cookie.name, audience=audience
            ),
            timeouts=Timeouts(idle_timeout, absolute_timeout, anonymous_idle_timeout),
            limits=Limits(max_bytes, max_keys),
            user_key=user_key,
            persistent=cookie_persistent,
            max_sessions_per_user=max_sessions_per_user,
            on_unavailable=on_unavailable,
            on_event=on_event,
            clock=clock,
        )
        self._autoload = autoload_cookie
        self._skip = _Paths(skip) or None
        self._rules = _Rules(on_gone, on_error, self._set_cookie)
        self._record_client = record_client
        self._purger = _Purger(self._manager, purge_interval)
        self._warned_of_http = False
        self._warned_of_another = False

    def __repr__(self) -> str:
        return f"<SessionMiddleware {self._cookie.name!r} on {self._manager.backend!r}>"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, WebSocket or lifespan."""
        kind, visits = scope["type"], scope.get(_VISITS)
        if kind == "lifespan":
            await self.app(scope, receive, self._lifespan(send))
            return
        if kind not in _SERVED or (visits and self._has_been_here(visits)):
            await self.app(scope, receive, send)
            return
        # The rest stands here and not in a coroutine of its own: each that waits is left and entered again.
        self._purger.start()
        values = cookies.read(scope["headers"], self._cookie_name)
        # Not of the scope, which will hold the visit: see `Visit.attach`.
        client = partial(_client, scope.get("client"), scope["headers"]) if self._record_client else _unknown
        visit, session = self._manager.open(values, client=client)
        if self._autoload and (self._skip is None or not self._skip.match(scope)):
            await visit.load()
        if "session" in scope:
            # An application around this one has a session of its own, under another cookie, and goes on to see that.
            # Else not a copy: what is around this looks in its scope for the route that was found.
            scope = dict(scope)
        scope["session"] = session
        scope[_VISITS] = {**visits, self._cookie.name: visit} if visits else {self._cookie.name: visit}
        exchange = _Exchange(self._rules, visit, session, scope, receive=receive, send=send)
        try:
            await self.app(scope, receive, exchange.send)
        except WebSocketDisconnect:  # how Starlette tells a handler that the client has closed: no failure
            if (ending := exchange.ending()) is not None:
                await ending
            raise
        except BaseException as error:  # noqa: BLE001 - raised again by fail(), unless it is ours
            await exchange.fail(error)
        else:
            if (ending := exchange.ending()) is not None:
                await ending
        finally:
            visit.over = True

    def _has_been_here(self, visits: Mapping[str, Visit]) -> bool:
        """Tell whether a middleware around this one serves our cookie; warn if it does from another backend."""
        visit = visits.get(self._cookie.name)
        if visit is None or visit.over:
            return False
        if visit.backend is not self._manager.backend and not self._warned_of_another:
            self._warned_of_another = True
            logger.warning(
                "sqlsessions: a SessionMiddleware around another one has the same cookie, %r, and another backend: the "
                "session is that of the outer one, %r. Give each a cookie_name of its own",
                self._cookie.name,
                visit.backend,
            )
        return True

    def _set_cookie(self, scope: Scope, root_path: str, change: CookieChange) -> bytes:
        """Return the Set-Cookie header for *change*."""
        if change.value is None:
            return self._cookie.expire(root_path)
        if self._cookie.https_only and scope.get("scheme") in ("http", "ws") and not self._warned_of_http:
            self._warned_of_http = True
            logger.warning(
                "sqlsessions: a Secure cookie was set on a plain-http request, and browsers will not send it back. "
                "Behind a proxy that ends TLS, have the server trust its headers (uvicorn --forwarded-allow-ips=…); "
                "for plain http in development, cookie_https_only=False"
            )
        return self._cookie.set(change.value, max_age=change.max_age, root_path=root_path)

    def _lifespan(self, send: Send) -> Send:
        async def watched(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._purger.start()
            elif message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
                await self._purger.stop()
                await self._manager.drain()
                await self._manager.backend.aclose()
            await send(message)

        return watched


class SessionAutoloadMiddleware:
    """Loads the session for requests to *paths*, where `SessionMiddleware` around it has ``autoload_cookie=False``."""

    def __init__(self, app: ASGIApp, *, paths: Iterable[PathRule]) -> None:
        self.app = app
        self._paths = _Paths(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Load the session if the path is one of those."""
        if scope["type"] in ("http", "websocket") and self._paths.match(scope):
            await _visit(scope).load()
        await self.app(scope, receive, send)


async def load_session(connection: HTTPConnection) -> Session:
    """Return the request's session, loaded: one SELECT if the cookie is genuine, none if it is loaded already.

    Raises `BackendError` if the database cannot be asked, and `ConfigurationError` without `SessionMiddleware`.
    """
    session = await _visit(connection.scope).load()
    session.mark_accessed()
    return session


class _AbandonedError(Exception):
    """Thrown into the application when its response is replaced by ours."""


@dataclass(frozen=True, slots=True)
class _Rules:
    """What the settings say about responses."""

    on_gone: Literal["drop", "raise"]
    on_error: ErrorHandler | None
    #: Returns the Set-Cookie header.
    set_cookie: Callable[[Scope, str, CookieChange], bytes]


class _Exchange:
    """One request's way out: commits before the headers leave, and answers in the application's place when that
    fails.
    """

    # What an exchange begins with stands in the class, and costs none of them anything.

    _begun = False
    _closed = False
    #: Nothing but an end is kept for a response that is a 5xx, or that never begins.
    _failed = True
    _failure: Exception | None = None

    def __init__(
        self,
        rules: _Rules,
        visit: Visit,
        session: Session,
        scope: Scope,
        *,
        receive: Receive,
        send: Send,
    ) -> None:
        self._rules = rules
        self._visit = visit
        self._session = session
        self._scope = scope
        #: Where this application is: whatever is mounted within it says in the same scope where that is.
        self._root_path: str = scope.get("root_path", "")
        self._receive = receive
        self._send = send

    async def send(self, message: Message) -> None:
        """Pass *message* on; before the first with headers, commit."""
        if self._failure is not None:
            raise _AbandonedError
        kind = message["type"]
        if not self._begun and kind in _BEGINNINGS:
            headers = list(message.get("headers", ()))
            try:
                if (commit := self._owed(message, headers)) is not None:
                    await commit
            except Exception as error:  # noqa: BLE001 - answered or raised once the application has stopped
                if not self._forgiven(error):
                    self._failure = error
            message = self._begin(message, headers)
        if kind == "websocket.close":
            self._closed = True
        await self._send(message)

    def ending(self) -> Awaitable[None] | None:
        """Return what commits what was changed after the headers, or answers if the application's response was
        abandoned; None if nothing is left to be done.
        """
        if self._failure is not None:
            return self._answer(self._failure)
        try:
            commit = self._visit.owed(self._session, failed=self._failed)
        except SessionGone as error:
            if self._forgiven(error):
                return None
            raise
        return None if commit is None else self._kept(commit)

    async def fail(self, error: BaseException) -> None:
        """End the session if that was asked for, then answer errors of ours and raise all others."""
        if self._failure is not None and not isinstance(error, asyncio.CancelledError):
            await self._answer(self._failure)
            return
        await self._end()
        ours = _ours(error)
        if ours is not None and not self._begun:
            await self._answer(ours)
        elif ours is not None and self._scope["type"] == "websocket" and not self._closed:
            await self._send(_closing(ours))
        else:
            raise error

    def _owed(self, message: Message, headers: list[tuple[bytes, bytes]]) -> Commit | None:
        """Return what has to be committed before *message* leaves."""
        refused = message["type"] == "websocket.close"
        self._failed = message.get("status", 403 if refused else 200) >= _SERVER_ERROR
        # A refused handshake has no headers of ours.
        self._visit.headers_sent = refused
        return self._visit.owed(self._session, failed=self._failed, may_touch=lambda: not _shared(headers))

    def _begin(self, message: Message, headers: list[tuple[bytes, bytes]]) -> Message:
        """Return *message* as it leaves, unless the application's response is abandoned."""
        if self._failed and self._failure is None and message.get("status") == _SERVER_ERROR:
            # A mounted application has an error page of its own, which knows nothing of outages. It sends that while
            # it handles the error; a handler which sends a 500 of its own has handled ours.
            refusal = self._visit.refusal
            self._failure = refusal if _comes_of(sys.exception(), refusal) else None
        if self._failure is not None:
            raise _AbandonedError
        self._begun = self._visit.headers_sent = True
        if message["type"] == "websocket.close":
            return message
        return {**message, "headers": self._dressed(headers)}

    async def _kept(self, commit: Commit) -> None:
        try:
            await commit
        except SessionGone as error:
            if not self._forgiven(error):
                raise

    async def _end(self) -> None:
        """End the session if that was asked for: whatever else cannot be stored, and whatever the response is."""
        if not self._session.marks.ended:
            return
        try:
            await self._visit.commit(failed=True)
        except _ANSWERED:
            # The manager has told of it in an event; what the application raised comes first.
            logger.warning("sqlsessions: a session that was to end could not be ended after the application failed")

    def _forgiven(self, error: Exception) -> bool:
        """Tell whether *error* says no more than that a change was dropped, as the settings want it."""
        return isinstance(error, SessionGone) and self._rules.on_gone == "drop"

    def _dressed(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Return *headers* with what the session adds: nothing, if it was not used."""
        change = self._visit.cookie
        if change is None:
            return _varied(headers) if self._session.accessed else headers
        cookie = self._rules.set_cookie(self._scope, self._root_path, change)
        name = cookie[: cookie.index(b"=") + 1]
        # One Set-Cookie of a name per response (RFC 6265bis §4.1.1).
        kept = [(key, value) for key, value in headers if key.lower() != b"set-cookie" or not value.startswith(name)]
        return [*_private(_varied(kept)), (b"set-cookie", cookie)]

    async def _answer(self, failure: Exception) -> None:
        """Answer 503, or 409 for a session that is gone; raise what is an error of the application's own."""
        if not isinstance(failure, _ANSWERED):
            await self._end()
            raise failure
        kind = "http.response"
        if self._scope["type"] == "websocket":
            kind = "websocket.http.response"
            if kind not in (self._scope.get("extensions") or {}):
                await self._send(_closing(failure))
                return
        elif self._rules.on_error is not None:
            response = self._rules.on_error(Request(self._scope, self._receive), failure)
            if inspect.isawaitable(response):
                response = await response
            await response(self._scope, self._receive, self._send_answer)
            return
        gone = isinstance(failure, SessionGone)
        body = b"Conflict: the session has ended" if gone else b"Service Unavailable"
        headers = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"no-store"),
        ]
        if not gone:
            headers.append((b"retry-after", _RETRY_AFTER))
        await self._send_answer({"type": f"{kind}.start", "status": 409 if gone else 503, "headers": headers})
        await self._send({"type": f"{kind}.body", "body": b"" if self._scope.get("method") == "HEAD" else body})

    async def _send_answer(self, message: Message) -> None:
        """Send a message of an answer in place of the application's. What was committed before may have made a cookie,
        without which the browser would be nobody.
        """
        if self._visit.cookie is not None and message["type"] in _BEGINNINGS:
            message = {**message, "headers": self._dressed(list(message.get("headers", ())))}
        await self._send(message)


def _ours(error: BaseException) -> Exception | None:
    """Return the error of ours that *error* is: by itself, or in a group that has nothing else, as several tasks raise
    it.
    """
    if not isinstance(error, BaseExceptionGroup):
        return error if isinstance(error, _ANSWERED) else None
    found = [_ours(each) for each in error.exceptions]
    return None if None in found else found[0]


def _comes_of(error: BaseException | None, refusal: Exception | None) -> bool:
    """Tell whether *error* is *refusal*, or was raised from it."""
    while error is not None and error is not refusal:
        error = error.__cause__
    return error is not None


def _closing(failure: Exception) -> Message:
    """Return the message that closes a WebSocket: as a violation for a session that is gone, else "try again later"."""
    return {"type": "websocket.close", "code": 1008 if isinstance(failure, SessionGone) else 1013}


class _Purger:
    """The purge task: one, in the event loop that first asks for it, until that loop ends or `stop`."""

    def __init__(self, manager: SessionManager, interval: timedelta | None) -> None:
        self._manager = manager
        self._interval = interval
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, unless a task is running or another event loop has one."""
        if self._interval is None or (
            self._task is not None and not (self._task.done() or self._task.get_loop().is_closed())
        ):
            return
        self._task = asyncio.get_running_loop().create_task(
            purge_forever(self._purge, self._interval), name="sqlsessions purge"
        )

    async def stop(self) -> None:
        """End the task and wait for it."""
        task, self._task = self._task, None
        if task is None or task.get_loop() is not asyncio.get_running_loop():
            return
        task.cancel()
        await asyncio.wait({task})

    async def _purge(self) -> None:
        count = await purge(self._manager.backend, clock=self._manager.clock)
        if count:
            self._manager.emit(Event("purged", count=count))


class _Paths:
    """Paths as the routes of the application have them: of ``scope["path"]``, without what a proxy or a mount has put
    before it; not of a URL built from the Host header, which the client chooses (CVE-2026-48710).
    """

    def __init__(self, rules: Iterable[PathRule]) -> None:
        if isinstance(rules, str):
            raise ConfigurationError(f"paths must be a list, not the one str {rules!r:.80}")
        rules = list(rules)
        for rule in rules:
            if not isinstance(rule, (str, re.Pattern)):
                raise ConfigurationError(f"a path must be a str or a compiled pattern, not {rule!r:.80}")
        self._prefixes = tuple(rule.rstrip("/") for rule in rules if isinstance(rule, str))
        self._patterns = [rule for rule in rules if not isinstance(rule, str)]

    def __bool__(self) -> bool:
        return bool(self._prefixes or self._patterns)

    def match(self, scope: Scope) -> bool:
        """Tell whether the request's path is one of these, or below one."""
        path = _route_path(scope)
        return any(path == prefix or path.startswith(prefix + "/") for prefix in self._prefixes) or any(
            pattern.fullmatch(path) for pattern in self._patterns
        )


def _route_path(scope: Scope) -> str:
    """Return the path that routes are found by, as Starlette takes it: a prefix may have been taken away already."""
    path: str = scope["path"]
    root_path: str = scope.get("root_path", "")
    return path[len(root_path) :] if path == root_path or path.startswith(root_path + "/") else path


def _visit(scope: Scope) -> Visit:
    for visit in scope.get(_VISITS, {}).values():
        if visit.session is scope.get("session"):
            found: Visit = visit
            return found
    raise ConfigurationError("SessionMiddleware must be installed around whatever loads a session")


def _unknown() -> None: ...


def _client(client: tuple[str, int] | None, headers: list[tuple[bytes, bytes]]) -> str:
    """Return where the request came from, as the JSON text that a record keeps."""
    agent = Headers(raw=headers).get("user-agent")
    # Neither may fill the table: behind a trusting server the address, too, is what a header says.
    return json.dumps({"ip": client[0][:64] if client else None, "user_agent": agent[:512] if agent else None})


def _directives(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Return what the application says about caching: each directive, with its argument or nothing."""
    values = (value for key, value in headers if key.lower() == b"cache-control")
    parts = (part.partition(b"=") for value in values for part in value.split(b","))
    return {name.strip().lower(): argument.strip(b' \t"') for name, _, argument in parts if name.strip()}


def _closed(said: Mapping[bytes, bytes]) -> bool:
    """Tell whether no shared cache keeps the response; ``private="field"`` keeps it from that field only (RFC 9111
    §5.2.2.7).
    """
    return b"no-store" in said or said.get(b"private") == b""


def _shared(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Tell whether a shared cache may answer others with this response by its own word (RFC 9111 §4.2)."""
    said = _directives(headers)
    age = said.get(b"s-maxage", said.get(b"max-age"))
    fresh = b"public" in said if age is None else age != b"0"
    return fresh and b"no-cache" not in said and not _closed(said)


def _private(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return *headers* with which no shared cache keeps the cookie: a cached Set-Cookie is somebody else's session."""
    said = _directives(headers)
    if _closed(said):
        return headers
    if not said:
        return [*headers, (b"cache-control", b"no-store")]
    if _shared(headers):
        logger.warning(
            "sqlsessions: a response for shared caches sets a session cookie; it is sent as 'private, no-store' instead"
        )
    return [
        *((key, value) for key, value in headers if key.lower() != b"cache-control"),
        (b"cache-control", b"private, no-store"),
    ]


def _varied(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return *headers* with ``Cookie`` among what the response varies by (RFC 9110 §12.5.5); ``*`` says so already."""
    if b"vary" not in [key.lower() for key, _ in headers]:
        return [*headers, (b"vary", b"Cookie")]
    fields = [part.strip() for key, value in headers if key.lower() == b"vary" for part in value.split(b",")]
    if any(field == b"*" or field.lower() == b"cookie" for field in fields):
        return headers
    rest = [(key, value) for key, value in headers if key.lower() != b"vary"]
    return [*rest, (b"vary", b", ".join([*filter(None, fields), b"Cookie"]))]


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigurationError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r:.80}")


def _forgetful() -> Backend:
    logger.warning(
        "sqlsessions: no backend given, so sessions live in this process's memory: "
        "a restart forgets them and other workers do not see them. Pass backend=SQLAlchemyBackend(url)"
    )
    return InMemoryBackend()
