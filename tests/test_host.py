"""A real application with tables, metadata and an Alembic history of its own, in host_app."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sqlsessions import migrate
from sqlsessions.errors import SchemaMissing
from tests.catalogue import catalogue, create_from_metadata, tables
from tests.commands import run
from tests.looking import sql

pytestmark = pytest.mark.anyio

OURS = {"web_sessions", "alembic_version_web_sessions"}
THEIRS = {"users", "orders", "alembic_version"}
CLEAN = "No new upgrade operations detected"
JOINS = pytest.mark.parametrize("joins", [{}, {"HOST_JOINS": "1"}], ids=["apart", "joined"])


class Host:
    """A copy of the application, on a database."""

    def __init__(self, folder: Path, url: str) -> None:
        self.url = url
        self.folder = shutil.copytree(Path(__file__).with_name("host_app"), folder / "host")
        self.versions = self.folder / "migrations" / "versions"

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the application's Alembic, whatever comes of it."""
        return run("alembic", *arguments, cwd=self.folder, HOST_URL=self.url, **variables)

    def alembic(self, *arguments: str, **variables: str) -> str:
        """Run the application's Alembic, which must succeed, and return what it printed."""
        result = self.run(*arguments, **variables)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def autogenerate(self, **variables: str) -> str:
        """Return the ``upgrade`` that autogenerate writes."""
        self.alembic("revision", "--autogenerate", "--rev-id", "0009", "-m", "what changed", **variables)
        written = (self.versions / "0009_what_changed.py").read_text()
        found = re.search(r"def upgrade\(\).*?:\n(.*?)\n\n", written, re.DOTALL)
        assert found
        return "\n".join(line.strip() for line in found[1].splitlines() if "# ###" not in line)


@pytest.fixture
def host(tmp_path: Path, database_url: str) -> Host:
    """Make an application that is up to date, beside a session table that is."""
    return _host(tmp_path, database_url)


@pytest.fixture
def sqlite_host(tmp_path: Path, sqlite_url: str) -> Host:
    """Make one on SQLite, for what does not depend on the engine."""
    return _host(tmp_path, sqlite_url)


def said(result: subprocess.CompletedProcess[str]) -> str:
    """Return what a command said that failed, as it should."""
    assert result.returncode != 0
    return result.stdout + result.stderr


def _host(folder: Path, url: str) -> Host:
    host = Host(folder, url)
    host.alembic("upgrade", "head")
    return host


@JOINS
async def test_autogenerate_is_empty(host: Host, joins: dict[str, str]) -> None:
    """With the hook, autogenerate and check find nothing, whether or not the table is in the host's metadata too."""
    await migrate.upgrade(host.url)
    assert CLEAN in host.alembic("check", **joins)
    assert host.autogenerate(**joins) == "pass"


async def test_autogenerate_before_our_migration(sqlite_host: Host) -> None:
    """The hook also keeps autogenerate from creating a table that the chain will create."""
    assert CLEAN in sqlite_host.alembic("check", HOST_JOINS="1")
    assert "add_table" in said(sqlite_host.run("check", HOST_JOINS="1", HOST_HOOK="none"))


async def test_without_the_hook(host: Host) -> None:
    """Without the hook, autogenerate drops the sessions and their version table: these tests can fail."""
    await migrate.upgrade(host.url)
    written = host.autogenerate(HOST_HOOK="none")
    assert "op.drop_table('web_sessions')" in written
    assert "op.drop_table('alembic_version_web_sessions')" in written


async def test_joined_without_the_hook(sqlite_host: Host) -> None:
    """A table in the host's metadata is not enough: its version table would still be dropped."""
    await migrate.upgrade(sqlite_host.url)
    written = sqlite_host.autogenerate(HOST_HOOK="none", HOST_JOINS="1")
    assert "op.drop_table('alembic_version_web_sessions')" in written
    assert "op.drop_table('web_sessions')" not in written


async def test_hook_of_the_hosts_own(sqlite_host: Host) -> None:
    """The hook takes the host's own along, and hides nothing else."""
    await migrate.upgrade(sqlite_host.url)
    await sql(sqlite_host.url, "CREATE TABLE legacy (id integer)")
    assert CLEAN in sqlite_host.alembic("check", HOST_HOOK="both")
    assert "remove_table" in said(sqlite_host.run("check"))
    await sql(sqlite_host.url, "DROP INDEX orders_user_id")
    assert "add_index" in said(sqlite_host.run("check", HOST_HOOK="both"))


async def test_hook_for_two_tables(sqlite_host: Host) -> None:
    """Hooks for two session tables in one database go into each other."""
    await migrate.upgrade(sqlite_host.url)
    await migrate.upgrade(sqlite_host.url, table="admin_sessions")
    assert "remove_table" in said(sqlite_host.run("check"))
    assert CLEAN in sqlite_host.alembic("check", HOST_HOOK="two")


async def test_hook_for_another_schema(tmp_path: Path, postgres_url: str) -> None:
    """A session table in a schema of its own is hidden there; a namesake of the host's elsewhere is not."""
    host = _host(tmp_path, postgres_url)
    await sql(host.url, "CREATE SCHEMA auth")
    await migrate.upgrade(host.url, table="logins", schema="auth")
    assert "remove_table" in said(host.run("check", HOST_SCHEMAS="1"))
    assert CLEAN in host.alembic("check", HOST_SCHEMAS="1", HOST_HOOK="named")
    await sql(host.url, "CREATE TABLE logins (id integer)")
    assert "remove_table" in said(host.run("check", HOST_SCHEMAS="1", HOST_HOOK="named"))


async def test_default_schema_by_name(tmp_path: Path, postgres_url: str) -> None:
    """Naming the default schema changes nothing: Alembic reflects it as None."""
    await migrate.upgrade(postgres_url, schema="public")
    host = _host(tmp_path, postgres_url)
    assert CLEAN in host.alembic("check", HOST_SCHEMAS="1")


async def test_histories_are_apart(sqlite_host: Host) -> None:
    """Neither history moves the other: up and down, in whatever order."""
    await migrate.upgrade(sqlite_host.url)
    sqlite_host.alembic("downgrade", "base")
    await migrate.check(sqlite_host.url)
    sqlite_host.alembic("upgrade", "head")
    await migrate.downgrade(sqlite_host.url)
    assert await tables(sqlite_host.url) == THEIRS


async def test_one_command_for_both(tmp_path: Path, database_url: str) -> None:
    """A host's env.py may await our upgrade on its own connection, amid a run of Alembic: the two do not meet."""
    host = Host(tmp_path, database_url)
    host.alembic("upgrade", "head", HOST_UPGRADES_SESSIONS="1")
    assert await tables(host.url) == THEIRS | OURS
    await migrate.check(host.url)
    host.alembic("upgrade", "head", HOST_UPGRADES_SESSIONS="1")


async def test_delegation(host: Host) -> None:
    """A revision of the host's may make our table: one history, up and down, and the same table as ever."""
    shutil.copy(host.folder / "delegated" / "0002_sessions.py", host.versions)
    host.alembic("upgrade", "head")
    assert await tables(host.url) == THEIRS | {"web_sessions"}
    await create_from_metadata(host.url, "from_metadata")
    assert await catalogue(host.url, "web_sessions") == await catalogue(host.url, "from_metadata")
    await sql(host.url, "DROP TABLE from_metadata")
    assert CLEAN in host.alembic("check", HOST_JOINS="1")
    with pytest.raises(SchemaMissing):  # the version is in the host's history alone
        await migrate.check(host.url)
    host.alembic("downgrade", "-1")
    assert await tables(host.url) == THEIRS


def test_delegation_offline(sqlite_host: Host) -> None:
    """The host's ``--sql`` prints our DDL within its own."""
    shutil.copy(sqlite_host.folder / "delegated" / "0002_sessions.py", sqlite_host.versions)
    printed = sqlite_host.alembic("upgrade", "0001:head", "--sql")
    assert "CREATE INDEX web_sessions_user_id ON web_sessions (user_id) WHERE user_id IS NOT NULL" in printed
    assert "alembic_version_web_sessions" not in printed
