"""Every backend here keeps the contract."""

import inspect
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import get_origin, get_type_hints

import pytest

from sqlsessions.backends.base import Backend, UserSessions
from sqlsessions.backends.memory import InMemoryBackend
from sqlsessions.backends.sqlalchemy import SQLAlchemyBackend
from sqlsessions.testing import BackendConformance
from tests.commands import run
from tests.servers import PostgresServer


class TestInMemoryBackend(BackendConformance):
    """The executable specification meets itself."""

    @pytest.fixture
    def backend(self) -> Backend:
        """An empty backend."""
        return InMemoryBackend()


class TestSQLAlchemyBackendOnSQLite(BackendConformance):
    """So does a table in SQLite."""

    @pytest.fixture
    async def backend(self, sqlite_sessions_url: str) -> AsyncIterator[Backend]:
        """A backend on an empty table."""
        backend = SQLAlchemyBackend(sqlite_sessions_url)
        yield backend
        await backend.aclose()


class TestSQLAlchemyBackendOnPostgreSQL(BackendConformance):
    """So does a table in PostgreSQL."""

    @pytest.fixture
    async def backend(self, shared_url: str) -> AsyncIterator[Backend]:
        """A backend on an emptied table."""
        backend = SQLAlchemyBackend(shared_url)
        yield backend
        await backend.delete_all()
        await backend.aclose()


@pytest.fixture(scope="module")
def shared_url(postgres: PostgresServer, postgres_template: str, database_names: Iterator[str]) -> Iterator[str]:
    """A database for all of these tests: making one takes longer than a test."""
    name = next(database_names)
    yield postgres.create_database(name, postgres_template)
    postgres.drop_database(name)


@pytest.mark.parametrize("protocol", [Backend, UserSessions])
def test_methods_may_return_a_coroutine_of_another(protocol: type) -> None:
    """The contract asks for a Coroutine: pyright, unlike mypy, takes ``async def`` in a protocol for more than that,
    and refuses `SQLAlchemyBackend`, some of whose methods hand on a coroutine.
    """
    methods = {name: method for name, method in vars(protocol).items() if inspect.isfunction(method) and name[0] != "_"}
    assert methods
    for name, method in methods.items():
        assert not inspect.iscoroutinefunction(method), name
        assert get_origin(get_type_hints(method)["return"]) is Coroutine, name


def test_conformance_alone(tmp_path: Path) -> None:
    """A third party's subclass runs with nothing but anyio's plugin, and skips what its backend does not offer."""
    (tmp_path / "test_mine.py").write_text(MINE)
    done = run("pytest", "-q", "-rs", "-p", "no:cacheprovider", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
    assert "OnlyRecords does not find records by their user" in done.stdout


MINE = """
import pytest
from sqlsessions.backends.memory import InMemoryBackend
from sqlsessions.testing import BackendConformance

class OnlyRecords:
    def __init__(self):
        whole = InMemoryBackend()
        for name in ("load", "insert", "replace", "touch", "delete", "purge", "aclose"):
            setattr(self, name, getattr(whole, name))

class TestMine(BackendConformance):
    @pytest.fixture
    async def backend(self):
        yield OnlyRecords()
"""
