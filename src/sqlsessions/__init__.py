"""Server-side login sessions for FastAPI and Starlette, kept in a table of your own SQL database."""

from sqlsessions.backends.base import Backend, Revocation, UserSessions
from sqlsessions.backends.memory import InMemoryBackend
from sqlsessions.backends.sqlalchemy import SQLAlchemyBackend
from sqlsessions.errors import (
    BackendError,
    BackendReadOnly,
    BackendTimeout,
    BackendUnavailable,
    ConfigurationError,
    CorruptData,
    DuplicateId,
    HeadersSent,
    InvalidData,
    SchemaMissing,
    SessionConflict,
    SessionError,
    SessionGone,
    SessionNotLoaded,
)
from sqlsessions.events import Event
from sqlsessions.fastapi import CurrentSession, CurrentUserId, current_session, current_user_id
from sqlsessions.middleware import SessionAutoloadMiddleware, SessionMiddleware, load_session
from sqlsessions.purge import purge
from sqlsessions.record import Expected, Record
from sqlsessions.session import Session

__all__ = [
    "Backend",
    "BackendError",
    "BackendReadOnly",
    "BackendTimeout",
    "BackendUnavailable",
    "ConfigurationError",
    "CorruptData",
    "CurrentSession",
    "CurrentUserId",
    "DuplicateId",
    "Event",
    "Expected",
    "HeadersSent",
    "InMemoryBackend",
    "InvalidData",
    "Record",
    "Revocation",
    "SQLAlchemyBackend",
    "SchemaMissing",
    "Session",
    "SessionAutoloadMiddleware",
    "SessionConflict",
    "SessionError",
    "SessionGone",
    "SessionMiddleware",
    "SessionNotLoaded",
    "UserSessions",
    "current_session",
    "current_user_id",
    "load_session",
    "purge",
]
