"""The example backend over HTTP keeps the contract, over a real socket to a real server."""

import shutil
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.http_backend import HTTPBackend, to_json
from examples.session_service import service
from sqlsessions.backends.base import Backend
from sqlsessions.backends.sqlalchemy import SQLAlchemyBackend
from sqlsessions.errors import (
    BackendError,
    BackendTimeout,
    BackendUnavailable,
    CorruptData,
    DuplicateId,
    SchemaMissing,
)
from sqlsessions.middleware import SessionMiddleware
from sqlsessions.record import Record
from sqlsessions.testing import START, BackendConformance, expecting, following, make_record
from tests.looking import sql

pytestmark = pytest.mark.anyio

TOKEN = "the token of the service"


@contextmanager
def served(url: str) -> Iterator[str]:
    """Run the service over the database at *url*; give its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    app = service(SQLAlchemyBackend(url), token=TOKEN)
    server = uvicorn.Server(uvicorn.Config(app, lifespan="on", ws="none", log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        # Whoever connects before the server accepts waits in the socket's queue.
        yield "http://{}:{}".format(*listening.getsockname())
    finally:
        server.should_exit = True
        thread.join()


@asynccontextmanager
async def calling(address: str, **settings: Any) -> AsyncIterator[HTTPBackend]:
    """Call the service at this address."""
    backend = HTTPBackend(address, **{"token": TOKEN, **settings})
    try:
        yield backend
    finally:
        await backend.aclose()


@pytest.fixture(scope="module")
def url(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The database of the service."""
    return f"sqlite+aiosqlite:///{shutil.copy(sqlite_template, tmp_path_factory.mktemp('service') / 'sessions.db')}"


@pytest.fixture(scope="module")
def address(url: str) -> Iterator[str]:
    """The address of a service for all of these tests."""
    with served(url) as address:
        yield address


@pytest.fixture
async def http_backend(address: str) -> AsyncIterator[HTTPBackend]:
    """A backend that calls it, emptied in the end."""
    async with calling(address) as backend:
        yield backend
        await backend.delete_all()


class TestHTTPBackend(BackendConformance):
    """It is a backend."""

    @pytest.fixture
    def backend(self, http_backend: HTTPBackend) -> Backend:
        """The one under test."""
        return http_backend


OPERATIONS: list[Callable[[HTTPBackend, Record], Awaitable[object]]] = [
    lambda backend, record: backend.load(record.id, START),
    lambda backend, record: backend.insert(record),
    lambda backend, record: backend.replace(record, expecting(record)),
    lambda backend, record: backend.touch(record.id, record.secret_hash, now=START, expires_at=START),
    lambda backend, record: backend.delete(record.id),
    lambda backend, record: backend.delete(record.id, expecting(record)),
    lambda backend, record: backend.purge(START, 1),
    lambda backend, record: backend.list_for_user("me"),
    lambda backend, record: backend.delete_for_user("me"),
    lambda backend, record: backend.trim_for_user("me", 1, newest=record.id, now=START),
    lambda backend, record: backend.delete_all(),
]


async def assert_all_raise(backend: HTTPBackend, kind: type[BackendError], match: str) -> None:
    """Assert that every operation raises exactly this."""
    for operate in OPERATIONS:
        with pytest.raises(kind, match=match) as caught:
            await operate(backend, make_record())
        assert type(caught.value) is kind


async def test_down() -> None:
    """A service that is not there is unavailable."""
    async with calling("http://127.0.0.1:1") as backend:
        await assert_all_raise(backend, BackendUnavailable, "cannot be reached")


async def test_silent() -> None:
    """A service that does not answer is given up at the deadline."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with calling("http://{}:{}".format(*silent.getsockname()), deadline=0.1) as backend:
            with pytest.raises(BackendTimeout):
                await backend.load(make_record().id, START)


async def test_database_of_the_service_down(tmp_path: Path) -> None:
    """A service that cannot reach its own database says so, in the words that the backend there uses."""
    with served(f"sqlite+aiosqlite:///{tmp_path / 'no such directory' / 'sessions.db'}") as address:
        async with calling(address) as backend:
            await assert_all_raise(backend, BackendUnavailable, "503")
    with served(f"sqlite+aiosqlite:///{tmp_path / 'empty.db'}") as address:
        async with calling(address) as backend:
            await assert_all_raise(backend, SchemaMissing, "503")


async def test_wrong_token(address: str) -> None:
    """Nothing is said to those without the token."""
    async with calling(address, token="another") as backend:
        await assert_all_raise(backend, BackendError, "401")


async def test_nonsense(address: str) -> None:
    """The service refuses what it cannot understand, and breaks on none of it."""
    record = make_record()
    path = f"/sessions/{record.id}"
    async with httpx.AsyncClient(base_url=address, headers={"authorization": f"Bearer {TOKEN}"}) as client:
        for request in [
            client.put(path, content="{"),
            client.put(path, content="[]"),
            client.put(path, content='{"id": 1}'),
            client.put(path, content=to_json(record), headers={"if-match": "*"}),
            client.put(path, content=to_json(record), headers={"if-match": '"1-xyz"'}),
            client.put("/sessions/1", content=to_json(record)),
            client.put(f"/sessions/{make_record().id}", content=to_json(record)),
            client.post(f"{path}/touch", json={"secret_hash": "xyz", "now": str(START), "expires_at": str(START)}),
            client.post("/purge", json={}),
            client.get("/sessions", params={"user_id": "", "now": str(START), "limit": 1}),
            client.delete("/sessions"),
        ]:
            response = await request
            assert 400 <= response.status_code < 500, response


async def test_corrupt_row(http_backend: HTTPBackend, url: str) -> None:
    """A corrupt row is as corrupt over HTTP."""
    record = make_record()
    await http_backend.insert(record)
    await sql(url, "UPDATE web_sessions SET created_at = 'yesterday'")
    with pytest.raises(CorruptData):
        await http_backend.load(record.id, START)


class LosingTransport(httpx.AsyncHTTPTransport):
    """A network that loses the answer to the next PUT: the service has done what it was asked."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Pass it on."""
        response = await super().handle_async_request(request)
        if request.method == "PUT":
            await response.aclose()
            raise httpx.ReadError("lost")
        return response


@pytest.fixture
async def losing(http_backend: HTTPBackend, address: str) -> HTTPBackend:
    """A backend in such a network."""
    http_backend._client = httpx.AsyncClient(
        base_url=address, transport=LosingTransport(), headers={"authorization": f"Bearer {TOKEN}"}
    )
    return http_backend


async def test_lost_answer_to_insert(losing: HTTPBackend) -> None:
    """An insert whose answer was lost finds its record, or is unavailable; it is never sent twice."""
    record = make_record()
    await losing.insert(record)
    assert await losing.load(record.id, START) == record
    with pytest.raises(BackendUnavailable):
        await losing.insert(make_record(id=record.id))
    assert await losing.load(record.id, START) == record


async def test_lost_answer_to_replace(losing: HTTPBackend) -> None:
    """A replace whose answer was lost finds out whether it was done, or is unavailable."""
    record = make_record()
    await losing.insert(record)
    changed = following(record)
    assert await losing.replace(changed, expecting(record)) is True
    assert await losing.load(record.id, START) == changed
    with pytest.raises(BackendUnavailable):
        await losing.replace(following(record), expecting(record))
    assert await losing.load(record.id, START) == changed


async def test_application(http_backend: HTTPBackend) -> None:
    """An application logs in and out with it as with any other."""

    async def login(request: Request) -> JSONResponse:
        request.session["user_id"] = 123
        return JSONResponse({})

    async def profile(request: Request) -> JSONResponse:
        return JSONResponse(dict(request.session))

    async def logout(request: Request) -> JSONResponse:
        request.session.clear()
        return JSONResponse({})

    routes = [Route("/login", login, methods=["POST"]), Route("/profile", profile), Route("/logout", logout)]
    app = SessionMiddleware(
        Starlette(routes=routes),
        secret_key="an only moderately confidential key, of 55 characters",
        backend=http_backend,
        purge_interval=None,
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="https://example.org") as client:
        await client.post("/login")
        assert (await client.get("/profile")).json() == {"user_id": 123}
        assert len(await http_backend.list_for_user(123)) == 1
        await client.get("/logout")
        assert (await client.get("/profile")).json() == {}
        assert await http_backend.list_for_user(123) == []


async def test_duplicate(http_backend: HTTPBackend) -> None:
    """An id that is taken is 412 on the wire, and DuplicateId on both ends of it."""
    record = make_record()
    await http_backend.insert(record)
    with pytest.raises(DuplicateId, match="412"):
        await http_backend.insert(record)
