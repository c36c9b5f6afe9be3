"""What races are staged with: a backend whose statements wait at gates.

It forwards to a real one, so what a test meets is what a database does; only when is the test's to say.
"""

import asyncio
import inspect
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from sqlsessions.backends.base import Backend, Revocation
from sqlsessions.backends.memory import InMemoryBackend
from sqlsessions.backends.sqlalchemy import SQLAlchemyBackend
from sqlsessions.middleware import SessionMiddleware
from sqlsessions.record import Expected, Record
from sqlsessions.session import Session
from tests import asgi

T = TypeVar("T")

#: What a handler does with the session of its request.
Do = Callable[[Session], object]

#: Seconds after which something that has to happen is taken not to happen.
PATIENCE = 20

NO_ID = UUID(int=0)


class Gate:
    """Where calls wait until it is opened."""

    def __init__(self, *, arrivals: int = 1, after: bool = False) -> None:
        #: How many calls it is for.
        self.arrivals = arrivals
        #: Whether they wait behind the statement instead of before it.
        self.after = after
        self._waiting = 0
        self._full = asyncio.Event()
        self._opened = asyncio.Event()

    def open(self) -> None:
        """Let everybody pass."""
        self._opened.set()

    async def full(self) -> None:
        """Return when all who are to wait here do."""
        async with asyncio.timeout(PATIENCE):
            await self._full.wait()

    async def pass_through(self) -> None:
        """Wait until it is opened."""
        self._waiting += 1
        if self._waiting == self.arrivals:
            self._full.set()
        async with asyncio.timeout(PATIENCE):
            await self._opened.wait()


class Staged(Revocation):
    """A backend that forwards to a real one, with gates before its statements, and failures in their place."""

    def __init__(self, backend: SQLAlchemyBackend | InMemoryBackend) -> None:
        self.backend = backend
        #: The names of the calls so far.
        self.calls: list[str] = []
        #: Raised by calls of these names instead of forwarding.
        self.failing: dict[str, Exception] = {}
        #: Entered around calls of these names.
        self.around: dict[str, Callable[[UUID], AbstractAsyncContextManager[object]]] = {}
        self._gates: defaultdict[str, deque[Gate]] = defaultdict(deque)

    def gate(self, verb: str, *, arrivals: int = 1, after: bool = False) -> Gate:
        """Return a gate for the next *arrivals* calls of *verb*."""
        gate = Gate(arrivals=arrivals, after=after)
        self._gates[verb].extend([gate] * arrivals)
        return gate

    @asynccontextmanager
    async def hold(
        self, verb: str, request: Coroutine[Any, Any, T], *, after: bool = False
    ) -> AsyncIterator["asyncio.Task[T]"]:
        """Start *request*, and keep it waiting before, or right after, its next *verb* while the block runs."""
        gate = self.gate(verb, after=after)
        task = asyncio.create_task(request)
        arrival = asyncio.create_task(gate.full())
        await asyncio.wait({task, arrival}, return_when=asyncio.FIRST_COMPLETED)
        assert arrival.done(), f"the request ended without coming to a {verb}: {task}"
        await arrival
        try:
            yield task
        finally:
            gate.open()

    async def load(self, id: UUID, now: datetime) -> Record | None:  # noqa: A002
        """Forward, as all below."""
        async with self._stage("load", id):
            return await self.backend.load(id, now)

    async def insert(self, record: Record) -> None:
        """Forward."""
        async with self._stage("insert", record.id):
            await self.backend.insert(record)

    async def replace(self, record: Record, expected: Expected) -> bool:
        """Forward."""
        async with self._stage("replace", record.id):
            return await self.backend.replace(record, expected)

    async def touch(self, id: UUID, secret_hash: bytes, *, now: datetime, expires_at: datetime) -> bool:  # noqa: A002
        """Forward."""
        async with self._stage("touch", id):
            return await self.backend.touch(id, secret_hash, now=now, expires_at=expires_at)

    async def delete(self, id: UUID, expected: Expected | None = None) -> bool:  # noqa: A002
        """Forward."""
        async with self._stage("delete", id):
            return await self.backend.delete(id, expected)

    async def purge(self, before: datetime, limit: int) -> int:
        """Forward."""
        async with self._stage("purge"):
            return await self.backend.purge(before, limit)

    async def list_for_user(
        self, user_id: str | int, now: datetime | None = None, limit: int = 100
    ) -> Sequence[Record]:
        """Forward."""
        return await self.backend.list_for_user(user_id, now, limit)

    async def delete_for_user(self, user_id: str | int, *, keep: UUID | None = None) -> int:
        """Forward."""
        return await self.backend.delete_for_user(user_id, keep=keep)

    async def trim_for_user(self, user_id: str | int, limit: int, *, newest: UUID, now: datetime) -> int:
        """Forward."""
        async with self._stage("trim", newest):
            return await self.backend.trim_for_user(user_id, limit, newest=newest, now=now)

    async def delete_all(self) -> int:
        """Forward."""
        return await self.backend.delete_all()

    async def aclose(self) -> None:
        """Forward."""
        await self.backend.aclose()

    @asynccontextmanager
    async def _stage(self, verb: str, id_: UUID = NO_ID) -> AsyncIterator[None]:
        self.calls.append(verb)
        gate = self._gates[verb].popleft() if self._gates[verb] else None
        if gate is not None and not gate.after:
            await gate.pass_through()
        if verb in self.failing:
            raise self.failing[verb]
        async with self.around.get(verb, _nothing)(id_):
            yield
        if gate is not None and gate.after:
            await gate.pass_through()


class Browser(asgi.Browser):
    """Sends requests of which only the session matters."""

    def twin(self, app: ASGIApp | None = None) -> "Browser":
        """Return another browser with the same cookies: a second tab, or whoever planted or stole them."""
        twin = Browser(app or self.app)
        twin.cookies |= self.cookies
        return twin

    async def do(self, do: Do, *, status: int = 200) -> asgi.Answer:
        """Return the answer to a request whose handler does *do* to its session, and answers with *status*."""

        async def handler(request: Request) -> Response:
            done = do(request.session)  # type: ignore[arg-type]
            if inspect.isawaitable(done):
                await done
            return Response(status_code=status)

        return await self.visit(handler)

    async def data(self) -> dict[str, Any]:
        """Return what the session of this browser holds."""
        seen: dict[str, Any] = {}
        await self.do(seen.update)
        return seen


class Site(asgi.Site):
    """A site whose backend has gates."""

    backend: Staged

    def __init__(self, backend: Staged, **options: Any) -> None:
        super().__init__(backend, backend.calls, **options)

    def browser(self) -> Browser:
        """Return a browser that has never been here."""
        return Browser(self.app)

    async def filled(self, **data: object) -> Browser:
        """Return a browser with a session that holds *data*; what was noted about it is forgotten."""
        browser = self.browser()
        await browser.do(lambda session: session.update(data))
        self.forget()
        return browser

    def second_process(self, backend: Backend) -> SessionMiddleware:
        """Return the same application once more, on a backend of its own."""
        return SessionMiddleware(asgi.serve, **self.options | {"backend": backend})

    async def records(self) -> list[Record]:
        """Return every row there is, expired ones too."""
        return await asgi.records(self.backend.backend)


def _nothing(_: UUID) -> AbstractAsyncContextManager[object]:
    return nullcontext()
