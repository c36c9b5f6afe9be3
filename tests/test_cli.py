import argparse
import asyncio
import os
import pty
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest

from sqlsessions import cli, migrate
from sqlsessions.backends.sqlalchemy import SQLAlchemyBackend
from sqlsessions.errors import ConfigurationError
from sqlsessions.record import Record
from tests.catalogue import tables
from tests.commands import ENVIRONMENT, command, run

LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


def fill(url: str, *, expired: int, live: int = 1) -> None:
    """Insert sessions that expired long ago, and some that have not."""

    async def insert() -> None:
        backend = SQLAlchemyBackend(url)
        ends = [LONG_AGO] * expired + [datetime.now(UTC) + timedelta(days=1)] * live
        for number, expires_at in enumerate(ends):
            times = (LONG_AGO, LONG_AGO, expires_at)
            await backend.insert(Record(UUID(int=number), bytes(32), None, "{}", 1, *times))
        await backend.aclose()

    asyncio.run(insert())


@contextmanager
def running(url: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command while something is done to it."""
    process = subprocess.Popen(
        command("sqlsessions", *arguments),
        env={**ENVIRONMENT, "SQLSESSIONS_URL": url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_migrate(database_url: str, tmp_path: Path) -> None:
    """The table is made, found to be up to date, and dropped, each with one line and the right exit status."""

    def sqlsessions(*arguments: str) -> tuple[int, str, str]:
        result = run("sqlsessions", *arguments, cwd=tmp_path, SQLSESSIONS_URL=database_url)
        return result.returncode, result.stdout, result.stderr

    status, out, err = sqlsessions("migrate", "--check")
    assert (status, out) == (1, "")
    assert err.startswith("sqlsessions: table web_sessions is at no revision, the newest is sqlsessions_0001: run ")
    assert err.count("\n") == 1
    done = (0, "web_sessions: at sqlsessions_0001\n", "")
    assert sqlsessions("migrate") == done
    assert sqlsessions("migrate") == done
    assert sqlsessions("migrate", "--check") == done
    status, out, err = sqlsessions("downgrade")
    assert (status, out) == (2, "")
    assert "--yes" in err
    assert asyncio.run(tables(database_url)) == {"web_sessions", "alembic_version_web_sessions"}
    assert sqlsessions("downgrade", "--yes") == (0, "web_sessions: at base\n", "")
    assert asyncio.run(tables(database_url)) == set()


def test_url_and_names(postgres_url: str, tmp_path: Path) -> None:
    """--url goes before SQLSESSIONS_URL; --table and --schema say where; a missing schema is a clear refusal."""
    arguments = ["migrate", "--url", postgres_url, "--table", "logins", "--schema", "public"]
    result = run("sqlsessions", *arguments, cwd=tmp_path, SQLSESSIONS_URL="sqlite:///wrong.db")
    assert (result.returncode, result.stdout) == (0, "logins: at sqlsessions_0001\n")
    assert list(tmp_path.iterdir()) == []
    result = run("sqlsessions", *arguments[:-1], "auth", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == (
        "sqlsessions: there is no schema 'auth': create it first (CREATE SCHEMA auth), or name another\n"
    )


def test_sql(tmp_path: Path) -> None:
    """--sql prints what `migrate.sql` returns, and connects to nothing."""
    result = run("sqlsessions", "migrate", "--sql", "--url", "postgresql://", "--table", "logins", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == migrate.sql("postgresql", table="logins")


@pytest.mark.parametrize("arguments", [["migrate"], ["downgrade"], ["purge"], ["migrate", "--sql"]])
def test_no_url(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Without a database every command says how to name one."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "no database: set SQLSESSIONS_URL, or give --url" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["migrate", "--url", "postgresql://somebody:geheim@127.0.0.1:1/x?password=geheim"], 1),
        (["migrate", "--check", "--url", "postgresql://somebody:geheim@127.0.0.1:1/x"], 1),
        (["purge", "--url", "postgresql://somebody:geheim@127.0.0.1:1/x?password=geheim"], 1),
        (["purge", "--url", "sqlite:////nowhere/x.db"], 1),
        (["migrate", "--url", "sqlite:////nowhere/x.db"], 1),
        (["migrate", "--url", "postgresql://somebody:geheim@host:geheim/x"], 2),
        (["migrate", "--url", "nosql://somebody:geheim@host/x"], 2),
        (["migrate", "--url", "geheim"], 2),
        (["migrate", "--url", "sqlite:///x.db", "--table", "a b"], 2),
        (["migrate", "--url", "postgresql://somebody:geheim@geheim@127.0.0.1:1/x"], 2),
        (["migrate", "--url", "sqlite:///x.db", "--table", "postgresql://somebody:geheim@host/x"], 2),
        (["downgrade", "--url", "sqlite:///x.db", "--yes", "postgresql://host/x?user=somebody&password=geheim"], 2),
        (["migrate", "--url", "sqlite://"], 2),
        (["migrate", "--url", "postgresql+psycopg2://somebody:geheim@127.0.0.1:1/x"], 2),
        (["purge", "--url", "postgresql+psycopg2://somebody:geheim@127.0.0.1:1/x"], 2),
        (["migrate", "--url", "postgresql://somebody:geheim@127.0.0.1:1/x?channel_binding=geheim"], 2),
        (["purge", "--url", "postgresql://somebody:geheim@127.0.0.1:1/x?channel_binding=geheim"], 2),
        (["purge", "--every", "1d", "--url", "postgresql://somebody:geheim@127.0.0.1:1/x?channel_binding=geheim"], 2),
        (["migrate", "--url", "postgresql://somebody:geheim@127.0.0.1:65536/x"], 2),
        (["purge", "--url", "postgresql://somebody:geheim@127.0.0.1:65536/x"], 2),
        (["migrate", "--check", "--url", "sqlite:///x.db"], 1),
        (["purge", "--url", "sqlite:///x.db"], 1),
    ],
)
def test_errors(arguments: list[str], status: int, tmp_path: Path) -> None:
    """What cannot be done is said in one line, without a traceback and without the password."""
    result = run("sqlsessions", *arguments, cwd=tmp_path)
    assert result.returncode == status
    assert result.stdout == ""
    assert re.fullmatch(r"sqlsessions: .+\n", result.stderr)
    assert "geheim" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["postgresql://somebody:geheim@host/x"],
        ["migrate", "postgresql://somebody:geheim@host/x"],
        ["purge", "--every", "postgresql://somebody:geheim@host/x"],
    ],
)
def test_misplaced_url(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A URL in the wrong place is complained about without its password."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "://***@host/x" in said
    assert "geheim" not in said


@pytest.mark.parametrize(
    "where", ["@h:65536/x", "@/x?host=a:1&host=b:65536", "@/x?host=a&port=65536", "@/x?host=a,b&port=1,65536"]
)
def test_impossible_port(where: str) -> None:
    """A port that no network has is named, wherever the URL has it."""
    with pytest.raises(ConfigurationError, match="port 65536: there is none above 65535") as raised:
        SQLAlchemyBackend(f"postgresql://somebody:geheim{where}")
    assert "geheim" not in str(raised.value)
    SQLAlchemyBackend(f"postgresql://somebody:geheim{where.replace('65536', '65535')}")


@pytest.mark.parametrize(("command", "said"), [("migrate", "cannot use {}: "), ("purge", "{}: no connection to ")])
def test_which_database(command: str, said: str, tmp_path: Path) -> None:
    """An error names the database: of several hosts, all."""
    url = "postgresql://somebody:geheim@/x?host=127.0.0.1:1&host=127.0.0.1:2"
    result = run("sqlsessions", command, cwd=tmp_path, SQLSESSIONS_URL=url)
    assert result.returncode == 1
    assert result.stderr.startswith("sqlsessions: " + said.format("postgresql+asyncpg://127.0.0.1:1,127.0.0.1:2/x"))


def test_counting_what_will_be_purged(postgres_url: str) -> None:
    """Before the bar is drawn, too, an option that the driver does not know is named."""
    options = argparse.Namespace(url=f"{postgres_url}?channel_binding=x", table="web_sessions", schema=None)
    with pytest.raises(ConfigurationError, match="'channel_binding'"):
        asyncio.run(cli._expired(options))


def test_purge(sessions_url: str, tmp_path: Path) -> None:
    """What has expired is deleted, in batches, what has not stays; elsewhere than on a terminal it is one line."""
    fill(sessions_url, expired=25, live=2)
    arguments = ["purge", "--batch-size", "10"]
    result = run("sqlsessions", *arguments, cwd=tmp_path, SQLSESSIONS_URL=sessions_url)
    assert (result.returncode, result.stdout) == (0, "web_sessions: 25 expired sessions deleted\n")
    assert result.stderr == ""
    result = run("sqlsessions", *arguments, cwd=tmp_path, SQLSESSIONS_URL=sessions_url)
    assert result.stdout == "web_sessions: 0 expired sessions deleted\n"


def test_purge_without_table(database_url: str, tmp_path: Path) -> None:
    """Without the table, one line says what to run."""
    result = run("sqlsessions", "purge", cwd=tmp_path, SQLSESSIONS_URL=database_url)
    assert result.returncode == 1
    assert re.fullmatch(r"sqlsessions: .*sqlsessions migrate.*\n", result.stderr)


@pytest.mark.parametrize("command", [["migrate", "--check"], ["purge"]])
@pytest.mark.parametrize("place", [["--table", "other"], ["--schema", "app"], ["--table", "other", "--schema", "app"]])
def test_remedy_for_another_table(command: list[str], place: list[str], postgres_url: str, tmp_path: Path) -> None:
    """What to run has the options that say which table: without them, it would make another."""
    result = run("sqlsessions", *command, *place, cwd=tmp_path, SQLSESSIONS_URL=postgres_url)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.endswith(f": run 'sqlsessions migrate {' '.join(place)}'\n")


def test_remedy_for_a_missing_file(tmp_path: Path) -> None:
    """So it has where there is no database yet, and in what --every reports."""
    with running("sqlite:///missing.db", "purge", "--every", "1d", "--table", "other") as process:
        assert process.stderr is not None
        assert "run 'sqlsessions migrate --table other')" in process.stderr.readline()


def full() -> int:
    """Return a file that takes nothing."""
    return os.open("/dev/full", os.O_WRONLY)


def broken() -> int:
    """Return a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(("output", "said"), [(full, "No space left on device"), (broken, "Broken pipe")])
@pytest.mark.parametrize(
    "arguments", [["purge"], ["purge", "--every", "1d"], ["migrate"], ["migrate", "--sql"], ["downgrade", "--yes"]]
)
def test_unwritable_output(arguments: list[str], output: Callable[[], int], said: str, sqlite_url: str) -> None:
    """Output that cannot be written is one line on standard error, and no success."""
    asyncio.run(migrate.upgrade(sqlite_url))
    stdout = output()
    result = subprocess.run(
        command("sqlsessions", *arguments),
        env={**ENVIRONMENT, "SQLSESSIONS_URL": sqlite_url},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(stdout)
    assert (result.returncode, result.stderr) == (1, f"sqlsessions: the output cannot be written: {said}\n")


def test_purge_on_a_terminal(sessions_url: str) -> None:
    """On a terminal a bar grows to the number of expired sessions, and makes room for the last line."""
    fill(sessions_url, expired=25)
    terminal, theirs = pty.openpty()
    # As separate as in a shell with 2>/dev/tty: the bar is no part of the output.
    process = subprocess.Popen(
        command("sqlsessions", "purge", "--batch-size", "10"),
        env={**ENVIRONMENT, "SQLSESSIONS_URL": sessions_url, "COLUMNS": "60"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    out, _ = process.communicate(timeout=60)
    seen = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert process.returncode == 0
    assert out == "web_sessions: 25 expired sessions deleted\n"
    lines = seen.split("\r\x1b[K")
    assert lines[1:] == [
        f"web_sessions [{'#' * 14}{'.' * 21}] 10 of 25",
        f"web_sessions [{'#' * 28}{'.' * 7}] 20 of 25",
        f"web_sessions [{'#' * 35}] 25 of 25",
        "",
    ]


@pytest.mark.parametrize(("done", "width"), [(0, 80), (1, 80), (7, 80), (9, 80), (7, 30), (7, 5), (7, 0)])
def test_bar(done: int, width: int) -> None:
    """The bar fits the terminal, however narrow, and survives more sessions than were counted."""
    for total in (None, 0, 1, 8, 1_000_000):
        assert len(cli.Bar("web_sessions", total).line(done, width)) <= width


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_every(number: signal.Signals, sessions_url: str) -> None:
    """With --every the first purge is at once, and a signal ends it cleanly."""
    fill(sessions_url, expired=3)
    with running(sessions_url, "purge", "--every", "1d") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "web_sessions: 3 expired sessions deleted\n"
        process.send_signal(number)
        assert process.communicate(timeout=10) == ("", "")
        assert process.returncode == 0


def test_every_survives_errors(database_url: str) -> None:
    """With --every an error is one line, and the next time it is tried again."""
    with running(database_url, "purge", "--every", "1s") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert re.fullmatch(
            r"sqlsessions: purge failed \(SchemaMissing: .*run .*'sqlsessions migrate'\); trying again in about .*\n",
            process.stderr.readline(),
        )
        asyncio.run(migrate.upgrade(database_url))
        assert process.stdout.readline() == "web_sessions: 0 expired sessions deleted\n"
        process.terminate()
        process.communicate(timeout=10)
        assert process.returncode == 0


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("5m", 300), ("1h", 3_600), ("1d", 86_400), ("999999d", 999_999 * 86_400)]
)
def test_durations(text: str, seconds: int) -> None:
    """Durations have one number and one unit."""
    assert cli._duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "argument",
    [
        *[f"--every={text}" for text in ("", "0s", "5", "m", "-5m", "5.5m", "5 m", "5w", "1h30m", "9999999d", "²m")],
        *[f"--batch-size={text}" for text in ("", "0", "-1", "10001", "1e3", "many", "9" * 5_000)],
    ],
    ids=lambda argument: argument[:30],
)
def test_bad_numbers(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A duration or batch size that makes no sense is refused before anything is connected."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["purge", "--url", "sqlite:////nowhere/x.db", argument])
    assert ended.value.code == 2
    assert "is not a" in capsys.readouterr().err


def test_help(tmp_path: Path) -> None:
    """--help tells the exit statuses, of the command and of its parts, on any terminal; --version the version."""
    for arguments in (["--help"], ["migrate", "--help"], ["downgrade", "--help"], ["purge", "--help"]):
        result = run("sqlsessions", *arguments, cwd=tmp_path, PYTHONIOENCODING="ascii")
        assert result.returncode == 0
        assert "exit status:\n  0  done;" in result.stdout
        assert "SQLSESSIONS_URL" in result.stdout
    assert re.fullmatch(r"sqlsessions \S.*\n", run("sqlsessions", "--version", cwd=tmp_path).stdout)
    assert run("sqlsessions", cwd=tmp_path).returncode == 2
