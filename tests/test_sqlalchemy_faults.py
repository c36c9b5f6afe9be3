"""What becomes of an operation when clients leave, servers hang, connections break, event loops end, processes fork."""

import asyncio
import gc
import itertools
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from anyio.lowlevel import checkpoint
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from sqlsessions.backends.sqlalchemy import SQLAlchemyBackend
from sqlsessions.errors import BackendTimeout, BackendUnavailable, DuplicateId
from sqlsessions.record import Record
from sqlsessions.testing import EVER, MINUTE, START, expecting, following, make_record
from tests.commands import run
from tests.looking import PATIENCE, blocked, closing, everything, pids, recover, sql, threads_ended
from tests.proxy import proxied
from tests.servers import PgBouncer

pytestmark = pytest.mark.anyio

#: A deadline short enough to wait for, and how much later a busy machine may notice that it has passed.
DEADLINE = timedelta(seconds=0.3)
SLACK = timedelta(seconds=0.5)

Operation = Callable[[SQLAlchemyBackend, Record], Awaitable[object]]

WRITES: dict[str, Operation] = {
    "insert": lambda backend, record: backend.insert(record),
    "replace": lambda backend, record: backend.replace(following(record, data="{}"), expecting(record)),
    "touch": lambda backend, record: backend.touch(
        record.id, record.secret_hash, now=START + MINUTE, expires_at=record.expires_at
    ),
    "delete": lambda backend, record: backend.delete(record.id),
    "purge": lambda backend, record: backend.purge(record.expires_at, 10),
}


@pytest.fixture
async def backend(sessions_url: str) -> AsyncIterator[SQLAlchemyBackend]:
    """A backend on each engine."""
    async with closing(SQLAlchemyBackend(sessions_url)) as backend:
        yield backend


@asynccontextmanager
async def on_time(kind: type[BaseException], *, after: timedelta = DEADLINE) -> AsyncIterator[None]:
    """Assert that the block raises this kind of error, and not much later than it should."""
    begun = time.monotonic()
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind
    assert time.monotonic() - begun < (after + SLACK).total_seconds()


# clients that leave


@pytest.mark.parametrize("name", WRITES)
async def test_cancelled_at_each_step(backend: SQLAlchemyBackend, sessions_url: str, name: str) -> None:
    """Wherever a caller is cancelled it is cancelled, the operation is carried out whole, and no connection is lost
    (R70, R71).
    """
    for steps in range(8):
        record = make_record()
        if name != "insert":
            await backend.insert(record)
        task = asyncio.ensure_future(WRITES[name](backend, record))
        for _ in range(steps):
            await checkpoint()
        finished = task.done()
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled() is not finished
        await backend.delete(record.id)
    await backend.aclose()
    await backend.ping()
    if sessions_url.startswith("postgresql"):
        assert len(await pids(sessions_url)) == 1
        assert await sql(sessions_url, "SELECT 1 FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'") == []


async def test_disconnects_cost_no_connection(postgres_sessions_url: str) -> None:
    """Fifty clients that leave midway cost no connection: the server sees the same ones before and after (R72)."""
    async with closing(SQLAlchemyBackend(postgres_sessions_url, pool_size=2)) as backend:
        await asyncio.gather(*(backend.ping() for _ in range(8)))
        before = await pids(postgres_sessions_url)
        for steps in range(50):
            task = asyncio.ensure_future(backend.load(make_record().id, START))
            for _ in range(steps % 10):
                await checkpoint()
            task.cancel()
        await asyncio.gather(*(backend.ping() for _ in range(8)))
        assert await pids(postgres_sessions_url) == before
        assert len(before) == 2


async def test_cancelled_logout(backend: SQLAlchemyBackend) -> None:
    """A delete whose caller is cancelled as soon as it has begun takes effect nevertheless (R72)."""
    record = make_record()
    await backend.insert(record)
    task = asyncio.ensure_future(backend.delete(record.id))
    await checkpoint()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await backend.aclose()
    assert await backend.load(record.id, EVER) is None


async def test_closed_while_working(backend: SQLAlchemyBackend) -> None:
    """A close that is cancelled itself still gives the connections back."""
    await backend.ping()
    work = [asyncio.ensure_future(backend.ping()) for _ in range(20)]
    await checkpoint()
    closing_it = asyncio.ensure_future(backend.aclose())
    await checkpoint()
    closing_it.cancel()
    await asyncio.wait({closing_it})
    await asyncio.gather(*work)
    await backend.aclose()


# databases that let nobody in


@pytest.mark.parametrize(
    ("change", "meaning"),
    [
        (lambda url: url.set(database="nowhere"), r"no database of this name: check the URL .*3D000"),
        (lambda url: url.set(username="nobody"), r"does not let this user in: check the URL, .*28000"),
        (lambda url: url.set(host="nobody.invalid"), "host is not known: check the URL"),
        (lambda url: url.set(port=1), "no connection to the database .*Refused"),
    ],
    ids=["database", "user", "host", "port"],
)
async def test_a_url_that_leads_nowhere(
    postgres_sessions_url: str, change: Callable[[sa.URL], sa.URL], meaning: str
) -> None:
    """What is wrong with a URL is said in words of ours: those of servers may quote anything (R107)."""
    async with closing(SQLAlchemyBackend(change(sa.make_url(postgres_sessions_url)))) as backend:
        with pytest.raises(BackendUnavailable, match=meaning):
            await backend.ping()


async def test_a_file_that_is_none(tmp_path: Path) -> None:
    """The same of SQLite's files."""
    (tmp_path / "text.db").write_text("something else" * 1000)
    for name, meaning in (("text.db", "is no SQLite database"), ("nowhere/sessions.db", "cannot be opened")):
        async with closing(SQLAlchemyBackend(f"sqlite+aiosqlite:///{tmp_path}/{name}")) as backend:
            with pytest.raises(BackendUnavailable, match=f"{meaning}: check the URL"):
                await backend.load(make_record().id, START)
    await threads_ended()


# servers that hang


async def test_stopped_server_process(postgres_sessions_url: str) -> None:
    """A server process that hangs holds its caller until the deadline and nobody else; then all is well (R73)."""
    async with closing(SQLAlchemyBackend(postgres_sessions_url, pool_size=2, deadline=DEADLINE)) as backend:
        await backend.ping()
        (pid,) = await pids(postgres_sessions_url)
        os.kill(pid, signal.SIGSTOP)
        try:
            async with on_time(BackendTimeout):
                await backend.load(make_record().id, START)
            await everything(backend)
        finally:
            os.kill(pid, signal.SIGCONT)
        await everything(backend)


@pytest.mark.parametrize("name", WRITES)
async def test_black_hole(postgres_sessions_url: str, name: str) -> None:
    """A network that swallows packets holds nobody longer than the deadline, on old connections and on new ones; what
    was given up is not sent again when the network is back (R73).
    """
    record = make_record()
    async with (
        proxied(postgres_sessions_url) as (proxy, url),
        closing(SQLAlchemyBackend(url, pool_size=2, deadline=DEADLINE)) as backend,
    ):
        await backend.insert(record)
        sent, proxy.mode = proxy.statements, "drop"
        for _ in range(3):
            async with on_time(BackendTimeout):
                await WRITES[name](backend, record)
        async with on_time(BackendUnavailable, after=timedelta(0)):  # the circuit is open
            await WRITES[name](backend, record)
        proxy.mode = "pass"
        await backend.aclose()
        assert proxy.statements == sent
        async with closing(SQLAlchemyBackend(url)) as patient:
            assert await patient.load(record.id, START) == record


async def test_locked_table(postgres_sessions_url: str) -> None:
    """A lock that somebody else holds bounds the wait to the deadline; once released, all is well (R83)."""
    engine = create_async_engine(postgres_sessions_url)
    async with closing(SQLAlchemyBackend(postgres_sessions_url, deadline=DEADLINE)) as backend:
        async with engine.begin() as connection:
            await connection.execute(sa.text("LOCK TABLE web_sessions"))
            async with on_time(BackendTimeout):
                await backend.load(make_record().id, START)
        await everything(backend)
    await engine.dispose()


async def test_locked_file(sqlite_sessions_url: str) -> None:
    """An SQLite file locked by somebody else does too; callers find no place left at once while the given-up ones wait
    on, and afterwards all is well (R73).
    """
    engine = create_async_engine(sqlite_sessions_url, isolation_level="AUTOCOMMIT")
    async with closing(SQLAlchemyBackend(sqlite_sessions_url, pool_size=2, deadline=DEADLINE)) as backend:
        async with engine.connect() as connection:
            await connection.execute(sa.text("BEGIN EXCLUSIVE"))
            for _ in range(2):
                async with on_time(BackendTimeout):
                    await backend.load(make_record().id, START)
            async with on_time(BackendUnavailable, after=timedelta(0)):
                await backend.load(make_record().id, START)
            await connection.execute(sa.text("ROLLBACK"))
        await recover(backend)
        await everything(backend)
    await engine.dispose()


# connections that break


async def test_dead_connections(postgres_sessions_url: str) -> None:
    """Pooled connections that died meanwhile are replaced: no operation notices (R74)."""
    async with closing(SQLAlchemyBackend(postgres_sessions_url)) as backend:
        for name, write in WRITES.items():
            record = make_record()
            if name != "insert":
                await backend.insert(record)
            await asyncio.gather(*(backend.ping() for _ in range(10)))
            await terminate(postgres_sessions_url)
            assert await write(backend, record) in (None, True, 1), name
            await backend.delete(record.id)
        await terminate(postgres_sessions_url)
        assert await backend.load(make_record().id, START) is None


async def terminate(url: str) -> None:
    """End the server processes of everybody else in this database, and wait until they have ended."""
    await sql(
        url,
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )


async def test_restarted_server_is_told_from_missing_session(postgres_sessions_url: str) -> None:
    """While a connection breaks again and again a record is not absent: the backend is unavailable."""
    record = make_record()
    async with proxied(postgres_sessions_url) as (proxy, url), closing(SQLAlchemyBackend(url)) as backend:
        await backend.insert(record)
        assert await backend.load(record.id, START) == record
        proxy.answers_to_lose = 2
        with pytest.raises(BackendUnavailable):
            await backend.load(record.id, START)
        assert await backend.load(record.id, START) == record


async def test_lost_answer_to_replace(postgres_sessions_url: str) -> None:
    """A replace whose answer was lost finds out that it was carried out, and is not carried out twice."""
    record, other = make_record(), make_record()
    async with proxied(postgres_sessions_url) as (proxy, url), closing(SQLAlchemyBackend(url, pool_size=1)) as backend:
        await backend.insert(record)
        await backend.insert(other)
        await backend.replace(following(other), expecting(other))
        sent = proxy.statements
        proxy.answers_to_lose = 1
        changed = following(record, data='{"changed":true}')
        assert await backend.replace(changed, expecting(record)) is True
        assert proxy.statements == sent + 2  # the UPDATE, and the question whether it was carried out
        assert await backend.load(record.id, START) == changed


async def test_lost_answer_to_missed_replace(postgres_sessions_url: str) -> None:
    """A replace whose answer was lost and which had missed is told that it missed."""
    record = make_record()
    async with proxied(postgres_sessions_url) as (proxy, url), closing(SQLAlchemyBackend(url, pool_size=1)) as backend:
        await backend.insert(record)
        changed = following(record)
        await backend.replace(changed, expecting(record))
        proxy.answers_to_lose = 1
        # Versions only grow: a later one than what is there has not been there.
        assert await backend.replace(following(changed), expecting(record)) is False
        assert await backend.load(record.id, START) == changed


async def test_lost_answer_with_a_write_on_top(postgres_sessions_url: str) -> None:
    """A replace whose answer was lost, and on top of which somebody else has written before it could ask, is not said
    to have missed: it would be made a second time.
    """
    record = make_record()
    mine = following(record, data='{"mine":1}')
    theirs = following(mine, data='{"mine":1,"theirs":1}')
    async with (
        proxied(postgres_sessions_url) as (proxy, url),
        closing(SQLAlchemyBackend(postgres_sessions_url)) as other,
        meanwhile(url, lambda: other.replace(theirs, expecting(mine))) as engine,
        closing(SQLAlchemyBackend(engine, pool_size=1)) as backend,
    ):
        await backend.insert(record)
        proxy.answers_to_lose = 1
        with pytest.raises(BackendUnavailable):
            await backend.replace(mine, expecting(record))
        assert await backend.load(record.id, START) == theirs


@asynccontextmanager
async def meanwhile(url: sa.URL, act: Callable[[], Awaitable[object]]) -> AsyncIterator[AsyncEngine]:
    """Give an engine that lets somebody act while it makes its second connection, in place of a broken one."""
    engine = create_async_engine(url)
    connections = itertools.count(1)

    @event.listens_for(engine.sync_engine, "connect")
    def connected(connection: Any, _: object) -> None:
        if next(connections) == 2:
            connection.run_async(lambda _: act())

    yield engine
    await engine.dispose()


async def test_lost_answers_while_the_server_is_still_at_it(postgres_sessions_url: str) -> None:
    """Changes whose answers were lost, and whose rows the server has still locked for them, are not said to have
    missed once it has committed them: they would be made a second time.
    """
    await sql(
        postgres_sessions_url,
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.5); RETURN NEW; END $$",
        "CREATE TRIGGER slow BEFORE UPDATE ON web_sessions FOR EACH STATEMENT EXECUTE FUNCTION slow()",
    )
    records = [make_record() for _ in range(4)]
    async with proxied(postgres_sessions_url) as (proxy, url), closing(SQLAlchemyBackend(url)) as backend:
        await asyncio.gather(*(backend.insert(record) for record in records))
        news = [following(record, data='{"n":1}') for record in records]
        writing = asyncio.gather(
            *(backend.replace(new, expecting(old)) for new, old in zip(news, records, strict=True))
        )
        while not await sql(postgres_sessions_url, "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"):
            await checkpoint()
        proxy.cut()
        assert await writing == [True] * 4
        assert [await backend.load(record.id, START) for record in records] == news


async def test_lost_answer_to_a_logout(postgres_sessions_url: str) -> None:
    """An end whose answer was lost, and which finds nothing when it is tried again, is not said to have failed."""
    record = make_record()
    async with proxied(postgres_sessions_url) as (proxy, url), closing(SQLAlchemyBackend(url, pool_size=1)) as backend:
        await backend.insert(record)
        proxy.answers_to_lose = 1
        assert await backend.revoke(record.id)
        assert await backend.load(record.id, EVER) is None


async def test_lost_answer_to_insert(postgres_sessions_url: str) -> None:
    """An insert whose answer was lost finds its own record, and takes it for no duplicate."""
    record = make_record()
    async with proxied(postgres_sessions_url) as (proxy, url), closing(SQLAlchemyBackend(url, pool_size=1)) as backend:
        await backend.insert(make_record())
        proxy.answers_to_lose = 1
        await backend.insert(record)
        assert await backend.load(record.id, START) == record


async def test_lost_answer_to_duplicate(postgres_sessions_url: str) -> None:
    """An insert whose answer was lost still raises DuplicateId when the record there is somebody else's."""
    record = make_record()
    async with proxied(postgres_sessions_url) as (proxy, url), closing(SQLAlchemyBackend(url, pool_size=1)) as backend:
        await backend.insert(record)
        proxy.answers_to_lose = 1
        with pytest.raises(DuplicateId):
            await backend.insert(make_record(id=record.id))
        assert await backend.load(record.id, START) == record


@pytest.mark.parametrize("fate", ["expected", "changed"])
async def test_lost_answer_to_delete(postgres_sessions_url: str, fate: str) -> None:
    """A conditional delete whose answer was lost finds out whether the record is gone."""
    record, other = make_record(), make_record()
    async with proxied(postgres_sessions_url) as (proxy, url), closing(SQLAlchemyBackend(url, pool_size=1)) as backend:
        await backend.insert(record)
        await backend.insert(other)
        await backend.delete(other.id, expecting(other))
        proxy.answers_to_lose = 1
        if fate == "expected":
            assert await backend.delete(record.id, expecting(record)) is True
            assert await backend.load(record.id, EVER) is None
        else:
            assert await backend.delete(record.id, expecting(following(record))) is False
            assert await backend.load(record.id, EVER) == record


async def test_late_insert(postgres_sessions_url: str) -> None:
    """An insert that the server carries out only after the connection broke is recognised as well."""
    record = make_record()
    engine = create_async_engine(postgres_sessions_url)
    async with proxied(postgres_sessions_url) as (proxy, url), closing(SQLAlchemyBackend(url, pool_size=1)) as backend:
        await backend.insert(make_record())
        async with engine.begin() as connection:
            await connection.execute(sa.text("LOCK TABLE web_sessions IN SHARE MODE"))
            task = asyncio.create_task(backend.insert(record))
            await blocked(postgres_sessions_url, 1)
            proxy.cut()
            await blocked(postgres_sessions_url, 2)
        await task
        assert await backend.load(record.id, START) == record
    await engine.dispose()


# event loops and processes


def test_loops_in_turn(sessions_url: str) -> None:
    """One backend serves one event loop after the other; the end of a loop closes its connections (R65)."""
    backend = SQLAlchemyBackend(sessions_url)
    for _ in range(3):
        asyncio.run(everything(backend))
        gc.collect()  # would warn of a connection left open, and warnings are errors
        if sessions_url.startswith("postgresql"):
            assert asyncio.run(pids(sessions_url)) == set()


async def test_second_loop(postgres_sessions_url: str) -> None:
    """In a second event loop beside the first, connections are not kept: each is closed after its use (R65)."""
    async with closing(SQLAlchemyBackend(postgres_sessions_url)) as backend:
        await backend.ping()
        first = await pids(postgres_sessions_url)

        async def beside() -> None:
            await everything(backend)
            assert await pids(postgres_sessions_url) == first

        await asyncio.to_thread(asyncio.run, beside())
        await everything(backend)
        assert await pids(postgres_sessions_url) == first


def test_many_loops_at_once(sessions_url: str) -> None:
    """Event loops in several threads may begin to use a backend at the same time."""
    backend = SQLAlchemyBackend(sessions_url)
    together = threading.Barrier(6)
    done: list[None] = []

    def work() -> None:
        together.wait(PATIENCE)
        done.append(asyncio.run(everything(backend)))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(done) == 6


async def test_aclose(backend: SQLAlchemyBackend, sessions_url: str) -> None:
    """A backend may be closed before it was used, twice, and used again."""
    await backend.aclose()
    await everything(backend)
    await backend.aclose()
    await backend.aclose()
    if sessions_url.startswith("postgresql"):
        assert await pids(sessions_url) == set()
    await everything(backend)


FORK = """
import asyncio, gc, os, sys
from sqlsessions.backends.sqlalchemy import SQLAlchemyBackend
from tests.looking import everything

backend = SQLAlchemyBackend(sys.argv[1])

async def main():
    await asyncio.gather(*(everything(backend) for _ in range(5)))
    child = os.fork()
    if not child:
        asyncio.run(everything(backend))
        gc.collect()
        os._exit(0)
    # In a thread, so that parent and child work at the same time on what they might share.
    ended = asyncio.create_task(asyncio.to_thread(os.waitpid, child, 0))
    while not ended.done():
        await everything(backend)
    assert (await ended)[1] == 0, ended
    await everything(backend)

if sys.argv[2] == "used":
    asyncio.run(main())
else:
    child = os.fork()
    asyncio.run(everything(backend))
    if child:
        assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("when", ["used", "unused"])
def test_fork(sessions_url: str, tmp_path: Path, when: str) -> None:
    """A forked process opens connections of its own, and neither uses nor closes its parent's (R65)."""
    (tmp_path / "fork.py").write_text(FORK)
    root = Path(__file__).parents[1]
    # Python 3.12 warns of forks in processes with threads, which is what this is about.
    ignore = "ignore::DeprecationWarning"
    done = run(
        "fork",
        sessions_url,
        when,
        cwd=tmp_path,
        PYTHONPATH=f"{root / 'src'}:{root}:{tmp_path}",
        PYTHONWARNINGS=f"error,{ignore}",
    )
    assert (done.returncode, done.stderr) == (0, "")


# PgBouncer


async def test_pgbouncer(pgbouncer: PgBouncer, postgres_sessions_url: str) -> None:
    """Behind PgBouncer in transaction mode every statement may meet another server process, and all is well (R117)."""
    database = str(sa.make_url(postgres_sessions_url).database)
    engine = create_async_engine(
        f"{pgbouncer.url(database)}?prepared_statement_cache_size=0",
        connect_args={"statement_cache_size": 0, "prepared_statement_name_func": lambda: ""},
    )
    try:
        async with closing(SQLAlchemyBackend(engine)) as backend:
            await asyncio.gather(*(everything(backend) for _ in range(40)))
        assert await sql(postgres_sessions_url, "SELECT * FROM web_sessions") == []
    finally:
        await terminate(postgres_sessions_url)
