"""Ending sessions from outside of them: one, a user's, everybody's."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any
from uuid import UUID

import pytest

from sqlsessions import BackendError, InMemoryBackend, InvalidData, Record, SQLAlchemyBackend, migrate
from sqlsessions.testing import EVER, START, make_record

pytestmark = pytest.mark.anyio

Revocable = InMemoryBackend | SQLAlchemyBackend


async def fill(backend: Revocable, *users: str | None) -> list[Record]:
    """Store one session for each user."""
    records = [make_record(user_id=user) for user in users]
    for record in records:
        await backend.insert(record)
    return records


async def alive(backend: Revocable, records: list[Record]) -> list[bool]:
    """Tell of each record whether it is there."""
    return [await backend.load(record.id, START) is not None for record in records]


async def test_revoke(backend: Revocable) -> None:
    """A session is ended by its handle, once, and no other (R39)."""
    records = await fill(backend, "me", "me")
    assert await backend.revoke(records[0].id)
    assert not await backend.revoke(records[0].id)
    assert await alive(backend, records) == [False, True]


@pytest.mark.parametrize("user_id", ["7", 7], ids=repr)
async def test_revoke_of_the_users_own(backend: Revocable, user_id: str | int) -> None:
    """Given a user, a session of somebody else's or of nobody's is left alone, however valid its handle (R39)."""
    records = await fill(backend, "7", "77", None)
    assert [await backend.revoke(record.id, user_id=user_id) for record in records] == [True, False, False]
    assert await alive(backend, records) == [False, True, True]


async def test_revoke_of_nobodys(backend: Revocable) -> None:
    """The user "" is refused instead of standing for everybody, or for sessions without a user (R40)."""
    records = await fill(backend, None)
    with pytest.raises(InvalidData):
        await backend.revoke(records[0].id, user_id="")
    assert await alive(backend, records) == [True]


async def test_revoke_all(backend: Revocable) -> None:
    """A user's sessions end together, but for the one to keep (R39)."""
    records = await fill(backend, "me", "me", "me", "you")
    assert await backend.revoke_all("me", keep=records[1].id) == 2
    assert await alive(backend, records) == [False, True, False, True]
    assert await backend.revoke_all("me") == 1
    assert await alive(backend, records) == [False, False, False, True]


@pytest.mark.parametrize("spelled", [str, attrgetter("bytes"), attrgetter("int")], ids=["str", "bytes", "int"])
async def test_revoke_all_but_what_is_no_id(backend: Revocable, spelled: Callable[[UUID], Any]) -> None:
    """What is no id to keep is refused, on every backend alike, and nothing ends."""
    records = await fill(backend, "me", "me")
    with pytest.raises(BackendError, match="a session's id is a UUID"):
        await backend.revoke_all("me", keep=spelled(records[0].id))
    assert await alive(backend, records) == [True, True]


async def test_negative_limits(backend: Revocable) -> None:
    """A negative limit is refused, on every backend alike."""
    records = await fill(backend, "me")
    with pytest.raises(BackendError, match="a limit is at least 0, not -1"):
        await backend.list_for_user("me", START, -1)
    with pytest.raises(BackendError, match="a limit is at least 0, not -1"):
        await backend.purge(EVER, -1)
    assert await alive(backend, records) == [True]
    assert list(await backend.list_for_user("me", START, 0)) == []
    assert await backend.purge(EVER, 0) == 0


async def test_revoke_everything(backend: Revocable) -> None:
    """Everybody's sessions end (R42)."""
    records = await fill(backend, "me", "you", None)
    assert await backend.revoke_everything() == 3
    assert await alive(backend, records) == [False] * 3


async def test_two_tables(sessions_url: str) -> None:
    """Two tables in one database are two sets of sessions: lists, revocations and purges stay within theirs (R114)."""
    await migrate.upgrade(sessions_url, table="other")
    one, other = SQLAlchemyBackend(sessions_url), SQLAlchemyBackend(sessions_url, table="other")
    (record,) = await fill(other, "me")
    await fill(one, "me", "you", None)
    assert len(await one.list_for_user("me", START)) == 1
    assert await one.load(record.id, EVER) is None
    assert await one.revoke_all("me") == 1
    assert await one.trim_for_user("you", 1, newest=record.id, now=START) == 0
    assert await one.purge(record.expires_at, 10) == 2
    assert await one.revoke_everything() == 0
    assert await other.list_for_user("me", START) == [record]
    for backend in (one, other):
        await backend.aclose()


async def test_revoke_everything_in_batches(
    sessions_url: str, statements: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of any size is emptied by statements that each stay within the deadline, expired or not (R42)."""
    monkeypatch.setattr("sqlsessions.backends.sqlalchemy._BATCH", 2)
    backend = SQLAlchemyBackend(sessions_url)
    records = await fill(backend, "me", "you", None, "me")
    await backend.insert(make_record(expires_at=START))
    statements.clear()
    assert await backend.revoke_everything() == 5
    assert statements.count("DELETE") == 4
    assert [await backend.load(record.id, EVER) for record in records] == [None] * 4
    await backend.aclose()
