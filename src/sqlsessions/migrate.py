"""The migrations of the session table: run them, print them, and keep an application's own Alembic off it.

The chain of revisions lies in the package and has a version table of its own, so that it mixes with no
application's history. Nothing here touches ``alembic.context`` or ``alembic.op``, which belong to one run per
process: that run may be the application's own.
"""

import io
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from importlib import resources
from typing import Any, TypeVar
from zlib import crc32

import asyncpg
import sqlalchemy as sa
from alembic import op
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.runtime.environment import IncludeObjectFn
from alembic.runtime.migration import MigrationStep, RevisionStep
from alembic.script import Script, ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from sqlsessions.backends.connections import connected, new_engine
from sqlsessions.errors import (
    BackendError,
    BackendReadOnly,
    BackendTimeout,
    BackendUnavailable,
    ConfigurationError,
    SchemaMissing,
    SessionError,
)
from sqlsessions.schema import (
    DEFAULT_TABLE,
    async_url,
    checked_name,
    in_memory,
    masked,
    missing_file,
    place,
    sessions_table,
    version_table,
)

T = TypeVar("T")

#: Seconds that several hosts share until one of them has let us in.
_PATIENCE = 30

#: Where to migrate: a URL, an engine, or a connection. In a transaction begun on the connection, everything
#: happens in that one.
Target = str | sa.URL | AsyncEngine | AsyncConnection


async def upgrade(target: Target, *, table: str = DEFAULT_TABLE, schema: str | None = None) -> None:
    """Bring the session table to the newest revision; create it if there is none.

    Calling it again, or in many processes at once, does no harm: they wait for each other. A table that a
    later release has migrated is left as it is.
    """
    chain = Chain(table, schema)
    await _run(target, chain, chain.upgrade)


async def downgrade(
    target: Target, revision: str = "base", *, table: str = DEFAULT_TABLE, schema: str | None = None
) -> None:
    """Take the session table back to *revision*; to ``base``, drop it, its sessions and its version table."""
    chain = Chain(table, schema)
    kept = 0 if revision == "base" else chain.position(revision)
    await _run(target, chain, lambda connection: chain.downgrade(connection, kept))


async def current(target: Target, *, table: str = DEFAULT_TABLE, schema: str | None = None) -> str | None:
    """Return the revision that the session table is at, or None if it was never migrated. Only reads."""
    return await _current(target, Chain(table, schema))


async def check(target: Target, *, table: str = DEFAULT_TABLE, schema: str | None = None) -> None:
    """Raise `SchemaMissing` if the session table is behind the newest revision. Only reads.

    A table that a later release has migrated is not behind: during a rolling deploy both releases use it.
    """
    chain = Chain(table, schema)
    applied = await _current(target, chain)
    if applied is None or applied in chain.revisions[:-1]:
        raise SchemaMissing(
            f"table {table} is at {applied or 'no revision'}, the newest is {chain.revisions[-1]}: "
            "run 'sqlsessions migrate' or 'alembic upgrade head'"
        )


def sql(database: str | sa.URL, *, table: str = DEFAULT_TABLE, schema: str | None = None) -> str:
    """Return the DDL that `upgrade` would run on an empty database, for somebody else to run.

    Nothing is connected. Of a URL only the dialect matters; ``"postgresql"`` or ``"sqlite"`` is enough.
    """
    chain = Chain(table, schema)
    output = io.StringIO()
    offline = {"as_sql": True, "literal_binds": True, "output_buffer": output, "fn": lambda *_: chain.up(0)}
    url = async_url(f"{database}://" if isinstance(database, str) and ":" not in database else database)
    chain.run(MigrationContext.configure(dialect=_engine(url).dialect, opts={**chain.options, **offline}))
    return output.getvalue()


def apply(revision: str, *, table: str = DEFAULT_TABLE, schema: str | None = None) -> None:
    """Run one revision of ours in your own: call it in your ``upgrade()``, if you want one history.

    The version is then kept by your history alone; `upgrade`, `current` and `check` know nothing of it.
    """
    Chain(table, schema).module(revision).upgrade(op, table, schema)


def reverse(revision: str, *, table: str = DEFAULT_TABLE, schema: str | None = None) -> None:
    """Undo what `apply` did: call it in your ``downgrade()``."""
    Chain(table, schema).module(revision).downgrade(op, table, schema)


def include_object(
    hook: IncludeObjectFn | None = None, *, table: str = DEFAULT_TABLE, schema: str | None = None
) -> IncludeObjectFn:
    """Return an ``include_object`` for your ``env.py`` that keeps autogenerate and check off our tables.

    Without it, autogenerate writes a ``drop_table`` for every table that your metadata does not have, the
    sessions among them. A *hook* of your own, or another of these for another session table, decides about
    everything else.
    """
    chain = Chain(table, schema)
    ours = {chain.table, version_table(chain.table)}
    # Alembic reflects the default schema as None, whether or not it was named.
    default = {None, "public", "main"}
    homes = default if schema in default else {schema}

    def include(
        item: sa.schema.SchemaItem,
        name: str | None,
        kind: Any,
        reflected: bool,  # noqa: FBT001 - Alembic's signature
        other: sa.schema.SchemaItem | None,
    ) -> bool:
        if kind == "table" and name in ours and getattr(item, "schema", None) in homes:
            return False
        return hook is None or hook(item, name, kind, reflected, other)

    return include


class Chain:
    """The revisions in the package, as they apply to one session table."""

    def __init__(self, table: str = DEFAULT_TABLE, schema: str | None = None) -> None:
        self.table = checked_name(table, "table")
        self.schema = None if schema is None else checked_name(schema, "schema")
        self._directory = ScriptDirectory(str(resources.files("sqlsessions") / "migrations"))
        self._scripts: list[Script] = list(self._directory.walk_revisions())[::-1]
        #: The revisions, the oldest first.
        self.revisions = [script.revision for script in self._scripts]

    @property
    def options(self) -> dict[str, Any]:
        """Alembic's settings for this chain; about other people's tables it is told nothing."""
        metadata = sa.MetaData()
        sessions_table(metadata, self.table, self.schema)
        names = {"schema": self.schema, "table": self.table}
        return {
            "version_table": version_table(self.table),
            "version_table_schema": self.schema,
            "target_metadata": metadata,
            "include_schemas": self.schema is not None,
            "include_name": lambda name, kind, _: kind not in names or name == names[kind],
            # SQLite's is transactional too. Python's driver only does not begin a transaction for it; _lock()
            # does.
            "transactional_ddl": True,
            # So that one day an index can be created concurrently, in an autocommit block.
            "transaction_per_migration": True,
            "on_version_apply": (_drop_version_table_at_base,),
        }

    def position(self, revision: str) -> int:
        """Return how many revisions are applied when *revision* is the last."""
        if revision not in self.revisions:
            known = ", ".join(self.revisions)
            raise ConfigurationError(f"there is no revision {masked(repr(revision)):.80}, only {known}")
        return self.revisions.index(revision) + 1

    def module(self, revision: str) -> Any:
        """Return the Python module of *revision*."""
        return self._scripts[self.position(revision) - 1].module

    def current(self, connection: sa.Connection) -> str | None:
        """Return the revision that the table is at, or None."""
        begun = connection.in_transaction()
        try:
            return MigrationContext.configure(connection, opts=self.options).get_current_revision()
        finally:
            if not begun:
                connection.rollback()

    def upgrade(self, connection: sa.Connection) -> None:
        """Apply what is missing, one revision at a time: each in a transaction that runs alone."""
        for _ in self._scripts:
            self._step(connection, lambda heads, _: self.up(self._applied(heads))[:1])

    def downgrade(self, connection: sa.Connection, kept: int) -> None:
        """Reverse all but the first *kept* revisions, the newest first, each in a transaction that runs alone."""
        applied = self.current(connection)
        if applied is not None and applied not in self.revisions:
            raise ConfigurationError(
                f"table {self.table} is at {applied}, of a later release: downgrade with that release"
            )
        for _ in range(kept, self.position(applied) if applied else 0):
            self._step(connection, lambda heads, _: self.down(self._applied(heads), kept)[:1])

    def up(self, applied: int) -> list[RevisionStep]:
        """Return the steps that follow the first *applied* revisions."""
        revisions = self._directory.revision_map
        return [MigrationStep.upgrade_from_script(revisions, script) for script in self._scripts[applied:]]

    def down(self, applied: int, kept: int) -> list[RevisionStep]:
        """Return the steps from *applied* revisions back to *kept*."""
        revisions = self._directory.revision_map
        scripts = self._scripts[kept:applied][::-1]
        return [MigrationStep.downgrade_from_script(revisions, script) for script in scripts]

    def run(self, context: MigrationContext, connection: sa.Connection | None = None) -> None:
        """Run the steps that *context* is configured for.

        Where: in the transaction begun on *connection*, else in one per revision; without a connection, into the
        output of *context*.
        """
        begun = connection is None or connection.in_transaction()
        try:
            if connection is not None:
                _lock(connection, self.table)
                self._require_schema(connection)
            context.run_migrations(op=Operations(context), table=self.table, schema=self.schema)
        finally:
            if connection is not None and not begun:
                # What was done is committed; where nothing was to do, this gives the lock back.
                connection.rollback()

    async def run_on(self, target: Target, work: Callable[[sa.Connection], T]) -> T:
        """Return what *work* does on a connection to *target*; what the database refuses is one of our errors, which
        says what to do.
        """
        url = _url(target)
        try:
            async with _connection(target) as connection:
                return await connection.run_sync(work)
        except DBAPIError as error:
            raise _typed(error, self.table, place(url)) from error
        # While connecting, SQLAlchemy 2.0 passes asyncpg's own errors on.
        except (SQLAlchemyError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise BackendUnavailable(f"cannot use {place(url)}: {_said(error)}") from error

    def _step(
        self,
        connection: sa.Connection,
        steps: Callable[[tuple[str, ...], MigrationContext], Iterable[RevisionStep]],
    ) -> None:
        self.run(MigrationContext.configure(connection, opts={**self.options, "fn": steps}), connection)

    def _applied(self, heads: tuple[str, ...]) -> int:
        """Return how many of our revisions are applied; one of a later release counts as all of them."""
        known = [self.position(head) for head in heads if head in self.revisions]
        return max(known, default=len(self._scripts) if heads else 0)

    def _require_schema(self, connection: sa.Connection) -> None:
        """Refuse a schema that is not there: whose it is and who may use it is not for us to say."""
        if self.schema is not None and not sa.inspect(connection).has_schema(self.schema):
            raise ConfigurationError(
                f"there is no schema {self.schema!r}: create it first (CREATE SCHEMA {self.schema}), or name another"
            )


def _drop_version_table_at_base(*, ctx: MigrationContext, heads: set[str], **_: Any) -> None:
    """Leave nothing behind: with the last revision goes the version table, in the same transaction."""
    if not heads and ctx.connection is not None:
        name, schema = ctx.version_table, ctx.version_table_schema
        sa.Table(name, sa.MetaData(), schema=schema).drop(ctx.connection, checkfirst=False)


def _lock(connection: sa.Connection, table: str) -> None:
    """Begin a transaction that runs alone: workers that upgrade at once wait here, and then find it done.

    Held by the transaction, not by the session, so that it works through poolers too.
    """
    if connection.dialect.name == "postgresql":
        key = sa.literal(crc32(f"sqlsessions {table}".encode()), sa.BigInteger)
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(key)))
    elif connection.dialect.name == "sqlite" and not _is_in_transaction(connection):
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _is_in_transaction(connection: sa.Connection) -> bool:
    """Ask SQLite's driver: SQLAlchemy counts a transaction as begun before the database does."""
    return bool(getattr(connection.connection.driver_connection, "in_transaction", False))


async def _run(target: Target, chain: Chain, work: Callable[[sa.Connection], T]) -> T:
    """Return what *work* does on a connection to *target*; every failure is a typed error."""
    try:
        return await chain.run_on(target, work)
    except CommandError as error:
        raise BackendError(f"{place(_url(target))}: {error}") from error


async def _current(target: Target, chain: Chain) -> str | None:
    if isinstance(target, (str, sa.URL)) and missing_file(async_url(target)):
        return None
    return await _run(target, chain, chain.current)


def _url(target: Target) -> sa.URL:
    return async_url(target) if isinstance(target, (str, sa.URL)) else target.engine.url


@asynccontextmanager
async def _connection(target: Target) -> AsyncGenerator[AsyncConnection, None]:
    """Yield a connection to *target*: the one given, one of the engine's, or one of our own."""
    if isinstance(target, AsyncConnection):
        yield target
    elif isinstance(target, AsyncEngine):
        async with target.connect() as connection:
            await _committed(connection)
            yield connection
    else:
        url = async_url(target)
        if in_memory(url):
            raise ConfigurationError(
                "an in-memory SQLite is gone with its connection: name a file, sqlite+aiosqlite:///sessions.db"
            )
        async with aclosing(await connected(_engine(url))) as connection:
            await _committed(connection)
            yield connection


async def _committed(connection: AsyncConnection) -> None:
    """Have what others commit be seen, whatever the level of the engine or the server: in autocommit the lock would be
    given back at once, and a snapshot taken before the wait for it would not show the version table that another worker
    has made meanwhile.
    """
    if connection.dialect.name == "postgresql":
        await connection.execution_options(isolation_level="READ COMMITTED")


def _engine(url: sa.URL) -> AsyncEngine:
    return new_engine(url, deadline=_PATIENCE, poolclass=sa.NullPool)


def _said(error: BaseException) -> str:
    """Return the first line of an error's own message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _typed(error: DBAPIError, table: str, place: str) -> SessionError:
    """Say what to do about the refusal of a database, known by SQLSTATE or by SQLite's words."""
    state = getattr(error.orig, "sqlstate", None) or ""
    said = _said(getattr(error.orig, "__cause__", None) or error.orig or error)
    if state == "42P07" or "already exists" in said or "already a table" in said:
        return ConfigurationError(
            f"{place}: {said}, and not from these migrations, since {version_table(table)} does not know it: "
            "rename or drop it, or name another table; if a migration of your application's made it (migrate.apply), "
            "it is that one's to keep up to date"
        )
    if state == "42501":
        return BackendError(
            f"{place}: {said}: migrate as the schema's owner, or have the owner run what 'sqlsessions migrate --sql' "
            f"prints; --check needs SELECT on {version_table(table)}"
        )
    if state == "25006" or "readonly database" in said:
        return BackendReadOnly(f"{place}: {said}: migrate on the primary, or make the file and its directory writable")
    if state in {"55P03", "57014"} or "database is locked" in said:
        return BackendTimeout(f"{place}: {said}: try again when whoever has the lock is done")
    if error.connection_invalidated or not state or state[:2] in {"08", "28", "3D", "53", "57"}:
        return BackendUnavailable(f"cannot use {place}: {said}")
    return BackendError(f"{place}: {said}")
