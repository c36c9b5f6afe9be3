"""README.md is true: every block of it runs, or is checked, and its tables are those of the code.

A block is known by its heading, its language and its number among those. The Python blocks are one program, told in
pieces: each is run after those before it, and its check must have run every line of it.
"""

import argparse
import asyncio
import configparser
import importlib
import inspect
import logging
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import threading
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, get_args

import httpx
import pytest
import sqlalchemy as sa
import yaml
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from fastapi.testclient import TestClient
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.websockets import WebSocketDisconnect

import dev
from sqlsessions import Record, SessionMiddleware, SQLAlchemyBackend, migrate
from sqlsessions.credentials import CookieSigner
from sqlsessions.errors import BackendError
from sqlsessions.events import EventKind
from sqlsessions.record import utc_now
from sqlsessions.testing import make_record
from tests.commands import ENVIRONMENT, ROOT, run
from tests.demo_server import KEY, serving

README = (ROOT / "README.md").read_text()

#: Never executed together with others: what surrounds them is somebody's Alembic, or pytest.
ALONE = {("Migrations", 2), ("Migrations", 3), ("Another backend", 1)}


@dataclass(frozen=True)
class Block:
    """A fenced block, and where it stands."""

    heading: str
    language: str
    number: int
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.heading}, {self.language} {self.number}"


def blocks() -> list[Block]:
    """Return the blocks of the README, in its order."""
    found: list[Block] = []
    numbers: Counter[tuple[str, str]] = Counter()
    pattern = r"^#+ (?P<heading>[^\n]+)$|^```(?P<language>\w*)\n(?P<text>.*?)^```$"
    heading = ""
    for match in re.finditer(pattern, README, re.MULTILINE | re.DOTALL):
        if match["heading"]:
            heading = match["heading"]
            continue
        numbers[heading, match["language"]] += 1
        line = README.count("\n", 0, match.start()) + 2
        found.append(
            Block(heading, match["language"], numbers[heading, match["language"]], line, match["text"]),
        )
    return found


BLOCKS = blocks()


@dataclass
class Reader:
    """Somebody who does what the README says: in a folder of their own, with a database in which the table is."""

    folder: Path
    request: pytest.FixtureRequest
    names: dict[str, Any] = field(default_factory=dict)
    lines_run: set[int] = field(default_factory=set)

    @property
    def url(self) -> str:
        """Return the URL of the database."""
        return os.environ["SQLSESSIONS_URL"]

    def execute(self, block: Block) -> None:
        """Execute a Python block, after all those before it."""
        for earlier in BLOCKS:
            if earlier.language == "python" and (earlier is block or not is_alone(earlier)):
                exec(compiled(earlier), self.names)  # noqa: S102 - this is what a reader would do
            if earlier is block:
                return

    @contextmanager
    def client(self, app: str = "app") -> Iterator[TestClient]:
        """Have a browser for the application of that name."""
        with TestClient(self.names[app], base_url="https://testserver") as client:
            yield client

    def sql(self, statement: str, *parameters: str) -> None:
        """Send one statement to the SQLite database, behind the library's back."""
        connection = sqlite3.connect(self.url.partition("///")[2])
        with connection:
            connection.execute(statement, parameters)
        connection.close()

    def shell(self, script: str) -> str:
        """Run a script in the folder, as bash would after `set -eu`; return what it printed."""
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env={**ENVIRONMENT, "SQLSESSIONS_URL": self.url, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def expired_session(self) -> None:
        """Put a session into the database that is over."""
        ago = utc_now() - timedelta(days=1)
        record = make_record(created_at=ago, last_seen_at=ago, expires_at=ago)
        asyncio.run(SQLAlchemyBackend(self.url).insert(record))


Check = Callable[[Reader, Block], None]
CHECKS: dict[tuple[str, str, int], Check] = {}


def checks(heading: str, language: str = "python", number: int = 1) -> Callable[[Check], Check]:
    """Return a decorator for the check of a block."""

    def register(check: Check) -> Check:
        CHECKS[heading, language, number] = check
        return check

    return register


def is_alone(block: Block) -> bool:
    """Tell whether a Python block is no part of the program that the others tell."""
    return (block.heading, block.number) in ALONE


def compiled(block: Block) -> CodeType:
    """Return a Python block as code whose lines have their numbers in the README."""
    return compile("\n" * (block.line - 1) + block.text, "README.md", "exec", dont_inherit=True)


def lines_of(code: CodeType) -> set[int]:
    """Return the numbers of the lines that there is something to run on."""
    own = {line for _, _, line in code.co_lines() if line}
    return own.union(*(lines_of(constant) for constant in code.co_consts if isinstance(constant, CodeType)))


@contextmanager
def noting_lines(noted: set[int]) -> Iterator[None]:
    """Note which lines of the README run, in this thread and in those that it starts."""

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != "README.md":
            return None
        noted.add(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    threading.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
        threading.settrace(before)


@pytest.fixture
def reader(
    sqlite_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Reader:
    """A reader, in a fresh folder with the commands on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SQLSESSIONS_URL", f"sqlite+aiosqlite:///{shutil.copy(sqlite_template, tmp_path / 'reader.db')}")
    monkeypatch.setenv("SECRET_KEY", KEY)
    monkeypatch.setenv("NEW_SECRET_KEY", KEY[::-1])
    monkeypatch.setenv("PGBOUNCER_URL", "postgresql+asyncpg://nowhere/nothing")
    for name, module in [("sqlsessions", "-m sqlsessions"), ("python3", "")]:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module} "$@"\n')
        path.chmod(0o755)
    return Reader(tmp_path, request)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block(block: Block, reader: Reader) -> None:
    """A block does what the text around it says; of a Python block, every line has been run."""
    check = CHECKS.get((block.heading, block.language, block.number))
    assert check is not None, f"README.md:{block.line}: nothing here checks {block}"
    if block.language != "python" or is_alone(block):
        check(reader, block)
        return
    with noting_lines(reader.lines_run):
        reader.execute(block)
        check(reader, block)
    assert lines_of(compiled(block)) - reader.lines_run == set()


def test_types(tmp_path: Path) -> None:
    """The program that the Python blocks tell passes the strictest mypy: whoever begins with it has no errors."""
    told = [block.text for block in BLOCKS if block.language == "python" and not is_alone(block)]
    (tmp_path / "main.py").write_text("\n".join(told))
    options = ["--strict", "--cache-dir", str(tmp_path / "cache")]
    result = run("mypy", *options, "main.py", cwd=tmp_path, MYPYPATH=str(ROOT / "src"))
    assert result.returncode == 0, result.stdout


def test_no_check_is_left_over() -> None:
    """A block that was removed or moved takes its check along."""
    assert CHECKS.keys() == {(block.heading, block.language, block.number) for block in BLOCKS}


@checks("Try it", "sh")
def _(reader: Reader, block: Block) -> None:
    """Both commands are dev.py's."""
    monkeypatch = reader.request.getfixturevalue("monkeypatch")
    become: list[list[str]] = []
    for name, replacement in [("_become", become.append), ("_python", lambda extra: "python"), ("_run", lambda _: 0)]:
        monkeypatch.setattr(dev, name, replacement)
    for line in block.text.splitlines():
        python, script, *arguments = shlex.split(line)
        assert (python, script) == ("python3", "dev.py")
        dev.main(arguments)
    assert [command[2] for command in become] == ["uvicorn", "pytest"]


@checks("Install", "sh")
def _(reader: Reader, block: Block) -> None:
    """What pip needs to know is in the checkout."""
    python, *arguments = shlex.split(block.text)
    assert python == "python3"
    assert arguments[-1] == "."
    options = ["--dry-run", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    result = run(*arguments[1:3], *options, str(ROOT), cwd=reader.folder, PYTHONWARNINGS="")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"sqlsessions-{version}" in result.stdout, result.stderr


@checks("Thirty lines")
def _(reader: Reader, block: Block) -> None:
    """The application logs in and out, keeps a cart, and knows nobody else."""
    with reader.client() as client:
        assert client.get("/profile").status_code == 401
        assert client.post("/cart").json() == ["tea"]
        cookie = client.post("/login").headers["set-cookie"]
        assert re.fullmatch(r"__Host-session=[\w.-]{110}; Path=/; HttpOnly; Secure; SameSite=Lax", cookie)
        assert client.post("/cart").json() == ["tea", "tea"]
        assert client.get("/profile").json() == {"user_id": "123"}
        client.post("/logout")
        assert client.get("/profile").status_code == 401


@checks("Thirty lines", "sh")
def _(reader: Reader, block: Block) -> None:
    """There are a key that the middleware takes, and the table."""
    said, key = reader.shell(f'{block.text}\nprintf %s "$SECRET_KEY"').splitlines()
    assert said == "web_sessions: at sqlsessions_0001"
    CookieSigner(key, cookie_name="session")
    assert (reader.folder / "app.db").exists()


def test_a_wrong_setting_ends_the_server(reader: Reader) -> None:
    """Served as the README says, an application with a setting that is refused does not start, and says why."""
    (block,) = (block for block in BLOCKS if str(block) == "Thirty lines, python 1")
    (reader.folder / "main.py").write_text(block.text)
    (line,) = re.findall(r"`uvicorn ([^`]*main:app[^`]*)`", section("Thirty lines"))
    settings = {"SECRET_KEY": "short", "SQLSESSIONS_URL": reader.url}
    result = run("uvicorn", *shlex.split(line), "--port", "0", cwd=reader.folder, **settings)
    assert result.returncode != 0
    assert "ConfigurationError: secret_key" in result.stderr


@checks("On the wire", "console")
def _(reader: Reader, block: Block) -> None:
    """The demo answers each request of the transcript as is printed there, header by header."""
    with serving(SQLSESSIONS_URL=reader.url, SECRET_KEY=KEY) as server:
        curl = Curl(server.url)
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            command, _, printed = part.partition("\n")
            assert masked(curl.run(shlex.split(command))) == masked(printed.strip())


class Curl:
    """What curl does with the few options that the README uses."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._jars: dict[str, httpx.Cookies] = {}

    def run(self, command: list[str]) -> str:
        """Run curl, or cp of a cookie jar, and return what it prints."""
        program, *arguments = command
        if program == "cp":
            source, target = arguments
            self._jars[target] = httpx.Cookies(self._jars[source])
            return ""
        assert program == "curl"
        parser = argparse.ArgumentParser()
        for flag in ("-s", "-i"):
            parser.add_argument(flag, action="store_true")
        for option in ("-b", "-c", "-d", "-X"):
            parser.add_argument(option)
        parser.add_argument("url")
        options = parser.parse_args(arguments)
        url = httpx.URL(options.url)
        assert (url.host, url.port) == ("127.0.0.1", 8000)
        with httpx.Client(base_url=self._url, cookies=self._jars.get(options.b), headers={"accept": "*/*"}) as client:
            form = {"content-type": "application/x-www-form-urlencoded"} if options.d else {}
            method = options.X or ("POST" if options.d else "GET")
            response = client.request(method, url.path, content=options.d, headers=form)
            if options.c:
                self._jars[options.c] = client.cookies
        if not options.i:
            return response.text
        status = f"{response.http_version} {response.status_code} {response.reason_phrase}"
        headers = [f"{name.decode()}: {value.decode()}" for name, value in response.headers.raw]
        return "\n".join([status, *headers, "", response.text])


def masked(response: str) -> str:
    """Return a printed response without what differs each time: the date, and the value of a cookie."""
    return re.sub(r"(?<=^date: ).*$|(?<=session=)[\w.-]{110}(?=;)", "…", response, flags=re.MULTILINE)


@checks("The session")
def _(reader: Reader, block: Block) -> None:
    """A remembered session outlives the browser; another has the idle timeout given; atomic() counts."""
    with reader.client() as client:
        assert "Max-Age=1209600" in client.post("/sign-in?remember=true").headers["set-cookie"]
        client.cookies.clear()
        assert "Max-Age" not in client.post("/sign-in").headers["set-cookie"]
        one, other = stored(reader, "123")
        assert {one.idle_timeout, other.idle_timeout} == {None, 1800}
        assert [client.post("/count").json() for _ in range(3)] == [1, 2, 3]


def stored(reader: Reader, user: str) -> list[Record]:
    """Return the records of a user's sessions."""

    async def ask() -> list[Record]:
        return list(await SQLAlchemyBackend(reader.url).list_for_user(user))

    return asyncio.run(ask())


@checks("Confirm it is you")
def _(reader: Reader, block: Block) -> None:
    """Only who has logged in lately may delete the account."""
    with reader.client() as client:
        assert client.delete("/account").json() == {"detail": "Not logged in"}
        client.post("/login")
        assert client.delete("/account").json() == "Goodbye, 123"
        ago = utc_now() - timedelta(minutes=20)
        reader.sql("UPDATE web_sessions SET authenticated_at = ?", f"{ago:%Y-%m-%d %H:%M:%S}")
        assert client.delete("/account").json() == {"detail": "Please enter your password again"}


@checks("WebSockets, streams and background tasks")
def _(reader: Reader, block: Block) -> None:
    """Notes are kept while the socket is open; who logs out elsewhere is told at the next note."""
    with reader.client() as client, client.websocket_connect("/notes") as socket:
        for note, notes in [("one", ["one"]), ("two", ["one", "two"])]:
            socket.send_text(note)
            assert socket.receive_json() == notes
        asyncio.run(SQLAlchemyBackend(reader.url).revoke_everything())
        socket.send_text("three")
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_json()
    assert closed.value.code == 4401


@checks("Loading")
def _(reader: Reader, block: Block) -> None:
    """Only the paths that are named load the session."""
    statements: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    with reader.client() as client:
        client.post("/login")
        cookie = {"cookie": f"__Host-session={client.cookies['__Host-session']}"}
    sa.event.listen(sa.engine.Engine, "before_cursor_execute", note)
    with reader.client("lazy") as client:
        assert client.get("/public", headers=cookie).json() == "no statement, cookie or not"
        assert statements == []
        assert client.get("/account/name", headers=cookie).json() == "nobody"
        assert len(statements) == 1
    sa.event.remove(sa.engine.Engine, "before_cursor_execute", note)


@checks("Migrations", "sh")
def _(reader: Reader, block: Block) -> None:
    """The three commands do what their comments say."""
    reader.sql("DROP TABLE web_sessions")
    assert len(re.findall("^sqlsessions migrate", block.text, re.MULTILINE)) == 3
    said = reader.shell(block.text)
    assert said.startswith("web_sessions: at sqlsessions_0001\nweb_sessions: at sqlsessions_0001\n")
    assert "CREATE TABLE web_sessions" in said


@checks("Migrations")
def _(reader: Reader, block: Block) -> None:
    """deploy() makes the table where there is none."""
    reader.sql("DROP TABLE web_sessions")
    asyncio.run(reader.names["deploy"]())
    assert asyncio.run(migrate.current(reader.url)) == "sqlsessions_0001"


@checks("Migrations", "python", 2)
def _(reader: Reader, block: Block) -> None:
    """With those lines in its env.py a host's autogenerate finds nothing to do; without the hook, tables to drop."""
    reader.sql("DROP TABLE web_sessions")
    asyncio.run(migrate.upgrade(reader.url))

    def differences(connection: sa.Connection, source: str) -> list[Any]:
        configuration = Config()
        configuration.set_main_option("script_location", str(ROOT / "migrations"))
        context = EnvironmentContext(configuration, ScriptDirectory.from_config(configuration))
        metadata = sa.MetaData()
        exec(  # noqa: S102 - as Alembic would
            source, {"context": context, "connection": connection, "target_metadata": metadata}
        )
        found: list[Any] = compare_metadata(context.get_context(), metadata)
        return found

    async def compare(source: str) -> list[Any]:
        engine = create_async_engine(reader.url)
        async with engine.connect() as connection:
            found = await connection.run_sync(differences, source)
        await engine.dispose()
        return found

    assert asyncio.run(compare(block.text)) == []
    (without, count) = re.subn(r"^ +include_object=.*\n", "", block.text, flags=re.MULTILINE)
    assert count == 1
    dropped = [difference[1].name for difference in asyncio.run(compare(without)) if difference[0] == "remove_table"]
    assert sorted(dropped) == ["alembic_version_web_sessions", "web_sessions"]


@checks("Migrations", "python", 3)
def _(reader: Reader, block: Block) -> None:
    """A revision of the host's own makes our table, and drops it."""
    reader.sql("DROP TABLE web_sessions")
    module: dict[str, Any] = {}
    exec(block.text, module)  # noqa: S102 - as Alembic would
    tables: list[list[str]] = []

    def go(connection: sa.Connection) -> None:
        with Operations.context(MigrationContext.configure(connection)):
            for step in ("upgrade", "downgrade"):
                module[step]()
                tables.append(sa.inspect(connection).get_table_names())

    async def connect() -> None:
        engine = create_async_engine(reader.url)
        async with engine.begin() as connection:
            await connection.run_sync(go)
        await engine.dispose()

    asyncio.run(connect())
    assert tables == [["web_sessions"], []]


@checks("Purge", "sh")
def _(reader: Reader, block: Block) -> None:
    """The command deletes what has expired."""
    reader.expired_session()
    assert reader.shell(block.text) == "web_sessions: 1 expired session deleted\n"


@checks("Purge")
def _(reader: Reader, block: Block) -> None:
    """every_night() deletes what has expired, and says how much that was."""
    reader.expired_session()
    assert asyncio.run(reader.names["every_night"]()) == 1


@checks("Purge", "crontab")
def _(reader: Reader, block: Block) -> None:
    """Cron would run the command every five minutes, with the database in its environment."""
    setting, entry = block.text.splitlines()
    name, _, url = setting.partition("=")
    assert name == "SQLSESSIONS_URL"
    assert sa.make_url(url).drivername == "postgresql+asyncpg"
    *schedule, command = entry.split(maxsplit=5)
    assert is_every_five_minutes(schedule)
    purges(reader, command)


@checks("Purge", "ini")
def _(reader: Reader, block: Block) -> None:
    """The service runs the command once."""
    unit = configparser.ConfigParser()
    unit.optionxform = str  # type: ignore[assignment,method-assign] # as the documentation says to
    unit.read_string(block.text)
    assert {section: set(unit[section]) for section in unit.sections()} == {
        "Unit": {"Description"},
        "Service": {"Type", "User", "EnvironmentFile", "ExecStart"},
    }
    assert unit["Service"]["Type"] == "oneshot"
    purges(reader, unit["Service"]["ExecStart"])


@checks("Purge", "ini", 2)
def _(reader: Reader, block: Block) -> None:
    """The timer of the same name fires every five minutes."""
    unit = configparser.ConfigParser()
    unit.read_string(block.text)
    assert dict(unit["Timer"]) == {"oncalendar": "*:0/5", "randomizeddelaysec": "60"}
    assert dict(unit["Install"]) == {"wantedby": "timers.target"}


@checks("Purge", "yaml")
def _(reader: Reader, block: Block) -> None:
    """Kubernetes would run the command every five minutes, with the database in its environment."""
    job = yaml.safe_load(block.text)
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "CronJob")
    assert is_every_five_minutes(job["spec"]["schedule"].split())
    (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert [variable["name"] for variable in container["env"]] == ["SQLSESSIONS_URL"]
    purges(reader, shlex.join(container["command"]))


def is_every_five_minutes(schedule: list[str]) -> bool:
    """Tell whether the five fields of cron's say so."""
    return schedule == ["*/5", "*", "*", "*", "*"]


def purges(reader: Reader, command: str) -> None:
    """Assert that the command deletes expired sessions, from wherever it is installed."""
    reader.expired_session()
    reader.shell(re.sub(r"^/srv/app/bin/", "", command))
    assert asyncio.run(SQLAlchemyBackend(reader.url).delete_all()) == 0


@checks("Operating", "python", 1)
def _(reader: Reader, block: Block) -> None:
    """A cookie signed with the old key works, and comes back signed with the new one."""
    with reader.client() as client:
        client.post("/login")
        cookie = client.cookies["__Host-session"]
    with reader.client("rotated") as client:
        response = client.get("/profile", headers={"cookie": f"__Host-session={cookie}"})
        assert response.json() == {"user_id": "123"}
        assert client.cookies["__Host-session"] != cookie
        assert "set-cookie" not in client.get("/profile").headers


@checks("Operating", "python", 2)
def _(reader: Reader, block: Block) -> None:
    """A user sees both devices, ends one, and with a new password all others."""
    with reader.client() as laptop, TestClient(reader.names["app"], base_url="https://testserver") as phone:
        for client in (laptop, phone):
            client.post("/login")
        listed = laptop.get("/devices").json()
        assert sorted(device["this"] for device in listed) == [False, True]
        (other,) = [device["id"] for device in listed if not device["this"]]
        assert laptop.delete(f"/devices/{make_record().id}").json() is False
        assert laptop.delete(f"/devices/{other}").json() is True
        assert phone.get("/profile").status_code == 401
        phone.post("/login")
        assert laptop.post("/change-password").json() == 1
        assert phone.get("/profile").status_code == 401
        assert laptop.get("/profile").status_code == 200


@checks("Operating", "python", 3)
def _(reader: Reader, block: Block) -> None:
    """The log says who logged in."""
    caplog = reader.request.getfixturevalue("caplog")
    caplog.set_level(logging.INFO, "audit")
    with reader.client("audited") as client:
        client.post("/login")
    assert [message.split()[0] for message in caplog.messages] == ["created", "bound"]
    assert caplog.messages[1].endswith("user=123")


@checks("Operating", "sql")
def _(reader: Reader, block: Block) -> None:
    """With these rights everything works but DDL."""
    postgres = reader.request.getfixturevalue("postgres")
    url = sa.make_url(reader.request.getfixturevalue("postgres_sessions_url"))
    postgres.execute("CREATE ROLE app LOGIN")
    try:
        postgres.execute(block.text, url.database)
        asyncio.run(everything(SQLAlchemyBackend(url.set(username="app"))))
        with pytest.raises(BackendError):
            asyncio.run(migrate.upgrade(url.set(username="app")))
    finally:
        postgres.execute("DROP OWNED BY app", url.database)
        postgres.execute("DROP ROLE app")


async def everything(backend: SQLAlchemyBackend) -> None:
    """Do with a backend all that the application does."""
    now = utc_now()
    records = [make_record(user_id="1", created_at=now, last_seen_at=now) for _ in range(20)]

    async def live(record: Record) -> None:
        await backend.insert(record)
        assert await backend.load(record.id, now) == record
        later = now + timedelta(minutes=10)
        assert await backend.touch(record.id, record.secret_hash, now=later, expires_at=record.expires_at)
        assert await backend.revoke(record.id)

    await asyncio.gather(*map(live, records))
    gone = make_record(user_id="1", expires_at=now - timedelta(days=1))
    kept = records[0]._replace(data='{"kept":true}')
    await backend.insert(gone)
    await backend.insert(kept)
    assert await backend.list_for_user("1") == [kept]
    assert await backend.purge(now, 100) == 1
    assert await backend.revoke_all("1") == 1


@checks("Operating", "python", 4)
def _(reader: Reader, block: Block) -> None:
    """Through PgBouncer, whose transactions meet different connections, everything works."""
    bouncer = reader.request.getfixturevalue("pgbouncer")
    name = sa.make_url(reader.request.getfixturevalue("postgres_sessions_url")).database
    reader.request.getfixturevalue("monkeypatch").setenv("PGBOUNCER_URL", bouncer.url(name))
    reader.execute(block)
    asyncio.run(everything(reader.names["pooled"]))


@checks("Operating", "sh")
def _(reader: Reader, block: Block) -> None:
    """The file is in WAL mode afterwards."""
    assert reader.shell(block.text) == "wal\n"


@checks("Operating", "python", 5)
def _(reader: Reader, block: Block) -> None:
    """A page of that origin may read even our 503."""
    with reader.client() as client:
        client.post("/login")
        cookie = client.cookies["__Host-session"]
    reader.sql("DROP TABLE web_sessions")
    headers = {"cookie": f"__Host-session={cookie}", "origin": "https://www.example.com"}
    with reader.client("api") as client:
        response = client.get("/profile", headers=headers)
    assert response.status_code == 503
    assert response.headers["access-control-allow-origin"] == "https://www.example.com"


@checks("Testing your application")
def _(reader: Reader, block: Block) -> None:
    """The test passes."""
    reader.names["test_login"]()


@checks("Another backend")
def _(reader: Reader, block: Block) -> None:
    """The suite is found by pytest, and the backend of the example passes it."""
    (reader.folder / "test_my_backend.py").write_text(block.text)
    result = run("pytest", "-q", "-p", "no:cacheprovider", "test_my_backend.py", cwd=reader.folder)
    assert re.search(r"^[0-9]{2,} passed in", result.stdout, re.MULTILINE), result.stdout


def section(heading: str) -> str:
    """Return the text below a heading, up to the next."""
    return re.split(r"^#+ ", README.partition(f"\n## {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def table(heading: str, number: int = 1) -> list[list[str]]:
    """Return the rows of a table below a heading, without its head."""
    found = re.findall(r"(?:^\|.*\|\n)+", section(heading), re.MULTILINE)[number - 1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines()[2:]]


def spelled(default: object) -> str:
    """Return a default as the README writes it."""
    if default is inspect.Parameter.empty:
        return ""
    if isinstance(default, timedelta):
        for unit, span in {"days": timedelta(days=1), "minutes": timedelta(minutes=1)}.items():
            if default >= span:
                return f"{default // span} {unit}"
        return f"{default.seconds} seconds"
    if isinstance(default, int) and not isinstance(default, bool):
        return str(default)
    if isinstance(default, str):
        return f'`"{default}"`'
    return f"`{getattr(default, '__name__', repr(default))}`"


@pytest.mark.parametrize(("number", "of"), [(1, SessionMiddleware), (2, SQLAlchemyBackend)])
def test_settings(number: int, of: type) -> None:
    """The table of settings is the signature, in its order, with its defaults."""
    keyword_only = [
        (f"`{name}`", spelled(parameter.default))
        for name, parameter in inspect.signature(of).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    assert [(name, default) for name, default, _ in table("Settings", number)] == keyword_only


def test_user_key() -> None:
    """The function that says who is logged in says nobody for whoever is not, by whichever means."""
    (spelled_out,) = re.findall(r"`user_key=(lambda .*?)`", README)
    user_key = eval(spelled_out)  # noqa: S307 - this is what a reader would write
    sessions: list[dict[str, Any]] = [{"user": {"sub": "ada"}}, {}, {"user": None}, {"user": {}}]
    assert list(map(user_key, sessions)) == ["ada", None, None, None]


def test_events() -> None:
    """Every kind of event is explained, once."""
    kinds = [kind for row in table("Operating") for kind in re.findall(r"`(\w+)`", row[0])]
    assert sorted(kinds) == sorted(get_args(EventKind))


def test_guarantees() -> None:
    """Every guarantee links to tests that cite each of the requirements it names."""
    for guarantee, source, tests in table("Guarantees"):
        links = re.findall(r"\]\((tests/(?:fuzz/|faults/)?test_\w+\.py|src/sqlsessions/testing\.py)\)", tests)
        cited = " ".join((ROOT / link).read_text() for link in links)
        missing = [number for number in re.findall(r"\bR[0-9]+\b", source) if not re.search(rf"\b{number}\b", cited)]
        assert (guarantee, missing) == (guarantee, [])
        assert links


def test_links() -> None:
    """Links within the README and to files beside it lead somewhere."""
    headings = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall("^#+ (.+)$", README, re.MULTILINE)
    }
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert target.removeprefix("#") in headings if target.startswith("#") else (ROOT / target).exists(), target


def test_modules() -> None:
    """The functions named of other modules exist, and are all there are."""
    (named,) = re.findall(r"`sqlsessions\.migrate` \((.*?)\)", section("Names"), re.DOTALL)
    module = importlib.import_module("sqlsessions.migrate")
    public = {
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    assert set(re.findall(r"`(\w+)`", named)) == public
