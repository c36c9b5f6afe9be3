"""The table and one builder per statement: everything a database ever sees, and the only room that names a dialect.

Statements compare and swap, never upsert: a session that was revoked, purged or renewed cannot be written back by a
slow request.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Dialect

from sqlsessions.errors import ConfigurationError
from sqlsessions.record import Record

DEFAULT_TABLE = "web_sessions"

#: What any database takes unquoted, so short that ``alembic_version_<table>_pkc`` fits in PostgreSQL's 63 bytes.
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,42}", re.ASCII)

_LAST_PORT = 65_535

#: Sessions are updated far more often than inserted: room on the page keeps those updates HOT, early vacuums keep it.
_STORAGE = (
    "ALTER TABLE %(fullname)s SET "
    "(fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05)"
)


class UtcDateTime(sa.TypeDecorator[datetime]):
    """An instant that goes in and comes out as an aware UTC datetime, on SQLite too, which drops the zone without
    converting.
    """

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Convert to UTC; naive datetimes are refused, since nobody can tell what they mean."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("naive datetime")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Return the stored instant in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class JSONText(sa.types.UserDefinedType[str]):
    """A JSON column read and written as the text we encoded.

    On PostgreSQL ``json``, not ``jsonb``: that reorders keys, refuses NUL and turns 1e22 into an integer.
    """

    cache_ok = True

    def get_col_spec(self, **kw: Any) -> str:  # noqa: ARG002
        """Return the same name on every dialect."""
        return "JSON"

    def column_expression(self, column: sa.ColumnElement[str]) -> sa.ColumnElement[str]:
        """Read as text: from SQLAlchemy 2.1 on, asyncpg is told to parse ``json`` before we see it."""
        return sa.cast(column, sa.Text)


class _Joined(sa.TypeDecorator[Sequence[UUID]]):
    """Ids as one text. For an array asyncpg would ask the server about its type, on each connection anew, and turn
    ``jit`` off and on around the question, which a pooler in between may send to two different servers.
    """

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Sequence[UUID] | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Join the ids by commas."""
        return None if value is None else ",".join(map(_written, value))


def _written(id: object) -> str:  # noqa: A002
    # By its number: the usual spelling of a UUID takes five times as long.
    return f"{id.int:032x}" if type(id) is UUID else str(id)


def checked_name(name: str, what: str) -> str:
    """Return *name* if it may name a table or schema; raise `ConfigurationError` otherwise (CVE-2019-15658)."""
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{what} {masked(repr(name)):.80} is not usable: "
            "at most 43 lower-case letters, digits and underscores, not starting with a digit"
        )
    return name


def version_table(table: str = DEFAULT_TABLE) -> str:
    """Return the name of Alembic's version table for *table*, so that two session tables live in one database."""
    return f"alembic_version_{checked_name(table, 'table')}"


def async_url(url: str | sa.URL) -> sa.URL:
    """Return *url* with its asynchronous driver filled in where it names none; the error for a bad one does not show
    its password.
    """
    try:
        url = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):  # a port that is no number
        raise ConfigurationError(
            "the database URL cannot be read; it looks like postgresql+asyncpg://user:password@host/database or sqlite+aiosqlite:///file.db"
        ) from None
    if "@" in (url.host or ""):
        raise ConfigurationError("the database URL has one @ too many: in a user name or a password it is written %40")
    for port in _ports(url):
        if port > _LAST_PORT:  # asyncio has an OverflowError for it, as for a number that is too large for its column
            raise ConfigurationError(f"the database URL has the port {port}: there is none above {_LAST_PORT}")
    driver = {"postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg", "sqlite": "sqlite+aiosqlite"}
    url = url.set(drivername=driver.get(url.drivername, url.drivername))
    if url.drivername == "postgresql+asyncpg" and "sslmode" in url.query and "ssl" not in url.query:
        # Of the same values, and in the URLs that hosters hand out.
        return url.update_query_dict({"ssl": url.query["sslmode"]}).difference_update_query(["sslmode"])
    return url


def _ports(url: sa.URL) -> list[int]:
    """Return the ports in *url*, of several hosts too, that have five digits or more; a part of an IPv6 address has
    fewer.
    """
    several = url.normalized_query
    named = "\n".join([str(url.port), *several.get("host", ()), *several.get("port", ())])
    return [int(port) for port in re.findall(r"(?:^|[:,])([0-9]{5,99})(?=,|$)", named, re.MULTILINE)]


def place(url: sa.URL) -> str:
    """Name a database in a message: without user, password and options, which may hold a password too."""
    shown = sa.URL.create(url.drivername, host=url.host, port=url.port, database=url.database).render_as_string()
    if url.host:
        return shown
    several = url.query.get("host", ())
    return shown.replace("://", f"://{several if isinstance(several, str) else ','.join(several)}", 1)


def masked(text: str) -> str:
    """Return *text*, in which there may be a URL where none should be, without the passwords of it."""
    return re.sub(r"(://)[^\s'\"]*(@)|(password=)[^\s&'\"]*", r"\1\3***\2", text)


def in_memory(url: sa.URL) -> bool:
    """Tell whether *url* is an SQLite database that lasts no longer than its connection."""
    database = url.database or ":memory:"
    return url.get_backend_name() == "sqlite" and (":memory:" in database or url.query.get("mode") == "memory")


def missing_file(url: sa.URL) -> bool:
    """Tell whether *url* is an SQLite file that is not there; connecting would make an empty one."""
    named = url.get_backend_name() == "sqlite" and not in_memory(url) and "uri" not in url.query
    return named and url.database is not None and not Path(url.database).exists()


def sessions_table(metadata: sa.MetaData, name: str = DEFAULT_TABLE, schema: str | None = None) -> sa.Table:
    """Return the session table, attached to *metadata*. Names are validated here."""
    checked_name(name, "table")
    if schema is not None:
        checked_name(schema, "schema")
    table = sa.Table(
        name,
        metadata,
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("secret_hash", sa.LargeBinary(32), nullable=False),
        sa.Column("user_id", sa.String(255)),
        sa.Column("data", JSONText, nullable=False),
        sa.Column("client", JSONText),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.Column("last_seen_at", UtcDateTime, nullable=False),
        sa.Column("expires_at", UtcDateTime, nullable=False),
        sa.Column("authenticated_at", UtcDateTime),
        sa.Column("idle_timeout", sa.Integer),
        sa.Column("persistent", sa.Boolean, nullable=False),
        sa.Column("format", sa.SmallInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name=f"{name}_pkey"),
        schema=schema,
    )
    sa.Index(f"{name}_expires_at", table.c.expires_at)
    owned = table.c.user_id.is_not(None)
    sa.Index(f"{name}_user_id", table.c.user_id, postgresql_where=owned, sqlite_where=owned)
    # A statement of its own, since SQLAlchemy takes storage parameters for a table only from 2.1 on.
    storage = sa.DDL(_STORAGE)  # type: ignore[no-untyped-call] # SQLAlchemy has no annotations there
    event.listen(table, "after_create", storage.execute_if(dialect="postgresql"))
    return table


@dataclass(frozen=True, slots=True)
class Write:
    """One change, in the forms in which it is sent. All take the same parameters.

    One to one row returns on PostgreSQL, in each form, the id of the row if it was changed.
    """

    #: Waits for a row that somebody else has locked. Every database takes this form.
    plain: sa.Executable
    #: Passes over a row that somebody else has locked: no row of a batch blocks the others.
    passing: sa.Executable
    #: Fails at once on a row that somebody else has locked (55P03).
    prompt: sa.Executable
    #: The same change to many rows at once, with `columns` of the parameters for its own; passes over locked rows, too.
    many: sa.Executable | None = None

    def waiting(self) -> "Write":
        """Return the same change for a database that refuses all but the plain form."""
        return Write(self.plain, self.plain, self.plain)


class Statements:
    """The statements of one table, each built once; parameters are bound, never written into the text (R112).

    The named parameters of each are what `SQLAlchemyBackend` passes; those that are columns are set.
    """

    def __init__(self, table: sa.Table, dialect: str) -> None:
        self.table = table
        #: Whether the database works beside this process, and not in a thread that takes turns with its event loop.
        self.beside = dialect != "sqlite"
        columns = table.c
        record = [columns[name] for name in Record._fields]
        live = _live(table)
        this = _named(table)
        before = columns.expires_at <= sa.bindparam("before", type_=UtcDateTime)
        owner = columns.user_id == sa.bindparam("the_user_id", type_=sa.String(255))

        self.load = sa.select(*record).where(this, live)
        #: Without regard to their expiry: each is asked for at an instant of its own.
        self.load_many = sa.select(*record).where(_member(dialect, columns.id))
        self.reread = sa.select(columns.version, columns.secret_hash).where(this)
        inserted = _telling(sa.insert(table), dialect)
        self.insert = Write(inserted, inserted, inserted)
        self.replace = _forms(sa.update(table), dialect, _unchanged)
        #: Of the data and the version alone. What a statement sets is what it is first spelled with.
        self.replace_data = _forms(sa.update(table), dialect, _unchanged, many=_many)
        self.touch = _forms(
            sa.update(table).values(
                last_seen_at=sa.bindparam("seen", type_=UtcDateTime), expires_at=_later(columns.expires_at)
            ),
            dialect,
            _touchable,
        )
        self.delete = _forms(sa.delete(table), dialect, _named)
        self.delete_unchanged = _forms(sa.delete(table), dialect, _unchanged)
        self.list_for_user = (
            sa.select(*record)
            .where(owner, live)
            .order_by(columns.last_seen_at.desc(), columns.id)
            .limit(sa.bindparam("limit", type_=sa.Integer))
        )
        # As bytes in SQLite, which lets anything into a column, and not only texts.
        id_ = columns.id if dialect != "sqlite" else sa.cast(columns.id, sa.LargeBinary)
        self.list_ids_for_user = self.list_for_user.with_only_columns(id_.label("id"))
        self.delete_for_user = _of_several(table, dialect, owner)
        self.delete_for_user_except = _of_several(
            table, dialect, owner, columns.id != sa.bindparam("kept", type_=sa.Uuid)
        )
        others = table.alias("others")
        kept = (
            sa.select(others.c.id)
            .where(others.c.user_id == sa.bindparam("the_user_id", type_=sa.String(255)), _live(others))
            .order_by(
                others.c.last_seen_at.desc(),
                sa.case((others.c.id == sa.bindparam("newest", type_=sa.Uuid), 0), else_=1),
                others.c.id.desc(),
            )
            .limit(sa.bindparam("limit", type_=sa.Integer))
        )
        self.trim_for_user = _of_several(table, dialect, owner, live, columns.id.not_in(kept))
        outdated = sa.select(columns.id).where(before).order_by(columns.expires_at)
        outdated = outdated.limit(sa.bindparam("limit", type_=sa.Integer))
        # The expiry is checked again: a session extended since it was selected survives (R86).
        purge = sa.delete(table).where(_chosen(dialect, columns.id, outdated), before)
        self.purge = _of_those(outdated, dialect, purge)
        # As text, which an id is that cannot be read, too.
        oldest = sa.select(sa.cast(columns.id, sa.Text)).order_by(columns.expires_at)
        self.oldest = oldest.limit(sa.literal_column("1", sa.Integer))
        self.ping = sa.select(sa.literal(1))
        self.begin = sa.text("BEGIN IMMEDIATE" if dialect == "sqlite" else "BEGIN")
        self.commit = sa.text("COMMIT")
        self.rollback = sa.text("ROLLBACK")


def _live(rows: sa.FromClause) -> sa.ColumnElement[bool]:
    return rows.c.expires_at > sa.bindparam("now", type_=UtcDateTime)


def _named(rows: sa.FromClause) -> sa.ColumnElement[bool]:
    return rows.c.id == sa.bindparam("the_id", type_=sa.Uuid)


def _proven(rows: sa.FromClause) -> sa.ColumnElement[bool]:
    return sa.and_(
        _named(rows), rows.c.secret_hash == sa.bindparam("the_secret_hash", type_=sa.LargeBinary(32)), _live(rows)
    )


def _unchanged(rows: sa.FromClause) -> sa.ColumnElement[bool]:
    return sa.and_(_proven(rows), rows.c.version == sa.bindparam("the_version", type_=sa.BigInteger))


def _touchable(rows: sa.FromClause) -> sa.ColumnElement[bool]:
    return sa.and_(_proven(rows), rows.c.last_seen_at < sa.bindparam("seen", type_=UtcDateTime))


def _forms(
    statement: sa.Update | sa.Delete,
    dialect: str,
    condition: Callable[[sa.FromClause], sa.ColumnElement[bool]],
    *,
    many: Callable[[Any], sa.Executable] | None = None,
) -> Write:
    table = statement.table
    plain = _telling(statement.where(condition(table)), dialect)
    if dialect != "postgresql":
        return Write(plain, plain, plain)
    # The lock is taken under the condition, and what has it stays as it is; so the row is known by its id alone.
    other = table.alias("other")
    free = sa.select(other.c.id).where(condition(other))
    passing, prompt = (
        _telling(statement.where(_named(table), table.c.id == locked.scalar_subquery()), dialect)
        for locked in _locking(free)
    )
    return Write(plain, passing, prompt, None if many is None else many(table))


def _of_several(table: sa.Table, dialect: str, *conditions: sa.ColumnElement[bool]) -> Write:
    """Return the DELETE of all rows that fulfil *conditions*."""
    return _of_those(sa.select(table.c.id).where(*conditions), dialect, sa.delete(table).where(*conditions))


def _of_those(ids: sa.Select[tuple[UUID]], dialect: str, plain: sa.Delete) -> Write:
    """Return the DELETE of the rows that *ids* finds, which *plain* deletes, too."""
    if dialect != "postgresql":
        return Write(plain, plain, plain)
    # As in `_forms`: what has the lock stays as it was found.
    passing, prompt = (
        sa.delete(plain.table).where(_chosen(dialect, plain.table.c.id, locked)) for locked in _locking(ids)
    )
    return Write(plain, passing, prompt)


def _locking(ids: sa.Select[tuple[UUID]]) -> tuple[sa.Select[tuple[UUID]], sa.Select[tuple[UUID]]]:
    """Return *ids*, locking what they find: passing over what somebody else has locked, and failing on it."""
    return ids.with_for_update(skip_locked=True), ids.with_for_update(nowait=True)


#: The parameters of `Statements.replace_data` of which `columns` makes those of its `many`.
_SWAPPED = itemgetter("the_id", "the_secret_hash", "the_version", "version", "data", "now")


def columns(several: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the parameters of one statement for many rows: of each of theirs a column.

    All columns are texts or bytes. About arrays of any other type asyncpg would ask the server, see `_Joined`. Raises
    `StatementError` if a value is none of its column.
    """
    ids, hashes, expected, versions, data, instants = zip(*map(_SWAPPED, several), strict=True)
    try:
        return {
            "ids": ids,
            "hashes": b"".join(hashes),
            "expected": ",".join(map(str, expected)),
            "versions": ",".join(map(str, versions)),
            "texts": data,
            # What expires before the last of them was sent has expired.
            "now": max(instants),
        }
    except TypeError as error:
        raise _unbindable(error) from None


def _many(table: sa.Table) -> sa.Executable:
    """Return the UPDATE of data and version for many rows: one plan and one run of it, where many would cost the server
    twice as much.

    The lock is taken under the condition, by rows that are free; see `_forms`.
    """
    numbers = postgresql.ARRAY(sa.BigInteger)
    news = (
        sa.func.unnest(
            sa.cast(_split("ids", _Joined), postgresql.ARRAY(sa.Uuid)),
            sa.cast(_split("expected", sa.Text), numbers),
            sa.cast(_split("versions", sa.Text), numbers),
            _hidden("texts", postgresql.ARRAY(sa.Text)),
        )
        .table_valued("id", "expected", "version", "data", with_ordinality="place")
        .render_derived(name="news")
    )
    one, size = sa.literal_column("1", sa.Integer), sa.literal_column("32", sa.Integer)
    begin = sa.cast((news.c.place - one) * size + one, sa.Integer)
    hashes = sa.bindparam("hashes", type_=sa.LargeBinary)
    other = table.alias("other")
    free = (
        sa.select(other.c.id, news.c.version, news.c.data)
        .where(
            other.c.id == news.c.id,
            other.c.secret_hash == sa.func.substring(hashes, begin, size),
            other.c.version == news.c.expected,
            _live(other),
        )
        .with_for_update(skip_locked=True, of=other)
        .cte("free")
    )
    changed = sa.update(table).values(data=sa.cast(free.c.data, JSONText), version=free.c.version)
    return changed.where(table.c.id == free.c.id).returning(table.c.id)


def _split(name: str, type_: Any) -> sa.ColumnElement[Any]:
    """Return the parameter *name*, a text, as an array of what stands between its commas."""
    return sa.func.string_to_array(_hidden(name, type_), sa.literal_column("','"))


def _hidden(name: str, type_: Any) -> sa.ColumnElement[Any]:
    """Return a parameter that PostgreSQL's planner does not look at: it would take few values for a reason to plan
    each statement anew, at the price of several rows.
    """
    return sa.select(sa.bindparam(name, type_=type_)).scalar_subquery()


def _telling(statement: Any, dialect: str) -> Any:
    """Return *statement*, telling of the row it changed where the driver does not say how many for each of many."""
    return statement.returning(statement.table.c.id) if dialect == "postgresql" else statement


class Spelled:
    """A statement as text and its parameters in their places, for a driver that is spoken to directly."""

    __slots__ = ("_pick", "_process", "_read", "text")

    def __init__(self, statement: Any, dialect: Dialect, columns: Sequence[str] = ()) -> None:
        compiled = statement.compile(dialect=dialect, column_keys=list(columns))
        names = compiled.positiontup
        self.text = str(compiled)
        # `itemgetter` of one name would give no tuple.
        self._pick: Callable[[Mapping[str, Any]], Sequence[Any]] = (
            itemgetter(*names) if len(names) > 1 else lambda parameters: [parameters[name] for name in names]
        )
        binds = [_bind_processor(compiled.binds[name].type, dialect) for name in names]
        self._process = [(place, process) for place, process in enumerate(binds) if process is not None]
        chosen = statement.selected_columns if isinstance(statement, sa.Select) else ()
        reads = [column.type.dialect_impl(dialect).result_processor(dialect, None) for column in chosen]
        self._read = [(place, process) for place, process in enumerate(reads) if process is not None]

    def values(self, parameters: Mapping[str, Any]) -> Sequence[Any]:
        """Return *parameters* in the order and the form that the driver takes; raise `StatementError`, as SQLAlchemy
        does, for a value that has none.
        """
        values = self._pick(parameters)
        if self._process:
            values = list(values)
            try:
                for place, process in self._process:
                    values[place] = process(values[place])
            except (ValueError, TypeError, AttributeError) as error:
                raise _unbindable(error) from None
        return values

    def row(self, row: Sequence[Any]) -> Sequence[Any]:
        """Return the driver's *row* in the form that SQLAlchemy gives."""
        values = list(row)
        for place, process in self._read:
            values[place] = process(values[place])
        return values


def _unbindable(error: Exception) -> sa.exc.StatementError:
    return sa.exc.StatementError("a value cannot be bound", None, None, error)


def _bind_processor(type_: Any, dialect: Dialect) -> Callable[[Any], Any] | None:
    """Return what makes of a value what the driver takes; None where asyncpg takes Python's own."""
    if dialect.name == "postgresql" and isinstance(type_, (sa.Boolean, sa.LargeBinary)):
        return None
    if dialect.name == "postgresql" and isinstance(type_, UtcDateTime):
        return _aware
    processor: Callable[[Any], Any] | None = type_.dialect_impl(dialect).bind_processor(dialect)
    return processor


def _aware(value: datetime | None) -> datetime | None:
    """Return *value*, which asyncpg would take for local time if it were naive."""
    if value is not None and value.tzinfo is not UTC and value.tzinfo is None:
        raise ValueError("naive datetime")
    return value


def _later(column: sa.ColumnElement[datetime]) -> sa.ColumnElement[datetime]:
    until = sa.bindparam("until", type_=UtcDateTime)
    return sa.case((column < until, until), else_=column)


def _member(dialect: str, column: sa.ColumnElement[UUID]) -> sa.ColumnElement[bool]:
    """Return how *dialect* says "is one of these ids": as one parameter, or as a list of any length."""
    if dialect == "postgresql":
        return column == sa.any_(sa.cast(_split("ids", _Joined), postgresql.ARRAY(sa.Uuid)))
    return column.in_(sa.bindparam("ids", expanding=True, type_=sa.Uuid))


def _chosen(dialect: str, column: sa.ColumnElement[UUID], ids: sa.Select[tuple[UUID]]) -> sa.ColumnElement[bool]:
    """Return how *dialect* says "is one of those that *ids* finds": by one look at them, however many there may be."""
    if dialect == "postgresql":
        # As an array, since PostgreSQL has no idea how many rows a parameter of LIMIT means, and might read the table.
        return column == sa.any_(sa.func.array(ids.scalar_subquery()))
    # Within another one: MySQL and MariaDB refuse LIMIT in what IN looks at, and a table that is deleted from.
    return column.in_(sa.select(ids.subquery("outdated").c.id))
