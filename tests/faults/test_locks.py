"""Rows, tables and limits of a database that is well, but is needed by somebody else as well."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from anyio.lowlevel import checkpoint
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from sqlsessions.backends.sqlalchemy import SQLAlchemyBackend
from sqlsessions.errors import BackendTimeout, BackendUnavailable
from sqlsessions.record import Record
from sqlsessions.session import Session
from sqlsessions.testing import MINUTE, START, make_record
from tests.asgi import Answer
from tests.faults.ways import DEADLINE, SLACK, Way
from tests.looking import PATIENCE, blocked, closing, everything, pids, sql
from tests.staging import Browser, Do, Site, Staged

pytestmark = pytest.mark.anyio

#: Something done to the session of one record.
Act = Callable[[SQLAlchemyBackend, Record], Awaitable[Any]]

LIMIT = (DEADLINE + SLACK).total_seconds()


@pytest.fixture
async def site(way: Way, postgres_sessions_url: str, anyio_backend: str) -> AsyncIterator[Site]:
    """A site on a database of its own."""
    site = Site(Staged(way.backend(postgres_sessions_url)))
    yield site
    await site.backend.aclose()


@asynccontextmanager
async def holding(url: str, *statements: str) -> AsyncIterator[AsyncConnection]:
    """Keep the locks that these statements take, in a transaction of somebody else's, while the block runs."""
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.connect() as connection, connection.begin():
        for statement in statements:
            await connection.execute(sa.text(statement))
        yield connection


def locking(row: UUID) -> str:
    """Return a statement that locks a row."""
    return f"SELECT 1 FROM web_sessions WHERE id = '{row}' FOR UPDATE"  # noqa: S608


async def timed(browser: Browser, do: Do) -> tuple[Answer, float]:
    """Return the answer, and the seconds it took: no more than it may."""
    begun = time.monotonic()
    answer = await browser.do(do)
    took = time.monotonic() - begun
    assert took < LIMIT
    return answer, took


def count(session: Session) -> None:
    """Change the session."""
    session["n"] = session.get("n", 0) + 1


def read(session: Session) -> None:
    """Look into the session."""
    session.get("n")


def log_in(session: Session) -> None:
    """Begin a session, or renew its secret."""
    session.login("anybody")


async def add(session: Session) -> None:
    """Change the session in one step."""
    await session.atomic(lambda data: data.update(n=data["n"] + 1))


@pytest.mark.parametrize("requests", [1, 8])
@pytest.mark.parametrize("do", [count, add])
async def test_a_row_that_is_locked(
    site: Site, postgres_sessions_url: str, *, requests: int, do: Do, observed: Callable[[str], None]
) -> None:
    """A locked row costs requests to this session, however many, their deadline, and others nothing: no queue behind
    one stuck transaction (R83).
    """
    one = await site.filled(n=0)
    row = (await site.record()).id
    others = [await site.filled(n=0) for _ in range(30)]
    async with holding(postgres_sessions_url, locking(row)):
        waiting = [asyncio.create_task(timed(one, do)) for _ in range(requests)]
        await blocked(postgres_sessions_url)
        assert (await site.browser().do(count)).status == 200
        assert not any(task.done() for task in waiting)
        took = []
        while not all(task.done() for task in waiting):
            for answer, seconds in await asyncio.gather(*(timed(other, count) for other in others)):
                assert answer.status == 200
                took.append(seconds)
        answers = [await task for task in waiting]
        assert {answer.status for answer, _ in answers} == {503}
        assert (await timed(one, read))[0].status == 200
    assert (await one.do(do)).status == 200
    assert (await one.data())["n"] >= 1
    assert [(await other.data())["n"] for other in others] == [len(took) // 30] * 30
    observed(
        f"{len(took)} writes of others, longest {max(took):.2f} s; stuck for {max(took for _, took in answers):.2f} s"
    )


async def test_a_row_that_is_unlocked_in_time(site: Site, postgres_sessions_url: str) -> None:
    """A request that waits for a row is served as soon as the row is free (R83)."""
    one = await site.filled(n=0)
    row = (await site.record()).id
    async with holding(postgres_sessions_url, locking(row)):
        waiting = asyncio.create_task(timed(one, count))
        await blocked(postgres_sessions_url)
        assert (await site.browser().do(count)).status == 200
    assert (await waiting)[0].status == 200
    assert (await one.data())["n"] == 1


async def test_a_locked_row_is_no_outage(site: Site, postgres_sessions_url: str) -> None:
    """Though nobody else has been answered meanwhile, timeouts at one row do not refuse other sessions (R83)."""
    one = await site.filled(n=0)
    row = (await site.record()).id
    other = await site.filled(n=0)
    async with holding(postgres_sessions_url, locking(row)):
        for _ in range(2):
            answers = await asyncio.gather(*(timed(one, count) for _ in range(8)))
            assert {answer.status for answer, _ in answers} == {503}
            assert (await timed(other, count))[0].status == 200
            assert (await timed(one, read))[0].status == 200


#: What changes all rows of a user, as a login and a logout everywhere do, but for the one row.
OF_A_USER: dict[str, Act] = {
    "revoke_all": lambda backend, record: backend.revoke_all("somebody", keep=record.id),
    "trim": lambda backend, record: backend.trim_for_user("somebody", 1, newest=record.id, now=START),
}


@pytest.mark.parametrize("name", OF_A_USER)
async def test_a_row_of_a_user_that_is_locked(way: Way, postgres_sessions_url: str, name: str) -> None:
    """What is to end all sessions of a user waits for a locked one, and lets everybody else pass, however many of it
    there are (R83).
    """
    locked, other, kept = (make_record(user_id="somebody") for _ in range(3))
    async with closing(way.backend(postgres_sessions_url, timedelta(seconds=PATIENCE))) as backend:
        for record in (locked, other, kept):
            await backend.insert(record)
        async with holding(postgres_sessions_url, locking(locked.id)):
            waiting = [asyncio.ensure_future(OF_A_USER[name](backend, kept)) for _ in range(3)]
            for _ in range(30):
                assert await backend.load(other.id, START) == other
            assert not any(task.done() for task in waiting)
        assert sorted(await asyncio.gather(*waiting)) == [0, 0, 2]


@pytest.mark.parametrize("name", OF_A_USER)
async def test_a_locked_row_of_a_user_is_no_outage(way: Way, postgres_sessions_url: str, name: str) -> None:
    """Its timeouts do not refuse other sessions either (R83)."""
    locked, kept = (make_record(user_id="somebody") for _ in range(2))
    async with closing(way.backend(postgres_sessions_url)) as backend:
        for record in (locked, kept):
            await backend.insert(record)
        async with holding(postgres_sessions_url, locking(locked.id)):
            outcomes = await asyncio.gather(*(OF_A_USER[name](backend, kept) for _ in range(8)), return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {BackendTimeout}
            assert await backend.load(kept.id, START) == kept


async def test_a_purge_and_a_row_that_is_locked(way: Way, postgres_sessions_url: str) -> None:
    """A purge passes over an expired row that somebody has locked, and takes it another time (R85)."""
    expired = [make_record(expires_at=START + number * MINUTE) for number in range(3)]
    async with closing(way.backend(postgres_sessions_url)) as backend:
        for record in expired:
            await backend.insert(record)
        async with holding(postgres_sessions_url, locking(expired[0].id)):
            assert await backend.purge(START + 3 * MINUTE, 2) == 2
            assert await backend.purge(START + 3 * MINUTE, 2) == 0
        assert await backend.purge(START + 3 * MINUTE, 2) == 1


async def test_the_end_of_everything_and_a_row_that_is_locked(way: Way, postgres_sessions_url: str) -> None:
    """Ending every session passes over none: it waits for a row that somebody has locked."""
    records = [make_record() for _ in range(3)]
    async with closing(way.backend(postgres_sessions_url, timedelta(seconds=PATIENCE))) as backend:
        for record in records:
            await backend.insert(record)
        async with holding(postgres_sessions_url, locking(records[0].id)):
            ending = asyncio.create_task(backend.delete_all())
            await blocked(postgres_sessions_url)
        assert await ending == 3


async def test_everything_is_ended_by_two_at_once(
    way: Way, postgres_sessions_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ending every session is not over while there are any left, though somebody else has ended a whole batch (R42)."""
    monkeypatch.setattr("sqlsessions.backends.sqlalchemy._BATCH", 2)
    records = [make_record(expires_at=START + number * MINUTE) for number in range(4)]
    async with closing(way.backend(postgres_sessions_url, timedelta(seconds=PATIENCE))) as backend:
        for record in records:
            await backend.insert(record)
        first = ", ".join(f"'{record.id}'" for record in records[:2])
        async with holding(postgres_sessions_url, f"DELETE FROM web_sessions WHERE id IN ({first})"):  # noqa: S608
            ending = asyncio.create_task(backend.delete_all())
            await blocked(postgres_sessions_url)
        assert await ending == 2
        assert await sql(postgres_sessions_url, "SELECT id FROM web_sessions") == []


async def test_the_end_of_everything_where_nothing_can_be_deleted(way: Way, postgres_sessions_url: str) -> None:
    """What cannot be deleted, though nobody says why, is not tried for ever."""
    async with closing(way.backend(postgres_sessions_url, timedelta(seconds=PATIENCE))) as backend:
        await backend.insert(make_record())
        await sql(
            postgres_sessions_url,
            "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
            "CREATE TRIGGER keep BEFORE DELETE ON web_sessions FOR EACH ROW EXECUTE FUNCTION keep()",
        )
        async with asyncio.timeout(PATIENCE):
            assert await backend.delete_all() == 0


async def test_a_table_that_is_locked(site: Site, postgres_sessions_url: str, observed: Callable[[str], None]) -> None:
    """While a migration keeps the table, everybody is answered by the deadline, and routes without a session at once;
    then all goes on (R83).
    """
    browsers = [await site.filled(n=0) for _ in range(10)]
    cookies = [dict(browser.cookies) for browser in browsers]
    took: list[float] = []
    async with holding(postgres_sessions_url, "LOCK TABLE web_sessions IN ACCESS EXCLUSIVE MODE"):
        for do in (read, count, Session.clear):
            for answer, seconds in await asyncio.gather(*(timed(browser, do) for browser in browsers)):
                assert (answer.status, answer.set_cookies) == (503, [])
                took.append(seconds)
            assert (await site.browser().do(read)).status == 200
    async with asyncio.timeout(PATIENCE):
        while (await browsers[0].do(read)).status != 200:  # until the circuit is closed
            await checkpoint()
    for browser, cookie in zip(browsers, cookies, strict=True):
        assert dict(browser.cookies) == cookie
        assert (await browser.do(count)).status == 200
    assert [(await browser.data())["n"] for browser in browsers] == [1] * 10
    observed(f"30 requests, answered after {sorted(took)[15]:.2f} s (median), {max(took):.2f} s (longest)")


@pytest.mark.parametrize("level", ["read committed", "repeatable read", "serializable"])
async def test_isolation_levels(way: Way, postgres_sessions_url: str, level: str) -> None:
    """Whatever isolation the server has by default, two processes that write the same sessions at once, begin, end and
    purge others meanwhile, meet no error and lose nothing (R59).
    """
    database = sa.make_url(postgres_sessions_url).database
    await sql(postgres_sessions_url, f"ALTER DATABASE {database} SET default_transaction_isolation TO '{level}'")
    site = Site(Staged(way.backend(postgres_sessions_url, timedelta(seconds=PATIENCE))))
    async with closing(way.backend(postgres_sessions_url, timedelta(seconds=PATIENCE))) as other:
        second = site.second_process(other)
        browsers = [await site.filled(n=0, user_id="somebody") for _ in range(10)]
        everywhere = [*browsers, *(browser.twin(second) for browser in browsers)]
        for _ in range(3):
            leaving = [await site.filled(user_id="nobody") for _ in range(10)]
            purging = asyncio.create_task(other.purge(site.clock.now, 100))
            ending = asyncio.create_task(other.delete_for_user("nobody"))
            answers = await asyncio.gather(
                *(browser.do(add) for browser in everywhere),
                *(site.browser().do(log_in) for _ in range(10)),
                *(browser.do(Session.clear) for browser in leaving),
            )
            assert {answer.status for answer in answers} == {200}
            assert (await purging, await ending <= 10) == (0, True)
        assert [(await browser.data())["n"] for browser in browsers] == [6] * 10
    await site.backend.aclose()


@pytest.mark.parametrize("setting", ["statement_timeout", "lock_timeout"])
async def test_a_limit_of_the_servers_own(way: Way, postgres_sessions_url: str, setting: str) -> None:
    """What the server gives up by a time limit of its own is a 503, and the connection is as good as before (R75)."""
    database = sa.make_url(postgres_sessions_url).database
    site = Site(Staged(way.backend(postgres_sessions_url, timedelta(seconds=PATIENCE))))
    one = await site.filled(n=0)
    row = (await site.record()).id
    await site.backend.aclose()
    await sql(postgres_sessions_url, f"ALTER DATABASE {database} SET {setting} TO '50ms'")
    async with holding(postgres_sessions_url, f"SET {setting} TO 0", locking(row)):
        await one.do(read)
        before = await pids(postgres_sessions_url)
        assert (await one.do(count)).status == 503
        assert [event.detail for event in site.events] == ["BackendTimeout"]
        assert (await one.do(read)).status == 200
        assert await pids(postgres_sessions_url) <= before
    assert (await one.do(count)).status == 200
    await site.backend.aclose()


async def test_no_transaction_is_left_idle(way: Way, postgres_sessions_url: str) -> None:
    """A server that ends whoever is idle in a transaction, be it for a millisecond, finds nobody."""
    database = sa.make_url(postgres_sessions_url).database
    await sql(postgres_sessions_url, f"ALTER DATABASE {database} SET idle_in_transaction_session_timeout TO '1ms'")
    site = Site(Staged(way.backend(postgres_sessions_url)))
    await asyncio.gather(*(site.browser().do(count) for _ in range(20)))
    before = await pids(postgres_sessions_url)
    for _ in range(5):
        browsers = [await site.filled(n=0) for _ in range(5)]
        for do in (count, add, log_in, Session.clear):
            answers = await asyncio.gather(*(browser.do(do) for browser in browsers))
            assert {answer.status for answer in answers} == {200}
    assert before <= await pids(postgres_sessions_url)
    await site.backend.aclose()


async def test_a_deadlock(way: Way, postgres_sessions_url: str) -> None:
    """An operation that the server chose as a deadlock's victim is tried again (R59).

    Twice, if it is back before the other has taken the lock that it gave up.
    """
    database = sa.make_url(postgres_sessions_url).database
    await sql(postgres_sessions_url, f"ALTER DATABASE {database} SET deadlock_timeout TO '600ms'")
    first, second = make_record(user_id="somebody"), make_record(user_id="somebody")
    async with closing(way.backend(postgres_sessions_url, timedelta(seconds=PATIENCE))) as backend:
        for record in (first, second):
            await backend.insert(record)
        async with holding(
            postgres_sessions_url, f"SET deadlock_timeout TO '{PATIENCE}s'", locking(second.id)
        ) as connection:
            deleting = asyncio.create_task(backend.delete_all())
            await blocked(postgres_sessions_url)
            await connection.execute(sa.text(locking(first.id)))
        assert await deleting == 2
        await everything(backend)
    await sql(postgres_sessions_url, "SELECT pg_stat_force_next_flush()")
    (seen,) = await sql(
        postgres_sessions_url, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    )
    assert seen.deadlocks >= 1


#: Nobody can delete anything any more; a sequence counts how often that was tried, which no rollback undoes.
REFUSING = (
    "CREATE SEQUENCE tried",
    """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM nextval('tried'); RAISE 'another was faster' USING ERRCODE = 'serialization_failure'; END $$
    """,
    "CREATE TRIGGER refuse BEFORE DELETE ON web_sessions EXECUTE FUNCTION refuse()",
)


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(lambda backend, record: backend.delete(record.id), id="delete"),
        pytest.param(lambda backend, _: backend.delete_for_user("somebody"), id="delete_for_user"),
    ],
)
async def test_what_is_undone_again_and_again(way: Way, postgres_sessions_url: str, act: Act) -> None:
    """What the server undoes for the sake of others is tried again three times, and is then a typed error (R59)."""
    record = make_record(user_id="somebody")
    async with closing(way.backend(postgres_sessions_url, timedelta(seconds=PATIENCE))) as backend:
        await backend.insert(record)
        await sql(postgres_sessions_url, *REFUSING)
        with pytest.raises(BackendUnavailable, match="40001"):
            await act(backend, record)
        (tries,) = await sql(postgres_sessions_url, "SELECT last_value FROM tried")
        assert tries.last_value == 1 + 3
