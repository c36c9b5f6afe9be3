"""What only a database can get wrong: connections, statements, errors, and answers that never come."""

import asyncio
import json
import re
import sqlite3
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool, StaticPool
from sqlalchemy.sql import visitors
from sqlalchemy.util import await_only

from sqlsessions.backends.sqlalchemy import SQLAlchemyBackend
from sqlsessions.errors import (
    BackendError,
    BackendReadOnly,
    BackendUnavailable,
    ConfigurationError,
    CorruptData,
    DuplicateId,
    SchemaMissing,
)
from sqlsessions.purge import purge
from sqlsessions.record import Record
from sqlsessions.schema import Spelled, Statements, columns, sessions_table
from sqlsessions.testing import EVER, MINUTE, START, expecting, following, make_record
from tests.looking import PATIENCE, closing, everything, pids, sql, threads_ended
from tests.servers import PostgresServer

pytestmark = pytest.mark.anyio

#: Stands in data and hashes wherever errors are provoked, and must not appear in them.
CANARY = "canary-7f3a"


@pytest.fixture
async def backend(sessions_url: str) -> AsyncIterator[SQLAlchemyBackend]:
    """A backend on each engine."""
    async with closing(SQLAlchemyBackend(sessions_url)) as backend:
        yield backend


# where connections come from


async def test_url_and_engine(sessions_url: str) -> None:
    """A URL as text, as an object, or an engine: all are the same to the backend."""
    engine = create_async_engine(sessions_url)
    for given in (sessions_url, sa.make_url(sessions_url), engine):
        async with closing(SQLAlchemyBackend(given)) as backend:
            await everything(backend)
    await engine.dispose()


async def test_url_without_driver(sessions_url: str) -> None:
    """A URL that names no driver gets the asynchronous one, as does the old postgres://."""
    scheme, rest = sessions_url.split("+", 1)[0], sessions_url.split(":", 1)[1]
    for name in {scheme, scheme.replace("postgresql", "postgres")}:
        async with closing(SQLAlchemyBackend(f"{name}:{rest}")) as backend:
            await backend.ping()


async def test_sslmode(postgres_sessions_url: str) -> None:
    """What libpq calls sslmode, as the URLs of hosters do, is asyncpg's ssl."""
    async with closing(SQLAlchemyBackend(f"{postgres_sessions_url}?sslmode=disable")) as backend:
        await everything(backend)
    async with closing(SQLAlchemyBackend(f"{postgres_sessions_url}?sslmode=require")) as backend:
        await fails(backend.ping(), BackendUnavailable)  # the server has no certificate


@pytest.mark.skipif(not hasattr(sqlite3, "LEGACY_TRANSACTION_CONTROL"), reason="from Python 3.12 on")
async def test_a_transaction_at_all_times(sqlite_sessions_url: str) -> None:
    """An engine whose driver has a transaction open at all times, as SQLAlchemy has it, commits ours all the same."""
    engine = create_async_engine(sqlite_sessions_url, connect_args={"autocommit": False})
    async with closing(SQLAlchemyBackend(engine)) as backend:
        await everything(backend)
        await backend.insert(make_record())
        assert await sql(sqlite_sessions_url, "SELECT count(*) FROM web_sessions") == [(1,)]
    await engine.dispose()


async def test_a_listener_that_begins(sessions_url: str) -> None:
    """A listener for all engines that begins transactions, as in SQLAlchemy's recipe for SQLite, leaves none open."""
    elsewhere = sessions_url if sessions_url.startswith("postgresql") else f"{sessions_url}?timeout=0.1"

    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    event.listen(Engine, "begin", begin)
    try:
        async with closing(SQLAlchemyBackend(sessions_url)) as backend:
            await everything(backend)
            assert await backend.purge(START, 10) == 0
            for user in ("one", "other"):
                await backend.insert(make_record(user_id=user))
            assert await backend.delete_for_user("one") == 1
            assert await sql(elsewhere, "SELECT user_id FROM web_sessions") == [("other",)]
    finally:
        event.remove(Engine, "begin", begin)


async def test_a_connection_that_is_out_while_the_others_are_given_up(sessions_url: str) -> None:
    """What leads to a server of no more use is not kept either if it is in use when that is found out (R81)."""
    async with closing(SQLAlchemyBackend(sessions_url)) as backend:
        await backend.ping()
        room = backend._at_hand()
        assert room is not None
        one, other = await room.connections.take(), await room.connections.take()
        await room.connections.discard(one, others=True)
        await room.connections.give(other)
        assert not room.connections._idle
        await everything(backend)
        assert room.connections._idle


def test_an_operation_in_a_loop_of_its_own(sessions_url: str) -> None:
    """An operation may be asked for where no event loop runs yet, and awaited in one."""
    backend, record = SQLAlchemyBackend(sessions_url), make_record()
    asyncio.run(_closing(backend, backend.insert(record)))
    assert asyncio.run(_closing(backend, backend.load(record.id, START))) == record
    assert asyncio.run(_closing(backend, backend.delete(record.id)))


async def _closing(backend: SQLAlchemyBackend, operation: Awaitable[Any]) -> Any:
    async with closing(backend):
        return await operation


async def test_an_option_that_is_none(postgres_sessions_url: str) -> None:
    """An option that the driver does not know is a mistake in the settings, and named; its value is not."""
    async with closing(SQLAlchemyBackend(f"{postgres_sessions_url}?channel_binding={CANARY}")) as backend:
        with pytest.raises(ConfigurationError, match="'channel_binding'") as caught:
            await backend.ping()
        assert CANARY not in str(caught.value)


@pytest.mark.parametrize("url", ["postgresql+psycopg2://host/x", "nosql://host/x"])
def test_no_such_driver(url: str) -> None:
    """A driver that is not there, or cannot be awaited, is refused at once, with those that can."""
    with pytest.raises(ConfigurationError, match=r"use postgresql\+asyncpg:// or sqlite\+aiosqlite:///"):
        SQLAlchemyBackend(url)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite+aiosqlite://",
        "sqlite+aiosqlite:///:memory:",
        "sqlite+aiosqlite:///file::memory:?uri=true",
        "sqlite+aiosqlite:///file:shared?mode=memory&cache=shared&uri=true",
    ],
)
@pytest.mark.filterwarnings("ignore:Selection of the StaticPool:sqlalchemy.exc.SADeprecationWarning")
def test_memory_refused(url: str) -> None:
    """A database in memory is refused: it is one connection's, and its records end with that."""
    with pytest.raises(ConfigurationError, match=r"in-memory SQLite.*file of their own.*InMemoryBackend"):
        SQLAlchemyBackend(url)


def test_static_pool_refused(sqlite_sessions_url: str) -> None:
    """An engine with one connection for everybody is refused, whatever it is connected to."""
    engine = create_async_engine(sqlite_sessions_url, poolclass=StaticPool)
    with pytest.raises(ConfigurationError, match="StaticPool"):
        SQLAlchemyBackend(engine)


@pytest.mark.parametrize("given", [None, 1, "engine"])
def test_sync_engine_refused(given: object, sqlite_sessions_url: str) -> None:
    """A synchronous engine, or no engine at all, is refused by name."""
    engine: Any = sa.create_engine(sqlite_sessions_url.replace("+aiosqlite", "")) if given == "engine" else given
    with pytest.raises(ConfigurationError, match=f"URL or an AsyncEngine, not {type(engine).__name__}"):
        SQLAlchemyBackend(engine)


def test_url_of_nonsense() -> None:
    """A URL that cannot be read is refused without being quoted: it may hold a password."""
    with pytest.raises(ConfigurationError, match="postgresql\\+asyncpg://") as caught:
        SQLAlchemyBackend(f"//user:{CANARY}@host")
    assert_kept_secret(caught.value)


@pytest.mark.parametrize(
    "settings",
    [{"pool_size": 0}, {"deadline": timedelta(0)}, {"table": "a;b"}, {"table": ""}, {"schema": 'a"b'}, {"table": "A"}],
    ids=str,
)
def test_settings_refused(settings: dict[str, Any], sqlite_sessions_url: str) -> None:
    """A setting that cannot work is refused at construction, by its name (R111)."""
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        SQLAlchemyBackend(sqlite_sessions_url, **settings)


async def test_async_creator(postgres_sessions_url: str) -> None:
    """An engine's own way to connect is the backend's too."""
    url = sa.make_url(postgres_sessions_url)
    calls = 0

    async def connect(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        import asyncpg  # noqa: PLC0415

        return await asyncpg.connect(host=url.host, port=url.port, user=url.username, database=url.database)

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect)
    async with closing(SQLAlchemyBackend(engine)) as backend:
        await everything(backend)
    assert calls == 1


async def test_connect_args(postgres_sessions_url: str) -> None:
    """An engine's connect arguments are the backend's too."""
    engine = create_async_engine(
        postgres_sessions_url, connect_args={"server_settings": {"application_name": "an application"}}
    )
    async with closing(SQLAlchemyBackend(engine)) as backend:
        await backend.ping()
        named = await sql(
            postgres_sessions_url, "SELECT 1 FROM pg_stat_activity WHERE application_name = 'an application'"
        )
    assert len(named) == 1


async def test_connect_listeners(postgres_url: str) -> None:
    """What an application does to each new connection is done to the backend's too, before its first statement."""
    engine = create_async_engine(postgres_url)

    @event.listens_for(engine.sync_engine, "do_connect")
    def password_of_the_day(dialect: Any, record: Any, arguments: Any, parameters: dict[str, Any]) -> None:
        parameters["server_settings"] = {"application_name": "from do_connect"}

    @event.listens_for(engine.sync_engine, "connect")
    def set_search_path(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("SET search_path TO elsewhere")
        cursor.close()
        connection.commit()

    metadata = sa.MetaData(schema="elsewhere")
    sessions_table(metadata, schema="elsewhere")
    await sql(postgres_url, "CREATE SCHEMA elsewhere")
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    await engine.dispose()
    async with closing(SQLAlchemyBackend(engine)) as backend:
        await everything(backend)
        named = await sql(postgres_url, "SELECT 1 FROM pg_stat_activity WHERE application_name = 'from do_connect'")
    assert len(named) == 1


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"), [("json", json.dumps, json.loads), ("uuid", str, str)], ids=["json", "uuid"]
)
async def test_codecs(
    postgres_sessions_url: str, name: str, encoder: Callable[[Any], str], decoder: Callable[[str], Any]
) -> None:
    """How an application has asyncpg read and write its own json and uuid changes nothing about sessions."""
    engine = create_async_engine(postgres_sessions_url)

    @event.listens_for(engine.sync_engine, "connect")
    def set_codec(connection: Any, record: Any) -> None:
        async def set_it(driver: Any) -> None:
            await driver.set_type_codec(name, encoder=encoder, decoder=decoder, schema="pg_catalog")

        connection.run_async(set_it)

    records = [make_record(data='{"a":1}') for _ in range(3)]
    async with closing(SQLAlchemyBackend(engine)) as backend:
        await everything(backend)
        await asyncio.gather(*map(backend.insert, records))
        assert await asyncio.gather(*(backend.load(record.id, START) for record in records)) == records
        assert await asyncio.gather(*(backend.replace(following(each), expecting(each)) for each in records))
        rows = await sql(postgres_sessions_url, "SELECT data #>> '{}' AS text FROM web_sessions")
        assert {row.text for row in rows} == {following(records[0]).data}
    await engine.dispose()


async def test_table_and_schema(postgres_url: str) -> None:
    """The table may have another name, in another schema (R111)."""
    metadata = sa.MetaData()
    sessions_table(metadata, "carts", "shop")
    await sql(postgres_url, "CREATE SCHEMA shop")
    engine = create_async_engine(postgres_url)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    await engine.dispose()
    async with closing(SQLAlchemyBackend(postgres_url, table="carts", schema="shop")) as backend:
        await everything(backend)
        assert "shop.carts" in repr(backend)


async def test_pool_of_its_own(sessions_url: str) -> None:
    """Nothing is borrowed from the application's pool: its one connection, held by it, is no obstacle (R61)."""
    engine = create_async_engine(sessions_url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    async with closing(SQLAlchemyBackend(engine)) as backend:
        async with engine.connect():
            async with asyncio.timeout(PATIENCE):
                await everything(backend)
            assert "Checked out connections: 1" in engine.pool.status()
        await engine.dispose()
        await everything(backend)


# what goes over the wire

OPERATIONS: dict[str, tuple[Callable[[SQLAlchemyBackend, Record], Awaitable[object]], list[str]]] = {
    "load": (lambda backend, record: backend.load(record.id, START), ["SELECT"]),
    "load absent": (lambda backend, record: backend.load(UUID(int=0), START), ["SELECT"]),
    "insert": (lambda backend, record: backend.insert(make_record()), ["INSERT"]),
    "replace": (lambda backend, record: backend.replace(following(record), expecting(record)), ["UPDATE"]),
    "replace missed": (lambda backend, record: backend.replace(record, expecting(following(record))), ["UPDATE"]),
    "touch": (
        lambda backend, record: backend.touch(
            record.id, record.secret_hash, now=START + MINUTE, expires_at=record.expires_at
        ),
        ["UPDATE"],
    ),
    "delete": (lambda backend, record: backend.delete(record.id), ["DELETE"]),
    "delete expected": (lambda backend, record: backend.delete(record.id, expecting(record)), ["DELETE"]),
    "purge": (lambda backend, record: backend.purge(record.expires_at, 10), ["DELETE"]),
    "purge nothing": (lambda backend, record: backend.purge(START, 10), ["DELETE"]),
    "list_for_user": (lambda backend, record: backend.list_for_user("me", START), ["SELECT"]),
    "delete_for_user": (lambda backend, record: backend.delete_for_user("me"), ["DELETE"]),
    "delete_for_user keep": (lambda backend, record: backend.delete_for_user("me", keep=record.id), ["DELETE"]),
    "trim_for_user": (
        lambda backend, record: backend.trim_for_user("me", 1, newest=record.id, now=START),
        ["DELETE"],
    ),
    "delete_all": (lambda backend, record: backend.delete_all(), ["DELETE", "DELETE", "SELECT"]),
    "ping": (lambda backend, record: backend.ping(), ["SELECT"]),
}


async def test_statements_postgresql(postgres: PostgresServer, postgres_sessions_url: str) -> None:
    """Each operation is one statement on the wire, with no BEGIN, COMMIT or ROLLBACK around it (R60)."""
    engine = create_async_engine(postgres_sessions_url, connect_args={"server_settings": {"log_statement": "all"}})
    async with closing(SQLAlchemyBackend(engine, pool_size=1)) as backend:
        await backend.ping()
        (pid,) = await pids(postgres_sessions_url)
        for name, (operate, expected) in OPERATIONS.items():
            record = make_record(user_id="me")
            await backend.insert(record)
            before = len(postgres.log)
            await operate(backend, record)
            said = [line.partition(f"[{pid}] LOG:  ")[2] for line in postgres.log[before:].splitlines()]
            assert [line.partition(": ")[2].split()[0] for line in said if line] == expected, name
            await backend.delete_all()


async def test_statements_sqlite(sqlite_sessions_url: str) -> None:
    """The same in SQLite."""
    engine = create_async_engine(sqlite_sessions_url)
    said: list[str] = []

    @event.listens_for(engine.sync_engine, "connect")
    def trace(connection: Any, record: Any) -> None:
        connection.run_async(lambda driver: driver.set_trace_callback(said.append))

    async with closing(SQLAlchemyBackend(engine, pool_size=1)) as backend:
        for name, (operate, expected) in OPERATIONS.items():
            record = make_record(user_id="me")
            await backend.insert(record)
            said.clear()
            await operate(backend, record)
            assert [statement.split()[0] for statement in said] == expected, name
            await backend.delete_all()


async def test_the_first_of_all_at_once(postgres_sessions_url: str) -> None:
    """Operations that are asked for before any has begun share connections, and those are kept."""
    async with closing(SQLAlchemyBackend(postgres_sessions_url)) as backend:
        await asyncio.gather(*[backend.load(UUID(int=n), START) for n in range(2)])
        kept = await pids(postgres_sessions_url)
        assert len(kept) == 1
        await backend.load(UUID(int=0), START)
        assert await pids(postgres_sessions_url) == kept


async def test_a_purge_keeps_to_its_connection(postgres: PostgresServer, postgres_sessions_url: str) -> None:
    """A purge and the requests between its batches go by different connections, each time the same: a server process
    that was busy for long is given a processor late.
    """
    engine = create_async_engine(postgres_sessions_url, connect_args={"server_settings": {"log_statement": "all"}})
    async with closing(SQLAlchemyBackend(engine)) as backend:
        await asyncio.gather(backend.purge(START, 10), backend.load(UUID(int=0), START))
        assert len(await pids(postgres_sessions_url)) == 2
        before = len(postgres.log)
        for _ in range(5):
            await backend.purge(START, 10)
            await backend.load(UUID(int=0), START)
            await backend.load(UUID(int=1), START)
        said = re.findall(r"\[(\d+)\] LOG:  .*: (DELETE|SELECT)", postgres.log[before:])
    assert len(said) == 15
    assert len(set(said)) == 2
    assert len({pid for pid, _ in said}) == 2


async def count_up(backend: SQLAlchemyBackend, record: Record, times: int) -> None:
    """Add one to the number that the record holds, *times* times, in parallel with others."""
    for _ in range(times):
        found = await backend.load(record.id, START)
        assert found
        while not await backend.replace(following(found, data=str(int(found.data) + 1)), expecting(found)):
            found = await backend.load(record.id, START)
            assert found


@pytest.mark.parametrize("level", ["serializable", "repeatable read"])
async def test_isolation_levels(postgres_sessions_url: str, level: str) -> None:
    """Fifty writers of one row meet no error and lose no update, whatever isolation the server has by default (R59)."""
    database = sa.make_url(postgres_sessions_url).database
    await sql(postgres_sessions_url, f"ALTER DATABASE {database} SET default_transaction_isolation TO '{level}'")
    async with closing(SQLAlchemyBackend(postgres_sessions_url)) as backend:
        record = make_record(data="0")
        await backend.insert(record)
        touches = (
            backend.touch(record.id, record.secret_hash, now=START + n * MINUTE, expires_at=record.expires_at)
            for n in range(50)
        )
        await asyncio.gather(*touches, *(count_up(backend, record, 1) for _ in range(50)))
        loaded = await backend.load(record.id, START)
    assert loaded
    assert loaded.data == "50"


async def test_fifty_writers_sqlite(sqlite_sessions_url: str) -> None:
    """Fifty writers at once, in two applications, meet no "database is locked" and lose no update (R62)."""
    record = make_record(data="0")
    async with (
        closing(SQLAlchemyBackend(sqlite_sessions_url)) as one,
        closing(SQLAlchemyBackend(sqlite_sessions_url)) as other,
    ):
        await one.insert(record)
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(everything(backend) for backend in (one, other) for _ in range(25)))
            await asyncio.gather(count_up(one, record, 10), count_up(other, record, 10))
        loaded = await one.load(record.id, START)
    assert loaded
    assert loaded.data == "20"


# plans


async def fill(url: str, rows: int) -> None:
    """Insert records in bulk: half of them have expired at START, and each user has a hundred."""
    values = [
        {name: getattr(record, name) for name in Record._fields}
        for n in range(rows)
        for record in [make_record(expires_at=START + (n - rows // 2) * MINUTE, user_id=f"user {n // 100}")]
    ]
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.execute(sa.insert(sessions_table(sa.MetaData())), values)
    await engine.dispose()
    await sql(url, "ANALYZE")


async def plan(url: str, choose: Callable[[Statements], Any], **parameters: Any) -> str:
    """Return how the database would run one of our statements."""
    dialect = create_async_engine(url).dialect
    statement = choose(Statements(sessions_table(sa.MetaData()), dialect.name))

    def fill_in(parameter: Any) -> None:
        parameter.value, parameter.required = parameters.get(parameter.key, parameter.value), False

    statement = visitors.cloned_traverse(statement, {}, {"bindparam": fill_in})
    text = statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True})
    explain = "EXPLAIN (COSTS OFF)" if dialect.name == "postgresql" else "EXPLAIN QUERY PLAN"
    return "\n".join(str(row[-1]) for row in await sql(url, f"{explain} {text}".replace(":", "\\:")))


async def test_plans(sessions_url: str) -> None:
    """Loads and writes are one probe of the primary key; purges and lists use their own index; none scans the table
    (R85).
    """
    await fill(sessions_url, 5000)
    postgres = sessions_url.startswith("postgresql")
    by_key = "web_sessions_pkey" if postgres else "sqlite_autoindex_web_sessions_1 (id=?)"
    by_expiry, by_user = "web_sessions_expires_at", "web_sessions_user_id"
    this: dict[str, Any] = {"the_id": UUID(int=1), "now": START}
    explain = partial(plan, sessions_url)
    expired: dict[str, Any] = {"before": START, "limit": 1000}
    theirs: dict[str, Any] = {"the_user_id": "user 3"}
    kept: dict[str, Any] = {"now": START, "limit": 3, "newest": UUID(int=1)}
    purges = [
        await explain(lambda statements: statements.purge.plain, **expired),
        await explain(lambda statements: statements.purge.passing, **expired),
    ]
    plans = [
        (by_key, await explain(lambda statements: statements.load, **this)),
        (by_key, await explain(lambda statements: statements.reread, the_id=UUID(int=1))),
        (by_key, await explain(lambda statements: statements.load_many, ids=[UUID(int=1), UUID(int=2)])),
        (by_key, await explain(lambda statements: statements.delete.plain, the_id=UUID(int=1))),
        (by_key, await explain(lambda statements: statements.delete.passing, the_id=UUID(int=1))),
        *((index, purge) for index in (by_expiry, by_key) for purge in purges),
        (by_user, await explain(lambda statements: statements.list_for_user, the_user_id="user 3", now=START, limit=9)),
        (by_user, await explain(lambda statements: statements.delete_for_user.plain, **theirs)),
        (by_user, await explain(lambda statements: statements.delete_for_user.prompt, **theirs)),
        (by_user, await explain(lambda statements: statements.trim_for_user.plain, **theirs, **kept)),
        (by_user, await explain(lambda statements: statements.trim_for_user.prompt, **theirs, **kept)),
    ]
    for index, found in plans:
        assert index in found, found
        assert "Seq Scan" not in found
        assert "SCAN web_sessions" not in found


async def test_plan_of_many_changes(postgres_sessions_url: str) -> None:
    """Changes of many rows probe the primary key for each, to lock it and to write it; the table is not scanned."""
    await fill(postgres_sessions_url, 5000)
    change = {"the_secret_hash": b"x" * 32, "the_version": 1, "version": 2, "data": "{}", "now": START}
    parameters = columns([{"the_id": UUID(int=number), **change} for number in range(100)])
    statement = Statements(sessions_table(sa.MetaData()), "postgresql").replace_data.many
    spelled = Spelled(statement, create_async_engine(postgres_sessions_url).dialect, list(parameters))
    connection = await asyncpg.connect(postgres_sessions_url.replace("+asyncpg", ""))
    rows = await connection.fetch(f"EXPLAIN (COSTS OFF) {spelled.text}", *spelled.values(parameters))
    await connection.close()
    plan = "\n".join(row[0] for row in rows)
    assert plan.count("Index Scan using web_sessions_pkey") == 2, plan
    assert "Seq Scan" not in plan


# purge


async def test_purge_spares_extended(sessions_url: str) -> None:
    """A session that is extended between the SELECT and the DELETE of a purge survives it (R86)."""
    selected, extended = asyncio.Event(), asyncio.Event()
    engine = create_async_engine(sessions_url)

    @event.listens_for(engine.sync_engine, "do_execute")
    def hold(cursor: Any, statement: str, parameters: Any, context: Any) -> None:
        if statement.startswith("DELETE"):
            selected.set()
            await_only(extended.wait())

    extend, expire = (make_record(expires_at=START + MINUTE) for _ in range(2))
    async with closing(SQLAlchemyBackend(engine)) as purging, closing(SQLAlchemyBackend(sessions_url)) as other:
        for record in (extend, expire):
            await other.insert(record)
        async with asyncio.timeout(PATIENCE):
            work = asyncio.create_task(purging.purge(START + 2 * MINUTE, 10))
            await selected.wait()
            now, until = START + MINUTE / 2, START + 3 * MINUTE
            assert await other.touch(extend.id, extend.secret_hash, now=now, expires_at=until)
            extended.set()
            assert await work == 1
        assert await other.load(extend.id, now) is not None
        assert await other.load(expire.id, EVER) is None


async def test_parallel_purges(sessions_url: str) -> None:
    """Eight purges at once delete every expired row exactly once, and nothing else (R85)."""
    await fill(sessions_url, 4000)
    backends = [SQLAlchemyBackend(sessions_url, pool_size=1, deadline=timedelta(seconds=PATIENCE)) for _ in range(8)]
    counts = await asyncio.gather(*(purge(each, batch_size=100, clock=lambda: START + MINUTE) for each in backends))
    for each in backends:
        await each.aclose()
    assert sum(counts) == 2001
    rows = await sql(sessions_url, "SELECT expires_at FROM web_sessions")
    assert len(rows) == 1999


# errors


def assert_kept_secret(error: BaseException) -> None:
    """Assert that nothing that gets printed of an error holds the canary."""
    shown = "".join(traceback.format_exception(error)) + str(error) + repr(error)
    assert CANARY not in shown.replace(f'"{CANARY}"', "")


async def fails(call: Awaitable[object], kind: type[BackendError | CorruptData], match: str | None = None) -> None:
    """Assert that a call raises exactly this kind of error, which gives nothing away."""
    with pytest.raises(kind, match=match) as caught:
        await call
    assert type(caught.value) is kind
    assert_kept_secret(caught.value)


async def test_missing_table(database_url: str) -> None:
    """Without the table every operation names the command that makes it (R75)."""
    async with closing(SQLAlchemyBackend(database_url)) as backend:
        for name, (operate, _) in OPERATIONS.items():
            if name != "ping":
                await fails(operate(backend, make_record()), SchemaMissing, "alembic upgrade head.*sqlsessions migrate")


async def test_missing_column(sessions_url: str) -> None:
    """So it does when the table lacks a column that this version needs."""
    await sql(sessions_url, "ALTER TABLE web_sessions DROP COLUMN persistent")
    async with closing(SQLAlchemyBackend(sessions_url)) as backend:
        await fails(backend.load(UUID(int=0), START), SchemaMissing, "behind")
        await fails(backend.insert(make_record()), SchemaMissing, "behind")


async def assert_read_only(backend: SQLAlchemyBackend, record: Record) -> None:
    """Assert that writes are refused, and reads are not."""
    for name, (operate, _) in OPERATIONS.items():
        if name in {"load", "load absent", "list_for_user", "ping"}:
            await operate(backend, record)
        else:
            await fails(operate(backend, record), BackendReadOnly, "accepts no writes")


async def test_read_only_file(sqlite_sessions_url: str) -> None:
    """An SQLite file that is open for reading only is that, and not an outage (R80)."""
    record = make_record(user_id="me")
    async with closing(SQLAlchemyBackend(sqlite_sessions_url)) as backend:
        await backend.insert(record)
    path = sqlite_sessions_url.partition("///")[2]
    async with closing(SQLAlchemyBackend(f"sqlite+aiosqlite:///file:{path}?mode=ro&uri=true")) as backend:
        await assert_read_only(backend, record)


async def test_read_only_server(postgres_sessions_url: str) -> None:
    """A server that became a standby is that too; its connections are given up, so that the promoted one is found (R80,
    R81).
    """
    database = sa.make_url(postgres_sessions_url).database
    record = make_record(user_id="me")
    async with closing(SQLAlchemyBackend(postgres_sessions_url)) as backend:
        await backend.insert(record)
        await sql(
            postgres_sessions_url,
            f"ALTER DATABASE {database} SET default_transaction_read_only TO on",
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )
        await assert_read_only(backend, record)
        await sql(
            postgres_sessions_url,
            "SET default_transaction_read_only TO off",
            f"ALTER DATABASE {database} SET default_transaction_read_only TO off",
        )
        # One write meets the connections of old, and is told; they are given up together.
        await fails(backend.delete(record.id), BackendReadOnly)
        assert await backend.delete(record.id)


async def test_disk_full(sqlite_sessions_url: str) -> None:
    """When the disk is full loads and deletes go on, and what needs room is refused as read-only (R82)."""
    engine = create_async_engine(sqlite_sessions_url)
    limit: list[str] = []

    @event.listens_for(engine.sync_engine, "connect")
    def small(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        for statement in limit:
            cursor.execute(statement)
        cursor.close()

    record = make_record()
    async with closing(SQLAlchemyBackend(engine)) as backend:
        await backend.insert(record)
    limit.append("PRAGMA max_page_count = 1")
    async with closing(SQLAlchemyBackend(engine)) as backend:
        await fails(backend.insert(make_record(data=f'{{"a":"{CANARY * 9000}"}}')), BackendReadOnly)
        assert await backend.load(record.id, START) == record
        assert await backend.delete(record.id)


async def test_refused_connection(postgres_sessions_url: str) -> None:
    """A server that is not there is unavailable (R75)."""
    url = sa.make_url(postgres_sessions_url).set(port=1, password=CANARY)
    async with closing(SQLAlchemyBackend(url)) as backend:
        for operate, _ in OPERATIONS.values():
            await fails(operate(backend, make_record()), BackendUnavailable)
    assert CANARY not in repr(backend)


@pytest.mark.parametrize(
    "change", [{"database": "nowhere"}, {"username": "nobody-we-know"}, {"host": "host.invalid"}], ids=str
)
async def test_refused_login(postgres_sessions_url: str, change: Any) -> None:
    """A server that does not let us in, or cannot be found, is unavailable (R75)."""
    url = sa.make_url(postgres_sessions_url).set(password=CANARY, **change)
    async with closing(SQLAlchemyBackend(url)) as backend:
        await fails(backend.load(UUID(int=0), START), BackendUnavailable)


async def test_too_many_connections(postgres_sessions_url: str) -> None:
    """A server that is full is unavailable, and usable again as soon as there is room."""
    database = sa.make_url(postgres_sessions_url).database
    await sql(
        postgres_sessions_url,
        "CREATE ROLE guest LOGIN",
        "GRANT ALL ON web_sessions TO guest",
        f"ALTER DATABASE {database} CONNECTION LIMIT 1",
    )
    guest = sa.make_url(postgres_sessions_url).set(username="guest")
    engine = create_async_engine(guest, poolclass=NullPool)
    try:
        async with closing(SQLAlchemyBackend(guest)) as backend:
            async with engine.connect():
                await fails(backend.ping(), BackendUnavailable)
            await everything(backend)
    finally:
        await sql(postgres_sessions_url, "DROP OWNED BY guest", "DROP ROLE guest")


async def test_no_such_file(tmp_path: Path) -> None:
    """An SQLite file that cannot be opened is unavailable."""
    async with closing(SQLAlchemyBackend(f"sqlite+aiosqlite:///{tmp_path / CANARY / 'sessions.db'}")) as backend:
        await fails(backend.load(UUID(int=0), START), BackendUnavailable)
    await threads_ended()


async def test_not_a_database(tmp_path: Path) -> None:
    """A file that is not an SQLite database is unavailable."""
    path = tmp_path / "sessions.db"
    path.write_bytes(b"no database at all, but long enough to be looked at" * 99)
    async with closing(SQLAlchemyBackend(f"sqlite+aiosqlite:///{path}")) as backend:
        await fails(backend.load(UUID(int=0), START), BackendUnavailable)


@pytest.mark.parametrize(
    "broken",
    [
        {"secret_hash": None},
        {"data": None},
        {"expires_at": None},
        {"persistent": None},
        {"expires_at": START.replace(tzinfo=None)},
        {"version": 2**70},
        {"idle_timeout": 2**70},
        {"created_at": CANARY},
        {"id": CANARY},
    ],
    ids=str,
)
async def test_impossible_record(backend: SQLAlchemyBackend, broken: dict[str, Any]) -> None:
    """A record that no database takes is an error of ours, of one kind, which quotes neither data nor parameters
    (R107).
    """
    fields = {"user_id": f"user {CANARY}", "data": json.dumps({"password": CANARY})}
    with pytest.raises(BackendError) as caught:
        await backend.insert(make_record(**fields | broken))
    assert not isinstance(caught.value, DuplicateId)
    assert_kept_secret(caught.value)
    await backend.ping()


async def test_duplicate_is_discreet(backend: SQLAlchemyBackend) -> None:
    """A duplicate id is reported without the row (R107)."""
    record = make_record(data=f'{{"password":"{CANARY}"}}', user_id=CANARY)
    await backend.insert(record)
    await fails(backend.insert(record), DuplicateId)


def test_repr(sessions_url: str) -> None:
    """A backend shows its table and dialect, and no password."""
    url = sa.make_url(sessions_url)
    if url.host:
        url = url.set(password=CANARY)
    assert repr(SQLAlchemyBackend(url)) == f"<SQLAlchemyBackend 'web_sessions' on {url.get_backend_name()}>"


CORRUPTIONS = {
    "sqlite": [
        "data = x'80'",
        "data = CAST(x'ff' AS TEXT)",
        "secret_hash = 'text'",
        "secret_hash = 1.5",
        "user_id = x'00ff'",
        "version = 'abc'",
        "version = 1.5",
        "created_at = 'yesterday'",
        "created_at = 7",
        "last_seen_at = x'00'",
        "expires_at = 'zzz'",
        "authenticated_at = '2040-13-32'",
        "idle_timeout = 'long'",
        "format = 'new'",
    ],
    "postgresql": [
        "expires_at = '294276-01-01'",
        "created_at = '0044-03-15 BC'",
    ],
}


@pytest.mark.parametrize("corruption", CORRUPTIONS["sqlite"])
async def test_corrupt_row_sqlite(sqlite_sessions_url: str, corruption: str) -> None:
    """A row that this library cannot have written is corrupt, not an outage; it can be deleted (R99)."""
    await check_corrupt(sqlite_sessions_url, corruption)


@pytest.mark.parametrize("id_", ["'not an id'", "x'fffe'", "x'00'", "5"])
async def test_an_id_that_cannot_be_read(sqlite_sessions_url: str, id_: str) -> None:
    """A row whose very id is none is left out of a list, and ends with its user's others (R99)."""
    async with closing(SQLAlchemyBackend(sqlite_sessions_url)) as backend:
        await backend.insert(make_record(user_id="somebody"))
        await sql(sqlite_sessions_url, f"UPDATE web_sessions SET id = {id_}")  # noqa: S608 - from the list above
        await backend.insert(other := make_record(user_id="somebody"))
        assert await backend.list_for_user("somebody", START) == [other]
        assert await backend.delete_for_user("somebody") == 2


@pytest.mark.parametrize("corruption", CORRUPTIONS["postgresql"])
async def test_corrupt_row_postgresql(postgres_sessions_url: str, corruption: str) -> None:
    """The same in PostgreSQL, whose columns refuse most of it; its timestamps reach further than Python's."""
    await check_corrupt(postgres_sessions_url, corruption)


async def check_corrupt(url: str, corruption: str) -> None:
    """Spoil a row; assert what can be done with it."""
    record = make_record(data=f'{{"password":"{CANARY}"}}', user_id=CANARY)
    async with closing(SQLAlchemyBackend(url, pool_size=1)) as backend:
        await backend.insert(record)
        await sql(url, f"UPDATE web_sessions SET {corruption}")  # noqa: S608 - from the lists above
        await fails(backend.load(record.id, START), CorruptData)
        other = make_record(user_id=CANARY)
        await backend.insert(other)
        assert await backend.list_for_user(CANARY, START) == [other]
        assert not await backend.revoke(record.id, user_id=CANARY)
        assert await backend.load(other.id, START) == other
        assert await backend.delete(record.id)
