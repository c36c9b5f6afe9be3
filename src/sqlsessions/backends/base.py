"""The contract of a backend: where records are kept.

Absence is a value, sickness is a `BackendError`. Anything that can get, put and delete by a key under a
compare-and-swap can be a backend; `sqlsessions.testing.BackendConformance` says of any implementation whether it is
one.
"""

from collections.abc import Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol, runtime_checkable
from uuid import UUID

from sqlsessions.errors import CorruptData, InvalidData
from sqlsessions.record import Expected, Record, principal


class Backend(Protocol):
    """Keeps records. No method returns, changes or revives a record that has expired; ``expires_at == now`` is expired.

    Every method may raise `BackendError`, one that returns records `CorruptData`, and nothing else
    (`asyncio.CancelledError` passes through); their messages are for the log, and quote nothing of a record but its id.
    A method whose outcome is unknown, because the connection broke after sending, finds it out by reading, or raises;
    it never writes again blindly.

    Write them with ``async def``, or hand on the coroutine of another.
    """

    def load(self, id: UUID, now: datetime) -> Coroutine[Any, Any, Record | None]:  # noqa: A002
        """Return the record, equal in every field to the one stored; None if it is absent or has expired at *now*."""

    def insert(self, record: Record) -> Coroutine[Any, Any, None]:
        """Store a new record. Raise `DuplicateId` rather than overwrite."""

    def replace(self, record: Record, expected: Expected) -> Coroutine[Any, Any, bool]:
        """Store *record* over the one of the same id, if that one still matches *expected*; tell whether it did.

        The comparison and the write are one step: of parallel calls with the same *expected*, one returns True. False
        leaves everything as it was; an absent or expired record is never created. Where *expected* holds the record
        that was read, what does not differ from it need not be written.
        """

    def touch(self, id: UUID, secret_hash: bytes, *, now: datetime, expires_at: datetime) -> Coroutine[Any, Any, bool]:  # noqa: A002
        """Set ``last_seen_at`` to *now* and move ``expires_at`` forward to *expires_at*; tell whether it was done.

        Done only to a live record with this *secret_hash* last seen before *now*. Never shortens, never changes the
        version or the data; a no-op if the record is gone.
        """

    def delete(self, id: UUID, expected: Expected | None = None) -> Coroutine[Any, Any, bool]:  # noqa: A002
        """Delete the record, or only if it still matches *expected*; tell whether one was deleted. Absence is a
        no-op.
        """

    def purge(self, before: datetime, limit: int) -> Coroutine[Any, Any, int]:
        """Delete at most *limit* records with ``expires_at <= before``, the oldest first; return how many were
        deleted.
        """

    def aclose(self) -> Coroutine[Any, Any, None]:
        """Finish the work in flight and give connections back. The backend may be used again afterwards."""


@runtime_checkable
class UserSessions(Protocol):
    """What a backend can do besides, if it can find records by their user.

    A user id is a str, or an int that stands for its digits; None, "" and anything else raise `InvalidData`:
    sessions without a user are nobody's.
    """

    def list_for_user(
        self, user_id: str | int, now: datetime | None = None, limit: int = 100
    ) -> Coroutine[Any, Any, Sequence[Record]]:
        """Return the user's live records, most recently seen first, at most *limit*. One that cannot be read is left
        out: it opens nothing.
        """

    def delete_for_user(self, user_id: str | int, *, keep: UUID | None = None) -> Coroutine[Any, Any, int]:
        """Delete the user's records, but for the one with the id *keep*; return how many."""

    def trim_for_user(self, user_id: str | int, limit: int, *, newest: UUID, now: datetime) -> Coroutine[Any, Any, int]:
        """Delete the user's live records but for the *limit* most recently seen; return how many.

        Of records seen at one instant *newest* counts as seen last, and then the greater id. One step: of parallel
        calls, each after an insert, the last leaves no more than *limit*.
        """

    def delete_all(self) -> Coroutine[Any, Any, int]:
        """Delete every record; return how many."""


#: An instant at which no record has expired: this is administration, and has no clock.
_EVER = datetime.min.replace(tzinfo=UTC)


class Revocation:
    """What applications call on a backend to end sessions; mixed into those here."""

    async def revoke(self: "_Found", id: UUID, *, user_id: str | int | None = None) -> bool:  # noqa: A002
        """End one session by its handle; tell whether there was one. Requests under way with it write nothing more.

        With *user_id*, only if it is this user's: for a route where people end sessions of their own. One that cannot
        be read is nobody's, and opens nothing.
        """
        if user_id is not None:
            user = owner(user_id)
            try:
                record = await self.load(id, _EVER)
            except CorruptData:
                return False
            if record is None or record.user_id != user:
                return False
        return await self.delete(id)

    async def revoke_all(self: UserSessions, user_id: str | int, *, keep: UUID | None = None) -> int:
        """End the user's sessions, but for *keep*: to log out other devices, keep ``session.id``; return how many."""
        return await self.delete_for_user(user_id, keep=keep)

    async def revoke_everything(self: UserSessions) -> int:
        """End every session of everybody (OWASP ASVS 5 §7.4.5); return how many."""
        return await self.delete_all()


class _Found(Protocol):
    def load(self, id: UUID, now: datetime) -> Coroutine[Any, Any, Record | None]: ...  # noqa: A002

    def delete(self, id: UUID, expected: Expected | None = None) -> Coroutine[Any, Any, bool]: ...  # noqa: A002


def detached(backend: object) -> bool:
    """Tell whether the operations of *backend* belong to themselves: cancelling who waits for one cancels nothing, and
    any other task may go on waiting.

    The class says so by ``detached = True``, and a subclass says so again: what it adds may depend on its task, as
    ``asyncio.timeout`` and task groups do.
    """
    return bool(vars(type(backend)).get("detached"))


def owner(user_id: str | int) -> str:
    """Return *user_id* as records hold it; raise `InvalidData` for nobody."""
    user = principal(user_id)
    if user is None:
        raise InvalidData("a user id is needed: sessions without a user are nobody's")
    return user
