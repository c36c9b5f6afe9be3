"""Looking at a database past the library, and using the library whole."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import sqlalchemy as sa
from anyio.lowlevel import checkpoint
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from sqlsessions.backends.sqlalchemy import SQLAlchemyBackend
from sqlsessions.errors import BackendUnavailable
from sqlsessions.testing import MINUTE, START, expecting, following, make_record

#: Seconds after which something that has to happen is taken not to happen.
PATIENCE = 20


@asynccontextmanager
async def closing(backend: SQLAlchemyBackend) -> AsyncIterator[SQLAlchemyBackend]:
    """Close the backend at the end."""
    try:
        yield backend
    finally:
        await backend.aclose()


async def sql(url: str, *statements: str, **parameters: Any) -> Sequence[Any]:
    """Run statements on a connection of their own; return the rows of the last."""
    engine = create_async_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    rows: Sequence[Any] = []
    async with engine.connect() as connection:
        for statement in statements:
            result = await connection.execute(sa.text(statement), parameters)
            rows = result.all() if result.returns_rows else []
    return rows


async def pids(url: str) -> set[int]:
    """Return the server processes that serve anybody else in this database."""
    rows = await sql(
        url, "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    return {row.pid for row in rows}


async def blocked(url: str, count: int = 1) -> None:
    """Wait until so many statements wait for a lock."""
    async with asyncio.timeout(PATIENCE):
        while len(await sql(url, "SELECT 1 FROM pg_locks WHERE NOT granted")) < count:
            await checkpoint()


async def threads_ended() -> None:
    """Wait for aiosqlite's threads: after a failed connect one ends in its own time, and then tells the event loop."""
    for thread in threading.enumerate():
        if "_connection_worker_thread" in thread.name:
            await asyncio.to_thread(thread.join)


@contextmanager
def left_as_garbage() -> Iterator[list[str]]:
    """Give the kinds of our objects that the block leaves to the garbage collector, once it is over."""
    found: list[str] = []
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        found += [type(each).__name__ for each in gc.garbage if type(each).__module__.startswith("sqlsessions.")]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


@contextmanager
def counted_tasks() -> Iterator[list[object]]:
    """Give the work of each task that the running event loop is asked for in the block."""
    loop, made = asyncio.get_running_loop(), []
    before = loop.get_task_factory()

    def make(loop: asyncio.AbstractEventLoop, work: Any, **settings: Any) -> "asyncio.Task[Any]":
        made.append(work)
        return asyncio.Task(work, loop=loop, **settings)

    loop.set_task_factory(make)
    try:
        yield made
    finally:
        loop.set_task_factory(before)


async def recover(backend: SQLAlchemyBackend) -> None:
    """Wait until those have ended whose deadline passed while they waited for the lock."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await backend.ping()
            except BackendUnavailable:
                await checkpoint()
            else:
                return


async def everything(backend: SQLAlchemyBackend) -> None:
    """Use every method there is, on a record that is gone in the end."""
    record = make_record()
    user = str(record.id)
    record = record._replace(user_id=user)
    await backend.insert(record)
    assert await backend.load(record.id, START) == record
    changed = following(record)
    assert await backend.replace(changed, expecting(record))
    assert await backend.touch(record.id, record.secret_hash, now=START + MINUTE, expires_at=record.expires_at)
    assert len(await backend.list_for_user(user, START)) == 1
    assert await backend.delete_for_user(user, keep=record.id) == 0
    assert await backend.purge(START, 10) == 0
    assert await backend.delete(record.id, expecting(changed))
    await backend.ping()


@asynccontextmanager
async def silent() -> AsyncIterator[str]:
    """Run a server that accepts connections and never says a word; give its address."""
    clients: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: clients.append(writer), "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        for client in clients:
            client.transport.abort()
        server.close()
        await server.wait_closed()


def several(url: str, *before: str, **options: str) -> sa.URL:
    """Return *url* with other hosts before its own."""
    own = sa.make_url(url)
    return sa.make_url(
        f"postgresql+asyncpg://postgres@/{own.database}?"
        + "&".join([f"host={host}" for host in [*before, f"{own.host}:{own.port}"]])
    ).update_query_dict(options)
