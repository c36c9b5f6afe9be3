"""The service behind ``http_backend.py``: sessions in a table, for applications that cannot reach the database.

    SESSIONS_URL=postgresql+asyncpg://… SESSIONS_TOKEN=… uvicorn --factory examples.session_service:create_app

Whoever has the token can read and end every session: keep it, and the network between, to your own applications.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from secrets import compare_digest
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Body, Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import AwareDatetime, BeforeValidator

from examples.http_backend import from_json, matched, to_json
from sqlsessions import CorruptData, DuplicateId, Expected, InvalidData, SessionError, SQLAlchemyBackend


def authenticate(request: Request, authorization: Annotated[str, Header()] = "") -> None:
    """Let nobody in without the token."""
    if not compare_digest(authorization.encode(), f"Bearer {request.app.state.token}".encode()):
        raise HTTPException(401)


def backend_of(request: Request) -> SQLAlchemyBackend:
    """Return the backend that this service was given."""
    backend: SQLAlchemyBackend = request.app.state.backend
    return backend


def expectation(if_match: Annotated[str | None, Header()] = None, now: AwareDatetime | None = None) -> Expected | None:
    """Return what the request expects to find; None if nothing, or anything."""
    if if_match is None:
        return None
    if now is None:
        raise HTTPException(400)
    try:
        return matched(if_match, now)
    except ValueError as error:
        raise HTTPException(400) from error


Backend = Annotated[SQLAlchemyBackend, Depends(backend_of)]
IfMatch = Annotated[Expected | None, Depends(expectation)]
Instant = Annotated[AwareDatetime, Body()]

router = APIRouter(dependencies=[Depends(authenticate)])


@router.get("/sessions/{id_}")
async def load(backend: Backend, id_: UUID, now: AwareDatetime) -> Response:
    record = await backend.load(id_, now)
    if record is None:
        raise HTTPException(404)
    return Response(to_json(record), media_type="application/json")


@router.put("/sessions/{id_}", status_code=204)
async def save(backend: Backend, id_: UUID, request: Request, expected: IfMatch) -> None:
    record = from_json(await request.body())
    if record.id != id_:
        raise HTTPException(400)
    if expected is None:
        await backend.insert(record)
    elif not await backend.replace(record, expected):
        raise HTTPException(412)


@router.delete("/sessions/{id_}", status_code=204)
async def delete(backend: Backend, id_: UUID, expected: IfMatch) -> None:
    if not await backend.delete(id_, expected):
        raise HTTPException(412 if expected else 404)


@router.post("/sessions/{id_}/touch")
async def touch(
    backend: Backend,
    id_: UUID,
    secret_hash: Annotated[bytes, BeforeValidator(bytes.fromhex), Body()],
    now: Instant,
    expires_at: Instant,
) -> bool:
    return await backend.touch(id_, secret_hash, now=now, expires_at=expires_at)


@router.post("/purge")
async def purge(backend: Backend, before: Instant, limit: Annotated[int, Body(ge=1, le=10_000)]) -> int:
    return await backend.purge(before, limit)


@router.get("/sessions")
async def list_for_user(backend: Backend, user_id: str, now: AwareDatetime, limit: int) -> list[str]:
    return [to_json(record) for record in await backend.list_for_user(user_id, now, limit)]


@router.delete("/sessions")
async def delete_for_user(backend: Backend, user_id: str, keep: UUID | None = None) -> int:
    return await backend.delete_for_user(user_id, keep=keep)


@router.post("/trim")
async def trim_for_user(
    backend: Backend,
    user_id: Annotated[str, Body()],
    limit: Annotated[int, Body(ge=1)],
    newest: Annotated[UUID, Body()],
    now: Instant,
) -> int:
    return await backend.trim_for_user(user_id, limit, newest=newest, now=now)


@router.delete("/everything")
async def delete_all(backend: Backend) -> int:
    return await backend.delete_all()


async def failed(_: Request, error: Exception) -> JSONResponse:
    """Answer with the kind of the error, by which the other side raises the same."""
    statuses: dict[type[Exception], int] = {DuplicateId: 412, InvalidData: 400, CorruptData: 422}
    return JSONResponse({"error": type(error).__name__}, statuses.get(type(error), 503))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    await app.state.backend.aclose()


def service(backend: SQLAlchemyBackend, *, token: str) -> FastAPI:
    """Return a service over *backend* for those who have the token."""
    app = FastAPI(title="Sessions", lifespan=lifespan, exception_handlers={SessionError: failed})
    app.state.backend, app.state.token = backend, token
    app.include_router(router)
    return app


def create_app() -> FastAPI:
    """Return the service that the environment describes."""
    return service(SQLAlchemyBackend(os.environ["SESSIONS_URL"]), token=os.environ["SESSIONS_TOKEN"])
