"""The applications that are compared: one row of the tables each."""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from starlette.types import ASGIApp

from benchmarks.endpoints import Endpoint

Store = Literal["", "PostgreSQL", "SQLite", "Redis"]


@dataclass(frozen=True, slots=True)
class Row:
    """One application, in which sessions are kept in one way."""

    #: What `--only` calls it.
    key: str
    #: What the tables call it.
    title: str
    #: ``module:function`` of what makes it from the URL of its store; imported only when it is used.
    factory: str
    #: What has to run for it.
    store: Store = ""
    #: The key of the same framework without sessions.
    baseline: str = "fastapi"

    @property
    def is_baseline(self) -> bool:
        """Whether it has no sessions."""
        return self.key == self.baseline

    @property
    def is_ours(self) -> bool:
        """Whether it is what the benchmarks are about."""
        return self.factory.startswith("ours:")

    def path(self, endpoint: Endpoint) -> Endpoint:
        """Return what is asked for in a cell of *endpoint*: without sessions, there is only one."""
        return "/none" if self.is_baseline else endpoint

    def application(self, url: str) -> ASGIApp:
        """Return the application; what it needs, it opens in its lifespan."""
        module, _, name = self.factory.partition(":")
        make: Callable[[str], ASGIApp] = getattr(importlib.import_module(f"benchmarks.{module}"), name)
        return make(url)


_ALL = (
    Row("fastapi", "FastAPI, no session", "peers.cookie:without"),
    Row("cookie", "Starlette cookie middleware", "peers.cookie:signed"),
    Row("starsessions-memory", "starsessions, memory", "peers.starsessions:in_memory"),
    Row("starsessions-redis", "starsessions, Redis", "peers.starsessions:in_redis", "Redis"),
    Row("starsessions-orm", "starsessions, hand-written SQLAlchemy store", "peers.starsessions:in_orm", "PostgreSQL"),
    Row("litestar", "Litestar, no session", "peers.litestar:without", baseline="litestar"),
    Row("advanced-alchemy", "Litestar, advanced-alchemy", "peers.litestar:in_orm", "PostgreSQL", "litestar"),
    Row("django", "Django, no session", "peers.django:without", baseline="django"),
    Row("django-db", "Django, db sessions", "peers.django:in_database", "PostgreSQL", "django"),
    Row("asyncpg", "raw asyncpg, connections held", "peers.raw:asyncpg_held", "PostgreSQL"),
    Row("asyncpg-batched", "raw asyncpg, batched", "peers.raw:asyncpg_batched", "PostgreSQL"),
    Row("aiosqlite", "raw aiosqlite", "peers.raw:aiosqlite_plain", "SQLite"),
    Row("memory", "sqlsessions, memory", "ours:in_memory"),
    Row("postgresql", "sqlsessions, PostgreSQL", "ours:in_database", "PostgreSQL"),
    Row("postgresql-unbatched", "sqlsessions, PostgreSQL, batch=False", "ours:unbatched", "PostgreSQL"),
    Row("sqlite", "sqlsessions, SQLite", "ours:in_database", "SQLite"),
    Row("sqlite-unbatched", "sqlsessions, SQLite, batch=False", "ours:unbatched", "SQLite"),
)

#: Every row, by its key, in the order of the tables.
ROWS = {row.key: row for row in _ALL}


def served() -> ASGIApp:
    """Return the application that the environment names, for uvicorn."""
    return ROWS[os.environ["BENCHMARK_ROW"]].application(os.environ["BENCHMARK_URL"])
