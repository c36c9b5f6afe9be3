"""One event loop's connections: opened as the user's engine would, kept between uses, spoken to directly where it pays.

SQLAlchemy connects, builds the statements and spells them. What it does per statement (greenlets, contexts, results)
costs several times what the driver does, so the statements of every request go to the driver's own connection, unless
somebody listens to SQLAlchemy's events (echo, tracing) or the settings leave the preparing of statements to it, as
behind some poolers. Then everything goes through SQLAlchemy.
"""

import asyncio
import logging
import sqlite3
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC
from functools import partial
from typing import Any, Protocol, TypeVar
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Dialect, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only

from sqlsessions.backends.hosts import connector
from sqlsessions.backends.lanes import Apart
from sqlsessions.errors import ConfigurationError, CorruptData
from sqlsessions.record import Record
from sqlsessions.schema import Spelled, Statements, Write, columns, place

#: `Record._make`, but for its look at the length, which is the statement's.
_record: Callable[[Any], Record] = partial(tuple.__new__, Record)

T = TypeVar("T")
Parameters = Mapping[str, Any]
#: Returns a statement as the driver takes it, given parameters such as it will have.
Spelling = Callable[[sa.Executable, Parameters], Spelled]
#: Of a write that was sent with others: whether it changed its row, or why nobody can say so.
Outcome = bool | Exception

#: What a server answers that was demoted to a standby.
READ_ONLY = "25006"
#: Read-only, shut down, crashed, starting up: the connection leads to the wrong server and must go (F19).
WRONG_SERVER = frozenset({READ_ONLY, "57P01", "57P02", "57P03"})
#: The row is locked by somebody else, and the statement was not to wait.
LOCKED = "55P03"
#: Our engines log under this name, so that what they log can be told from what the application's do.
_LOGGING_NAME = "sqlsessions"

#: What Citus answers to a statement that it cannot send to its workers.
NOT_SUPPORTED = "0A000"


class Fault(Exception):
    """What a driver raised: its class's *name*, SQLSTATE and message, and what has become of the connection."""

    def __init__(self, error: BaseException, *, gone: bool) -> None:
        super().__init__()
        #: Without a cause: drivers quote parameters and rows in their messages (R107).
        self.name = type(error).__name__
        self.state: str = getattr(error, "sqlstate", None) or ""
        self.said = "" if self.state else str(error)
        #: What the connection leads to accepts no writes: a standby, or an SQLite file, perhaps one that another has
        #: taken the place of.
        self.refuses = self.state == READ_ONLY or "readonly database" in self.said
        #: The connection is of no more use.
        self.gone = gone or self.refuses
        #: Whether the statement took effect is unknown. A refusal is an answer.
        self.lost = gone and not self.refuses
        #: The driver could not send the statement, because of a value in it.
        self.unsayable = not self.state and self.name == "DataError"
        self.constraint = self.state.startswith("23") or isinstance(error, sqlite3.IntegrityError)


class Way(Protocol):
    """How the statements of every request are sent on a connection."""

    async def record(self, statement: sa.Executable, parameters: Parameters) -> Record | None:
        """Return the first row as a record."""

    async def records_of_each(self, several: Sequence[Parameters]) -> Sequence[Record | Exception | None]:
        """Return the record of each id, or None: by one statement or transaction. It may have expired."""

    async def changed(self, statement: sa.Executable, parameters: Parameters) -> bool:
        """Tell whether a write changed its row."""

    async def changed_each(self, several: Sequence[tuple[Write, Parameters]]) -> Sequence[Outcome]:
        """Tell of each write whether it changed its row: with one commit, never waiting for a lock on a row.

        If it raises, nothing was done, or nobody knows.
        """


class Plain:
    """Through SQLAlchemy: on any database, and seen by whoever listens to its events."""

    def __init__(self, connection: AsyncConnection, statements: Statements) -> None:
        self._connection = connection
        self._statements = statements

    async def rows(self, statement: sa.Executable, parameters: Parameters) -> Sequence[Any]:
        """Return all rows."""
        return (await self._connection.execute(statement, parameters)).all()

    async def count(self, statement: sa.Executable, parameters: Parameters) -> int:
        """Return the number of rows changed."""
        return (await self._connection.execute(statement, parameters)).rowcount

    async def records(self, statement: sa.Executable, parameters: Parameters) -> Sequence[Record]:
        """Return all rows as records."""
        return [checked(row) for row in await self._decoded(statement, parameters)]

    async def record(self, statement: sa.Executable, parameters: Parameters) -> Record | None:
        """Return the first row as a record."""
        return next(iter(await self.records(statement, parameters)), None)

    async def records_of_each(self, several: Sequence[Parameters]) -> Sequence[Record | Exception | None]:
        """Return the record of each id, by one statement."""
        ids = [parameters["the_id"] for parameters in several]
        try:
            rows = await self._decoded(self._statements.load_many, {"ids": list(dict.fromkeys(ids))})
        except CorruptData:
            return [Apart()] * len(several)
        found = {row.id: row for row in rows}
        return [_attempt(checked, found[the_id]) if the_id in found else None for the_id in ids]

    async def changed(self, statement: sa.Executable, parameters: Parameters) -> bool:
        """Tell whether a write changed its row."""
        return await self.count(statement, parameters) == 1

    async def changed_each(self, several: Sequence[tuple[Write, Parameters]]) -> Sequence[Outcome]:
        """Send the writes one by one in one transaction."""
        await self._connection.execute(self._statements.begin)
        try:
            counts = [await self.count(write.passing, parameters) for write, parameters in several]
            await self._connection.execute(self._statements.commit)
        except Exception as error:
            if not (isinstance(error, DBAPIError) and error.connection_invalidated):
                await self._connection.execute(self._statements.rollback)
            raise
        return [_told(write, count == 1) for (write, _), count in zip(several, counts, strict=True)]

    async def _decoded(self, statement: sa.Executable, parameters: Parameters) -> Sequence[Any]:
        try:
            return (await self._connection.execute(statement, parameters)).all()
        except (ValueError, TypeError, OverflowError):
            raise _unreadable() from None


class _PastSQLAlchemy:
    """A driver's own connection, and what it takes to speak to it."""

    __slots__ = ("_driver", "_spell", "_statements")

    def __init__(self, driver: Any, statements: Statements, spell: Spelling) -> None:
        self._driver = driver
        self._statements = statements
        self._spell = spell


class Asyncpg(_PastSQLAlchemy):
    """By asyncpg, which takes and gives the very values that records are made of."""

    __slots__ = ()

    async def record(self, statement: sa.Executable, parameters: Parameters) -> Record | None:
        """Return the first row as a record."""
        spelled = self._spell(statement, parameters)
        try:
            rows = await self._driver.fetch(spelled.text, *spelled.values(parameters))
            return _given(spelled, rows[0]) if rows else None
        except OverflowError:  # a date that Python does not have
            raise _unreadable() from None

    async def records_of_each(self, several: Sequence[Parameters]) -> Sequence[Record | Exception | None]:
        """Return the record of each id, by one statement."""
        ids = [parameters["the_id"] for parameters in several]
        wanted = {"ids": ids}
        spelled = self._spell(self._statements.load_many, wanted)
        values = spelled.values(wanted)
        try:
            found = {row[0]: _given(spelled, row) for row in await self._driver.fetch(spelled.text, *values)}
        except OverflowError:  # as above, of one of them
            return [Apart()] * len(several)
        return [found.get(the_id) for the_id in ids]

    async def changed(self, statement: sa.Executable, parameters: Parameters) -> bool:
        """Tell whether a write changed its row: it returns its id then."""
        spelled = self._spell(statement, parameters)
        return bool(await self._driver.fetch(spelled.text, *spelled.values(parameters)))

    async def changed_each(self, several: Sequence[tuple[Write, Parameters]]) -> Sequence[Outcome]:
        """Send all writes of a kind as one message, which is one transaction; several kinds share another."""
        kinds: defaultdict[Write, list[Parameters]] = defaultdict(list)
        for write, parameters in several:
            kinds[write].append(parameters)
        changed: set[UUID] = set()
        async with self._driver.transaction() if len(kinds) > 1 else nullcontext():
            for write, group in kinds.items():
                rows = await (self._one_by_one(write, group) if write.many is None else self._as_one(write.many, group))
                changed.update([row[0] for row in rows])
        return [_told(write, _id(parameters) in changed) for write, parameters in several]

    async def _as_one(self, many: sa.Executable, group: list[Parameters]) -> Sequence[Any]:
        together = columns(group)
        spelled = self._spell(many, together)
        rows: Sequence[Any] = await self._driver.fetch(spelled.text, *spelled.values(together))
        return rows

    async def _one_by_one(self, write: Write, group: list[Parameters]) -> Sequence[Any]:
        # In one order everywhere, for databases that take no form but the one that waits for locks.
        group.sort(key=_place)
        spelled = self._spell(write.passing, group[0])
        rows: Sequence[Any] = await self._driver.fetchmany(spelled.text, list(map(spelled.values, group)))
        return rows


class Aiosqlite(_PastSQLAlchemy):
    """By SQLite itself, in aiosqlite's thread: one hop per call, however many statements it takes."""

    __slots__ = ()

    async def record(self, statement: sa.Executable, parameters: Parameters) -> Record | None:
        """Return the first row as a record."""
        spelled = self._spell(statement, parameters)
        values = spelled.values(parameters)
        row = await self._hop(lambda connection: connection.execute(spelled.text, values).fetchone())
        return None if row is None else _converted(spelled, row)

    async def records_of_each(self, several: Sequence[Parameters]) -> Sequence[Record | Exception | None]:
        """Return the record of each id, by one statement each."""
        spelled = self._spell(self._statements.load, several[0])
        every = list(map(spelled.values, several))

        def read(connection: sqlite3.Connection) -> list[Any]:
            connection.execute("BEGIN")
            try:
                return [connection.execute(spelled.text, values).fetchone() for values in every]
            finally:
                connection.execute("ROLLBACK")

        convert = partial(_converted, spelled)
        return [None if row is None else _attempt(convert, row) for row in await self._hop(read)]

    async def changed(self, statement: sa.Executable, parameters: Parameters) -> bool:
        """Tell whether a write changed its row."""
        spelled = self._spell(statement, parameters)
        values = spelled.values(parameters)
        return await self._hop(lambda connection: connection.execute(spelled.text, values).rowcount) == 1

    async def changed_each(self, several: Sequence[tuple[Write, Parameters]]) -> Sequence[Outcome]:
        """Send the writes in one transaction; one that breaks a constraint fails alone."""
        every = []
        for write, parameters in several:
            spelled = self._spell(write.plain, parameters)
            every.append((spelled.text, spelled.values(parameters)))

        def write_all(connection: sqlite3.Connection) -> list[Outcome]:
            # As a writer from the start: of two that begin as readers neither could go on.
            connection.execute("BEGIN IMMEDIATE")
            try:
                outcomes = [_outcome(connection, text, values) for text, values in every]
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            return outcomes

        return await self._hop(write_all)

    async def _hop(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return what *work* returns, called in the connection's thread."""
        driver = self._driver
        # What aiosqlite's own methods are made of, each of which hops once per statement.
        result: T = await driver._execute(lambda: work(driver._conn))  # noqa: SLF001
        return result


def _given(spelled: Spelled, row: Any) -> Record:
    """Return asyncpg's *row* as a record: all as it is, but for "infinity", which it gives as a naive datetime."""
    created, seen, expires, authenticated = row[5:9]
    if created.tzinfo is seen.tzinfo is expires.tzinfo is UTC and (
        authenticated is None or authenticated.tzinfo is UTC
    ):
        return _record(row)
    return Record(*spelled.row(row))


def _outcome(connection: sqlite3.Connection, text: str, values: Sequence[Any]) -> Outcome:
    try:
        return connection.execute(text, values).rowcount == 1
    except sqlite3.IntegrityError as error:  # undoes its statement, not the transaction
        return Fault(error, gone=False)


def _id(parameters: Parameters) -> UUID:
    """Return whose row a write is for: an INSERT names it as its column, all others as their condition."""
    found: UUID = parameters["the_id"] if "the_id" in parameters else parameters["id"]
    return found


def _place(parameters: Parameters) -> int:
    return _id(parameters).int


def _told(write: Write, changed: bool) -> Outcome:  # noqa: FBT001
    """Return the outcome of *write*, which may have passed over its row if that is locked."""
    return changed if changed or write.passing is write.plain else Apart()


def checked(row: Any) -> Record:
    """Return the row as a record; raise `CorruptData` for what SQLite lets into any column, whatever its type."""
    record = Record(*row)
    for name, kind in Record.__annotations__.items():
        if not isinstance(getattr(record, name), kind):
            raise _unreadable()
    return record


def _converted(spelled: Spelled, row: Sequence[Any]) -> Record:
    try:
        return checked(spelled.row(row))
    except (ValueError, TypeError, OverflowError):
        raise _unreadable() from None


def _attempt(make: Callable[[Any], Record], row: Any) -> Record | Exception:
    try:
        return make(row)
    except CorruptData as error:
        return error


def _unreadable() -> CorruptData:
    return CorruptData("a stored session has a column that cannot be read")


class Connection:
    """A connection in autocommit that belongs to nobody's pool."""

    __slots__ = ("_driver", "_sqlalchemy", "direct", "opened", "plain", "way")

    def __init__(self, sqlalchemy: AsyncConnection, statements: Statements, spell: Spelling, *, opened: float) -> None:
        self._sqlalchemy = sqlalchemy
        #: When that was begun.
        self.opened = opened
        adapter: Any = sqlalchemy.sync_connection and sqlalchemy.sync_connection.connection.dbapi_connection
        self._driver: Any = sqlalchemy.dialect.get_driver_connection(adapter)
        self.plain = Plain(sqlalchemy, statements)
        kind = _way(sqlalchemy.dialect, adapter, self._driver)
        #: Past SQLAlchemy, if that is possible with this driver and these settings.
        self.direct: Way = self.plain if kind is None else kind(self._driver, statements, spell)
        #: How the statements of every request are sent just now.
        self.way: Way = self.plain

    def usable(self, recycle: float) -> bool:
        """Tell whether the connection may serve once more: it is not known to be dead, nor older than *recycle*."""
        return not self._dead() and (recycle < 0 or time.monotonic() - self.opened <= recycle)

    def terminate(self) -> None:
        """Cut the connection without a word to the server, if the driver can."""
        cut = getattr(self._driver, "terminate", None)
        if cut is not None:
            cut()

    def in_doubt(self) -> bool:
        """Tell whether somebody may have begun a transaction on it, whom SQLAlchemy tells that it has."""
        if not self._sqlalchemy.in_transaction():
            return False
        engine: Any = self._sqlalchemy.engine.sync_engine
        return bool(engine._has_events and engine.dispatch.begin)  # noqa: SLF001 - as in `Connections`

    async def commit(self) -> None:
        """End the transaction that may be open."""
        begun = getattr(self._driver, "is_in_transaction", None)
        if begun is not None and begun():
            # Of one that it has not begun itself, SQLAlchemy's asyncpg knows nothing.
            await self._sqlalchemy.exec_driver_sql("COMMIT")
        await self._sqlalchemy.commit()

    async def close(self) -> None:
        """Take leave of the server."""
        await self._sqlalchemy.close()

    def fault(self, error: BaseException) -> Fault | None:
        """Return what the driver said, whichever way it came; None for an error that is not a driver's."""
        if isinstance(error, DBAPIError) and error.orig is not None:
            return Fault(error.orig, gone=error.connection_invalidated)
        state = getattr(error, "sqlstate", None)
        if state is not None or isinstance(error, OSError) or type(error).__module__.startswith("asyncpg."):
            return Fault(error, gone=state in WRONG_SERVER or isinstance(error, OSError) or self._dead())
        return Fault(error, gone=False) if isinstance(error, sqlite3.Error) else None

    def _dead(self) -> bool:
        closed = getattr(self._driver, "is_closed", None)
        return closed is not None and bool(closed())


class Connections:
    """The connections of one event loop, opened as *model* opens its own; those given back are kept for the next.

    With *kept* False each is closed when it is given back.
    """

    def __init__(self, model: Engine, statements: Statements, *, kept: bool) -> None:
        self.kept = kept
        self._engine = _engine_like(model)
        self._recycle: float = model.pool._recycle  # noqa: SLF001 - what Pool.recreate() passes on; there is no public way
        self._statements = statements
        self._idle: deque[Connection] = deque()
        #: What was opened before this leads to where we no longer want to go.
        self._since = 0.0
        self._texts: dict[sa.Executable, Spelled] = {}

    def at_hand(self, *, aside: bool = False) -> Connection | None:
        """Return a connection that is kept, for one to use at a time; None if there is none of use.

        What keeps the server busy for long, as a purge does, goes *aside*: by the same connection each time and not by
        one that requests have used just now. A server process that has had a processor for long gets the next one
        late, which reads by it would wait for.
        """
        if not self._idle or not self._idle[0 if aside else -1].usable(self._recycle):
            return None
        return self._heard(self._taken_up(aside=aside))

    async def take(self, *, aside: bool = False) -> Connection:
        """Return one, opened if need be."""
        while self._idle:
            if (connection := self.at_hand(aside=aside)) is not None:
                return connection
            await self._taken_up(aside=aside).close()
        return self._heard(await self._open())

    def _taken_up(self, *, aside: bool) -> Connection:
        return self._idle.popleft() if aside else self._idle.pop()

    async def give(self, connection: Connection, *, aside: bool = False) -> None:
        """Take *connection* back."""
        if connection.in_doubt():
            await connection.commit()
        if not self.kept or connection.opened < self._since:
            await connection.close()
        elif aside:
            self._idle.appendleft(connection)
        else:
            self._idle.append(connection)

    async def discard(self, connection: Connection, *, others: bool = False) -> None:
        """Cut *connection*, and with *others* those that are kept, which lead to the same place; those in use go when
        they are given back. A standby goes on answering reads, and what is read there and written elsewhere is lost.
        """
        discarded = [connection]
        if others:
            self._since = time.monotonic()
            discarded += self._idle
            self._idle.clear()
        for each in discarded:
            each.terminate()
            await each.close()

    async def aclose(self) -> None:
        """Close what is kept, and from now on what is given back."""
        self.kept = False
        while self._idle:
            await self._idle.pop().close()

    async def _open(self) -> Connection:
        # In a task of its own: drivers set limits to the time it takes, which cancel the task that they were set in.
        opening = asyncio.ensure_future(self._connect())
        try:
            await asyncio.wait({opening})
        except asyncio.CancelledError:
            opening.cancel()
            opening.add_done_callback(_looked_at)
            raise
        return opening.result()

    async def _connect(self) -> Connection:
        begun = time.monotonic()
        opened = await connected(self._engine)
        if opened.sync_connection is not None:
            # Ours alone: of one that is lost together with its event loop, a pool would complain.
            opened.sync_connection.detach()
        return Connection(opened, self._statements, self._spell, opened=begun)

    def _spell(self, statement: sa.Executable, parameters: Parameters) -> Spelled:
        text = self._texts.get(statement)
        if text is None:
            text = self._texts[statement] = Spelled(statement, self._engine.dialect, list(parameters))
        return text

    def _heard(self, connection: Connection) -> Connection:
        connection.way = connection.plain if self._overheard() else connection.direct
        return connection

    def _overheard(self) -> bool:
        """Tell whether somebody listens to what SQLAlchemy executes: echo, tracing, a test."""
        engine: Any = self._engine.sync_engine
        # Both private ones are what SQLAlchemy asks itself, before it calls listeners and before it logs.
        if engine._has_events:  # noqa: SLF001
            heard = engine.dispatch
            if heard.before_cursor_execute or heard.after_cursor_execute or heard.before_execute or heard.after_execute:
                return True
        return bool(engine.dialect.dispatch.do_execute) or bool(engine._should_log_info())  # noqa: SLF001


def _looked_at(opening: "asyncio.Future[Connection]") -> None:
    """Let go of what was opened for somebody who has gone."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().terminate()


def _way(dialect: Dialect, adapter: Any, driver: Any) -> type[Asyncpg] | type[Aiosqlite] | None:
    """Return how to send statements past SQLAlchemy: not with a driver other than these two, nor where the settings
    say how SQLAlchemy is to prepare statements, as they do behind some poolers.
    """
    if dialect.driver == "aiosqlite" and hasattr(driver, "_execute") and hasattr(driver, "_conn"):
        return Aiosqlite
    if dialect.driver != "asyncpg":
        return None
    name = getattr(adapter, "_prepared_statement_name_func", None)
    cached = getattr(adapter, "_prepared_statement_cache", None) is not None
    return Asyncpg if cached and name is not None and name() is None else None


def new_engine(url: sa.URL, *, deadline: float, **options: Any) -> AsyncEngine:
    """Return an engine on *url*, of whose hosts, if they are several, one that hangs does not hide the next.

    Raises `ConfigurationError` if there is no driver for it that can be awaited.
    """
    several = {"async_creator_fn": connector(deadline)} if url.drivername == "postgresql+asyncpg" else {}
    try:
        return create_async_engine(url, connect_args=several, **options)
    except (SQLAlchemyError, ImportError, TypeError) as error:
        raise ConfigurationError(
            f"there is no asynchronous driver for {url.drivername} ({type(error).__name__}): "
            "use postgresql+asyncpg:// or sqlite+aiosqlite:///"
        ) from error


async def connected(engine: AsyncEngine) -> AsyncConnection:
    """Return a connection. Raises `ConfigurationError` for an option that the driver does not know."""
    try:
        return await engine.connect()
    except TypeError as error:
        raise ConfigurationError(
            f"{place(engine.url)}: the driver does not take an option of the URL, or of connect_args: {error}"
        ) from error


def _engine_like(model: Engine) -> AsyncEngine:
    """Return an engine without a pool that connects exactly as *model* does, in autocommit."""
    pool = NullPool(
        model.pool._creator,  # noqa: SLF001 - what Pool.recreate() passes on; there is no public way
        reset_on_return=None,  # no statement of ours leaves a transaction or a setting behind
        dialect=model.dialect,
        _dispatch=model.pool.dispatch,
    )
    engine = Engine(pool, model.dialect, model.url, logging_name=_LOGGING_NAME, hide_parameters=True)
    event.listen(pool, "connect", lambda connection, _: _set_autocommit(model.dialect, connection))
    event.listen(pool, "connect", lambda connection, _: _reset_codecs(model.dialect, connection))
    event.listen(engine, "handle_error", _discard_wrong_server)
    return AsyncEngine(engine)


def _set_autocommit(dialect: Dialect, connection: Any) -> None:
    """Have each statement committed by itself, whatever the settings of the user's engine say."""
    # From Python 3.12 on, autocommit=False has a transaction open at all times.
    legacy = getattr(sqlite3, "LEGACY_TRANSACTION_CONTROL", None)
    if dialect.driver == "aiosqlite" and legacy is not None:
        driver: Any = dialect.get_driver_connection(connection)

        def forget_its_own() -> None:
            driver._conn.autocommit = True  # noqa: SLF001 - which ends that transaction
            driver._conn.autocommit = legacy  # noqa: SLF001

        await_only(driver._execute(forget_its_own))  # noqa: SLF001
    dialect.set_isolation_level(connection, "AUTOCOMMIT")


def _reset_codecs(dialect: Dialect, connection: Any) -> None:
    """Have asyncpg take and give texts for JSON, and ids as they are, whatever a listener of the user's has it do."""
    if dialect.driver == "asyncpg":
        driver: Any = dialect.get_driver_connection(connection)
        for name in ("json", "uuid"):
            # Of types that it knows by itself it asks the server nothing.
            await_only(driver.reset_type_codec(name, schema="pg_catalog"))


def _discard_wrong_server(context: sa.ExceptionContext) -> None:
    if getattr(context.original_exception, "sqlstate", None) in WRONG_SERVER:
        context.is_disconnect = True


class _WithoutParameters(logging.Filter):
    """Takes the parameters out of what aiosqlite logs of statements on *table*: at DEBUG it writes all of them."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; every one may pass."""
        call = record.args[0] if isinstance(record.args, tuple) and record.args else None
        if isinstance(call, partial) and call.args and isinstance(call.args[0], str) and self.name in call.args[0]:
            record.args = (f"{getattr(call.func, '__name__', 'statement')} {call.args[0]!r}, parameters hidden",)
        return True


def _without_rows(record: logging.LogRecord) -> bool:
    """Tell whether a record is other than the columns and rows of a result, which SQLAlchemy logs at DEBUG."""
    return record.levelno > logging.DEBUG


def silence(table: str) -> None:
    """Keep data and hashes out of the logs of our drivers, whatever their levels (R107)."""
    driver = logging.getLogger("aiosqlite")
    if not any(isinstance(known, _WithoutParameters) and known.name == table for known in driver.filters):
        driver.addFilter(_WithoutParameters(table))
    logging.getLogger(f"sqlalchemy.engine.Engine.{_LOGGING_NAME}").addFilter(_without_rows)


def join_threads() -> None:
    """Wait for what is left of SQLite, before the event loop is closed: a file that cannot be opened leaves a thread of
    aiosqlite's that is about to tell the event loop. Told a closed one, it would die with a traceback.
    """
    for thread in threading.enumerate():
        # asyncio's own threads are ended by asyncio.run.
        if thread is not threading.main_thread() and not thread.name.startswith("asyncio_"):
            thread.join(timeout=1)
