"""Fixtures that every test may ask for: a database to itself, on each engine that the library supports.

Empty: `sqlite_url`, `postgres_url`, and `database_url`, which runs its test on both. With our table in it:
`sqlite_sessions_url`, `postgres_sessions_url`, and `sessions_url` for both; `backend` and `site` are on each
of these and in memory. An engine that is not at hand
skips its tests on a laptop and fails them where CI is set: there, a green run means that everything ran.
"""

import asyncio
import gc
import itertools
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import settings
from sqlalchemy import event
from sqlalchemy.engine import Engine

from sqlsessions.backends.memory import InMemoryBackend
from sqlsessions.backends.sqlalchemy import SQLAlchemyBackend
from tests.asgi import Site, TellingBackend
from tests.servers import PgBouncer, PostgresServer, Server, Unavailable

# Before anything imports it: its bare asserts are the conformance suite's, and have to explain themselves.
pytest.register_assert_rewrite("sqlsessions.testing")

from tests.catalogue import create_from_metadata  # noqa: E402 - imports it

# The tests set the library's variables themselves; those of the developer's shell are not theirs.
for variable in [name for name in os.environ if name.startswith("SQLSESSIONS_")]:
    del os.environ[variable]

# The same examples on every run: what fails here fails there. A busy machine is no failure.
settings.register_profile("reproducible", derandomize=True, database=None, deadline=None)
settings.load_profile("reproducible")

S = TypeVar("S", bound=Server)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what is there before the first test: thousands of them, and all modules.

    Going over these takes 0.15 s on a machine that has nothing else to do, half of some deadlines below.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Coroutine tests run on asyncio, the only loop that the drivers know."""
    return "asyncio"


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One PostgreSQL server for the whole run (under xdist: for each worker)."""
    with _at_hand(PostgresServer) as server:
        yield server


@pytest.fixture(scope="session")
def pgbouncer(postgres: PostgresServer) -> Iterator[PgBouncer]:
    """A PgBouncer in front of that server, for every database on it: `pgbouncer.url(name)`."""
    with _at_hand(lambda: PgBouncer(postgres)) as server:
        yield server


@pytest.fixture
def postgres_url(postgres: PostgresServer, database_names: Iterator[str]) -> Iterator[str]:
    """The URL of an empty PostgreSQL database."""
    with _database(postgres, next(database_names), "template1") as url:
        yield url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of an SQLite database that does not exist yet, in the test's own directory."""
    return f"sqlite+aiosqlite:///{tmp_path / 'empty.db'}"


@pytest.fixture(params=["sqlite_url", "postgres_url"], ids=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database, on each engine in turn."""
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def postgres_sessions_url(
    postgres: PostgresServer, postgres_template: str, database_names: Iterator[str]
) -> Iterator[str]:
    """The URL of a PostgreSQL database with an empty session table."""
    with _database(postgres, next(database_names), postgres_template) as url:
        yield url


@pytest.fixture
def sqlite_sessions_url(sqlite_template: Path, tmp_path: Path) -> str:
    """The URL of an SQLite database with an empty session table, in the test's own directory."""
    return f"sqlite+aiosqlite:///{shutil.copy(sqlite_template, tmp_path / 'sessions.db')}"


@pytest.fixture(params=["sqlite_sessions_url", "postgres_sessions_url"], ids=["sqlite", "postgresql"])
def sessions_url(request: pytest.FixtureRequest) -> str:
    """The URL of a database with an empty session table, on each engine in turn."""
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """The first word of each statement that SQLAlchemy sends, or that `TellingBackend` would."""
    noted: list[str] = []

    def note(connection: object, cursor: object, statement: str, *_: object) -> None:
        noted.append(statement.split(maxsplit=1)[0])

    event.listen(Engine, "before_cursor_execute", note)
    yield noted
    event.remove(Engine, "before_cursor_execute", note)


@pytest.fixture(scope="session")
def shared_postgres_url(postgres: PostgresServer, postgres_template: str) -> str:
    """The URL of a PostgreSQL database with our table that tests use in turn: emptying it is faster than another."""
    return postgres.create_database("shared", postgres_template)


@pytest.fixture(params=[None, "sqlite_sessions_url", "shared_postgres_url"], ids=["memory", "sqlite", "postgresql"])
def backend_url(request: pytest.FixtureRequest) -> str | None:
    """The URL of a database with an empty session table on each engine in turn; None for the backend in memory."""
    return request.param and str(request.getfixturevalue(request.param))


@pytest.fixture
async def backend(
    backend_url: str | None, statements: list[str], anyio_backend: str
) -> AsyncIterator[InMemoryBackend | SQLAlchemyBackend]:
    """Each backend in turn, empty."""
    backend = SQLAlchemyBackend(backend_url) if backend_url else TellingBackend(statements)
    await backend.delete_all()
    statements.clear()
    yield backend
    await backend.aclose()


@pytest.fixture
def site(backend: InMemoryBackend | SQLAlchemyBackend, statements: list[str]) -> Site:
    """A site with the default settings on each backend in turn; `site.reconfigured(...)` is one with others."""
    return Site(backend, statements)


@pytest.fixture(scope="session")
def postgres_template(postgres: PostgresServer) -> str:
    """The name of a PostgreSQL database with our table, for copying."""
    asyncio.run(create_from_metadata(postgres.create_database("sessions")))
    return "sessions"


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with our table, for copying."""
    path = tmp_path_factory.mktemp("sqlite") / "sessions.db"
    asyncio.run(create_from_metadata(f"sqlite+aiosqlite:///{path}"))
    return path


@pytest.fixture(scope="session")
def database_names() -> Iterator[str]:
    """Names that no database on the run's server has had."""
    return (f"test_{number}" for number in itertools.count(1))


@contextmanager
def _database(server: PostgresServer, name: str, template: str) -> Iterator[str]:
    yield server.create_database(name, template)
    server.drop_database(name)


def _at_hand(make: Callable[[], S]) -> S:
    """Return what `make` makes; without it, skip the test, or fail it where CI is set."""
    try:
        return make()
    except Unavailable as error:
        if os.environ.get("CI"):
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
