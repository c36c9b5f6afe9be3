"""Requests that are cancelled, at whichever await: nothing is half-way, and no connection pays for it (R70-R72)."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from types import coroutine
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine

from sqlsessions import Session, SQLAlchemyBackend
from sqlsessions.payload import decode
from sqlsessions.purge import purge
from sqlsessions.record import Record
from tests.looking import everything, pids, sql
from tests.staging import Do, Site, Staged

pytestmark = pytest.mark.anyio

#: How many connections the backend may have.
POOL_SIZE = 2


@dataclass
class Steps:
    """Counts the awaits of all tasks, those that work on somebody's behalf included, and cancels one task at one."""

    #: Whether every later await cancels it once more, as anyio's cancel scopes do, below which Starlette streams.
    again: bool = False
    taken: int = 0
    #: Whether the cancellation came before the task had ended.
    cancelled: bool = False
    _target: asyncio.Task[Any] | None = None
    _at: int = 0

    def make_task(
        self,
        loop: asyncio.AbstractEventLoop,
        work: Coroutine[Any, Any, Any] | Generator[Any, None, Any],
        **options: Any,
    ) -> asyncio.Task[Any]:
        """Return a task for *work* whose awaits count; a task factory."""
        assert isinstance(work, Coroutine)
        return asyncio.Task(self._counted(work), loop=loop, **options)

    async def run(self, work: Coroutine[Any, Any, object], *, cancel_at: int) -> None:
        """Run *work* and cancel it at this await, counted from here. What it raises is raised; not the cancellation."""
        self.taken, self.cancelled, self._at = 0, False, cancel_at
        self._target = asyncio.create_task(work)
        await asyncio.wait({self._target})
        assert self._target.cancelled() is self.cancelled, "a cancellation was swallowed"
        if not self.cancelled:
            self._target.result()
        self._target = None

    async def _counted(self, work: Coroutine[Any, Any, Any]) -> Any:
        return await self._each(work)

    @coroutine
    def _each(self, work: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        resume = partial(work.send, None)
        while True:
            try:
                awaited = resume()
            except StopIteration as end:
                return end.value
            self._step()
            try:
                resume = partial(work.send, (yield awaited))
            except BaseException as error:  # noqa: BLE001 - whatever is thrown in is thrown on
                resume = partial(work.throw, error)

    def _step(self) -> None:
        self.taken += 1
        if self._target is not None and (self.taken == self._at or (self.again and self.taken > self._at)):
            self.cancelled = self._target.cancel() or self.cancelled


@dataclass
class Shop:
    """A site, its database and what is counted about both."""

    site: Site
    backend: SQLAlchemyBackend
    url: str
    steps: Steps
    #: Every connection that was ever opened.
    connections: list[object] = field(default_factory=list)

    async def settled(self) -> list[Record]:
        """Return what is stored when all work has ended."""
        await self.site.app._manager.drain()
        return await self.site.records()

    async def assert_well(self, opened: int | None = None) -> None:
        """Assert that the pool is whole and the database free, with no connection opened beyond those *opened*."""
        await self.backend.delete_all()
        await asyncio.gather(*(everything(self.backend) for _ in range(2 * POOL_SIZE)))
        assert opened is None or len(self.connections) <= max(opened, POOL_SIZE)
        if self.url.startswith("postgresql"):
            assert len(await pids(self.url)) <= POOL_SIZE
            assert await sql(self.url, "SELECT 1 FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'") == []
        else:
            await sql(self.url, "PRAGMA busy_timeout = 0", "BEGIN EXCLUSIVE", "ROLLBACK")


@pytest.fixture(params=["sqlite_sessions_url", "shared_postgres_url"], ids=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """The URL of a database with our table, on each engine in turn."""
    return str(request.getfixturevalue(request.param))


@pytest.fixture(params=[False, True], ids=["once", "again and again"])
async def shop(request: pytest.FixtureRequest, url: str) -> AsyncIterator[Shop]:
    """A shop on each engine, where requests are cancelled in either way."""
    steps = Steps(again=request.param)
    loop = asyncio.get_running_loop()
    loop.set_task_factory(steps.make_task)
    engine = create_async_engine(url)
    backend = make_backend(engine)
    await backend.delete_all()
    shop = Shop(Site(Staged(backend)), backend, url, steps)
    event.listen(engine.sync_engine, "connect", lambda connection, _: shop.connections.append(connection))
    await asyncio.gather(*(everything(backend) for _ in range(2 * POOL_SIZE)))
    yield shop
    loop.set_task_factory(None)
    await backend.aclose()
    await engine.dispose()


def make_backend(engine: Any) -> SQLAlchemyBackend:
    """Return the backend that is tested."""
    return SQLAlchemyBackend(engine, pool_size=POOL_SIZE)


def summary(records: list[Record]) -> "Stored":
    """Return whose sessions there are, and what is in them."""
    return [(record.user_id, decode(record.data)) for record in records]


def read(session: Session) -> None:
    """Look into the session."""
    assert session["cart"] == [1]


def write(session: Session) -> None:
    """Change it."""
    session["cart"] = [2]


async def update(session: Session) -> None:
    """Change it atomically."""
    await session.atomic(lambda data: data.update(cart=[2]))


def login(session: Session) -> None:
    """Become somebody."""
    session.login("somebody")


def become_another(session: Session) -> None:
    """Become somebody else: the one session ends and another begins."""
    session["user_id"] = "other"


def empty(session: Session) -> None:
    """Take the last thing out."""
    session.pop("cart")


#: Whose sessions there are, and what is in them.
Stored = list[tuple[str | None, dict[str, Any]]]

OLD: Stored = [(None, {"cart": [1]})]

#: What each does, and what is stored if it was done.
COMMITS: dict[str, tuple[Do, Stored]] = {
    "read": (read, OLD),
    "write": (write, [(None, {"cart": [2]})]),
    "atomic": (update, [(None, {"cart": [2]})]),
    "login": (login, [("somebody", {"cart": [1], "user_id": "somebody"})]),
    "empty": (empty, []),
}


@pytest.mark.parametrize("name", COMMITS)
async def test_a_request_cancelled_at_each_await(shop: Shop, name: str) -> None:
    """Cancelled at its k-th await, for every k, a request has committed all or nothing (R70, R71, R72)."""
    do, new = COMMITS[name]
    opened, at = len(shop.connections), 0
    while not at or shop.steps.cancelled:
        at += 1
        browser = await shop.site.filled(cart=[1])
        await shop.steps.run(browser.do(do), cancel_at=at)
        stored = summary(await shop.settled())
        assert stored == new if not shop.steps.cancelled else stored in (OLD, new), at
        await shop.backend.delete_all()
    assert at > 1
    await shop.assert_well(opened)


async def test_a_new_session_cancelled_at_each_await(shop: Shop) -> None:
    """A login from nothing, cancelled at its k-th await, has made one whole session or none (R70)."""
    opened, at = len(shop.connections), 0
    while not at or shop.steps.cancelled:
        at += 1
        await shop.steps.run(shop.site.browser().do(login), cancel_at=at)
        stored = summary(await shop.settled())
        assert stored in ([], [("somebody", {"user_id": "somebody"})]), at
        assert shop.steps.cancelled or stored
        await shop.backend.delete_all()
    await shop.assert_well(opened)


async def test_a_renewal_cancelled_at_each_await(shop: Shop) -> None:
    """Cancelled at its k-th await, a renewal leaves one secret: the old one, which works on, or another (R27, R70)."""
    opened, at = len(shop.connections), 0
    while not at or shop.steps.cancelled:
        at += 1
        browser = await shop.site.filled(cart=[1])
        twin = browser.twin()
        (old,) = await shop.site.records()
        await shop.steps.run(browser.do(Session.renew), cancel_at=at)
        (new,) = await shop.settled()
        assert decode(new.data) == {"cart": [1]}
        known = new.secret_hash == old.secret_hash
        assert await twin.data() == ({"cart": [1]} if known else {}), at
        assert shop.steps.cancelled or not known
        await shop.backend.delete_all()
    await shop.assert_well(opened)


async def test_another_user_cancelled_at_each_await(shop: Shop) -> None:
    """Cancelled at its k-th await, a change of users leaves the one's session or the other's, never both (R44, R70)."""
    old = [("somebody", {"cart": [1], "user_id": "somebody"})]
    opened, at = len(shop.connections), 0
    while not at or shop.steps.cancelled:
        at += 1
        browser = await shop.site.filled(cart=[1], user_id="somebody")
        await shop.steps.run(browser.do(become_another), cancel_at=at)
        assert summary(await shop.settled()) in (old, [("other", {"user_id": "other"})]), at
        await shop.backend.delete_all()
    await shop.assert_well(opened)


async def clear(session: Session, asked: list[bool]) -> None:
    """Log out."""
    session.clear()
    asked.append(True)


async def clear_finally(session: Session, asked: list[bool]) -> None:
    """Log out, whatever becomes of a save()."""
    session["cart"] = [2]
    try:
        await session.save()
    finally:
        session.clear()
        asked.append(True)


@pytest.mark.parametrize("log_out", [clear, clear_finally])
async def test_a_logout_cancelled_at_each_await(
    shop: Shop, log_out: Callable[[Session, list[bool]], Coroutine[Any, Any, None]]
) -> None:
    """Cancelled at its k-th await, a request that has come to its clear() has logged out, also where the clear() comes
    from a handler whose save() is what was cancelled (R28, R72).
    """
    opened, at = len(shop.connections), 0
    asked: list[bool] = []
    while not at or shop.steps.cancelled:
        at += 1
        asked.clear()
        browser = await shop.site.filled(cart=[1])
        await shop.steps.run(browser.do(lambda session: log_out(session, asked)), cancel_at=at)
        assert summary(await shop.settled()) == ([] if asked else OLD), at
        await shop.backend.delete_all()
    assert asked
    await shop.assert_well(opened)


#: What administrators do, to one of two sessions of one user; and how many of them are left.
ADMINISTRATION: dict[str, tuple[Callable[[Shop, Record], Coroutine[Any, Any, object]], int]] = {
    "load": (lambda shop, record: shop.backend.load(record.id, shop.site.clock()), 2),
    "list": (lambda shop, record: _listed(shop), 2),
    "revoke": (lambda shop, record: shop.backend.revoke(record.id), 1),
    "revoke_all": (lambda shop, record: shop.backend.revoke_all("somebody"), 0),
    "purge": (lambda shop, record: purge(shop.backend, clock=lambda: shop.site.clock() + timedelta(days=99)), 0),
}


async def _listed(shop: Shop) -> object:
    return await shop.backend.list_for_user("somebody", shop.site.clock())


@pytest.mark.parametrize("name", ADMINISTRATION)
async def test_administration_cancelled_at_each_await(shop: Shop, name: str) -> None:
    """What is called on the backend, cancelled at its k-th await, was done whole or not at all (R70, R71)."""
    act, left = ADMINISTRATION[name]
    at = 0
    while not at or shop.steps.cancelled:
        at += 1
        for _ in range(2):
            await shop.site.filled(user_id="somebody")
        record = (await shop.site.records())[0]
        await shop.steps.run(act(shop, record), cancel_at=at)
        await shop.backend.aclose()
        found = len(await shop.site.records())
        assert found in ((2, left) if shop.steps.cancelled else (left,)), at
        await shop.backend.delete_all()
    await shop.assert_well()


async def test_a_first_connection_cancelled_at_each_await(shop: Shop) -> None:
    """A request that is cancelled while its connection is being opened loses no place in the pool (R70)."""
    browser = await shop.site.filled(cart=[1])
    at = 0
    while not at or shop.steps.cancelled:
        at += 1
        await shop.backend.aclose()
        await shop.steps.run(browser.twin().do(read), cancel_at=at)
        await shop.site.app._manager.drain()
    assert at > 5
    assert await browser.data() == {"cart": [1]}
    await shop.assert_well()


async def test_a_neighbour_that_fails(shop: Shop) -> None:
    """A task group whose other task fails cancels a save(), and the transaction of nobody stays open (R70, R72)."""

    async def fail() -> None:
        raise ZeroDivisionError

    async def beside(session: Session) -> None:
        session["cart"] = [2]
        async with asyncio.TaskGroup() as group:
            group.create_task(session.save())
            group.create_task(fail())

    opened = len(shop.connections)
    for _ in range(10):
        browser = await shop.site.filled(cart=[1])
        with pytest.raises(ExceptionGroup):
            await browser.do(beside)
        assert summary(await shop.settled()) in (OLD, [(None, {"cart": [2]})])
        await shop.backend.delete_all()
    await shop.assert_well(opened)
