"""The servers and files that the rows keep their sessions in, and what those count."""

import itertools
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self, assert_never
from unittest.mock import patch

import asyncpg

from benchmarks.rows import Row
from tests.servers import PostgresServer, Server, Unavailable

#: The durability that PostgreSQL has out of the box, and room for every row's connections.
_POSTGRESQL = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_buffers": "128MB",
    "max_connections": "300",
    "shared_preload_libraries": "pg_stat_statements",
    # Counting costs time. `Stage.counting` switches it on for the databases that it is about.
    "pg_stat_statements.track": "none",
}


class RedisServer(Server):
    """A Redis that keeps everything in memory."""

    signals: ClassVar = {"fast": signal.SIGTERM, "immediate": signal.SIGTERM, "kill": signal.SIGKILL}

    def __init__(self) -> None:
        """Raise Unavailable if there is none here."""
        super().__init__()
        binary = shutil.which("redis-server") or shutil.which("valkey-server")
        if binary is None:
            raise Unavailable("no redis-server on PATH")
        self._binary = binary

    def prepare(self) -> None:
        """Do nothing: everything is said on the command line."""

    def command(self) -> list[str]:
        """Return the command line."""
        return [self._binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]

    def accepts(self, pid: int, said: str) -> bool:  # noqa: ARG002
        """Return whether it has said so."""
        return "Ready to accept connections" in said


class Stage:
    """Starts each server when the first row asks for it, and ends them all with its `with` block."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._urls: dict[str, str] = {}
        self._traced = itertools.count()

    def __enter__(self) -> Self:
        self._folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="sqlsessions-")))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    @cached_property
    def postgres(self) -> PostgresServer:
        """A PostgreSQL with default durability."""
        server = self._open.enter_context(PostgresServer(_POSTGRESQL))
        server.execute("CREATE EXTENSION pg_stat_statements")
        return server

    @cached_property
    def redis(self) -> RedisServer:
        """A Redis."""
        return self._open.enter_context(RedisServer())

    def url(self, row: Row) -> str:
        """Return the URL of what is *row*'s alone; raise Unavailable without the server."""
        if row.key not in self._urls:
            self._urls[row.key] = url = self._new(row)
            if row.is_ours and url:
                # Before the application starts, as everywhere: what serves requests has no use for Alembic.
                subprocess.run([sys.executable, "-m", "sqlsessions", "migrate", "--url", url], check=True)
        return self._urls[row.key]

    def _new(self, row: Row) -> str:
        match row.store:
            case "":
                return ""
            case "PostgreSQL":
                return self.postgres.create_database(row.key)
            case "Redis":
                return f"redis://127.0.0.1:{self.redis.port}/0"
            case "SQLite":
                path = self._folder / f"{row.key}.db"
                # As the README says to; the file remembers it.
                connection = sqlite3.connect(path)
                connection.execute("PRAGMA journal_mode = WAL")
                connection.close()
                return f"sqlite+aiosqlite:///{path}"
        assert_never(row.store)

    @property
    def versions(self) -> str:
        """What has run, and which version of it."""
        servers = [self.__dict__[name] for name in ("postgres", "redis") if name in self.__dict__]
        commands = [[server.command()[0], "--version"] for server in servers]
        told = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for command in commands]
        numbers = [found[0] if (found := re.search(r"[0-9]+(\.[0-9]+)+", line)) else "?" for line in told]
        names = [Path(command[0]).name for command in commands]
        return ", ".join([f"SQLite {sqlite3.sqlite_version}", *map(" ".join, zip(names, numbers, strict=True))])

    @contextmanager
    def counting(self, row: Row) -> Iterator[None]:
        """Count the statements of the connections that *row* opens inside the block."""
        self.url(row)
        if row.store == "PostgreSQL":
            self.postgres.execute(f"""ALTER DATABASE "{row.key}" SET "pg_stat_statements.track" = 'top'""")
            yield
            self.postgres.execute(f'ALTER DATABASE "{row.key}" RESET "pg_stat_statements.track"')
        elif row.store == "SQLite":
            with patch("sqlite3.connect", self._tracing(sqlite3.connect)):
                yield
        else:
            yield

    def _tracing(self, connect: Callable[..., sqlite3.Connection]) -> Callable[..., sqlite3.Connection]:
        def connect_and_trace(*arguments: Any, **options: Any) -> sqlite3.Connection:
            connection = connect(*arguments, **options)
            connection.set_trace_callback(self._note)
            return connection

        return connect_and_trace

    def _note(self, statement: str) -> None:  # noqa: ARG002
        next(self._traced)

    async def counted(self, row: Row) -> int:
        """Return how many statements *row* has sent so far: the server's own count, BEGIN and COMMIT included.

        From pg_stat_statements, from Redis' statistics and from SQLite's trace.
        """
        match row.store:
            case "":
                return 0
            case "PostgreSQL":
                return await self._counted_by_postgres(row.key)
            case "Redis":
                return self._counted_by_redis()
            case "SQLite":
                # Taking a number makes one.
                self._traced = itertools.count(count := next(self._traced))
                return count
        assert_never(row.store)

    async def _counted_by_postgres(self, database: str) -> int:
        connection = await asyncpg.connect(host="127.0.0.1", port=self.postgres.port, user="postgres", ssl=False)
        query = "SELECT sum(calls)::int FROM pg_stat_statements JOIN pg_database ON oid = dbid WHERE datname = $1"
        try:
            return await connection.fetchval(query, database) or 0
        finally:
            await connection.close()

    def _counted_by_redis(self) -> int:
        from redis import Redis  # noqa: PLC0415 - a peer's, which only its row needs

        with Redis(port=self.redis.port) as client:
            statistics = client.info("commandstats")
        return sum(statistics.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("get", "set", "setex", "exists"))
