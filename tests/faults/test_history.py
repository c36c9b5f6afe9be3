"""What clients are told while the database fails under them is what happened: checked over random histories."""

import asyncio
import itertools
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import URL

from sqlsessions import Session, SessionMiddleware, SQLAlchemyBackend
from sqlsessions.errors import BackendError
from sqlsessions.payload import decode
from sqlsessions.record import utc_now
from tests.asgi import KEY, serve
from tests.catalogue import create_from_metadata
from tests.faults.history import COUNTER, NO_CREDENTIAL, Operation, Verb, anomalies
from tests.looking import closing, sql
from tests.proxy import proxied
from tests.servers import PostgresServer
from tests.staging import Browser, Do

pytestmark = pytest.mark.anyio

#: A longer history, or another one: TEST_HISTORY_OPERATIONS=100000 TEST_HISTORY_SEED=7.
OPERATIONS = int(os.environ.get("TEST_HISTORY_OPERATIONS", "1000"))
SEED = int(os.environ.get("TEST_HISTORY_SEED", "1"))

PROCESSES = 3
CLIENTS = 12
#: How many sessions are alive at a time: few, so that clients meet.
SESSIONS = 4
#: How many operations there are to one fault, on average.
CALM = 25
USER = "somebody"


# The checker


def done(verb: Verb, begin: float, end: float, **fields: Any) -> Operation:
    """Return an operation on the one session of a history, acknowledged unless told otherwise."""
    return Operation(verb=verb, invoked=begin, completed=end, **{"session": "s", **fields})


CREATED = done("create", 0, 1)
GOOD: dict[str, list[Operation]] = {
    "read your writes": [done("write", 2, 3, key="a", value=1), done("read", 4, 5, value={"a": 1})],
    "a write that was overwritten": [
        done("write", 2, 3, key="a", value=1),
        done("write", 4, 5, key="a", value=2),
        done("read", 6, 7, value={"a": 2}),
    ],
    "two writes at once, either last": [
        done("write", 2, 5, key="a", value=1),
        done("write", 3, 4, key="a", value=2),
        done("read", 6, 7, value={"a": 1}),
    ],
    "a read beside a write": [done("write", 2, 5, key="a", value=1), done("read", 3, 4, value={})],
    "a write without an answer that took effect late": [
        done("write", 2, inf, key="a", value=1),
        done("read", 3, 4, value={}),
        done("read", 5, 6, value={"a": 1}),
    ],
    "a write that was refused": [done("write", 2, 3, key="a", value=1, refused=True), done("read", 4, 5, value={})],
    "a read beside the end": [done("revoke", 2, 5), done("read", 3, 4, value={}), done("read", 6, 7)],
    "an end without an answer": [done("revoke", 2, inf), done("read", 3, 4, value={}), done("read", 5, 6)],
    "a renewal": [
        done("renew", 2, 3, value=1),
        done("read", 4, 5),
        done("read", 4, 5, credential=1, value={}),
        done("write", 6, 7, key="a", value=1, credential=1),
    ],
    "a renewal without an answer": [done("renew", 2, inf), done("read", 4, 5)],
    "additions of which one may have been": [
        done("add", 2, 3, value=1),
        done("add", 4, inf),
        done("add", 5, 6, value=3),
        done("read", 7, 8, value={COUNTER: 3}),
    ],
    "a list": [
        done("list", 2, 3, session="", value={"s"}),
        done("revoke", 4, 5),
        done("list", 6, 7, session="", value=set()),
    ],
}

BAD: dict[str, tuple[str, list[Operation]]] = {
    "never there": ("lost write", [done("write", 2, 3, key="a", value=1), done("read", 4, 5, value={})]),
    "overwritten by what was before": (
        "lost write",
        [
            done("write", 2, 3, key="a", value=1),
            done("write", 4, 5, key="a", value=2),
            done("read", 6, 7, value={"a": 1}),
        ],
    ),
    "there and gone, though never acknowledged": (
        "lost write",
        [done("write", 2, inf, key="a", value=1), done("read", 3, 4, value={"a": 1}), done("read", 5, 6, value={})],
    ),
    "nobody's": ("phantom write", [done("read", 2, 3, value={"a": 1})]),
    "another's": ("phantom write", [done("write", 2, 3, key="a", value=1), done("read", 4, 5, value={"a": 1, "b": 1})]),
    "refused and yet done": (
        "phantom write",
        [done("write", 2, 3, key="a", value=1, refused=True), done("read", 4, 5, value={"a": 1})],
    ),
    "seen beforehand": ("phantom write", [done("read", 2, 3, value={"a": 1}), done("write", 4, 5, key="a", value=1)]),
    "alive after its end": ("resurrected", [done("revoke", 2, 3), done("read", 4, 5, value={})]),
    "alive after it had gone": (
        "resurrected",
        [done("revoke", 2, inf), done("read", 3, 4), done("read", 5, 6, value={})],
    ),
    "written after its end": ("after the end", [done("revoke", 2, 3), done("write", 4, 5, key="a", value=1)]),
    "listed after its end": ("resurrected", [done("revoke", 2, 3), done("list", 4, 5, session="", value={"s"})]),
    "gone by itself": ("lost session", [done("read", 2, 3)]),
    "not in the list": ("lost session", [done("list", 2, 3, session="", value=set())]),
    "the old secret": ("superseded secret", [done("renew", 2, 3, value=1), done("read", 4, 5, value={})]),
    "a write by the old secret": (
        "superseded secret",
        [done("renew", 2, 3, value=1), done("write", 4, 5, key="a", value=1)],
    ),
    "two new secrets": ("two heirs", [done("renew", 2, 4, value=1), done("renew", 3, 5, value=2)]),
    "counted twice": (
        "phantom increment",
        [done("add", 2, 3, value=1), done("add", 4, 5, value=2), done("read", 6, 7, value={COUNTER: 3})],
    ),
    "refused and yet counted": (
        "phantom increment",
        [done("add", 2, 3, refused=True), done("read", 4, 5, value={COUNTER: 1})],
    ),
    "told too much": ("phantom increment", [done("add", 2, 3, value=2)]),
    "not counted": ("lost increment", [done("add", 2, 3, value=1), done("read", 4, 5, value={COUNTER: 0})]),
    "counted as one": ("lost increment", [done("add", 2, 4, value=1), done("add", 3, 5, value=1)]),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_history(name: str) -> None:
    """What a database without faults may do is no anomaly."""
    assert anomalies([CREATED, *GOOD[name]]) == []


@pytest.mark.parametrize("name", BAD)
def test_a_bad_history(name: str) -> None:
    """What it must not do is one, by its name."""
    what, history = BAD[name]
    found = anomalies([CREATED, *history])
    assert found
    assert all(what in line for line in found), found


# The clients


@dataclass(frozen=True, slots=True)
class Key:
    """What a client knows of a session: its handle, and a cookie with one of its secrets in turn."""

    handle: str
    credential: int
    cookies: dict[str, str]


@dataclass
class World:
    """Several processes before one database, and what their clients have noted."""

    processes: list[SQLAlchemyBackend]
    random: random.Random
    #: What goes wrong next: returns when it has.
    faults: Iterator[Callable[[], Awaitable[object]]] = field(default_factory=lambda: iter(()))
    history: list[Operation] = field(default_factory=list)
    #: One for each session that has not been ended.
    keys: list[Key] = field(default_factory=list)
    #: Keys that nothing should be found with.
    old: list[Key] = field(default_factory=list)
    #: How the operations ended.
    ends: Counter[str] = field(default_factory=Counter)
    left: int = OPERATIONS

    def __post_init__(self) -> None:
        self.apps = [
            SessionMiddleware(serve, secret_key=KEY, backend=backend, purge_interval=None, on_gone="raise")
            for backend in self.processes
        ]
        self._clock = itertools.count()
        self._values = itertools.count()
        self._credentials = itertools.count(1)
        self._failing = asyncio.Lock()

    async def client(self) -> None:
        """Do one thing after the other, anywhere, until all operations are used up."""
        verbs: dict[Callable[[], Awaitable[None]], int] = {
            self.read: 30, self.write: 25, self.add: 20, self.renew: 6, self.revoke: 3, self.look_up: 4,
        }  # fmt: skip
        while self.left > 0:
            self.left -= 1
            if len(self.keys) < SESSIONS:
                await self.create()
            else:
                (verb,) = self.random.choices(list(verbs), list(verbs.values()))
                await verb()
            if self.random.random() < 1 / CALM and not self._failing.locked():
                async with self._failing:
                    await next(self.faults)()
                    self.ends["fault"] += 1

    async def create(self) -> None:
        """Log in."""
        handles: list[str] = []

        async def begin(session: Session) -> None:
            session.login(USER)
            await session.save()
            handles.append(str(session.id))

        browser = Browser(self.random.choice(self.apps))
        operation = await self.visit(browser, begin, verb="create")
        if operation.acknowledged:
            (handle,) = handles
            self.history.append(replace(operation, session=handle))
            self.keys.append(Key(handle, 0, browser.cookies))

    async def read(self) -> None:
        """Look into a session."""
        key, seen = self.key(), dict[str, Any]()
        operation = await self.visit(self.browser(key), seen.update, verb="read", key=key)
        if operation.acknowledged:
            whose = seen.pop("user_id", None)
            assert whose in (None, USER)
            self.history.append(replace(operation, value=None if whose is None else seen))

    async def write(self) -> None:
        """Set a key, to a value of its own."""
        key, name, value = self.key(), self.random.choice("abc"), next(self._values)
        do: Do = lambda session: session.update({name: value})  # noqa: E731
        operation = await self.visit(self.browser(key), do, verb="write", key=key)
        self.history.append(replace(operation, key=name, value=value))

    async def add(self) -> None:
        """Count one on."""
        key, counted = self.key(), list[int]()

        async def count(session: Session) -> None:
            data = await session.atomic(lambda data: {**data, COUNTER: data.get(COUNTER, 0) + 1})
            counted.append(data[COUNTER])

        operation = await self.visit(self.browser(key), count, verb="add", key=key)
        self.history.append(replace(operation, value=counted[-1]) if operation.acknowledged else operation)

    async def renew(self) -> None:
        """Exchange the secret."""
        key = self.key()
        browser = self.browser(key)
        operation = await self.visit(browser, Session.renew, verb="renew", key=key)
        if operation.possible:
            self.forget(key)
        if operation.acknowledged:
            heir = Key(key.handle, next(self._credentials), browser.cookies)
            operation = replace(operation, value=heir.credential)
            self.keys.append(heir)
        self.history.append(operation)

    async def revoke(self) -> None:
        """Log out, or end a session from elsewhere."""
        key = self.random.choice(self.keys)
        self.forget(key)
        if self.random.random() < 1 / 2:
            self.history.append(await self.visit(self.browser(key), Session.clear, verb="revoke", key=key))
            return
        invoked, completed = next(self._clock), inf
        try:
            await self.random.choice(self.processes).revoke(UUID(key.handle))
            completed = next(self._clock)
        except BackendError as error:
            self.ends[f"revoke {type(error).__name__}"] += 1
        self.history.append(Operation(verb="revoke", session=key.handle, invoked=invoked, completed=completed))

    async def look_up(self) -> None:
        """Ask for the user's sessions."""
        invoked = next(self._clock)
        try:
            found = await self.random.choice(self.processes).list_for_user(USER, limit=OPERATIONS)
        except BackendError as error:
            self.ends[f"list {type(error).__name__}"] += 1
            return
        handles = {str(record.id) for record in found}
        self.history.append(Operation(verb="list", invoked=invoked, completed=next(self._clock), value=handles))

    async def look_back(self, backend: SQLAlchemyBackend) -> None:
        """Read every row there is or was, past all cookies."""
        for handle in sorted({operation.session for operation in self.history} - {""}):
            read = Operation(verb="read", session=handle, credential=NO_CREDENTIAL, invoked=next(self._clock))
            record = await backend.load(UUID(handle), utc_now())
            seen = None if record is None else decode(record.data)
            if seen is not None:
                assert seen.pop("user_id") == USER
            self.history.append(replace(read, completed=next(self._clock), value=seen))

    async def visit(self, browser: Browser, do: Do, *, verb: Verb, key: Key | None = None) -> Operation:
        """Return what was asked for by a request, and how it was answered; now and then the client does not stay."""
        about: dict[str, Any] = {"verb": verb} | ({"session": key.handle, "credential": key.credential} if key else {})
        refused = False

        async def if_there(session: Session) -> None:
            nonlocal refused
            refused = key is not None and verb != "read" and str(session.id) != key.handle
            done = None if refused else do(session)
            if isinstance(done, Awaitable):
                await done

        invoked = next(self._clock)
        request = asyncio.create_task(browser.do(if_there))
        if self.random.random() < 1 / CALM:
            for _ in range(self.random.randrange(100)):
                await asyncio.sleep(0)
            request.cancel()
        await asyncio.wait({request})
        if request.cancelled():
            self.ends["cancelled"] += 1
            return Operation(invoked=invoked, **about)
        status = request.result().status
        self.ends[f"{verb} {status}"] += 1
        if status == 503:
            return Operation(invoked=invoked, **about)
        assert status in (200, 409)
        return Operation(invoked=invoked, completed=next(self._clock), refused=refused or status == 409, **about)

    def key(self) -> Key:
        """Return a key that should be good, or now and then one that should not."""
        return self.random.choice(self.old[-SESSIONS:] if self.old and self.random.random() < 1 / 8 else self.keys)

    def forget(self, key: Key) -> None:
        """Expect no more of a key."""
        self.keys = [other for other in self.keys if other.handle != key.handle]
        self.old.append(key)

    def browser(self, key: Key) -> Browser:
        """Return a browser with this key, before any of the processes."""
        browser = Browser(self.random.choice(self.apps))
        browser.cookies |= key.cookies
        return browser


def make_backend(url: str | URL) -> SQLAlchemyBackend:
    """Return the backend of one process."""
    return SQLAlchemyBackend(url)


async def check(
    url: str, routes: Sequence[str | URL], faults: Callable[[World], list[Callable[[], Awaitable[object]]]]
) -> None:
    """Assert that what the clients of processes on *routes* are told is what happened, whatever goes wrong meanwhile.

    In the end it is looked at by *url*, where nothing goes wrong.
    """
    async with AsyncExitStack() as stack:
        processes = [await stack.enter_async_context(closing(make_backend(route))) for route in routes]
        world = World(processes, random.Random(SEED))  # noqa: S311 - to be the same again
        kinds = faults(world)
        world.random.shuffle(kinds)
        world.faults = itertools.cycle(kinds)
        await asyncio.gather(*(world.client() for _ in range(CLIENTS)))
        for app in world.apps:
            await app._manager.drain()
        await world.look_back(await stack.enter_async_context(closing(make_backend(url))))
    found = anomalies(world.history)
    again = f"TEST_HISTORY_SEED={SEED} TEST_HISTORY_OPERATIONS={OPERATIONS}"
    assert not found, "\n".join([again, str(dict(sorted(world.ends.items()))), *found[:10]])
    # Not everything may have failed: of that there would be nothing to tell.
    acknowledged = Counter(operation.verb for operation in world.history if operation.acknowledged)
    assert set(acknowledged) == {"create", "read", "write", "add", "renew", "revoke", "list"}, again


class Cluster:
    """A PostgreSQL that can be restarted below a running event loop, and keeps what it has acknowledged."""

    def __init__(self) -> None:
        # Started, restarted and stopped in one thread, which lives as long.
        self._thread = ThreadPoolExecutor(1)
        self.server = PostgresServer({"synchronous_commit": "on"})
        self._thread.submit(self.server.__enter__).result()

    async def restart(self) -> None:
        """Crash it, and start it again."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._restart)

    def _restart(self) -> None:
        self.server.stop("immediate")
        self.server.start()

    def end(self) -> None:
        """Stop it for good."""
        self._thread.submit(self.server.__exit__, None, None, None).result()
        self._thread.shutdown()


@pytest.fixture
def cluster(postgres: PostgresServer) -> Iterator[Cluster]:
    """A PostgreSQL of its own; skipped where there is none."""
    cluster = Cluster()
    yield cluster
    cluster.end()


async def test_a_history_on_postgresql(cluster: Cluster) -> None:
    """Connections are ended, cut, or lose answers, the server crashes, clients leave: whatever was acknowledged is so,
    nothing that has ended comes back, and each increment counts once (R29, R52, R53, R74).
    """
    url = cluster.server.create_database("history")
    await create_from_metadata(url)

    async def terminate() -> None:
        await sql(
            url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
            " AND datname = current_database()",
        )

    async with AsyncExitStack() as stack:
        routes = [await stack.enter_async_context(proxied(url)) for _ in range(PROCESSES)]

        def faults(world: World) -> list[Callable[[], Awaitable[object]]]:
            async def cut() -> None:
                world.random.choice(routes)[0].cut()

            async def lose() -> None:
                world.random.choice(routes)[0].answers_to_lose += 1

            return [*[terminate, cut, lose] * 6, cluster.restart]

        await check(url, [route for _, route in routes], faults)


async def test_a_history_on_sqlite(sqlite_sessions_url: str) -> None:
    """The same on a file that somebody else locks, by processes that close and begin again (R29, R52, R53, R62)."""

    def faults(world: World) -> list[Callable[[], Awaitable[object]]]:
        async def lock() -> None:
            await sql(sqlite_sessions_url, "BEGIN IMMEDIATE", "SELECT count(*) FROM web_sessions", "ROLLBACK")

        async def close() -> None:
            await world.random.choice(world.processes).aclose()

        return [lock, close]

    await check(sqlite_sessions_url, [sqlite_sessions_url] * PROCESSES, faults)
