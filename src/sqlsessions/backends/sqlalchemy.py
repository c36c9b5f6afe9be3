"""Records in a table of the user's database: one statement per operation, in autocommit, on connections of our own."""

import asyncio
import math
import os
import random
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, ClassVar, TypeVar
from uuid import UUID
from weakref import WeakSet

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import StaticPool

from sqlsessions.backends.base import Backend, Revocation, owner
from sqlsessions.backends.connections import (
    LOCKED,
    NOT_SUPPORTED,
    Connection,
    Connections,
    Fault,
    Parameters,
    new_engine,
    silence,
)
from sqlsessions.backends.lanes import ENOUGH, MAX_LOAD, PATIENCE, Apart, Lane
from sqlsessions.backends.supervisor import CircuitBreaker, Held, Lease, Supervisor
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
from sqlsessions.record import Expected, Record, checked_id, checked_limit, is_span, utc_now
from sqlsessions.schema import DEFAULT_TABLE, Statements, Write, async_url, in_memory, sessions_table

T = TypeVar("T")

UNIQUE_VIOLATION = "23505"
#: Serialization failure and deadlock: nothing has been done, and another try may succeed.
_SERIALIZATION = frozenset({"40001", "40P01"})
#: The longest wait before each further try, in seconds.
_PAUSES = (0.02, 0.04, 0.08)

#: Tells by the version and hash that are stored, or None, whether a write was done; None for "not yet".
Done = Callable[[Any], bool | None]

#: What is raised for a value that a driver cannot send; nothing was done then, and the connection is as it was.
_UNSAYABLE = (StatementError, OverflowError, UnicodeEncodeError)
#: What drivers and SQLAlchemy raise.
_SAID = (Fault, SQLAlchemyError, *_UNSAYABLE, OSError, TimeoutError)

#: The fields before and behind the two, data and version, that are all which most changes to a session change.
_BEFORE, _BEHIND = slice(Record._fields.index("data")), slice(Record._fields.index("version") + 1, None)

#: An instant at which every record has expired.
_FOREVER = datetime.max.replace(tzinfo=UTC)
#: How many rows one statement of `delete_all` takes.
_BATCH = 10_000


class SQLAlchemyBackend(Revocation):
    """Keeps sessions in the table that ``alembic upgrade head`` made, on PostgreSQL (asyncpg) or SQLite (aiosqlite).

    Given a URL or an `AsyncEngine` (whose URL, creator, connect settings and event listeners are taken over), it
    keeps *pool_size* connections of its own: FastAPI's ``yield`` dependencies hold the application's until after the
    headers, and a shared pool would deadlock. In a second event loop, as in a test client without its context manager,
    connections are not kept.

    Operations that wait at the same moment go to the database together, and share a round trip and a commit; with
    *batch* False each goes by itself. None takes longer than *deadline*, whatever the server does.
    """

    #: What is begun is the lanes' and the supervisor's.
    detached = True

    def __init__(
        self,
        engine: str | sa.URL | AsyncEngine,
        *,
        table: str = DEFAULT_TABLE,
        schema: str | None = None,
        batch: bool = True,
        pool_size: int = 2,
        deadline: timedelta = timedelta(seconds=5),
    ) -> None:
        if pool_size < 1:
            raise ConfigurationError(f"pool_size must be at least 1, not {pool_size!r}")
        if not is_span(deadline, timedelta.resolution):
            raise ConfigurationError(f"deadline must be a positive timedelta, not {deadline!r:.80}")
        self._model = _model_engine(engine, deadline.total_seconds())
        self._statements = Statements(sessions_table(sa.MetaData(), table, schema), self._model.dialect.name)
        silence(table)
        self._batch = batch
        self._pool_size = pool_size
        self._deadline = deadline.total_seconds()
        self._rooms: dict[asyncio.AbstractEventLoop, _Room] = {}
        self._inherited: list[object] = []
        _BACKENDS.add(self)

    def __repr__(self) -> str:
        return f"<SQLAlchemyBackend {self._statements.table.fullname!r} on {self._model.dialect.name}>"

    def load(self, id: UUID, now: datetime) -> Coroutine[Any, Any, Record | None]:  # noqa: A002
        """Return the record, or None if it is absent or has expired. One SELECT by primary key, shared with all that
        wait for one at the same moment.

        Raises `CorruptData` for a row that this library cannot have written.
        """
        room, read = self._at_hand(), _Read(checked_id(id), now)
        return self._load(read) if room is None else room.read(read)

    async def _load(self, read: "_Read") -> Record | None:
        return await (await self._opened()).read(read)

    async def insert(self, record: Record) -> None:
        """Store a new record: one INSERT. Raise `DuplicateId` rather than overwrite."""
        await self._write(self._statements.insert, record.id, record._asdict(), _inserted(record))

    def replace(self, record: Record, expected: Expected) -> Coroutine[Any, Any, bool]:
        """Store *record* if the row still matches *expected*: one UPDATE, of the data alone if nothing else is new."""
        values = _unchanged(record.id, expected)
        old = expected.record
        if old is not None and record[_BEFORE] == old[_BEFORE] and record[_BEHIND] == old[_BEHIND]:
            write = self._statements.replace_data
            values["data"], values["version"] = record.data, record.version
        else:
            write = self._statements.replace
            values.update(record._asdict())
            del values["id"]
        return self._write(write, record.id, values, partial(_has_replaced, record, expected))

    def touch(
        self,
        id: UUID,  # noqa: A002
        secret_hash: bytes,
        *,
        now: datetime,
        expires_at: datetime,
    ) -> Coroutine[Any, Any, bool]:
        """Move ``last_seen_at`` and, forward only, ``expires_at``: one UPDATE that leaves data and version alone."""
        values = {"the_id": id, "the_secret_hash": secret_hash, "now": now, "seen": now, "until": expires_at}
        return self._write(self._statements.touch, id, values)

    def delete(self, id: UUID, expected: Expected | None = None) -> Coroutine[Any, Any, bool]:  # noqa: A002
        """Delete the row, or only if it still matches *expected*: one DELETE."""
        if expected is None:
            return self._write(self._statements.delete, id, {"the_id": id})
        return self._write(self._statements.delete_unchanged, id, _unchanged(id, expected), _deleted(expected))

    async def purge(self, before: datetime, limit: int) -> int:
        """Delete one batch of expired rows: one DELETE, which finds them by the expiry index and checks them again.

        It passes over rows that somebody has locked, on PostgreSQL: the next purge will find them.
        """
        parameters = {"before": before, "limit": checked_limit(limit)}
        write = self._statements.purge
        return await self._run(lambda turn: turn.changed(write, write.passing, parameters))

    async def list_for_user(
        self, user_id: str | int, now: datetime | None = None, limit: int = 100
    ) -> Sequence[Record]:
        """Return the user's live records, most recently seen first: one SELECT, unless there are corrupt rows."""
        now = now or utc_now()
        parameters = {"the_user_id": owner(user_id), "now": now, "limit": checked_limit(limit)}
        try:
            return await self._run(lambda turn: turn.records(self._statements.list_for_user, parameters))
        except CorruptData:
            # A driver gives up on the whole result, so that the readable rows have to be had one by one.
            rows = await self._run(lambda turn: turn.rows(self._statements.list_ids_for_user, parameters))
            return [record for row in rows if (record := await self._readable(row.id, now)) is not None]

    async def _readable(self, id: UUID | bytes, now: datetime) -> Record | None:  # noqa: A002
        try:
            return await self.load(id if isinstance(id, UUID) else UUID(id.decode()), now)
        except (CorruptData, ValueError):
            return None

    async def delete_for_user(self, user_id: str | int, *, keep: UUID | None = None) -> int:
        """Delete the user's rows, but for *keep*: one DELETE, tried again while somebody has one of them locked."""
        parameters: dict[str, Any] = {"the_user_id": owner(user_id)}
        write = self._statements.delete_for_user
        if keep is not None:
            write = self._statements.delete_for_user_except
            parameters["kept"] = checked_id(keep)
        return await self._run(lambda turn: turn.changed(write, write.prompt, parameters))

    async def trim_for_user(self, user_id: str | int, limit: int, *, newest: UUID, now: datetime) -> int:
        """Delete the user's live rows but for the *limit* most recently seen: one DELETE, tried again while somebody
        has one of them locked.

        It sees what was committed before it began, so that of parallel logins, each of which trims after its own
        commit, the last to begin leaves no more than *limit*, whatever the isolation level.
        """
        parameters = {"the_user_id": owner(user_id), "limit": limit, "newest": newest, "now": now}
        write = self._statements.trim_for_user
        return await self._run(lambda turn: turn.changed(write, write.prompt, parameters))

    async def delete_all(self) -> int:
        """Delete every row, in batches: one DELETE of them all might take longer than the deadline.

        Not TRUNCATE, which would need a right that the running application should not have.
        """
        parameters = {"before": _FOREVER, "limit": _BATCH}
        deleted, left = 0, None
        while True:
            count = await self._run(lambda turn: turn.count(self._statements.purge.plain, parameters))
            deleted += count
            if count:
                continue
            # Somebody else may have taken all of the batch, and perhaps the next one, but not the same row again.
            before, left = left, await self._run(lambda turn: turn.rows(self._statements.oldest, {}))
            if left in ([], before):
                return deleted

    async def ping(self) -> None:
        """Return if the database answers, for a health route; raise `BackendError` otherwise."""
        await self._run(lambda turn: turn.rows(self._statements.ping, {}))

    async def aclose(self) -> None:
        """Wait for the work in flight, a deadline at the longest, and close this event loop's connections."""
        room = self._rooms.pop(asyncio.get_running_loop(), None)
        if room is not None:
            await room.aclose()

    async def _run(self, operation: Callable[["_Turn"], Awaitable[T]]) -> T:
        room = await self._opened()
        try:
            return await room.supervisor.run(lambda lease: operation(_Turn(room.connections, lease, aside=True)))
        except _SAID as error:
            raise _meant(error) from None

    def _write(
        self,
        write: Write,
        id: UUID,  # noqa: A002
        parameters: dict[str, Any],
        done: Done | None = None,
    ) -> Coroutine[Any, Any, bool]:
        # No coroutine around the lane's own: each that waits is left and entered again.
        data = parameters.get("data")
        change = _Change(checked_id(id), parameters, write, done, len(data) if isinstance(data, str) else 0)
        room = self._at_hand()
        return self._change(change) if room is None else room.write(change)

    async def _change(self, change: "_Change") -> bool:
        return await (await self._opened()).write(change)

    def _at_hand(self) -> "_Room | None":
        """Return the running event loop's room, if it has one."""
        # None while there is none, as where an operation is asked for that an event loop will be begun for.
        return self._rooms.get(asyncio._get_running_loop())  # type: ignore[arg-type] # noqa: SLF001 - exported by asyncio

    def _begin_anew(self) -> None:
        """Leave the connections alone that there are, and open others: for the child of a fork, which the parent's
        sockets are not for, neither to use nor, as forgetting them would, to close.
        """
        self._inherited.append(self._rooms)
        self._rooms = {}

    async def _opened(self) -> "_Room":
        if (room := self._at_hand()) is not None:  # by somebody who was asked for at the same moment
            return room
        # By copies of the keys: loops in other threads come and go meanwhile.
        for other in list(self._rooms):
            if other.is_closed():
                self._rooms.pop(other, None)
        kept = not any(other.connections.kept for other in list(self._rooms.values()))
        connections = Connections(self._model, self._statements, kept=kept)
        supervisor = Supervisor(slots=self._pool_size, deadline=self._deadline, breaker=CircuitBreaker())
        room = _Room(connections, supervisor, self._statements, batch=self._batch)
        self._rooms[asyncio.get_running_loop()] = room
        await room.open()
        return room


_BACKENDS: WeakSet[SQLAlchemyBackend] = WeakSet()


def _forked() -> None:
    for backend in _BACKENDS:
        backend._begin_anew()  # noqa: SLF001 - of this very module


# Told of a fork, nobody has to ask the system with every request what process this is.
os.register_at_fork(after_in_child=_forked)


class _Room:
    """What one event loop has: connections, the supervisor of what runs on them, a lane each for reads and writes."""

    def __init__(
        self, connections: Connections, supervisor: Supervisor, statements: Statements, *, batch: bool
    ) -> None:
        self.connections = connections
        self.supervisor = supervisor
        # Without batches, each piece of work is a load, and there are as many at a time as there are connections.
        load, flights = (MAX_LOAD, 1) if batch else (1, supervisor.slots)
        # Two halves of a crowd that are served by turns gain nothing where they cannot be at the same time.
        enough = ENOUGH if statements.beside else MAX_LOAD
        reader, writer = _Reader(connections, statements), _Writer(connections, statements)
        self.read = Lane(supervisor, reader, max_load=load, enough=enough, flights=flights, shared=True).put
        patience = PATIENCE
        if not statements.beside:
            # One writes at a time, of all processes: a second of ours would only wait, where a reader could read.
            flights, patience = 1, math.inf
        self.write = Lane(supervisor, writer, max_load=load, enough=enough, flights=flights, patience=patience).put
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
                await asyncio.wait({asyncio.ensure_future(self.connections.aclose())}, timeout=1)


@dataclass(slots=True)
class _Read:
    id: UUID
    now: datetime
    size: ClassVar = 36

    @property
    def parameters(self) -> dict[str, Any]:
        """What `Statements.load` is to be sent with; made only then, so as not to be kept while the read waits."""
        return {"the_id": self.id, "now": self.now}


@dataclass(slots=True)
class _Change:
    id: UUID
    parameters: dict[str, Any]
    write: Write
    #: Tells by the row, as `Statements.reread` has it, whether this write was done; None for one that may as well be
    #: done twice.
    done: Done | None
    #: The length of the data, if it has any.
    size: int


class _Reader:
    """Loads records, by themselves or together."""

    def __init__(self, connections: Connections, statements: Statements) -> None:
        self._connections = connections
        self._statements = statements

    async def alone(self, lease: Lease, work: _Read, *, waits: bool, lost: bool) -> Record | None:  # noqa: ARG002
        """Return the record, or None: reading waits for no lock, and may be done twice."""
        turn = _Turn(self._connections, lease)
        try:
            return await turn.again(lambda connection: connection.way.record(self._statements.load, work.parameters))
        except _SAID as error:
            raise _meant(error) from None

    async def together(self, lease: Lease, load: Sequence[_Read]) -> Sequence[Record | Exception | None]:
        """Return each record, or None."""
        several = [work.parameters for work in load]
        turn = _Turn(self._connections, lease)
        try:
            found = await turn.again(lambda connection: connection.way.records_of_each(several))
        except (Fault, *_UNSAYABLE):
            return [Apart()] * len(load)
        return [
            None if isinstance(each, Record) and each.expires_at <= work.now else each
            for each, work in zip(found, load, strict=True)
        ]


class _Writer:
    """Changes rows, by themselves or together."""

    def __init__(self, connections: Connections, statements: Statements) -> None:
        self._connections = connections
        self._statements = statements
        #: Whether the database takes statements that lock a row and do not wait for it. Citus refuses some.
        self._locks = True

    async def alone(self, lease: Lease, work: _Change, *, waits: bool, lost: bool) -> bool:
        """Tell whether the row was changed."""
        turn = _Turn(self._connections, lease)
        try:
            return await self._alone(turn, work, waits=waits, lost=lost)
        except _SAID as error:
            raise _meant(error) from None

    async def together(self, lease: Lease, load: Sequence[_Change]) -> Sequence[bool | Exception]:
        """Tell for each whether its row was changed."""
        several = [(work.write if self._locks else work.write.waiting(), work.parameters) for work in load]
        turn = _Turn(self._connections, lease)
        try:
            outcomes = await turn.once(lambda connection: connection.way.changed_each(several))
        except Fault as fault:
            self._locks = self._locks and fault.state != NOT_SUPPORTED
            return [Apart(lost=fault.lost)] * len(load)
        except _UNSAYABLE:
            return [Apart()] * len(load)
        return [_typed(outcome) if isinstance(outcome, Fault) else outcome for outcome in outcomes]

    async def _alone(self, turn: "_Turn", work: _Change, *, waits: bool, lost: bool) -> bool:
        if not lost:
            try:
                return await self._try(turn, work, waits=waits)
            except Fault as fault:
                if not fault.lost or turn.abandoned:
                    raise
        # It may have taken effect, or may still do so: only the row can tell.
        done = await self._done(turn, work)
        if done is not None:
            return done
        try:
            changed = await self._try(turn, work, waits=waits)
        except Held:
            raise Held(lost=True) from None
        except Fault as fault:  # of an INSERT whose first try has taken effect meanwhile
            if not fault.constraint or not await self._done(turn, work):
                raise
            return True
        # What may as well be done twice and has nothing to change any more was done by the first try.
        return changed or work.done is None or bool(await self._done(turn, work))

    async def _try(self, turn: "_Turn", work: _Change, *, waits: bool) -> bool:
        if waits or not self._locks:
            return await turn.once(lambda connection: connection.way.changed(work.write.plain, work.parameters))
        try:
            return await turn.once(lambda connection: connection.way.changed(work.write.prompt, work.parameters))
        except Fault as fault:
            if fault.state == NOT_SUPPORTED:
                self._locks = False
            elif fault.state != LOCKED:
                raise
        # Either way it may be tried again; the next time, perhaps, without a lock.
        raise Held

    async def _done(self, turn: "_Turn", work: _Change) -> bool | None:
        """Tell whether *work* was done; None if not yet: sent twice it still takes effect once."""
        if work.done is None:
            return None
        rows = await turn.rows(self._statements.reread, {"the_id": work.id})
        return work.done(rows[0] if rows else None)


class _Turn:
    """One operation's use of connections, each for one statement or transaction."""

    __slots__ = ("_aside", "_connections", "_lease")

    def __init__(self, connections: Connections, lease: Lease, *, aside: bool = False) -> None:
        self._connections = connections
        self._lease = lease
        self._aside = aside

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits any more."""
        return self._lease.abandoned

    async def rows(self, statement: sa.Executable, parameters: Parameters) -> Sequence[Any]:
        """Return all rows of a statement that changes nothing."""
        return await self.again(lambda connection: connection.plain.rows(statement, parameters))

    async def records(self, statement: sa.Executable, parameters: Parameters) -> Sequence[Record]:
        """Return all rows as records."""
        return await self.again(lambda connection: connection.plain.records(statement, parameters))

    async def count(self, statement: sa.Executable, parameters: Parameters) -> int:
        """Return the number of rows affected by a statement that may as well run twice."""
        return await self.again(lambda connection: connection.plain.count(statement, parameters))

    async def changed(self, write: Write, form: sa.Executable, parameters: Parameters) -> int:
        """Return the number of rows affected by this *form* of *write*, or by the plain one if the database refuses it,
        as Citus does. Raise `Held` rather than wait for a lock, if that is what the form does.
        """
        try:
            return await self.count(form, parameters)
        except Fault as fault:
            if fault.state == LOCKED and form is write.prompt:
                raise Held from None
            if fault.state != NOT_SUPPORTED:
                raise
        return await self.count(write.plain, parameters)

    async def again(self, use: Callable[[Connection], Awaitable[T]]) -> T:
        """Return what *use* returns, which may as well run twice: a dead connection is replaced once."""
        try:
            return await self.once(use)
        except Fault as fault:
            if self.abandoned or not fault.lost:
                raise
        return await self.once(use)

    async def once(self, use: Callable[[Connection], Awaitable[T]]) -> T:
        """Return what *use* returns; what the server undid for the sake of others is tried again (R59)."""
        for longest in _PAUSES:
            try:
                return await self._try(use)
            except Fault as fault:
                if self.abandoned or fault.state not in _SERIALIZATION:
                    raise
            await asyncio.sleep(random.uniform(0, longest))  # noqa: S311 - not a secret
        return await self._try(use)

    async def _try(self, use: Callable[[Connection], Awaitable[T]]) -> T:
        aside = self._aside
        connection = self._connections.at_hand(aside=aside) or await _connected(self._connections.take(aside=aside))
        self._lease.terminate = connection.terminate
        try:
            result = await use(connection)
        except BaseException as error:
            fault = connection.fault(error)
            self._lease.terminate = None
            unharmed = fault is not None or isinstance(error, (CorruptData, *_UNSAYABLE))
            await self._part_with(connection, healthy=unharmed and (fault is None or not fault.gone))
            if fault is None:
                raise
            raise fault from None
        self._lease.terminate = None
        await self._part_with(connection, healthy=True)
        return result

    async def _part_with(self, connection: Connection, *, healthy: bool) -> None:
        if self.abandoned:
            await self._connections.discard(connection)
        elif healthy:
            await self._connections.give(connection, aside=self._aside)
        else:
            await self._connections.discard(connection, others=True)


def _model_engine(engine: str | sa.URL | AsyncEngine, deadline: float) -> Engine:
    """Return the engine whose settings ours take over; nothing is connected."""
    if isinstance(engine, (str, sa.URL)):
        engine = new_engine(async_url(engine), deadline=deadline, skip_autocommit_rollback=True)
    if not isinstance(engine, AsyncEngine):
        raise ConfigurationError(f"SQLAlchemyBackend takes a URL or an AsyncEngine, not {type(engine).__name__}")
    model = engine.sync_engine
    if isinstance(model.pool, StaticPool) or in_memory(model.url):
        raise ConfigurationError(
            "an in-memory SQLite (StaticPool) has one connection for everybody: give sessions a file of their own, "
            "sqlite+aiosqlite:///sessions.db, or use InMemoryBackend"
        )
    return model


def _unchanged(id: UUID, expected: Expected) -> dict[str, Any]:  # noqa: A002
    return {"the_id": id, "the_version": expected.version, "the_secret_hash": expected.secret_hash, "now": expected.now}


def _inserted(record: Record) -> Done:
    """Return what tells whether the row is *record*; if it is somebody else's, inserting it again will say so."""
    return lambda row: True if row is not None and tuple(row) == (record.version, record.secret_hash) else None


def _has_replaced(record: Record, expected: Expected, row: Any) -> bool | None:
    """Tell by the *row* whether *record* has replaced what was *expected*. Versions only grow."""
    if row is None or row.version > record.version:
        # Gone, or written over, perhaps on top of ours. Said to have missed, ours would be made a second time.
        raise BackendUnavailable("the connection broke, and whether the record was written cannot be known")
    if row.version == record.version:
        return bool(row.secret_hash == record.secret_hash)
    return None if row.version == expected.version else False


def _deleted(expected: Expected) -> Done:
    """Return what tells whether the row that was *expected* is gone."""
    return lambda row: True if row is None else None if row.version == expected.version else False


async def _connected(taking: Awaitable[Connection]) -> Connection:
    """Return the connection, or say why there is none."""
    try:
        return await taking
    except DBAPIError as error:
        raise _typed(Fault(error.orig or error, gone=True)) from None
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        raise _unreachable(error) from None
    except Exception as error:
        # Before 2.1 SQLAlchemy passes on what asyncpg raises while connecting.
        if not hasattr(error, "sqlstate"):
            raise
        raise _typed(Fault(error, gone=True)) from None


def _unsayable(what: str) -> BackendError:
    return BackendError(f"the record has a value that its column cannot hold ({what})")


#: Why nobody is let in, and where to look: by SQLSTATE or SQLite's messages.
_LOCKED_OUT = {
    "3D000": "the server has no database of this name: check the URL",
    "28000": "the server does not let this user in: check the URL, and the server's pg_hba.conf",
    "28P01": "the server does not take this user's password: check the URL",
    "53300": "the server has no connection left: check its max_connections",
    "file is not a database": "the file is no SQLite database: check the URL",
    "unable to open database file": "the SQLite file cannot be opened: check the URL, and the rights to its folder",
}


def _unreachable(error: Exception) -> BackendUnavailable:
    name = type(error).__name__
    if isinstance(error, socket.gaierror):
        return BackendUnavailable(f"the name of the database's host is not known: check the URL ({name})")
    return BackendUnavailable(f"no connection to the database ({name})")


def _meant(error: Exception) -> BackendError | CorruptData:
    """Return what one of `_SAID` is to a caller. To be raised without a cause: drivers quote parameters and rows in
    their messages (R107).
    """
    if isinstance(error, Fault):
        return _typed(error)
    if isinstance(error, _UNSAYABLE):
        return _unsayable(type(error).__name__)
    return _unreachable(error)


def _typed(fault: Fault) -> BackendError | CorruptData:  # noqa: PLR0911 - a line of the table each
    """Name what a driver said, by SQLSTATE, or by SQLite's messages, which have no codes in SQLAlchemy's hands."""
    state, said, what = fault.state, fault.said, f"{fault.name} {fault.state}".rstrip()
    if fault.constraint:
        if state == UNIQUE_VIOLATION or "UNIQUE constraint failed" in said:
            return DuplicateId("a session with this id exists")
        return BackendError(f"the database refused the row ({what})")
    if (
        state in {"42P01", "42703", "3F000"}
        or "no such table" in said
        or "no such column" in said
        or "has no column" in said
    ):
        return SchemaMissing(
            f"the session table is missing or behind ({what}): run 'alembic upgrade head' or 'sqlsessions migrate'"
        )
    if state == "42501":
        return BackendError(
            f"the database user may not use the session table ({what}): "
            "GRANT SELECT, INSERT, UPDATE, DELETE on it, and USAGE on its schema"
        )
    if fault.unsayable:
        return _unsayable(fault.name)
    if "Could not decode to UTF-8" in said:
        return CorruptData(f"a stored session has a column that cannot be read ({what})")
    if fault.refuses or state == "53100" or "disk is full" in said:
        return BackendReadOnly(f"the database accepts no writes ({what})")
    if state in {"57014", LOCKED} or "database is locked" in said:
        return BackendTimeout(f"the database did not finish in time ({what})")
    if fault.gone or state.startswith(("08", "28", "3D", "53", "57", "40")) or not state:
        signs = (meaning for sign, meaning in _LOCKED_OUT.items() if sign == state or sign in said)
        return BackendUnavailable(f"{next(signs, 'the database is not available')} ({what})")
    return BackendError(f"the database refused the statement ({what})")


_: type[Backend] = SQLAlchemyBackend
