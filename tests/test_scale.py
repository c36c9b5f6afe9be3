"""A million sessions: what each statement reads there, and what an update leaves, by PostgreSQL's own account."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine

from sqlsessions import SQLAlchemyBackend, migrate
from sqlsessions.purge import MAX_BATCH_SIZE
from sqlsessions.record import Record
from sqlsessions.testing import MINUTE, PARALLEL, expecting, following, make_record
from tests.crowd import NOW, PER_USER, fill, id_of
from tests.looking import closing, sql
from tests.servers import PostgresServer

pytestmark = pytest.mark.anyio

ROWS = 1_000_000
EXPIRED = 100_000
#: The number of a session that is alive and has a user; those next to it are its user's others.
ALIVE = 900_000

#: A driver plans with the values at first, and without them once it has sent a statement five times.
PLANS = ["force_custom_plan", "force_generic_plan"]


@dataclass(frozen=True)
class Plan:
    """How one statement was executed."""

    #: What it did, from the outside in, each with the index it used.
    steps: list[str]
    #: The pages that it looked at, whether they were in memory or not.
    buffers: int


@dataclass(frozen=True)
class Explained:
    """A backend, and the plans of the statements sent since they were last cleared."""

    backend: SQLAlchemyBackend
    plans: list[Plan]

    async def again(self, operation: Callable[[SQLAlchemyBackend], Awaitable[Any]]) -> list[Plan]:
        """Return the plans of an operation the second time: the first one also reads the catalogue."""
        await operation(self.backend)
        self.plans.clear()
        await operation(self.backend)
        return self.plans


@pytest.fixture(scope="module")
def crowded_url(postgres: PostgresServer, postgres_template: str) -> Iterator[str]:
    """The URL of a database with a million sessions, a tenth of them expired."""
    url = postgres.create_database("crowded", postgres_template)
    asyncio.run(fill(url, ROWS, expired=EXPIRED))
    yield url
    postgres.drop_database("crowded")


@pytest.fixture(params=PLANS)
async def explained(crowded_url: str, request: pytest.FixtureRequest) -> AsyncIterator[Explained]:
    """A backend on a million sessions."""
    async with explaining(crowded_url, request.param) as explained:
        yield explained


async def test_load(explained: Explained) -> None:
    """Loading is one probe of the primary key: three pages of the index and the one with the row."""
    [plan] = await explained.again(lambda backend: loaded(backend, ALIVE))
    assert plan.steps == ["Index Scan web_sessions_pkey"]
    assert plan.buffers <= 4


async def test_load_many(explained: Explained) -> None:
    """Parallel requests cost four pages each at most, however many statements they are sent as."""
    spread = range(ALIVE, ROWS, 5_000)

    async def load(backend: SQLAlchemyBackend) -> None:
        await asyncio.gather(*(loaded(backend, number) for number in spread))

    plans = await explained.again(load)
    assert plans
    for plan in plans:
        assert_by(plan, "web_sessions_pkey")
    assert sum(plan.buffers for plan in plans) <= 4 * len(spread)


async def test_miss(explained: Explained) -> None:
    """An id that nobody has costs no more than one that somebody has."""
    [plan] = await explained.again(lambda backend: backend.load(make_record().id, NOW))
    assert plan.buffers <= 4


WRITES: dict[str, Callable[[SQLAlchemyBackend, Record], Awaitable[object]]] = {
    "replace": lambda backend, record: backend.replace(following(record), expecting(record)),
    "touch": lambda backend, record: backend.touch(
        record.id, record.secret_hash, now=NOW + MINUTE, expires_at=record.expires_at + MINUTE
    ),
    "delete": lambda backend, record: backend.delete(record.id),
    "delete unchanged": lambda backend, record: backend.delete(record.id, expecting(record)),
}


@pytest.mark.parametrize("name", WRITES)
async def test_write(explained: Explained, name: str) -> None:
    """Every write finds its row by the primary key."""
    record = make_record(expires_at=NOW + timedelta(hours=1))
    await explained.backend.insert(record)
    explained.plans.clear()
    assert await WRITES[name](explained.backend, record)
    [plan] = explained.plans
    assert plan.steps == ["ModifyTable", "Index Scan web_sessions_pkey"]
    await explained.backend.delete(record.id)


async def test_users_sessions(explained: Explained) -> None:
    """A user's sessions are listed and ended by the index on users."""
    user = ALIVE // PER_USER
    plans = await explained.again(lambda backend: backend.list_for_user(user, NOW))
    for _ in range(2):
        await explained.backend.delete_for_user(user, keep=id_of(ALIVE, ROWS))
    await explained.backend.delete_for_user("nobody")
    listing, *endings = plans
    assert len(endings) == 3
    assert_by(listing, "web_sessions_user_id")
    for plan in endings:
        # What is found is locked first, and then deleted.
        assert plan.steps[:2] == ["ModifyTable", "LockRows"]
        assert plan.steps[-1] == "Index Scan web_sessions_pkey"
        assert_by(Plan(plan.steps[2:-1], plan.buffers), "web_sessions_user_id")


#: How a purge finds the oldest; what is deleted comes behind it.
FINDING = ["ModifyTable", "Limit", "LockRows", "Index Scan web_sessions_expires_at"]


@pytest.mark.parametrize("batch_size", [1, 1_000, MAX_BATCH_SIZE])
async def test_purge(explained: Explained, batch_size: int) -> None:
    """A purge finds the oldest in the order of the expiry index, deletes by the primary key, and sorts nothing."""
    assert await explained.backend.purge(NOW, batch_size) == batch_size
    [plan] = explained.plans
    assert plan.steps[:4] == FINDING
    assert_by(Plan(plan.steps[4:], plan.buffers), "web_sessions_pkey")


async def test_purge_of_nothing(explained: Explained) -> None:
    """A purge that finds nothing looks at the edge of the expiry index and is done."""
    [plan] = await explained.again(lambda backend: backend.purge(NOW - timedelta(days=365), MAX_BATCH_SIZE))
    assert plan.steps[:4] == FINDING
    # What would be deleted may be known by either, as the planner sees how few have expired.
    assert plan.steps[4:] in (["Index Scan web_sessions_pkey"], ["Index Scan web_sessions_expires_at"])
    assert plan.buffers <= 3


# What updates leave behind

SESSIONS, ROUNDS = 1_000, 5

Update = Callable[[Record, int], Record]


def cart(record: Record, turn: int) -> Record:
    """Put things into the cart, or take some out: from 600 to 900 bytes."""
    items = [
        {"sku": f"{number:08x}", "name": f"Item {number:012x}", "quantity": turn, "price": "12.90"}
        for number in range(8 + (record.version + turn) % 5)
    ]
    return following(record, data=json.dumps({"cart": items}, separators=(",", ":")))


def extended(record: Record, turn: int) -> Record:
    """Change the cart of a session that is due to be extended."""
    return cart(record, turn)._replace(expires_at=record.expires_at + MINUTE, last_seen_at=NOW + turn * MINUTE)


@pytest.mark.parametrize(
    ("update", "least", "most"), [(cart, 0.95, 1.0), (extended, 0.0, 0.0)], ids=["unmoved", "moved"]
)
async def test_hot(postgres_url: str, update: Update, least: float, most: float) -> None:
    """Changing a session is a HOT update, which leaves the indexes alone, unless its expiry moves.

    Visitors come in any order: the versions that neighbours leave behind in one transaction cannot make room for it.
    """
    await migrate.upgrade(postgres_url)
    await fill(postgres_url, SESSIONS, items=8)
    connections: list[asyncpg.Connection] = []
    engine = create_async_engine(postgres_url)
    event.listen(engine.sync_engine, "connect", lambda adapted, _: connections.append(adapted.driver_connection))

    async def change(numbers: Iterable[int]) -> None:
        for number in numbers:
            record = await loaded(backend, number)
            for turn in range(ROUNDS):
                before, record = record, update(record, turn)
                assert await backend.replace(record, expecting(before))

    async with closing(SQLAlchemyBackend(engine)) as backend:
        visitors = random.Random(4).sample(range(SESSIONS), SESSIONS)  # noqa: S311 - no secret
        await asyncio.gather(*(change(visitors[first::PARALLEL]) for first in range(PARALLEL)))
        # A server process keeps its counts to itself for a second otherwise.
        for connection in connections:
            await connection.execute("SELECT pg_stat_force_next_flush()")
    [counted] = await sql(postgres_url, "SELECT * FROM pg_stat_user_tables WHERE relname = 'web_sessions'")
    assert counted.n_tup_upd == SESSIONS * ROUNDS
    assert least <= counted.n_tup_hot_upd / counted.n_tup_upd <= most


async def loaded(backend: SQLAlchemyBackend, number: int) -> Record:
    """Return the session with this number, which must be there."""
    record = await backend.load(id_of(number, SESSIONS if number < SESSIONS else ROWS), NOW)
    assert record is not None
    return record


def assert_by(plan: Plan, index: str) -> None:
    """Assert that the table is reached by this index alone, one way or the other."""
    scans = [step for step in plan.steps if "Scan" in step and step != "Bitmap Heap Scan"]
    assert scans in ([f"Index Scan {index}"], [f"Bitmap Index Scan {index}"])


@asynccontextmanager
async def explaining(url: str, mode: str) -> AsyncIterator[Explained]:
    """Provide a backend whose server tells how it executed each statement, planned in one *mode*."""
    plans: list[Plan] = []
    settings = {
        "session_preload_libraries": "auto_explain",
        "auto_explain.log_min_duration": "0",
        "auto_explain.log_analyze": "on",
        "auto_explain.log_buffers": "on",
        "auto_explain.log_format": "json",
        "auto_explain.log_level": "notice",
        "plan_cache_mode": mode,
    }
    engine = create_async_engine(url, connect_args={"server_settings": settings})

    def note(_: object, message: asyncpg.PostgresLogMessage) -> None:
        plans.append(plan_in(message.message))

    event.listen(engine.sync_engine, "connect", lambda adapted, _: adapted.driver_connection.add_log_listener(note))
    async with closing(SQLAlchemyBackend(engine)) as backend:
        yield Explained(backend, plans)


def plan_in(message: str) -> Plan:
    """Return the plan in what the server says of a statement."""
    top = json.loads(message[message.index("{") :])["Plan"]
    steps = [f"{step['Node Type']} {step.get('Index Name', '')}".rstrip() for step in steps_of(top)]
    return Plan(steps, top["Shared Hit Blocks"] + top["Shared Read Blocks"])


def steps_of(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a step of a plan and all those below it."""
    yield step
    for below in step.get("Plans", []):
        yield from steps_of(below)
