"""A backend that forgets: the executable specification of the contract, for tests and first steps."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from sqlsessions.backends.base import Revocation, owner
from sqlsessions.errors import DuplicateId
from sqlsessions.record import Expected, Record, checked_id, checked_limit, utc_now


class InMemoryBackend(Revocation):
    """Keeps records in this process until it ends. Not shared between workers; for tests and development."""

    #: Nothing here waits.
    detached = True

    def __init__(self) -> None:
        self._records: dict[UUID, Record] = {}

    def __repr__(self) -> str:
        return f"<InMemoryBackend of {len(self._records)} records>"

    async def load(self, id: UUID, now: datetime) -> Record | None:  # noqa: A002
        """Return the record, or None if it is absent or has expired."""
        record = self._records.get(id)
        return record if record is not None and record.expires_at > now else None

    async def insert(self, record: Record) -> None:
        """Store a new record. Raise `DuplicateId` rather than overwrite."""
        if record.id in self._records:
            raise DuplicateId(f"a session with the id {record.id} exists")
        self._records[record.id] = record

    async def replace(self, record: Record, expected: Expected) -> bool:
        """Store *record* if the one there still matches *expected*."""
        found = self._records.get(record.id)
        if found is None or not expected.matches(found):
            return False
        self._records[record.id] = record
        return True

    async def touch(self, id: UUID, secret_hash: bytes, *, now: datetime, expires_at: datetime) -> bool:  # noqa: A002
        """Move ``last_seen_at`` and, forward only, ``expires_at``."""
        found = self._records.get(id)
        if found is None or found.secret_hash != secret_hash or found.expires_at <= now or found.last_seen_at >= now:
            return False
        self._records[id] = found._replace(last_seen_at=now, expires_at=max(found.expires_at, expires_at))
        return True

    async def delete(self, id: UUID, expected: Expected | None = None) -> bool:  # noqa: A002
        """Delete the record, or only if it still matches *expected*."""
        found = self._records.get(id)
        if found is None or (expected is not None and not expected.matches(found)):
            return False
        del self._records[id]
        return True

    async def purge(self, before: datetime, limit: int) -> int:
        """Delete at most *limit* expired records, the oldest first."""
        checked_limit(limit)
        expired = [record for record in self._records.values() if record.expires_at <= before]
        expired.sort(key=lambda record: record.expires_at)
        for record in expired[:limit]:
            del self._records[record.id]
        return len(expired[:limit])

    async def list_for_user(
        self, user_id: str | int, now: datetime | None = None, limit: int = 100
    ) -> Sequence[Record]:
        """Return the user's live records, most recently seen first."""
        checked_limit(limit)
        user, now = owner(user_id), now or utc_now()
        found = [record for record in self._records.values() if record.user_id == user and record.expires_at > now]
        return sorted(found, key=lambda record: (-record.last_seen_at.timestamp(), record.id))[:limit]

    async def delete_for_user(self, user_id: str | int, *, keep: UUID | None = None) -> int:
        """Delete the user's records, but for *keep*."""
        user = owner(user_id)
        if keep is not None:
            checked_id(keep)
        doomed = [record.id for record in self._records.values() if record.user_id == user and record.id != keep]
        for id_ in doomed:
            del self._records[id_]
        return len(doomed)

    async def trim_for_user(self, user_id: str | int, limit: int, *, newest: UUID, now: datetime) -> int:
        """Delete the user's live records but for the *limit* most recently seen."""
        user = owner(user_id)
        found = [record for record in self._records.values() if record.user_id == user and record.expires_at > now]
        found.sort(key=lambda record: (record.last_seen_at, record.id == newest, record.id), reverse=True)
        for record in found[limit:]:
            del self._records[record.id]
        return len(found[limit:])

    async def delete_all(self) -> int:
        """Delete every record."""
        count = len(self._records)
        self._records.clear()
        return count

    async def aclose(self) -> None:
        """Do nothing: there is nothing to give back."""
