"""starsessions with the stores it brings, and with one in a database, written as its documentation says to."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.middleware import Middleware
from starlette.types import ASGIApp
from starsessions import InMemoryStore, SessionAutoloadMiddleware, SessionMiddleware, SessionStore
from starsessions.stores.redis import RedisStore

from benchmarks.endpoints import Lifespan, application

LIFETIME = timedelta(days=14)


def in_memory(url: str) -> ASGIApp:  # noqa: ARG001 - all rows are made alike
    """Return the application with sessions in memory."""
    return _application(InMemoryStore())


def in_redis(url: str) -> ASGIApp:
    """Return the application with sessions in Redis."""
    return _application(RedisStore(url))


def in_orm(url: str) -> ASGIApp:
    """Return the application with sessions in a mapped class."""
    # A pool that overflows would open and close connections all the time: three times slower.
    store = ORMStore(url, pool_size=10, max_overflow=0)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:  # noqa: ARG001
        async with store.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        yield
        await store.engine.dispose()

    return _application(store, lifespan)


class Base(DeclarativeBase):
    """The mapped classes."""


class StoredSession(Base):
    """One session."""

    __tablename__ = "sessions"

    id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    data: Mapped[bytes]
    expires_at: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True), index=True)


class ORMStore(SessionStore):
    """Sessions in a mapped class, read and merged in a transaction each."""

    def __init__(self, url: str, *, pool_size: int, max_overflow: int) -> None:
        self.engine = create_async_engine(url, pool_size=pool_size, max_overflow=max_overflow)
        self._sessions = async_sessionmaker(self.engine, expire_on_commit=False)

    async def read(self, session_id: str, lifetime: int) -> bytes:  # noqa: ARG002
        """Return what is stored, or nothing."""
        async with self._sessions() as session:
            stored = await session.get(StoredSession, session_id)
        return stored.data if stored is not None and stored.expires_at > datetime.now(UTC) else b""

    async def write(self, session_id: str, data: bytes, lifetime: int, ttl: int) -> str:  # noqa: ARG002
        """Store the data."""
        expires_at = datetime.now(UTC) + timedelta(seconds=ttl)
        async with self._sessions.begin() as session:
            await session.merge(StoredSession(id=session_id, data=data, expires_at=expires_at))
        return session_id

    async def remove(self, session_id: str) -> None:
        """Delete the session."""
        async with self._sessions.begin() as session:
            await session.execute(sa.delete(StoredSession).where(StoredSession.id == session_id))


def _application(store: SessionStore, lifespan: Lifespan | None = None) -> ASGIApp:
    return application(
        Middleware(SessionMiddleware, store=store, lifetime=LIFETIME, cookie_https_only=False),
        Middleware(SessionAutoloadMiddleware),
        lifespan=lifespan,
    )
