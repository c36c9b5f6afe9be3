"""Litestar, without sessions and with advanced-alchemy's."""

from typing import Any, TypeAlias

from advanced_alchemy.config import EngineConfig
from advanced_alchemy.extensions.litestar import SQLAlchemyAsyncConfig, SQLAlchemyPlugin
from advanced_alchemy.extensions.litestar.session import SessionModelMixin, SQLAlchemyAsyncSessionBackend
from litestar import Litestar, Request, get
from litestar.middleware import DefineMiddleware
from litestar.middleware.session import SessionMiddleware
from litestar.middleware.session.server_side import ServerSideSessionConfig
from starlette.types import ASGIApp

from benchmarks.endpoints import fresh

AnyRequest: TypeAlias = "Request[Any, Any, Any]"


class StoredSession(SessionModelMixin):
    """One session."""

    __tablename__ = "sessions"


@get("/none")
async def none(request: AnyRequest) -> dict[str, Any]:  # noqa: ARG001 - every endpoint is given one
    """Leave the session alone."""
    return {"n": None}


@get("/read")
async def read(request: AnyRequest) -> dict[str, Any]:
    """Read one key."""
    return {"user_id": request.session.get("user_id")}


@get("/write")
async def write(request: AnyRequest) -> dict[str, Any]:
    """Change one key."""
    request.session["n"] += 1
    return {"n": request.session["n"]}


@get("/login")
async def login(request: AnyRequest) -> dict[str, Any]:
    """Fill an empty session."""
    request.session.update(fresh())
    return {"n": 0}


def without(url: str) -> ASGIApp:  # noqa: ARG001 - all rows are made alike
    """Return the application without sessions."""
    app: ASGIApp = Litestar([none], openapi_config=None, logging_config=None)
    return app


def in_orm(url: str) -> ASGIApp:
    """Return the application with sessions in a mapped class."""
    alchemy = SQLAlchemyAsyncConfig(
        connection_string=url,
        metadata=StoredSession.metadata,
        create_all=True,
        engine_config=EngineConfig(pool_size=10, max_overflow=0),
    )
    backend = SQLAlchemyAsyncSessionBackend(
        config=ServerSideSessionConfig(), alchemy_config=alchemy, model=StoredSession
    )
    app: ASGIApp = Litestar(
        [none, read, write, login],
        middleware=[DefineMiddleware(SessionMiddleware, backend=backend)],
        plugins=[SQLAlchemyPlugin(config=alchemy)],
        openapi_config=None,
        logging_config=None,
    )
    return app
