"""The table behaves as the dictionary does, whatever happens in whatever order: SQL against the specification."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TypeVar
from uuid import UUID

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from sqlsessions.backends.memory import InMemoryBackend
from sqlsessions.backends.sqlalchemy import SQLAlchemyBackend
from sqlsessions.errors import DuplicateId
from sqlsessions.record import Expected, Record
from sqlsessions.testing import EVER, MICROSECOND, START, FakeClock, expecting, make_record

T = TypeVar("T")
AnyBackend = SQLAlchemyBackend | InMemoryBackend

#: Few of everything, so that things meet.
IDS = [UUID(int=n) for n in range(2)]
ids = st.sampled_from(IDS)
hashes = st.sampled_from([bytes([n]) * 32 for n in range(2)])
versions = st.integers(1, 2)
users = st.sampled_from(["me", "Me", "you"])
past = st.sampled_from([START + n * MICROSECOND for n in (-1, 0, 1)])
future = st.sampled_from([START + n * MICROSECOND for n in (1, 4, 0, 2)])
limits = st.integers(1, 2)
records = st.builds(
    make_record,
    id=ids,
    secret_hash=hashes,
    user_id=st.none() | users,
    data=st.sampled_from(["{}", '{"b":1,"a":"\\u0000"}']),
    version=versions,
    last_seen_at=past,
    expires_at=future,
)


class BackendAgainstModel(RuleBasedStateMachine):
    """Does the same to both, and compares what they answer and what they hold."""

    runner: asyncio.Runner
    backend: SQLAlchemyBackend

    def __init__(self) -> None:
        super().__init__()
        self.model = InMemoryBackend()
        self.clock = FakeClock()

    def both(self, call: Callable[[AnyBackend], Awaitable[T]]) -> T:
        """Return the answer of both, which has to be one."""

        async def answer(backend: AnyBackend) -> T:
            return await call(backend)

        found, wanted = self.runner.run(answer(self.backend)), self.runner.run(answer(self.model))
        assert found == wanted
        return wanted

    def shifted(self, instant: datetime) -> datetime:
        """Return an instant as far from now as the given one is from the start."""
        return self.clock() + (instant - START)

    def aged(self, record: Record) -> Record:
        """Return the record as one of these days."""
        last_seen_at, expires_at = self.shifted(record.last_seen_at), self.shifted(record.expires_at)
        return record._replace(last_seen_at=last_seen_at, expires_at=expires_at)

    @initialize(record=records)
    def begin(self, record: Record) -> None:
        """Each history starts with the same record under every id."""
        self.runner.run(self.backend.delete_all())
        for id_ in IDS:
            self.insert(record._replace(id=id_))

    @rule()
    def advance(self) -> None:
        """Time passes."""
        self.clock.advance(MICROSECOND)

    @rule(record=records)
    def insert(self, record: Record) -> None:
        """Somebody inserts a record."""
        aged = self.aged(record)

        async def inserted(backend: AnyBackend) -> bool:
            try:
                await backend.insert(aged)
            except DuplicateId:
                return False
            return True

        self.both(inserted)

    @rule(record=records)
    def replace(self, record: Record) -> None:
        """Somebody replaces what is there."""
        aged = self.aged(record)
        found = self.both(lambda backend: backend.load(record.id, EVER))
        expected = expecting(found or record, self.clock())
        self.both(lambda backend: backend.replace(aged, expected))

    @rule(record=records, version=versions, secret_hash=hashes)
    def replace_blindly(self, record: Record, version: int, secret_hash: bytes) -> None:
        """Somebody replaces what may be there no longer."""
        aged, expected = self.aged(record), Expected(version, secret_hash, self.clock())
        self.both(lambda backend: backend.replace(aged, expected))

    @rule(id_=ids, secret_hash=hashes, expires_at=future)
    def touch(self, id_: UUID, secret_hash: bytes, expires_at: datetime) -> None:
        """Somebody uses a record."""
        now, until = self.clock(), self.shifted(expires_at)
        self.both(lambda backend: backend.touch(id_, secret_hash, now=now, expires_at=until))

    @rule(id_=ids)
    def delete(self, id_: UUID) -> None:
        """Somebody deletes a record."""
        self.both(lambda backend: backend.delete(id_))

    @rule(id_=ids, version=versions, secret_hash=hashes)
    def delete_expected(self, id_: UUID, version: int, secret_hash: bytes) -> None:
        """Somebody deletes a record that may have changed."""
        expected = Expected(version, secret_hash, self.clock())
        self.both(lambda backend: backend.delete(id_, expected))

    @rule(limit=limits)
    def purge(self, limit: int) -> None:
        """The purge comes by."""
        now = self.clock()
        kept = self.runner.run(contents(self.model))
        ends = sorted(record.expires_at for record in kept if record is not None and record.expires_at <= now)
        # Of records that end at the same instant none is the oldest: the limit must not fall between them.
        while limit < len(ends) and ends[limit - 1] == ends[limit]:
            limit += 1
        self.both(lambda backend: backend.purge(now, limit))

    @rule(id_=ids)
    def load(self, id_: UUID) -> None:
        """Somebody loads a record."""
        now = self.clock()
        self.both(lambda backend: backend.load(id_, now))

    @rule(user=users, limit=limits)
    def list_for_user(self, user: str, limit: int) -> None:
        """Somebody looks at a user's sessions."""
        now = self.clock()

        async def listed(backend: AnyBackend) -> list[Record]:
            return list(await backend.list_for_user(user, now, limit))

        self.both(listed)

    @rule(user=users, keep=st.none() | ids)
    def revoke_all(self, user: str, keep: UUID | None) -> None:
        """Somebody ends a user's sessions."""
        self.both(lambda backend: backend.revoke_all(user, keep=keep))

    @invariant()
    def hold_the_same(self) -> None:
        """Both hold the same records, expired ones included."""
        self.both(contents)


async def contents(backend: AnyBackend) -> list[Record | None]:
    """Return everything a backend holds."""
    return list(await asyncio.gather(*(backend.load(id_, EVER) for id_ in IDS)))


#: Without shrinking, which takes minutes: add Phase.shrink to be told the shortest history that fails.
QUICK = settings(max_examples=20, stateful_step_count=40, phases=[Phase.generate])


def test_random_histories(sessions_url: str) -> None:
    """After any history the table answers as the dictionary does, and holds the same."""
    with asyncio.Runner() as event_loop:

        class Machine(BackendAgainstModel):
            runner = event_loop
            backend = SQLAlchemyBackend(sessions_url)

        run_state_machine_as_test(Machine, settings=QUICK)
