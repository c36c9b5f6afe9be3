"""A backend of your own: sessions kept by another service, which is spoken to over HTTP.

Anything with get, put and delete by a key, and a version to compare, can be a backend. Here HTTP itself brings all of
it (RFC 9110 §13): ``PUT`` with ``If-None-Match: *`` creates and never overwrites, and ``If-Match`` is the
compare-and-swap. The entity tag covers the version *and* the hash of the secret, so that a write under a secret that
has been renewed since misses. There is one clock, the caller's: requests say what time it is.

    GET    /sessions/{id}?now=              200 the record; 404 there is none, or it has expired
    PUT    /sessions/{id}                   If-None-Match: *             204; 412 the id is taken
    PUT    /sessions/{id}?now=              If-Match: "version-hash"     204; 412 it is not that one any more
    DELETE /sessions/{id}                                                204; 404 there was none
    DELETE /sessions/{id}?now=              If-Match: "version-hash"     204; 412 it is not that one any more
    POST   /sessions/{id}/touch             {secret_hash, now, expires_at}: 200 whether it was done
    POST   /purge                           {before, limit}: 200 how many were deleted
    GET    /sessions?user_id=&now=&limit=   200 the records
    DELETE /sessions?user_id=&keep=         200 how many were deleted
    DELETE /everything                      200 how many were deleted

The service is ``session_service.py``. `HTTPBackend` is used like any other:

    app.add_middleware(SessionMiddleware, secret_key=…, backend=HTTPBackend("https://sessions.internal", token=…))
"""

import json
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID

import httpx

from sqlsessions import errors
from sqlsessions.backends.base import Backend, Revocation, UserSessions, owner
from sqlsessions.backends.supervisor import CircuitBreaker, Supervisor
from sqlsessions.errors import BackendError, BackendUnavailable, CorruptData, SessionError
from sqlsessions.record import Expected, Record

T = TypeVar("T")


class HTTPBackend(Revocation):
    """Keeps records in a service. Belongs to one event loop."""

    def __init__(self, url: str, *, token: str, deadline: float = 5.0, connections: int = 20) -> None:
        self._url = url
        self._headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
        self._client: httpx.AsyncClient | None = None
        # Keeps the deadline whatever the service does, and finishes what was begun when a client disconnects.
        self._supervisor = Supervisor(slots=connections, deadline=deadline, breaker=CircuitBreaker())

    def __repr__(self) -> str:
        return f"<HTTPBackend at {self._url}>"

    async def load(self, id: UUID, now: datetime) -> Record | None:  # noqa: A002
        return await self._run(lambda: self._load(id, now))

    async def insert(self, record: Record) -> None:
        await self._run(lambda: self._insert(record))

    async def replace(self, record: Record, expected: Expected) -> bool:
        return await self._run(lambda: self._replace(record, expected))

    async def touch(self, id: UUID, secret_hash: bytes, *, now: datetime, expires_at: datetime) -> bool:  # noqa: A002
        body = {"secret_hash": secret_hash.hex(), "now": now, "expires_at": expires_at}
        return bool(await self._ask("POST", f"/sessions/{id}/touch", body=body))

    async def delete(self, id: UUID, expected: Expected | None = None) -> bool:  # noqa: A002
        return await self._run(lambda: self._delete(id, expected))

    async def purge(self, before: datetime, limit: int) -> int:
        return int(await self._ask("POST", "/purge", body={"before": before, "limit": limit}))

    async def list_for_user(
        self, user_id: str | int, now: datetime | None = None, limit: int = 100
    ) -> Sequence[Record]:
        params = {"user_id": owner(user_id), "now": now or datetime.now(UTC), "limit": limit}
        return [from_json(text) for text in await self._ask("GET", "/sessions", params=params)]

    async def delete_for_user(self, user_id: str | int, *, keep: UUID | None = None) -> int:
        params = {"user_id": owner(user_id)} | ({} if keep is None else {"keep": keep})
        return int(await self._ask("DELETE", "/sessions", params=params))

    async def trim_for_user(self, user_id: str | int, limit: int, *, newest: UUID, now: datetime) -> int:
        body = {"user_id": owner(user_id), "limit": limit, "newest": newest, "now": now}
        return int(await self._ask("POST", "/trim", body=body))

    async def delete_all(self) -> int:
        return int(await self._ask("DELETE", "/everything"))

    async def aclose(self) -> None:
        await self._supervisor.drain()
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _load(self, id: UUID, now: datetime) -> Record | None:  # noqa: A002
        response = await self._send("GET", f"/sessions/{id}", params={"now": now}, misses={404})
        return from_json(response.text) if response.is_success else None

    async def _insert(self, record: Record) -> None:
        try:
            await self._send("PUT", f"/sessions/{record.id}", headers={"if-none-match": "*"}, text=to_json(record))
        except BackendUnavailable:
            if not await self._is_stored(record, record.last_seen_at):
                raise

    async def _replace(self, record: Record, expected: Expected) -> bool:
        path, now = f"/sessions/{record.id}", {"now": expected.now}
        try:
            response = await self._send(
                "PUT", path, params=now, headers=match(expected), text=to_json(record), misses={412}
            )
        except BackendUnavailable:
            # Whether it was done is unknown. To send it again could do it twice; to look cannot.
            if await self._is_stored(record, expected.now):
                return True
            raise
        return response.is_success

    async def _delete(self, id: UUID, expected: Expected | None) -> bool:  # noqa: A002
        if expected is None:
            response = await self._send("DELETE", f"/sessions/{id}", misses={404})
        else:
            now, headers = {"now": expected.now}, match(expected)
            response = await self._send("DELETE", f"/sessions/{id}", params=now, headers=headers, misses={412})
        return response.is_success

    async def _is_stored(self, record: Record, now: datetime) -> bool:
        found = await self._load(record.id, now)
        return found is not None and (found.version, found.secret_hash) == (record.version, record.secret_hash)

    async def _run(self, operation: Callable[[], Awaitable[T]]) -> T:
        return await self._supervisor.run(lambda lease: operation())  # noqa: ARG005 - a cancelled request ends at once

    async def _ask(self, method: str, path: str, **request: Any) -> Any:
        return (await self._run(lambda: self._send(method, path, **request))).json()

    async def _send(
        self,
        method: str,
        path: str,
        *,
        params: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        body: dict[str, Any] | None = None,
        text: str | None = None,
        misses: Collection[int] = (),
    ) -> httpx.Response:
        """Return the response if it is a success or one of *misses*; raise what the service raised otherwise."""
        if self._client is None:
            self._client = httpx.AsyncClient(base_url=self._url, headers=self._headers, timeout=None)  # noqa: S113
        content = text if body is None else json.dumps(body, default=plain)
        query = {name: plain(value) for name, value in (params or {}).items()}
        try:
            response = await self._client.request(method, path, params=query, headers=headers, content=content)
        except httpx.RequestError as error:
            raise BackendUnavailable(f"the session service cannot be reached ({type(error).__name__})") from None
        if response.is_success or response.status_code in misses:
            return response
        raise error_of(response)


def match(expected: Expected) -> dict[str, str]:
    """Return the header that makes a request depend on what was read."""
    return {"if-match": f'"{expected.version}-{expected.secret_hash.hex()}"'}


def matched(if_match: str, now: datetime) -> Expected:
    """Return what such a header expects."""
    version, _, secret_hash = if_match.strip('"').rpartition("-")
    return Expected(int(version), bytes.fromhex(secret_hash), now)


def to_json(record: Record) -> str:
    """Return a record as JSON text; its data is a string in it, so that not a byte of it changes."""
    return json.dumps(record._asdict(), default=plain)


def from_json(text: str | bytes) -> Record:
    """Return the record that such text holds."""
    try:
        fields = json.loads(text)
        for name in ("created_at", "last_seen_at", "expires_at", "authenticated_at"):
            fields[name] = fields[name] and datetime.fromisoformat(fields[name])
        fields |= {"id": UUID(fields["id"]), "secret_hash": bytes.fromhex(fields["secret_hash"])}
        return Record(**fields)
    except (KeyError, TypeError, ValueError):
        raise CorruptData("the session service sent something that is no record") from None


def plain(value: object) -> str | int:
    """Return a value as JSON and query strings can hold it."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime):
        return value.isoformat()
    return value if isinstance(value, int) else str(value)


def error_of(response: httpx.Response) -> SessionError:
    """Return the error that the service names in its answer; of our own kinds only."""
    if response.headers.get("content-type") == "application/json":
        kind = getattr(errors, str(response.json().get("error")), None)
        if isinstance(kind, type) and issubclass(kind, BackendError | CorruptData):
            return kind(f"the session service answered {response.status_code}")
    if response.is_server_error:
        return BackendUnavailable(f"the session service answered {response.status_code}")
    return BackendError(f"the session service answered {response.status_code}")


_: tuple[type[Backend], type[UserSessions]] = (HTTPBackend, HTTPBackend)
