"""An SQLite file that is full, read-only, gone, locked by another process, or written to by many."""

import asyncio
import shutil
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing as file_closing
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from anyio.lowlevel import checkpoint
from sqlalchemy import event, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from sqlsessions import Session, SQLAlchemyBackend
from sqlsessions.errors import BackendError, BackendReadOnly, BackendTimeout
from sqlsessions.payload import decode
from sqlsessions.purge import purge
from sqlsessions.record import utc_now
from sqlsessions.testing import START, make_record
from tests.asgi import COOKIE, records
from tests.commands import ROOT, run
from tests.looking import PATIENCE, closing, everything, recover, sql
from tests.staging import Browser, Site, Staged

pytestmark = pytest.mark.anyio

#: What a session holds that takes room.
MUCH = "x" * 20_000
#: How many pages the file may have: some sessions of that much.
PAGES = 60
#: A deadline short enough to wait for, and how much later a busy machine may notice that it has passed.
DEADLINE = timedelta(seconds=0.3)
SLACK = timedelta(seconds=0.5)


def make_backend(engine: str | AsyncEngine, **options: Any) -> SQLAlchemyBackend:
    """Return the backend that is tested."""
    return SQLAlchemyBackend(engine, **options)


def file_of(url: str) -> Path:
    """Return the file that a URL names."""
    return Path(str(make_url(url).database))


def size(url: str) -> int:
    """Return how large that file is."""
    return file_of(url).stat().st_size


@pytest.fixture
def pragmas() -> list[str]:
    """What every new connection is told."""
    return []


@pytest.fixture
async def site(sqlite_sessions_url: str, pragmas: list[str]) -> AsyncIterator[Site]:
    """A site on a file whose connections do as `pragmas` says; `aclose` makes them do so from now on."""
    engine = create_async_engine(sqlite_sessions_url)

    @event.listens_for(engine.sync_engine, "connect")
    def told(connection: Any, record: object) -> None:
        cursor = connection.cursor()
        for pragma in pragmas:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    async with closing(make_backend(engine)) as backend:
        yield Site(Staged(backend))


async def fill_up(site: Site) -> list[Browser]:
    """Begin sessions until there is no room left; whoever finds none is told, and given no cookie."""
    browsers: list[Browser] = []
    while True:
        browser = site.browser()
        answer = await browser.do(lambda session: session.update(user_id="somebody", much=MUCH))
        if answer.status != 200:
            assert (answer.status, answer.set_cookies, site.events[-1].detail) == (503, [], "BackendReadOnly")
            return browsers
        browsers.append(browser)


async def test_a_full_file(site: Site, pragmas: list[str]) -> None:
    """Where there is no room left, what is there can be read and ended; that makes room, and so does a purge (R82)."""
    pragmas.append(f"max_page_count = {PAGES}")
    first, second, *others = await fill_up(site)
    assert others
    for browser in [first, second, *others]:
        assert (await browser.data())["much"] == MUCH
    before = dict(second.cookies)
    answer = await second.do(lambda session: session.update(more=MUCH))
    assert (answer.status, answer.set_cookies) == (503, [])
    assert (await second.data()).keys() == {"user_id", "much"}
    assert second.cookies == before
    assert (await first.do(Session.clear)).status == 200
    assert len(await fill_up(site)) == 1
    site.clock.advance(days=40)
    rows = len(await site.records())
    assert await purge(site.backend, clock=site.clock) == rows > 0
    assert len(await fill_up(site)) > 1


async def test_a_touch_and_a_file_that_is_full(site: Site, pragmas: list[str]) -> None:
    """A full file does not keep a session that is only read from being extended, nor its reader from reading (R82)."""
    pragmas.append(f"max_page_count = {PAGES}")
    browser, *_ = await fill_up(site)
    (before, *_) = [record for record in await site.records() if decode(record.data)]
    site.clock.advance(days=1)
    assert (await browser.do(Session.mark_accessed)).status == 200
    assert max(record.last_seen_at for record in await site.records()) > before.last_seen_at


@pytest.mark.parametrize("batch", [True, False])
async def test_readers_beside_a_writer_elsewhere(sqlite_sessions_url: str, *, batch: bool) -> None:
    """While another process writes, ours wait in one connection, however long, and readers go on by the other."""
    await sql(sqlite_sessions_url, "PRAGMA journal_mode = WAL")
    record, *others = (make_record() for _ in range(3))
    async with closing(make_backend(sqlite_sessions_url, batch=batch)) as backend:
        for each in (record, *others):
            await backend.insert(each)
        room = backend._at_hand()
        assert room is not None
        with file_closing(sqlite3.connect(file_of(sqlite_sessions_url), isolation_level=None)) as elsewhere:
            elsewhere.execute("BEGIN IMMEDIATE")
            writing = [asyncio.create_task(backend.delete(each.id)) for each in others]
            for _ in range(20):
                await checkpoint()
            for lease in [*room.supervisor._running]:  # a second later
                assert lease.overdue is not None
                lease.overdue(room.supervisor.loop.time() + 1)
            assert await backend.load(record.id, START) == record
            assert not any(task.done() for task in writing)
        assert await asyncio.gather(*writing) == [True, True]


async def test_a_file_that_becomes_read_only(site: Site, pragmas: list[str]) -> None:
    """Where nothing can be written, sessions can be read; a write is a 503, and so is a logout, which did not happen; a
    touch is left out; and when writing is possible again, so is everything (R78, R80).
    """
    browser = await site.filled(user_id="somebody", cart=[1])
    cookies = dict(browser.cookies)
    pragmas.append("query_only = ON")
    await site.backend.aclose()
    site.clock.advance(days=1)
    assert await browser.data() == {"user_id": "somebody", "cart": [1]}  # with a touch that is due
    assert [(event.kind, event.detail) for event in site.events] == [("unavailable", "BackendReadOnly")]
    for do in (lambda session: session.update(cart=[2]), Session.renew, Session.clear):
        answer = await browser.do(do)
        assert (answer.status, answer.header("retry-after") is not None, answer.set_cookies) == (503, True, [])
    assert (await site.browser().do(lambda session: session.login("somebody"))).status == 503
    pragmas.clear()
    await site.backend.aclose()
    assert browser.cookies == cookies
    assert await browser.data() == {"user_id": "somebody", "cart": [1]}
    assert (await browser.do(Session.clear)).status == 200
    assert await site.records() == []


HOLDER = """
    import sqlite3, sys

    connection = sqlite3.connect(sys.argv[1], isolation_level=None)
    connection.execute("PRAGMA cache_size = 1")  # so that what is not committed gets into the file
    connection.execute(f"BEGIN {sys.argv[2]}")
    if sys.argv[3]:
        connection.execute(sys.argv[3])
        connection.execute("SELECT sum(length(data)) FROM web_sessions").fetchall()  # which needs the cache for others
    print("held", flush=True)
    sys.stdin.read()
    connection.execute("ROLLBACK")
"""


@contextmanager
def held(url: str, how: str, then: str = "") -> Iterator["subprocess.Popen[bytes]"]:
    """Have another process hold a transaction on the file, until the block ends or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(file_of(url)), how, then],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.stdin.close()
        process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()


async def test_a_file_locked_by_another_process(sqlite_sessions_url: str) -> None:
    """A lock of another process is a 503 at the deadline and costs no cookie; released, all is well (R73, R78)."""
    async with closing(make_backend(sqlite_sessions_url, deadline=DEADLINE)) as backend:
        site = Site(Staged(backend))
        browser = await site.filled(cart=[1])
        cookies = dict(browser.cookies)
        with held(sqlite_sessions_url, "EXCLUSIVE"):
            begun = time.monotonic()
            answer = await browser.do(lambda session: session.update(cart=[2]))
            assert time.monotonic() - begun < (DEADLINE + SLACK).total_seconds()
            assert (answer.status, answer.set_cookies) == (503, [])
            assert [event.detail for event in site.events] == ["BackendTimeout"]
        await recover(backend)
        assert browser.cookies == cookies
        assert await browser.data() == {"cart": [1]}
        assert (await browser.do(Session.clear)).status == 200
        await everything(backend)


async def test_a_file_that_another_process_is_about_to_write(sqlite_sessions_url: str) -> None:
    """Beside a transaction of another process that has begun to write, sessions are read, and not written (R83)."""
    record = make_record()
    async with closing(make_backend(sqlite_sessions_url, deadline=DEADLINE)) as backend:
        await backend.insert(record)
        with held(sqlite_sessions_url, "IMMEDIATE"):
            assert await backend.load(record.id, START) == record
            with pytest.raises(BackendTimeout):
                await backend.insert(make_record())
            assert await backend.load(record.id, START) == record
        await recover(backend)
        await everything(backend)


async def test_a_process_killed_while_it_writes(sqlite_sessions_url: str) -> None:
    """What a process had half written into the file when it was killed is undone by the next request (R84)."""
    record = make_record()
    many = (
        "INSERT INTO web_sessions SELECT randomblob(16), secret_hash, user_id, hex(zeroblob(500)), client, version,"
        " created_at, last_seen_at, expires_at, authenticated_at, idle_timeout, persistent, format FROM web_sessions,"
        " (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000) SELECT i FROM n)"
    )
    async with closing(make_backend(sqlite_sessions_url)) as backend:
        await backend.insert(record)
        before = size(sqlite_sessions_url)
        with held(sqlite_sessions_url, "EXCLUSIVE", many) as process:
            process.kill()
            process.wait()
        assert size(sqlite_sessions_url) > before  # there is something to undo
        await backend.aclose()  # its connection still knows what was in the file
        assert await backend.load(record.id, START) == record
        await everything(backend)
        assert [found.id for found in await records(backend)] == [record.id]
    assert await sql(sqlite_sessions_url, "PRAGMA integrity_check") == [("ok",)]


WRITERS = """
    import asyncio, os, sys

    from sqlsessions import Session, SessionMiddleware, SQLAlchemyBackend
    from tests.asgi import KEY, serve
    from tests.staging import Browser

    def count(data):
        data["n"] = data.get("n", 0) + 1

    async def write(process):
        async with asyncio.timeout(50):
            app = SessionMiddleware(serve, secret_key=KEY, backend=SQLAlchemyBackend(sys.argv[1]), purge_interval=None)

            async def writer(number):
                shared, own = Browser(app), Browser(app)
                shared.cookies["__Host-session"] = sys.argv[2]
                for browser, do in [
                    (own, lambda session: session.login(number)),
                    (shared, lambda session: session.atomic(count)),
                    (own, lambda session: session.update(cart=[number])),
                    (shared, lambda session: session.update({f"key{number}": number})),
                    (own, lambda session: session.renew()),
                    (own, lambda session: session.clear() if number % 2 else None),
                ]:
                    assert (await browser.do(do)).status == 200

            await asyncio.gather(*(writer(10 * process + number) for number in range(10)))
            await app._manager.backend.aclose()

    ready, go = os.pipe()
    children = []
    for process in range(5):
        if not (child := os.fork()):
            os.close(go)
            os.read(ready, 1)  # all begin when the parent lets go
            asyncio.run(write(process))
            os._exit(0)
        children.append(child)
    os.close(go)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 5
"""


@pytest.mark.parametrize("journal", ["DELETE", "WAL"])
async def test_fifty_writers_in_five_processes(tmp_path: Path, sqlite_sessions_url: str, journal: str) -> None:
    """Fifty writers in five processes meet no error, and lose no key and no increment of a session they share (R62)."""
    await sql(sqlite_sessions_url, f"PRAGMA journal_mode = {journal}")
    (tmp_path / "writers.py").write_text(textwrap.dedent(WRITERS))
    async with closing(make_backend(sqlite_sessions_url)) as backend:
        site = Site(Staged(backend), clock=utc_now)
        browser = await site.filled(n=0)
        await backend.aclose()
        done = await asyncio.to_thread(
            run,
            "writers",
            sqlite_sessions_url,
            browser.cookies[COOKIE],
            cwd=tmp_path,
            PYTHONPATH=f"{ROOT / 'src'}:{ROOT}:{tmp_path}",
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert await browser.data() == {"n": 50} | {f"key{number}": number for number in range(50)}
        users = [record.user_id for record in await site.records() if record.user_id]
        assert sorted(users, key=int) == [str(number) for number in range(0, 50, 2)]


async def test_a_file_that_is_replaced(sqlite_sessions_url: str) -> None:
    """A file that another has taken the place of, as a restored backup does, is given up with the first write (R81)."""
    record = make_record()
    async with closing(make_backend(sqlite_sessions_url)) as backend:
        await backend.insert(record)
        await asyncio.gather(*(backend.ping() for _ in range(9)))
        restore(sqlite_sessions_url)
        for _ in range(9):
            with suppress(BackendReadOnly):
                await backend.insert(make_record())
        assert len(await sql(sqlite_sessions_url, "SELECT 1 FROM web_sessions")) > 2
        assert await backend.delete(record.id)
        await everything(backend)


def restore(url: str) -> None:
    """Put a copy in the place of the file."""
    backup = shutil.copy(file_of(url), file_of(url).with_suffix(".backup"))
    Path(backup).rename(file_of(url))


async def test_a_file_that_is_deleted(sqlite_sessions_url: str) -> None:
    """A file that is deleted below its connections is written to no more, and that is said, not passed over (R75)."""
    record = make_record()
    async with closing(make_backend(sqlite_sessions_url)) as backend:
        await backend.insert(record)
        file_of(sqlite_sessions_url).unlink()
        with pytest.raises(BackendError):
            await backend.insert(make_record())
        with pytest.raises(BackendError):
            await backend.delete(record.id)
