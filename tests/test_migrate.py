import asyncio
import logging
import re
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.ext.asyncio import create_async_engine

from sqlsessions import migrate
from sqlsessions.backends.sqlalchemy import SQLAlchemyBackend
from sqlsessions.errors import (
    BackendError,
    BackendReadOnly,
    BackendTimeout,
    BackendUnavailable,
    ConfigurationError,
    SchemaMissing,
)
from sqlsessions.record import Expected, Record
from sqlsessions.schema import sessions_table, version_table
from tests.catalogue import catalogue, create_from_metadata, tables
from tests.commands import ROOT, run
from tests.looking import several, silent, sql
from tests.servers import PgBouncer

pytestmark = pytest.mark.anyio

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
NOWHERE = "postgresql+asyncpg://somebody:geheim@127.0.0.1:1/nowhere?password=geheim"

NASTY = [
    "",
    "a b",
    "Sessions",
    'x"; DROP TABLE users; --',
    "x; DROP TABLE users",
    "x'y",
    "sessions\0",
    "1st",
    "auth.sessions",
    "%(x)s",
    "séances",
    "s" * 44,
]


def record(number: int, expires_at: datetime = NOW + timedelta(days=14)) -> Record:
    """Return a session record that does not matter."""
    return Record(UUID(int=number), bytes(32), "7", '{"user_id": "7"}', 1, NOW, NOW, expires_at)


# The chain and the metadata


async def test_chain_equals_metadata_in_the_eyes_of_alembic(database_url: str) -> None:
    """After all migrations, autogenerate finds nothing to do."""
    await migrate.upgrade(database_url)
    metadata = sa.MetaData()
    sessions_table(metadata)

    def compare(connection: sa.Connection) -> Any:
        options = {"version_table": version_table(), "compare_server_default": True}
        return compare_metadata(MigrationContext.configure(connection, opts=options), metadata)

    engine = create_async_engine(database_url)
    async with engine.connect() as connection:
        assert await connection.run_sync(compare) == []
    await engine.dispose()


async def test_chain_equals_metadata_in_the_catalogue(database_url: str) -> None:
    """All migrations and the metadata make the same table: also what Alembic does not compare."""
    await migrate.upgrade(database_url)
    await create_from_metadata(database_url, "from_metadata")
    migrated = await catalogue(database_url, "web_sessions")
    assert migrated
    assert migrated == await catalogue(database_url, "from_metadata")


async def test_postgresql_details(postgres_url: str) -> None:
    """On PostgreSQL: json and not jsonb (R102), zoned instants, room for HOT updates, vacuums, a partial index."""
    await migrate.upgrade(postgres_url)
    said = str(await catalogue(postgres_url, "web_sessions"))
    for detail in [
        "('data', 'json', True",
        "('client', 'json', False",
        "('id', 'uuid', True",
        "('expires_at', 'timestamp with time zone', True",
        "fillfactor=80",
        "autovacuum_vacuum_scale_factor=0.05",
        "autovacuum_analyze_scale_factor=0.05",
        "btree (expires_at)",
        "btree (user_id) WHERE (user_id IS NOT NULL)",
    ]:
        assert detail in said


async def test_sqlite_details(sqlite_url: str) -> None:
    """On SQLite, too, the index on user_id leaves anonymous sessions out."""
    await migrate.upgrade(sqlite_url)
    assert "ON TABLE (user_id) WHERE user_id IS NOT NULL" in str(await catalogue(sqlite_url, "web_sessions"))


@pytest.mark.parametrize("path", sorted((ROOT / "migrations" / "versions").glob("*.py")), ids=lambda path: path.name)
def test_revision_files(path: Path) -> None:
    """A revision's file is named for it, in the order of the chain, and never imports the schema of today."""
    revisions = migrate.Chain().revisions
    found = re.fullmatch(r"(sqlsessions_(\d{4}))_[a-z0-9_]+\.py", path.name)
    assert found
    assert revisions[int(found[2]) - 1] == found[1]
    assert not re.search(r"^\s*(from|import) sqlsessions", path.read_text(), re.MULTILINE)


def test_every_revision_has_a_file() -> None:
    """The chain is what lies in the folder; its first revision names the branch."""
    chain = migrate.Chain()
    assert len(chain.revisions) == len(list((ROOT / "migrations" / "versions").glob("*.py")))
    assert chain.module(chain.revisions[0]).branch_labels == ("sqlsessions",)


# Up and down


async def test_up_down_up(database_url: str) -> None:
    """Up, down and up again: down leaves nothing behind, not even the version table, and up works as before."""
    assert await migrate.current(database_url) is None
    await migrate.upgrade(database_url)
    first = await catalogue(database_url, "web_sessions")
    assert await migrate.current(database_url) == migrate.Chain().revisions[-1]
    assert await tables(database_url) == {"web_sessions", "alembic_version_web_sessions"}
    await migrate.downgrade(database_url)
    assert await tables(database_url) == set()
    assert await migrate.current(database_url) is None
    await migrate.upgrade(database_url)
    assert await catalogue(database_url, "web_sessions") == first


async def test_upgrade_twice_keeps_rows(database_url: str) -> None:
    """Upgrading what is up to date changes nothing."""
    await migrate.upgrade(database_url)
    backend = SQLAlchemyBackend(database_url)
    await backend.insert(record(1))
    await migrate.upgrade(database_url)
    assert await backend.load(UUID(int=1), NOW) == record(1)
    await backend.aclose()


async def test_downgrade_of_nothing(database_url: str) -> None:
    """Downgrading an empty database does nothing and leaves nothing."""
    await migrate.downgrade(database_url)
    assert await tables(database_url) == set()


async def test_check(database_url: str) -> None:
    """Check raises while the table is behind, names the remedy, and changes nothing."""
    with pytest.raises(SchemaMissing, match=r"web_sessions is at no revision.*sqlsessions migrate"):
        await migrate.check(database_url)
    assert await tables(database_url) == set()
    await migrate.upgrade(database_url)
    await migrate.check(database_url)


async def test_later_release(database_url: str) -> None:
    """A table that a later release has migrated is left alone, is not behind, and is not downgraded by this one."""
    await migrate.upgrade(database_url)
    await sql(database_url, "UPDATE alembic_version_web_sessions SET version_num = 'sqlsessions_9999'")
    await migrate.upgrade(database_url)
    await migrate.check(database_url)
    with pytest.raises(ConfigurationError, match="sqlsessions_9999, of a later release"):
        await migrate.downgrade(database_url)
    assert await migrate.current(database_url) == "sqlsessions_9999"


async def test_unknown_revision() -> None:
    """A revision that is not in the chain is refused before anything is connected."""
    with pytest.raises(ConfigurationError, match="no revision 'sqlsessions_7', only sqlsessions_0001"):
        await migrate.downgrade(NOWHERE, "sqlsessions_7")


# What can be migrated


async def test_targets(database_url: str) -> None:
    """A URL, a parsed URL, an engine in whatever isolation level, and a connection will do."""
    await migrate.upgrade(sa.make_url(database_url))
    assert await migrate.current(database_url.replace("+asyncpg", "").replace("+aiosqlite", "")) is not None
    for options in ({}, {"isolation_level": "AUTOCOMMIT"}, {"isolation_level": "SERIALIZABLE"}):
        engine = create_async_engine(database_url, **options)
        await migrate.downgrade(engine)
        assert await tables(database_url) == set()
        await asyncio.gather(*[migrate.upgrade(engine) for _ in range(4)])
        await migrate.check(engine)
        assert "Current Checked out connections: 0" in engine.pool.status()
        await engine.dispose()
    engine = create_async_engine(database_url)
    async with engine.connect() as connection:
        await migrate.downgrade(connection)
        assert await migrate.current(connection) is None
        assert not connection.in_transaction()
    await engine.dispose()


async def test_callers_transaction(database_url: str) -> None:
    """In a transaction of the caller's, everything happens in that one: rolled back, nothing has."""
    engine = create_async_engine(database_url)
    async with engine.connect() as connection:
        await connection.begin()
        await migrate.upgrade(connection)
        await migrate.check(connection)
        await connection.rollback()
        assert await migrate.current(connection) is None
        async with connection.begin():
            await migrate.upgrade(connection)
            await migrate.downgrade(connection)
            await migrate.downgrade(connection)
        assert await tables(database_url) == set()
        async with connection.begin():
            await migrate.upgrade(connection)
    await engine.dispose()
    assert await tables(database_url) == {"web_sessions", "alembic_version_web_sessions"}


async def test_in_memory_engine() -> None:
    """An in-memory SQLite is migrated through the application's engine, which has the only connection to it."""
    engine = create_async_engine("sqlite+aiosqlite://", poolclass=sa.StaticPool)
    await migrate.upgrade(engine)
    await migrate.check(engine)
    await engine.dispose()


async def test_table_names_and_schemas(postgres_url: str) -> None:
    """Table and schema are the caller's; the version table goes along, and the default schema stays empty."""
    await sql(postgres_url, "CREATE SCHEMA auth", "CREATE TABLE users (id int)")
    longest = "s" * 43  # alembic_version_…_pkc, the longest name made of it, has 63
    await migrate.upgrade(postgres_url, table=longest, schema="auth")
    await migrate.check(postgres_url, table=longest, schema="auth")
    assert await tables(postgres_url, "auth") == {longest, version_table(longest)}
    assert await tables(postgres_url) == {"users"}
    await migrate.downgrade(postgres_url, table=longest, schema="auth")
    assert await tables(postgres_url, "auth") == set()
    await sql(postgres_url, 'CREATE SCHEMA "user"')
    await migrate.upgrade(postgres_url, table="order", schema="user")  # words of SQL's own are quoted
    assert await tables(postgres_url, "user") == {"order", "alembic_version_order"}


async def test_two_tables_in_one_database(database_url: str) -> None:
    """Two session tables live in one database, each with a history of its own."""
    await migrate.upgrade(database_url, table="shop_sessions")
    with pytest.raises(SchemaMissing):
        await migrate.check(database_url, table="admin_sessions")
    await migrate.upgrade(database_url, table="admin_sessions")
    await migrate.downgrade(database_url, table="shop_sessions")
    await migrate.check(database_url, table="admin_sessions")
    assert await tables(database_url) == {"admin_sessions", "alembic_version_admin_sessions"}


@pytest.mark.parametrize("name", NASTY)
async def test_nasty_names(name: str) -> None:
    """A name that is not plain is refused by everything, before anything is connected or printed (R111)."""
    for call in (migrate.upgrade, migrate.downgrade, migrate.current, migrate.check):
        for what in ({"table": name}, {"schema": name}):
            with pytest.raises(ConfigurationError, match="is not usable"):
                await call(NOWHERE, **what)
    for refused in (migrate.sql, migrate.apply, migrate.reverse):
        with pytest.raises(ConfigurationError, match="is not usable"):
            refused("postgresql", table=name)
    with pytest.raises(ConfigurationError, match="is not usable"):
        migrate.include_object(table=name)


# Failures


async def test_missing_schema(database_url: str) -> None:
    """A schema that does not exist is named, with the remedy; nothing was done."""
    with pytest.raises(ConfigurationError, match=r"no schema 'auth'.*CREATE SCHEMA auth"):
        await migrate.upgrade(database_url, schema="auth")
    assert await tables(database_url) == set()


async def test_table_of_somebody_else(database_url: str) -> None:
    """A table of that name that the chain did not make is left as it is, and the message says so."""
    await sql(database_url, "CREATE TABLE web_sessions (mine integer)")
    with pytest.raises(ConfigurationError, match="alembic_version_web_sessions does not know it"):
        await migrate.upgrade(database_url)
    assert await sql(database_url, "SELECT mine FROM web_sessions") == []
    assert await tables(database_url) == {"web_sessions"}


async def test_failing_midway(database_url: str) -> None:
    """A migration that fails midway has done nothing, on SQLite too."""
    await sql(database_url, "CREATE TABLE web_sessions_user_id (mine integer)")
    with pytest.raises(ConfigurationError):
        await migrate.upgrade(database_url)
    assert await tables(database_url) == {"web_sessions_user_id"}
    await sql(database_url, "DROP TABLE web_sessions_user_id")
    await migrate.upgrade(database_url)


@pytest.mark.parametrize(
    ("url", "kind", "said"),
    [
        (NOWHERE, BackendUnavailable, "postgresql+asyncpg://127.0.0.1:1/nowhere: "),
        ("postgresql://somebody:geheim@[::1]:1/x", BackendUnavailable, "postgresql+asyncpg://[::1]:1/x: "),
        ("nosql://somebody:geheim@host/x", ConfigurationError, "no asynchronous driver for nosql"),
        ("sqlite+pysqlite:///x.db", ConfigurationError, "no asynchronous driver for sqlite"),
        ("not a URL: geheim", ConfigurationError, "cannot be read"),
        ("postgresql://somebody:ge:he@im@host:geheim/x", ConfigurationError, "cannot be read"),
    ],
)
async def test_no_database(url: str, kind: type[Exception], said: str) -> None:
    """A database that cannot be had is named in the error, its password is not."""
    with pytest.raises(kind) as caught:
        await migrate.upgrade(url)
    assert said in str(caught.value)
    assert "geheim" not in str(caught.value)


async def test_a_host_that_hangs(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several hosts, one that accepts connections and says nothing does not hide the next."""
    monkeypatch.setattr(migrate, "_PATIENCE", 1.5)
    async with silent() as address:
        await migrate.upgrade(several(postgres_url, address))
    await migrate.check(postgres_url)


async def test_refused_by_the_server(postgres_url: str) -> None:
    """A database that the server does not have is a `BackendUnavailable`, in the server's own words."""
    with pytest.raises(BackendUnavailable, match='/nowhere: database "nowhere" does not exist'):
        await migrate.upgrade(sa.make_url(postgres_url).set(database="nowhere"))


async def test_read_only(postgres_url: str, sqlite_url: str) -> None:
    """A database that accepts no writes is a `BackendReadOnly`."""
    await sql(sqlite_url, "CREATE TABLE users (id integer)")
    file = sa.make_url(sqlite_url).database
    read_only = create_async_engine(
        postgres_url, connect_args={"server_settings": {"default_transaction_read_only": "on"}}
    )
    for target in (read_only, f"sqlite+aiosqlite:///file:{file}?mode=ro&uri=true"):
        with pytest.raises(BackendReadOnly):
            await migrate.upgrade(target)
    await read_only.dispose()


async def test_locked(sqlite_url: str) -> None:
    """A SQLite file that somebody else keeps locked is a `BackendTimeout`."""
    await sql(sqlite_url, "CREATE TABLE users (id integer)")
    engine = create_async_engine(sqlite_url)
    async with engine.connect() as connection:
        await connection.execute(sa.text("BEGIN EXCLUSIVE"))
        with pytest.raises(BackendTimeout, match="database is locked"):
            await migrate.upgrade(f"{sqlite_url}?timeout=0.01")
    await engine.dispose()


async def test_application_role_needs_no_ddl(postgres_url: str) -> None:
    """A role that may only read and write rows runs the application (R115); migrating as that role says what to do."""
    await migrate.upgrade(postgres_url)
    role = f"app_{sa.make_url(postgres_url).database}"
    await sql(
        postgres_url,
        f"CREATE ROLE {role} LOGIN",
        "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON web_sessions TO {role}",
        f"GRANT SELECT ON alembic_version_web_sessions TO {role}",
    )
    url = sa.make_url(postgres_url).set(username=role)
    backend = SQLAlchemyBackend(url)
    first, expected = record(1), Expected(1, bytes(32), NOW)
    await backend.insert(first)
    await backend.insert(record(2, expires_at=NOW - timedelta(days=1)))
    assert await backend.replace(first, expected)
    assert await backend.touch(first.id, bytes(32), now=NOW + timedelta(hours=1), expires_at=NOW + timedelta(days=15))
    assert len(await backend.list_for_user("7", NOW)) == 1
    assert await backend.purge(NOW, 10) == 1
    assert await backend.delete(first.id)
    assert await backend.delete_for_user("7") == 0
    assert await backend.delete_all() == 0
    await sql(postgres_url, f"REVOKE DELETE ON web_sessions FROM {role}")
    with pytest.raises(BackendError, match=r"may not use the session table \(.*42501\): GRANT .* DELETE on it"):
        await backend.delete(first.id)
    await backend.aclose()
    await migrate.check(url)
    with pytest.raises(BackendError, match=r"permission denied for schema public: .*--sql"):
        await migrate.upgrade(url, table="other_sessions")
    await sql(postgres_url, f"REVOKE ALL ON alembic_version_web_sessions FROM {role}")
    with pytest.raises(BackendError, match=r"--check needs SELECT on alembic_version_web_sessions"):
        await migrate.check(url)


# At the same time


async def test_parallel_upgrades(database_url: str) -> None:
    """Workers of one process that upgrade at once all succeed."""
    await asyncio.gather(*[migrate.upgrade(database_url) for _ in range(8)])
    await migrate.check(database_url)


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
async def test_parallel_upgrades_in_isolation(postgres_url: str, level: str) -> None:
    """They do so whatever isolation the server has by default, and so do downgrades."""
    database = sa.make_url(postgres_url).database
    await sql(postgres_url, f"ALTER DATABASE {database} SET default_transaction_isolation TO '{level}'")
    await asyncio.gather(*[migrate.upgrade(postgres_url) for _ in range(8)])
    await migrate.check(postgres_url)
    await asyncio.gather(*[migrate.downgrade(postgres_url) for _ in range(4)])
    assert await migrate.current(postgres_url) is None


async def test_parallel_processes(database_url: str, tmp_path: Path) -> None:
    """Processes that upgrade at once all succeed, by our command and by Alembic's."""
    calls = [
        asyncio.to_thread(run, "sqlsessions", "migrate", cwd=tmp_path, SQLSESSIONS_URL=database_url),
        asyncio.to_thread(run, "alembic", "upgrade", "head", cwd=ROOT, SQLSESSIONS_URL=database_url),
    ]
    for result in await asyncio.gather(*calls, *[migrate.upgrade(database_url) for _ in range(2)]):
        assert result is None or result.returncode == 0, result.stderr
    await migrate.check(database_url)


async def test_parallel_through_a_pooler(pgbouncer: PgBouncer, postgres_url: str) -> None:
    """They do so through a pooler, too, which gives every transaction another connection."""
    pooled = pgbouncer.url(str(sa.make_url(postgres_url).database))
    await asyncio.gather(*[migrate.upgrade(pooled) for _ in range(8)])
    await migrate.check(pooled)


async def test_under_traffic(database_url: str) -> None:
    """The table comes and goes while sessions in another are read and written; none of them fails (R116)."""
    await migrate.upgrade(database_url, table="busy_sessions")
    backend = SQLAlchemyBackend(database_url, table="busy_sessions")
    waiting = SQLAlchemyBackend(database_url)
    with pytest.raises(SchemaMissing):
        await waiting.load(UUID(int=1), NOW)
    done = asyncio.Event()

    async def traffic(number: int) -> int:
        turns = 0
        while not done.is_set():
            turns += 1
            await backend.insert(record(number * 1_000_000 + turns))
            assert await backend.load(UUID(int=number * 1_000_000 + turns), NOW) is not None
        return turns

    busy = [asyncio.ensure_future(traffic(number)) for number in range(3)]
    for _ in range(3):
        await migrate.upgrade(database_url)
        await migrate.downgrade(database_url)
    await migrate.upgrade(database_url)
    done.set()
    turns = sum(await asyncio.gather(*busy))
    assert await sql(database_url, "SELECT count(*) FROM busy_sessions") == [(turns,)]
    await waiting.insert(record(1))  # the application that waited for its table goes on, without a restart
    await backend.aclose()
    await waiting.aclose()


# Offline, and from Alembic's command line


async def test_sql_makes_the_same_table(database_url: str) -> None:
    """The DDL printed for somebody else to run makes the same table, and the chain goes on from there."""
    dialect = sa.make_url(database_url).get_backend_name()
    printed = migrate.sql(dialect)
    assert printed.startswith("BEGIN;")
    assert printed.rstrip().endswith("COMMIT;")
    assert printed == migrate.sql(f"{dialect}://")
    statements = re.sub(r"^--.*$", "", printed, flags=re.MULTILINE).split(";")
    await sql(database_url, *[text for text in statements if text.strip() not in {"", "BEGIN", "COMMIT"}])
    await migrate.check(database_url)
    await create_from_metadata(database_url, "from_metadata")
    assert await catalogue(database_url, "web_sessions") == await catalogue(database_url, "from_metadata")


def test_sql_for_postgresql() -> None:
    """Printing needs no server; table and schema are the caller's."""
    printed = migrate.sql("postgresql+asyncpg://", table="logins", schema="auth")
    assert "CREATE TABLE auth.alembic_version_logins" in printed
    assert "CREATE TABLE auth.logins (" in printed
    assert "fillfactor = 80" in printed
    assert "CREATE INDEX logins_user_id ON auth.logins (user_id) WHERE user_id IS NOT NULL;" in printed
    assert "%" not in printed


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Make a checkout of this repository whose default database is not the developer's."""
    folder = tmp_path / "check out"
    folder.mkdir()
    shutil.copy(ROOT / "alembic.ini", folder)
    (folder / "src").symlink_to(ROOT / "src")
    return folder


async def test_alembic_default_database(checkout: Path, tmp_path: Path) -> None:
    """``alembic upgrade head`` and ``downgrade base`` work in a fresh checkout, on a file beside alembic.ini."""
    url = f"sqlite+aiosqlite:///{checkout / 'sqlsessions.db'}"
    up = run("alembic", "-c", str(checkout / "alembic.ini"), "upgrade", "head", cwd=tmp_path)
    assert up.returncode == 0, up.stderr
    assert "Running upgrade  -> sqlsessions_0001" in up.stderr
    await migrate.check(url)
    for arguments in (["check"], ["current"], ["history"], ["upgrade", "head"]):
        result = run("alembic", *arguments, cwd=checkout)
        assert result.returncode == 0, result.stderr
    down = run("alembic", "downgrade", "base", cwd=checkout)
    assert down.returncode == 0, down.stderr
    assert await tables(url) == set()


async def test_alembic_url(checkout: Path, database_url: str, tmp_path: Path) -> None:
    """SQLSESSIONS_URL names the database, -x url=… goes before it, and no password is printed."""
    await sql(database_url, "CREATE TABLE users (id integer)")
    url = sa.make_url(database_url)
    if url.host:
        url = url.set(username="postgres", password="geheim")
    shown = url.render_as_string(hide_password=False)
    up = run("alembic", "upgrade", "head", cwd=checkout, SQLSESSIONS_URL=shown)
    assert up.returncode == 0, up.stderr
    assert "geheim" not in up.stderr + up.stdout
    assert await tables(database_url) == {"users", "web_sessions", "alembic_version_web_sessions"}
    arguments = ["-x", f"url={shown}", "-x", "table=logins", "upgrade", "head"]
    up = run("alembic", *arguments, cwd=checkout, SQLSESSIONS_URL=f"sqlite+aiosqlite:///{tmp_path / 'wrong.db'}")
    assert up.returncode == 0, up.stderr
    await migrate.check(database_url, table="logins")
    assert not (tmp_path / "wrong.db").exists()
    down = run("alembic", "downgrade", "base", cwd=checkout, SQLSESSIONS_URL=shown)
    assert down.returncode == 0, down.stderr
    assert await tables(database_url) == {"users", "logins", "alembic_version_logins"}
    assert not (checkout / "sqlsessions.db").exists()


@pytest.mark.parametrize("url", ["postgresql+asyncpg://", "sqlite+aiosqlite://"])
def test_alembic_offline(url: str, checkout: Path) -> None:
    """``alembic upgrade head --sql`` prints the same as `migrate.sql`, and ``downgrade`` the reverse."""
    up = run("alembic", "upgrade", "head", "--sql", cwd=checkout, SQLSESSIONS_URL=url)
    assert up.returncode == 0, up.stderr
    assert up.stdout == migrate.sql(url)
    down = run("alembic", "downgrade", "head:base", "--sql", cwd=checkout, SQLSESSIONS_URL=url)
    assert down.returncode == 0, down.stderr
    assert "DROP TABLE web_sessions;" in down.stdout
    assert "DROP TABLE alembic_version_web_sessions;" in down.stdout


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("table=a b", "table 'a b' is not usable"),
        ("schema=auth", "there is no schema 'auth'"),
        ("tabel=logins", "-x tabel=… is unknown here"),
        ("url=postgresql://somebody:geheim@127.0.0.1:1/x", "cannot use postgresql+asyncpg://127.0.0.1:1/x: "),
        ("url=sqlite:////nowhere/x.db", "cannot use sqlite+aiosqlite:////nowhere/x.db: "),
        ("url=postgresql+psycopg2://host/x", "there is no asynchronous driver for postgresql+psycopg2"),
    ],
)
def test_alembic_refuses(argument: str, said: str, checkout: Path) -> None:
    """What Alembic's command line cannot do here it says in one line, having done nothing."""
    result = run("alembic", "-x", argument, "upgrade", "head", cwd=checkout)
    assert "geheim" not in result.stdout + result.stderr
    assert result.returncode != 0
    assert said in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


async def test_new_revision(checkout: Path, sqlite_url: str) -> None:
    """A contributor's ``alembic revision --autogenerate`` writes a file that joins the chain and runs."""
    (checkout / "src").unlink()
    shutil.copytree(ROOT / "src", checkout / "src", ignore=shutil.ignore_patterns("__pycache__"))
    assert run("alembic", "upgrade", "head", cwd=checkout, SQLSESSIONS_URL=sqlite_url).returncode == 0
    await sql(sqlite_url, "DROP INDEX web_sessions_expires_at", "CREATE TABLE users (id integer)")
    arguments = ["revision", "--autogenerate", "--rev-id", "sqlsessions_9999", "-m", "add the index again"]
    made = run("alembic", *arguments, cwd=checkout, SQLSESSIONS_URL=sqlite_url)
    assert made.returncode == 0, made.stderr
    versions = checkout / "src" / "sqlsessions" / "migrations" / "versions"
    written = (versions / "sqlsessions_9999_add_the_index_again.py").read_text()
    assert written.startswith('"""Add the index again.\n')
    assert "op.create_index(" in written
    assert "users" not in written
    up = run("alembic", "upgrade", "head", cwd=checkout, SQLSESSIONS_URL=sqlite_url)
    assert up.returncode == 0, up.stderr
    assert "TABLE_expires_at" in str(await catalogue(sqlite_url, "web_sessions"))


async def test_logging_is_left_alone(database_url: str) -> None:
    """Migrating from Python changes nobody's logging."""

    def configuration() -> Any:
        loggers = [logging.getLogger(name) for name in (None, "alembic", "alembic.runtime.migration", "sqlalchemy")]
        return [(logger.level, logger.disabled, logger.propagate, list(logger.handlers)) for logger in loggers]

    before = configuration()
    await migrate.upgrade(database_url)
    await migrate.downgrade(database_url)
    assert configuration() == before


async def test_callers_connection_survives(database_url: str) -> None:
    """A connection of the caller's is neither closed nor left in a transaction by a migration that fails."""
    engine = create_async_engine(database_url)
    async with engine.connect() as connection:
        with pytest.raises(ConfigurationError):
            await migrate.upgrade(connection, schema="auth")
        assert not connection.in_transaction()
        assert (await connection.execute(sa.select(1))).scalar_one() == 1
    await engine.dispose()
