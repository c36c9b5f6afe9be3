"""sqlsessions as its README sets it up."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.types import ASGIApp

from benchmarks.endpoints import KEY, application
from sqlsessions import Backend, InMemoryBackend, SessionMiddleware, SQLAlchemyBackend


def in_memory(url: str) -> ASGIApp:  # noqa: ARG001 - all rows are made alike
    """Return the application with sessions in memory."""
    return application(_middleware(InMemoryBackend()))


def in_database(url: str) -> ASGIApp:
    """Return the application with sessions in the database at *url*, which has been migrated."""
    return _in_database(SQLAlchemyBackend(url))


def unbatched(url: str) -> ASGIApp:
    """Return the same application with a statement of its own for each session."""
    return _in_database(SQLAlchemyBackend(url, batch=False))


def _in_database(backend: SQLAlchemyBackend) -> ASGIApp:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:  # noqa: ARG001
        yield
        await backend.aclose()

    return application(_middleware(backend), lifespan=lifespan)


def _middleware(backend: Backend) -> Middleware:
    return Middleware(SessionMiddleware, secret_key=KEY, backend=backend, cookie_https_only=False)
