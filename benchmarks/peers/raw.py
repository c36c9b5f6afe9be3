"""The limits: a database driver, and the least that a session needs around it.

Cookie, HMAC, one SELECT, JSON, the handler, JSON again to see what changed, and if something did, one upsert. No
deadline, no renewal, no conflict detection, no errors but the driver's: what a library adds to this is its price.
"""

import asyncio
import base64
import hmac
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Generic, Protocol, TypeVar

import aiosqlite
import asyncpg
from asyncpg.prepared_stmt import PreparedStatement
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from benchmarks.endpoints import KEY, application

T = TypeVar("T")
R = TypeVar("R")

#: How many connections are held: as many as SQLAlchemyBackend's pool has.
CONNECTIONS = 5

#: As `json.dumps` does it, without a new encoder each time.
_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode

_KEY = KEY.encode()

LIFETIME = 14 * 24 * 3600

_POSTGRESQL = """
    CREATE TABLE IF NOT EXISTS sessions (id text PRIMARY KEY, data text NOT NULL, expires_at timestamptz NOT NULL)
    WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05)
"""
_SQLITE = "CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, data TEXT NOT NULL, expires_at REAL NOT NULL)"
_SELECT = "SELECT data FROM sessions WHERE id = $1 AND expires_at > now()"
_SELECT_MANY = "SELECT id, data FROM sessions WHERE id = ANY($1) AND expires_at > now()"
_UPSERT = """
    INSERT INTO sessions (id, data, expires_at) VALUES ($1, $2, now() + interval '14 days')
    ON CONFLICT (id) DO UPDATE SET data = excluded.data
"""
_UPSERT_MANY = """
    INSERT INTO sessions (id, data, expires_at)
    SELECT id, data, now() + interval '14 days' FROM unnest($1::text[], $2::text[]) AS new (id, data)
    ON CONFLICT (id) DO UPDATE SET data = excluded.data
"""


class Sessions(Protocol):
    """Where JSON is kept; connected inside the `async with` of `opened`."""

    def opened(self, app: FastAPI) -> Any:
        """Return an asynchronous context manager, the lifespan of the application."""

    async def load(self, id: str) -> str | None:  # noqa: A002
        """Return what is stored, or None."""

    async def save(self, id: str, data: str) -> None:  # noqa: A002
        """Insert or update."""


def asyncpg_held(url: str) -> ASGIApp:
    """Return the application with prepared statements on connections that are never given back."""
    return _application(HeldConnections(url))


def asyncpg_batched(url: str) -> ASGIApp:
    """Return the application in which all that waits goes out as one statement."""
    return _application(BatchedConnections(url))


def aiosqlite_plain(url: str) -> ASGIApp:
    """Return the application with sessions in SQLite, on one connection in autocommit."""
    return _application(SQLiteConnection(url.partition("///")[2]))


def _application(sessions: Sessions) -> ASGIApp:
    return application(Middleware(RawMiddleware, sessions=sessions), lifespan=sessions.opened)


class RawMiddleware:
    """Loads before the handler, and saves what it changed before the headers leave."""

    def __init__(self, app: ASGIApp, *, sessions: Sessions) -> None:
        self._app = app
        self._sessions = sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        id_ = _authentic(scope["headers"])
        stored = await self._sessions.load(id_) if id_ else None
        session = scope["session"] = json.loads(stored) if stored else {}

        async def committed(message: Message) -> None:
            if message["type"] == "http.response.start":
                data = _encode(session)
                if data != (stored or "{}"):
                    if stored:
                        await self._sessions.save(id_, data)
                    else:
                        new = secrets.token_urlsafe(32)
                        await self._sessions.save(new, data)
                        message["headers"].append((b"set-cookie", _cookie(new)))
            await send(message)

        await self._app(scope, receive, committed)


def _authentic(headers: Sequence[tuple[bytes, bytes]]) -> str:
    """Return the id in the cookie, or "" without a cookie of ours."""
    for name, value in headers:
        if name == b"cookie":
            for cookie in value.split(b"; "):
                if cookie.startswith(b"session="):
                    id_, _, signature = cookie[8:].partition(b".")
                    return id_.decode("latin-1") if hmac.compare_digest(signature, _signature(id_)) else ""
    return ""


def _cookie(id_: str) -> bytes:
    signature = _signature(id_.encode()).decode()
    return f"session={id_}.{signature}; Path=/; HttpOnly; SameSite=lax".encode()


def _signature(id_: bytes) -> bytes:
    return base64.urlsafe_b64encode(hmac.digest(_KEY, id_, "sha256"))


class HeldConnections:
    """Some connections, each of which serves one statement at a time."""

    def __init__(self, url: str) -> None:
        self._url = url.replace("+asyncpg", "")
        self._free: list[tuple[PreparedStatement[Any], PreparedStatement[Any]]] = []
        # A queue would let those who come overtake those who wait, some of them for half a second.
        self._turn = asyncio.Semaphore(CONNECTIONS)

    @asynccontextmanager
    async def opened(self, app: FastAPI) -> AsyncGenerator[None, None]:  # noqa: ARG002
        """Hold the connections."""
        connections = [await asyncpg.connect(self._url) for _ in range(CONNECTIONS)]
        await connections[0].execute(_POSTGRESQL)
        for connection in connections:
            self._free.append((await connection.prepare(_SELECT), await connection.prepare(_UPSERT)))
        yield
        for connection in connections:
            await connection.close()

    async def load(self, id: str) -> str | None:  # noqa: A002
        """Return what is stored, or None."""
        async with self._turn:
            select, upsert = self._free.pop()
            try:
                found: str | None = await select.fetchval(id)
                return found
            finally:
                self._free.append((select, upsert))

    async def save(self, id: str, data: str) -> None:  # noqa: A002
        """Insert or update."""
        async with self._turn:
            select, upsert = self._free.pop()
            try:
                await upsert.fetchval(id, data)
            finally:
                self._free.append((select, upsert))


class Lane(Generic[T, R]):
    """One connection's queue: what came while a statement was under way goes out as the next one."""

    def __init__(self, send: Callable[[list[T]], Awaitable[Sequence[R]]]) -> None:
        self._send = send
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._running: asyncio.Task[None] | None = None

    async def ask(self, question: T) -> R:
        """Return the answer to *question*."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()
        self._waiting.append((question, future))
        if self._running is None:
            self._running = loop.create_task(self._run())
        return await future

    async def _run(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                answers = await self._send([question for question, _ in batch])
            except Exception as error:  # noqa: BLE001 - raised where it was waited for
                for _, future in batch:
                    future.set_exception(error)
            else:
                for (_, future), answer in zip(batch, answers, strict=True):
                    future.set_result(answer)
        self._running = None


class BatchedConnections:
    """One connection for reads and one for writes, with one statement under way on each."""

    def __init__(self, url: str) -> None:
        self._url = url.replace("+asyncpg", "")
        self._select: PreparedStatement[Any]
        self._upsert: PreparedStatement[Any]
        self._reads = Lane(self._load_all)
        self._writes = Lane(self._save_all)

    @asynccontextmanager
    async def opened(self, app: FastAPI) -> AsyncGenerator[None, None]:  # noqa: ARG002
        """Hold the connections."""
        reader, writer = await asyncpg.connect(self._url), await asyncpg.connect(self._url)
        await reader.execute(_POSTGRESQL)
        self._select, self._upsert = await reader.prepare(_SELECT_MANY), await writer.prepare(_UPSERT_MANY)
        yield
        await reader.close()
        await writer.close()

    async def load(self, id: str) -> str | None:  # noqa: A002
        """Return what is stored, or None."""
        return await self._reads.ask(id)

    async def save(self, id: str, data: str) -> None:  # noqa: A002
        """Insert or update."""
        await self._writes.ask((id, data))

    async def _load_all(self, ids: list[str]) -> Sequence[str | None]:
        found = dict(await self._select.fetch(ids))
        return [found.get(id_) for id_ in ids]

    async def _save_all(self, sessions: list[tuple[str, str]]) -> Sequence[None]:
        # A statement may not update one row twice: of the same id, the last.
        latest = dict(sessions)
        await self._upsert.fetch(list(latest), list(latest.values()))
        return [None] * len(sessions)


class SQLiteConnection:
    """One connection, with one hop to its thread for each statement."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._connection: aiosqlite.Connection

    @asynccontextmanager
    async def opened(self, app: FastAPI) -> AsyncGenerator[None, None]:  # noqa: ARG002
        """Hold the connection."""
        async with aiosqlite.connect(self._path, isolation_level=None) as self._connection:
            await self._connection.execute(_SQLITE)
            yield

    async def load(self, id: str) -> str | None:  # noqa: A002
        """Return what is stored, or None."""
        rows = await self._connection.execute_fetchall(
            "SELECT data FROM sessions WHERE id = ? AND expires_at > ?", (id, time.time())
        )
        return next((row[0] for row in rows), None)

    async def save(self, id: str, data: str) -> None:  # noqa: A002
        """Insert or update."""
        await self._connection.execute_fetchall(
            "INSERT INTO sessions (id, data, expires_at) VALUES (?, ?, ?)"
            " ON CONFLICT (id) DO UPDATE SET data = excluded.data",
            (id, data, time.time() + LIFETIME),
        )
