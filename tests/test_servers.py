"""The servers that the other tests stand on keep their promises."""

import os
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from tests import servers
from tests.servers import PgBouncer, PostgresServer, Unavailable

pytestmark = pytest.mark.anyio

OWNER = """
import sys
from tests.servers import PostgresServer

with PostgresServer() as server:
    print(server.folder, (server.data / "postmaster.pid").read_text().split()[0], flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def own_server(postgres: PostgresServer) -> Iterator[PostgresServer]:
    """A server that the test may ill-treat."""
    with PostgresServer({"max_connections": "7"}) as server:
        yield server


async def fetch(url: str, query: str) -> object:
    """Return the one value that a query has."""
    engine = create_async_engine(url)
    try:
        async with engine.connect() as connection:
            return await connection.scalar(text(query))
    finally:
        await engine.dispose()


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the leash is made of Linux system calls")
def test_owner_killed(postgres: PostgresServer) -> None:
    """A server does not outlive its owner, even one that was killed without a chance to stop it."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"TEST_POSTGRES_BIN": str(postgres.binaries)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with owner:
        assert owner.stdout
        folder, pid = owner.stdout.readline().split()
        server = os.pidfd_open(int(pid))
        owner.kill()
    ended, _, _ = select.select([server], [], [], servers.PATIENCE)
    os.close(server)
    shutil.rmtree(folder)
    assert ended


async def test_killed_and_started(own_server: PostgresServer) -> None:
    """A server that was killed starts again on the same port, with the settings and databases it had."""
    url = own_server.create_database("kept")
    own_server.stop("kill")
    with pytest.raises(OSError, match="Connect call failed"):
        await fetch(url, "SELECT 1")
    own_server.start()
    assert await fetch(url, "SELECT current_setting('max_connections')") == "7"


@pytest.mark.skipif(not servers._from_wheel(), reason="only the wheel can be copied to another place")
def test_closed_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs below a directory that only its owner may enter run all the same, and it stays closed."""
    installation = servers._from_wheel()[0].parent
    package = installation.parent
    closed = tmp_path / "closed"
    ignored = shutil.ignore_patterns("include", "doc")
    shutil.copytree(installation, closed / package.name / installation.name, symlinks=True, ignore=ignored)
    for libraries in package.parent.glob(f"{package.name}.libs"):
        shutil.copytree(libraries, closed / libraries.name)
    closed.chmod(0o700)
    monkeypatch.setenv("TEST_POSTGRES_BIN", str(closed / package.name / installation.name / "bin"))
    with PostgresServer() as server:
        server.execute("SELECT 1")
    assert closed.stat().st_mode & 0o777 == 0o700


def test_nothing_left(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server that cannot start repeats what it said and leaves nothing behind."""
    server = PostgresServer({"no_such_setting": "1"})
    with pytest.raises(RuntimeError, match=r"unrecognized configuration parameter .no_such_setting."), server:
        pytest.fail("it started")
    assert not server.folder.exists()


def test_port_taken(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose port was taken at the last moment moves to another one."""
    free_port = servers._free_port
    with socket.create_server(("127.0.0.1", 0)) as rival:
        ports = iter([rival.getsockname()[1]])
        monkeypatch.setattr(servers, "_free_port", lambda: next(ports, None) or free_port())
        with PostgresServer() as server:
            server.execute("SELECT 1")
            assert "Address already in use" in server.log


def test_named_binaries_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory named in TEST_POSTGRES_BIN without PostgreSQL in it is not replaced by another."""
    monkeypatch.setenv("TEST_POSTGRES_BIN", str(tmp_path))
    with pytest.raises(Unavailable, match=str(tmp_path)):
        PostgresServer()


async def test_pgbouncer(pgbouncer: PgBouncer, postgres_sessions_url: str) -> None:
    """Any database of the server can be reached through PgBouncer."""
    database = postgres_sessions_url.rpartition("/")[2]
    assert await fetch(pgbouncer.url(database), "SELECT current_database()") == database


@pytest.mark.parametrize("time", ["first", "second"])
async def test_database_to_itself(sessions_url: str, time: str) -> None:
    """Each test finds the session table empty, whatever the one before has done to it."""
    assert await fetch(sessions_url, "SELECT count(*) FROM web_sessions") == 0
    engine = create_async_engine(sessions_url)
    async with engine.begin() as connection:
        await connection.execute(text("DROP TABLE web_sessions"))
    await engine.dispose()


async def test_empty_database(database_url: str) -> None:
    """The plain fixtures give a database without our table."""
    engine = create_async_engine(database_url)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE web_sessions (id integer)"))
    await engine.dispose()
