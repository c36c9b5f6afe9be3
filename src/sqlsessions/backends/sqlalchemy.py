"""Records in a table of the user's database: one statement per operation, in autocommit, on connections of our own."""

import asyncio
import os
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError, StatementError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, Pool, StaticPool

from sqlsessions.backends.base import Backend, Revocation, owner
from sqlsessions.backends.supervisor import CircuitBreaker, Lease, Supervisor
from sqlsessions.errors import (
    BackendError,
    BackendReadOnly,
    BackendTimeout,
    BackendUnavailable,
    ConfigurationError,
    CorruptData,
    DuplicateId,
    SchemaMissing,
)
from sqlsessions.record import Expected, Record, utc_now
from sqlsessions.schema import DEFAULT_TABLE, Statements, async_url, sessions_table

T = TypeVar("T")

#: What a server answers that was demoted to a standby.
_READ_ONLY = "25006"
#: Read-only, shut down, crashed, starting up: the pooled connections lead to the wrong server and must go (F19).
_WRONG_SERVER = frozenset({_READ_ONLY, "57P01", "57P02", "57P03"})
#: Serialization failure and deadlock: nothing has been done, and another try may succeed.
_SERIALIZATION = frozenset({"40001", "40P01"})
#: The longest wait before each further try, in seconds.
_PAUSES = (0.02, 0.04, 0.08)

#: An instant at which every record has expired.
_FOREVER = datetime.max.replace(tzinfo=UTC)
#: How many rows one statement of `delete_all` takes.
_BATCH = 10_000


class SQLAlchemyBackend(Revocation):
    """Keeps sessions in the table that ``alembic upgrade head`` made, on PostgreSQL (asyncpg) or SQLite (aiosqlite).

    Given a URL or an `AsyncEngine` (whose URL, creator, connect settings and event listeners are taken over), it
    keeps a small pool of its own: FastAPI's ``yield`` dependencies hold the application's connections until after the
    headers, and a shared pool would deadlock. In a second event loop, as in a test client without its context
    manager, connections are not pooled.
    """

    def __init__(
        self,
        engine: str | sa.URL | AsyncEngine,
        *,
        table: str = DEFAULT_TABLE,
        schema: str | None = None,
        pool_size: int = 5,
        deadline: timedelta = timedelta(seconds=5),
    ) -> None:
        if pool_size < 1:
            raise ConfigurationError(f"pool_size must be at least 1, not {pool_size!r}")
        if deadline <= timedelta(0):
            raise ConfigurationError(f"deadline must be positive, not {deadline!r}")
        self._model = _model_engine(engine)
        self._statements = Statements(sessions_table(sa.MetaData(), table, schema), self._model.dialect.name)
        self._pool_size = pool_size
        self._deadline = deadline.total_seconds()
        self._rooms: dict[asyncio.AbstractEventLoop, _Room] = {}
        self._inherited: list[object] = []
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"<SQLAlchemyBackend {self._statements.table.fullname!r} on {self._model.dialect.name}>"

    async def load(self, id: UUID, now: datetime) -> Record | None:  # noqa: A002
        """Return the record, or None if it is absent or has expired. One SELECT by primary key.

        Raises `CorruptData` for a row that this library cannot have written.
        """
        return await self._run(lambda turn: turn.record(self._statements.load, the_id=id, now=now))

    async def insert(self, record: Record) -> None:
        """Store a new record: one INSERT. Raise `DuplicateId` rather than overwrite."""
        await self._run(lambda turn: self._insert(turn, record))

    async def replace(self, record: Record, expected: Expected) -> bool:
        """Store *record* if the row still matches *expected*: one UPDATE."""
        values = _values(record)
        del values["id"]
        return await self._run(lambda turn: self._replace(turn, record, values | _unchanged(record.id, expected)))

    async def touch(self, id: UUID, secret_hash: bytes, *, now: datetime, expires_at: datetime) -> bool:  # noqa: A002
        """Move ``last_seen_at`` and, forward only, ``expires_at``: one UPDATE that leaves data and version alone."""
        parameters = {"the_id": id, "the_secret_hash": secret_hash, "now": now, "seen": now, "until": expires_at}
        return await self._run(lambda turn: turn.again(self._statements.touch, **parameters)) == 1

    async def delete(self, id: UUID, expected: Expected | None = None) -> bool:  # noqa: A002
        """Delete the row, or only if it still matches *expected*: one DELETE."""
        if expected is None:
            return await self._run(lambda turn: turn.again(self._statements.delete, the_id=id)) == 1
        return await self._run(lambda turn: self._delete(turn, id, _unchanged(id, expected)))

    async def purge(self, before: datetime, limit: int) -> int:
        """Delete one batch of expired rows, found by the expiry index and checked again by the DELETE."""
        return await self._run(lambda turn: self._purge(turn, before, limit))

    async def list_for_user(
        self, user_id: str | int, now: datetime | None = None, limit: int = 100
    ) -> Sequence[Record]:
        """Return the user's live records, most recently seen first."""
        parameters = {"the_user_id": owner(user_id), "now": now or utc_now(), "limit": limit}
        return await self._run(lambda turn: turn.records(self._statements.list_for_user, **parameters))

    async def delete_for_user(self, user_id: str | int, *, keep: UUID | None = None) -> int:
        """Delete the user's rows, but for *keep*: one DELETE."""
        parameters: dict[str, Any] = {"the_user_id": owner(user_id)}
        if keep is None:
            return await self._run(lambda turn: turn.again(self._statements.delete_for_user, **parameters))
        return await self._run(
            lambda turn: turn.again(self._statements.delete_for_user_except, **parameters, kept=keep)
        )

    async def delete_all(self) -> int:
        """Delete every row, in batches: one DELETE of them all might take longer than the deadline.

        Not TRUNCATE, which would need a right that the running application should not have.
        """
        deleted = 0
        while count := await self.purge(_FOREVER, _BATCH):
            deleted += count
        return deleted

    async def ping(self) -> None:
        """Return if the database answers, for a health route; raise `BackendError` otherwise."""
        await self._run(lambda turn: turn.again(self._statements.ping))

    async def aclose(self) -> None:
        """Wait for the work in flight, a deadline at the longest, and close this event loop's connections."""
        room = self._rooms.pop(asyncio.get_running_loop(), None)
        if room is not None:
            await room.aclose()

    async def _run(self, operation: Callable[["_Turn"], Awaitable[T]]) -> T:
        room = await self._room()
        return await room.supervisor.run(lambda lease: _translated(operation(_Turn(room, lease))))

    async def _room(self) -> "_Room":
        loop = asyncio.get_running_loop()
        if self._pid != os.getpid():
            # Forked: the parent's sockets are not ours to use, nor to close, as forgetting them would.
            self._inherited.append(self._rooms)
            self._rooms, self._pid = {}, os.getpid()
        room = self._rooms.get(loop)
        if room is None:
            # By copies of the keys: loops in other threads come and go meanwhile.
            for ended in [other for other in list(self._rooms) if other.is_closed()]:
                self._rooms.pop(ended, None)
            pooled = not any(other.pooled for other in list(self._rooms.values()))
            room = self._rooms[loop] = _Room(self._model, pooled=pooled, slots=self._pool_size, deadline=self._deadline)
            await room.open()
        return room

    async def _insert(self, turn: "_Turn", record: Record) -> None:
        try:
            await turn.once(self._statements.insert, **_values(record))
        except _ConnectionLostError:
            if not await self._is_stored(turn, record):
                await self._insert_again(turn, record)

    async def _insert_again(self, turn: "_Turn", record: Record) -> None:
        try:
            await turn.once(self._statements.insert, **_values(record))
        except IntegrityError:  # the first one has taken effect meanwhile, or somebody else has this id
            if not await self._is_stored(turn, record):
                raise

    async def _replace(self, turn: "_Turn", record: Record, parameters: Mapping[str, Any]) -> bool:
        try:
            return await turn.once(self._statements.replace, **parameters) == 1
        except _ConnectionLostError:
            # The statement may have taken effect, or may still do so: only the row can tell.
            if await self._is_stored(turn, record):
                return True
            return await turn.once(self._statements.replace, **parameters) == 1 or await self._is_stored(turn, record)

    async def _delete(self, turn: "_Turn", id: UUID, parameters: Mapping[str, Any]) -> bool:  # noqa: A002
        try:
            return await turn.once(self._statements.delete_unchanged, **parameters) == 1
        except _ConnectionLostError:
            if await turn.row(self._statements.reread, the_id=id) is None:
                return True
            return await turn.once(self._statements.delete_unchanged, **parameters) == 1

    async def _is_stored(self, turn: "_Turn", record: Record) -> bool:
        found = await turn.row(self._statements.reread, the_id=record.id)
        return found is not None and tuple(found) == (record.version, record.secret_hash)

    async def _purge(self, turn: "_Turn", before: datetime, limit: int) -> int:
        found = await turn.rows(self._statements.expired, before=before, limit=limit)
        if not found:
            return 0
        return await turn.again(self._statements.purge, ids=[row.id for row in found], before=before)


class _ConnectionLostError(Exception):
    """The connection broke while a statement was on its way; whether it took effect is unknown."""

    def __init__(self, error: DBAPIError) -> None:
        super().__init__()
        self.error = error


class _Room:
    """What one event loop has: an engine, and the supervisor of what runs on it."""

    def __init__(self, model: Engine, *, pooled: bool, slots: int, deadline: float) -> None:
        self.pooled = pooled
        #: Whether connections that come back are closed instead of kept.
        self.closed = False
        self.engine = _engine_like(model, slots if pooled else 0)
        self.supervisor = Supervisor(slots=slots, deadline=deadline, breaker=CircuitBreaker())
        self._life = self._until_closed()

    async def open(self) -> None:
        """Begin. The room closes when it is told to, or with its event loop: runners close asynchronous generators
        that were left open.
        """
        await anext(self._life)

    async def aclose(self) -> None:
        """Finish what runs and close the connections, but wait no longer for a server that does not answer."""
        await self._life.aclose()

    async def _until_closed(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            try:
                await self.supervisor.drain()
            finally:
                self.closed = True
                await asyncio.wait({asyncio.ensure_future(self.engine.dispose())}, timeout=1)


class _Turn:
    """One operation's use of the engine: runs statements, each on a connection that is given back at once."""

    __slots__ = ("_lease", "_room")

    def __init__(self, room: _Room, lease: Lease) -> None:
        self._room = room
        self._lease = lease

    async def row(self, statement: sa.Executable, **parameters: Any) -> Any:
        """Return the first row or None."""
        return next(iter(await self.rows(statement, **parameters)), None)

    async def rows(self, statement: sa.Executable, **parameters: Any) -> Sequence[Any]:
        """Return all rows of a statement that changes nothing; a dead connection is replaced once."""
        try:
            return await self._execute(statement, parameters, lambda result: result.all())
        except _ConnectionLostError:
            return await self._execute(statement, parameters, lambda result: result.all())

    async def record(self, statement: sa.Executable, **parameters: Any) -> Record | None:
        """Return the first row as a record, or None."""
        return next(iter(await self.records(statement, **parameters)), None)

    async def records(self, statement: sa.Executable, **parameters: Any) -> Sequence[Record]:
        """Return all rows as records."""
        try:
            return [_record(row) for row in await self.rows(statement, **parameters)]
        except (ValueError, TypeError, OverflowError):
            raise CorruptData("a stored session has a column that cannot be read") from None

    async def again(self, statement: sa.Executable, **parameters: Any) -> int:
        """Return the number of rows affected by a statement that may as well run twice."""
        try:
            return await self.once(statement, **parameters)
        except _ConnectionLostError:
            return await self.once(statement, **parameters)

    async def once(self, statement: sa.Executable, **parameters: Any) -> int:
        """Return the number of rows affected; raise `_ConnectionLostError` when that cannot be known."""
        return await self._execute(statement, parameters, lambda result: result.rowcount)

    async def _execute(
        self, statement: sa.Executable, parameters: Mapping[str, Any], read: Callable[[sa.CursorResult[Any]], T]
    ) -> T:
        """Return what *read* makes of the result; what the server undid for the sake of others is tried again (R59)."""
        for longest in _PAUSES:
            try:
                return await self._try(statement, parameters, read)
            except DBAPIError as error:
                if self._lease.abandoned or _sqlstate(error) not in _SERIALIZATION:
                    raise
            await asyncio.sleep(random.uniform(0, longest))  # noqa: S311 - not a secret
        return await self._try(statement, parameters, read)

    async def _try(
        self, statement: sa.Executable, parameters: Mapping[str, Any], read: Callable[[sa.CursorResult[Any]], T]
    ) -> T:
        try:
            async with self._room.engine.connect() as connection:
                self._lease.terminate = _terminator(connection)
                try:
                    return read(await connection.execute(statement, parameters))
                finally:
                    if self._lease.abandoned or self._room.closed:
                        await connection.invalidate()
        except DBAPIError as error:
            connected = self._lease.terminate is not None
            unanswered = error.connection_invalidated and _sqlstate(error) != _READ_ONLY
            if connected and unanswered and not self._lease.abandoned:
                raise _ConnectionLostError(error) from error
            raise
        finally:
            self._lease.terminate = None


def _model_engine(engine: str | sa.URL | AsyncEngine) -> Engine:
    """Return the engine whose settings ours take over; nothing is connected."""
    if isinstance(engine, (str, sa.URL)):
        engine = create_async_engine(async_url(engine), skip_autocommit_rollback=True)
    if not isinstance(engine, AsyncEngine):
        raise ConfigurationError(f"SQLAlchemyBackend takes a URL or an AsyncEngine, not {type(engine).__name__}")
    model = engine.sync_engine
    database, mode = model.url.database, model.url.query.get("mode")
    if isinstance(model.pool, StaticPool) or (
        model.dialect.name == "sqlite" and (not database or ":memory:" in database or mode == "memory")
    ):
        raise ConfigurationError(
            "an in-memory SQLite (StaticPool) has one connection for everybody: give sessions a file of their own, "
            "sqlite+aiosqlite:///sessions.db, or use InMemoryBackend"
        )
    return model


def _engine_like(model: Engine, pool_size: int) -> AsyncEngine:
    """Return an engine with a pool of our own that connects exactly as *model* does, in autocommit."""
    inherited: dict[str, Any] = {
        "recycle": model.pool._recycle,  # noqa: SLF001 - what Pool.recreate() passes on; there is no public way
        "reset_on_return": None,  # no statement of ours leaves a transaction or a setting behind
        "dialect": model.dialect,
        "_dispatch": model.pool.dispatch,
    }
    creator = model.pool._creator  # noqa: SLF001 - the same
    pool: Pool
    if pool_size:
        pool = AsyncAdaptedQueuePool(creator, pool_size=pool_size, max_overflow=0, use_lifo=True, **inherited)
    else:
        pool = NullPool(creator, **inherited)
    engine = Engine(pool, model.dialect, model.url, hide_parameters=True)
    event.listen(pool, "connect", lambda connection, _: model.dialect.set_isolation_level(connection, "AUTOCOMMIT"))
    event.listen(engine, "handle_error", _discard_wrong_server)
    return AsyncEngine(engine)


def _discard_wrong_server(context: sa.ExceptionContext) -> None:
    if getattr(context.original_exception, "sqlstate", None) in _WRONG_SERVER:
        context.is_disconnect = True


def _terminator(connection: AsyncConnection) -> Callable[[], object]:
    """Return a function that cuts *connection* without a word to the server; for drivers that cannot, one that does
    nothing.
    """
    sync = connection.sync_connection
    driver = None if sync is None else sync.connection.driver_connection
    return getattr(driver, "terminate", None) or (lambda: None)


def _unchanged(id: UUID, expected: Expected) -> dict[str, Any]:  # noqa: A002
    return {"the_id": id, "the_version": expected.version, "the_secret_hash": expected.secret_hash, "now": expected.now}


def _values(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in Record.__slots__}


def _record(row: Any) -> Record:
    """Return the row as a record; raise TypeError for what SQLite lets into any column, whatever its type."""
    record = Record(**row._mapping)  # noqa: SLF001 - the public name of a row's columns, underscore and all
    for name, kind in Record.__annotations__.items():
        if not isinstance(getattr(record, name), kind):
            raise TypeError(name)
    return record


async def _translated(operation: Awaitable[T]) -> T:
    """Return what *operation* returns, with whatever the driver raises as a `BackendError`.

    Without a cause: drivers quote parameters and rows in their messages (R107).
    """
    try:
        return await operation
    except BackendError:
        raise
    except _ConnectionLostError as lost:
        raise _typed(lost.error) from None
    except IntegrityError as error:
        raise _constraint(error) from None
    except DBAPIError as error:
        raise _typed(error) from None
    except (StatementError, OverflowError) as error:
        raise BackendError(f"the record has a value that its column cannot hold ({type(error).__name__})") from None
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        raise BackendUnavailable(f"no connection to the database ({type(error).__name__})") from None
    except Exception as error:
        # Before 2.1 SQLAlchemy passes on what asyncpg raises while connecting.
        if not hasattr(error, "sqlstate"):
            raise
        raise BackendUnavailable(f"no connection to the database ({type(error).__name__})") from None


def _sqlstate(error: DBAPIError) -> str:
    return getattr(error.orig, "sqlstate", None) or ""


def _constraint(error: IntegrityError) -> BackendError:
    message = str(error.orig)
    if _sqlstate(error) == "23505" or "UNIQUE constraint failed" in message:
        return DuplicateId("a session with this id exists")
    return BackendError(f"the database refused the row ({type(error.orig).__name__} {_sqlstate(error)})".rstrip())


def _typed(error: DBAPIError) -> BackendError | CorruptData:
    """Name a driver's error by SQLSTATE, or by SQLite's messages, which have no codes in SQLAlchemy's hands."""
    state = _sqlstate(error)
    what = f"{type(error.orig).__name__} {state}".rstrip()
    said = str(error.orig) if not state else ""
    if (
        state in {"42P01", "42703", "3F000"}
        or "no such table" in said
        or "no such column" in said
        or "has no column" in said
    ):
        return SchemaMissing(
            f"the session table is missing or behind ({what}): run 'alembic upgrade head' or 'sqlsessions migrate'"
        )
    if "Could not decode to UTF-8" in said:
        return CorruptData(f"a stored session has a column that cannot be read ({what})")
    if state in {_READ_ONLY, "53100"} or "readonly database" in said or "disk is full" in said:
        return BackendReadOnly(f"the database accepts no writes ({what})")
    if state in {"57014", "55P03"} or "database is locked" in said:
        return BackendTimeout(f"the database did not finish in time ({what})")
    if error.connection_invalidated or state.startswith(("08", "28", "3D", "53", "57", "40")) or not state:
        return BackendUnavailable(f"the database is not available ({what})")
    return BackendError(f"the database refused the statement ({what})")


_: type[Backend] = SQLAlchemyBackend
