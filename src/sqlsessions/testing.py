"""For those who test: a clock that moves when told to, a record of any shape, and the suite that says whether
something is a backend.

    class TestMyBackend(BackendConformance):
        @pytest.fixture
        async def backend(self) -> AsyncIterator[MyBackend]:
            backend = MyBackend(...)
            yield backend
            await backend.aclose()

Needs pytest, and anyio's plugin for it, which comes with Starlette. Assertions explain themselves after
``pytest.register_assert_rewrite("sqlsessions.testing")`` in your ``conftest.py``.
"""

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

import anyio
import pytest
from anyio.lowlevel import checkpoint

from sqlsessions.backends.base import Backend, UserSessions
from sqlsessions.credentials import hash_secret, new_id, new_secret
from sqlsessions.errors import DuplicateId, InvalidData
from sqlsessions.record import FORMAT, MAX_USER_ID, Expected, Record, next_version, utc_now

T = TypeVar("T")

#: Where clocks start: past 2038, where 32-bit timestamps end; in the future, so that a backend which expires records by
#: itself keeps them; on a leap day, and with microseconds.
START = datetime(2040, 2, 29, 12, 34, 56, 123456, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
MINUTE = timedelta(minutes=1)

#: Before any record expires: what is loaded at this instant is everything there is.
EVER = datetime.min.replace(tzinfo=UTC)

#: How many calls at a time the parallel tests make.
PARALLEL = 20


class FakeClock:
    """A clock for ``clock=``: stands still until it is advanced."""

    def __init__(self, now: datetime = START) -> None:
        self.now = now

    def __call__(self) -> datetime:
        """Return the instant the clock shows."""
        return self.now

    def advance(self, by: timedelta) -> None:
        """Move the clock by *by*; backwards too, as real clocks do."""
        self.now += by


def make_record(**fields: Any) -> Record:
    """Return a live record with a fresh id, secret hash and version; *fields* replace its others."""
    return Record(
        **{
            "id": new_id(START),
            "secret_hash": hash_secret(new_secret()),
            "user_id": None,
            "data": '{"theme":"dark"}',
            "version": next_version(0),
            "created_at": START,
            "last_seen_at": START,
            "expires_at": START + timedelta(days=14),
            **fields,
        }
    )


def expecting(record: Record, now: datetime = START) -> Expected:
    """Return what a writer expects that read *record* and writes at *now*."""
    return Expected(record.version, record.secret_hash, now, record)


def following(record: Record, **fields: Any) -> Record:
    """Return the next version of *record*, with *fields* replaced."""
    return record._replace(**{"version": next_version(record.version), **fields})


@pytest.mark.anyio
class BackendConformance:
    """Tells whether a backend keeps the contract in the docstrings of `Backend` and `UserSessions`.

    Subclass it and provide a ``backend`` fixture: an empty backend for each test. The tests of `UserSessions` are
    skipped where the backend lacks its methods.
    """

    @pytest.fixture
    def anyio_backend(self) -> str:
        """Return the event loop to run on: asyncio."""
        return "asyncio"

    @pytest.fixture
    def users(self, backend: Backend) -> UserSessions:
        """Return the backend as one that finds records by their user."""
        if not isinstance(backend, UserSessions):
            pytest.skip(f"{type(backend).__name__} does not find records by their user")
        return backend

    # load

    async def test_load_absent(self, backend: Backend) -> None:
        """An id that was never inserted loads as None."""
        await backend.insert(make_record())
        assert await backend.load(new_id(START), START) is None

    @pytest.mark.parametrize(
        "fields",
        [
            pytest.param({}, id="plain"),
            pytest.param({"user_id": "somebody"}, id="user"),
            pytest.param({"user_id": " \N{GRINNING FACE}é'\"%\\/ "}, id="user-id-of-odd-characters"),
            pytest.param({"user_id": "\N{GRINNING FACE}" * MAX_USER_ID}, id="longest-user-id"),
            pytest.param({"version": 2**62}, id="large-version"),
            pytest.param({"authenticated_at": START - MICROSECOND}, id="authenticated"),
            pytest.param({"idle_timeout": 1}, id="idle-timeout-of-a-second"),
            pytest.param({"idle_timeout": 400 * 24 * 3600}, id="idle-timeout-of-400-days"),
            pytest.param({"persistent": True}, id="persistent"),
            pytest.param({"client": '{"user_agent":"\\u0000 Ünï","ip":"::1"}'}, id="client"),
            pytest.param({"client": "null"}, id="client-that-is-JSON-null"),
            pytest.param({"format": FORMAT + 1}, id="format-of-the-next-release"),
            pytest.param({"secret_hash": bytes(32)}, id="hash-of-zeros"),
            pytest.param({"created_at": START.replace(microsecond=0)}, id="whole-second"),
            pytest.param({"created_at": START.replace(microsecond=1)}, id="one-microsecond"),
            pytest.param({"created_at": START.replace(microsecond=999_999)}, id="999999-microseconds"),
            pytest.param({"expires_at": datetime.max.replace(tzinfo=UTC)}, id="expires-never"),
        ],
    )
    async def test_load_equal(self, backend: Backend, fields: dict[str, Any]) -> None:
        """A loaded record equals the inserted one in every field, and its instants are aware UTC datetimes."""
        record = make_record(**fields)
        await backend.insert(record)
        loaded = await backend.load(record.id, START)
        assert _same(loaded, record)

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param("{}", id="empty"),
            pytest.param('{"a":"\\u0000","\\u0000":1}', id="NUL"),
            pytest.param('{"a":"\N{GRINNING FACE}\U0010ffff","é":"e\N{COMBINING ACUTE ACCENT}"}', id="non-BMP"),
            pytest.param('{"zz":1,"a":2,"Z":3,"":4}', id="key-order"),
            pytest.param('{"a":1e22,"b":-0.0,"c":1.0,"d":5e-324,"e":12345678901234567890123}', id="numbers"),
            pytest.param('{"a":null,"b":true,"c":[],"d":{},"e":[null]}', id="nothings"),
            pytest.param('{"a":"\\\\ \\" \' % :a $1 ? /"}', id="quotes"),
            pytest.param(' { "a" : [ 1 , 2 ] }\n', id="white-space"),
            pytest.param('{"a":' + "[" * 30 + "]" * 30 + "}", id="deep"),
            pytest.param('{"a":"' + "\N{EURO SIGN}" * 21_000 + '"}', id="64-KiB"),
        ],
    )
    async def test_data_text(self, backend: Backend, data: str) -> None:
        """Data comes back as the same text, after an insert and after a replace (R89, R94)."""
        record = make_record(data=data)
        await backend.insert(record)
        loaded = await backend.load(record.id, START)
        assert loaded is not None
        assert loaded.data == data
        changed = following(record, data='{"changed":true}')
        assert await backend.replace(changed, expecting(record))
        assert await backend.replace(following(changed, data=data), expecting(changed))
        loaded = await backend.load(record.id, START)
        assert loaded is not None
        assert loaded.data == data

    async def test_load_expiry(self, backend: Backend) -> None:
        """A record is live up to the last microsecond before its expires_at, at which it has expired (R35)."""
        record = make_record()
        await backend.insert(record)
        assert await backend.load(record.id, record.expires_at - MICROSECOND) == record
        assert await backend.load(record.id, record.expires_at) is None
        assert await backend.load(record.id, record.expires_at + MICROSECOND) is None

    async def test_load_exact_id(self, backend: Backend) -> None:
        """An id is found by all of its 128 bits (R64)."""
        record = make_record()
        await backend.insert(record)
        for bit in range(128):
            assert await backend.load(UUID(int=record.id.int ^ 1 << bit), START) is None

    # insert

    async def test_insert_duplicate(self, backend: Backend) -> None:
        """Inserting an id that is taken raises DuplicateId and overwrites nothing (R5)."""
        record = make_record()
        await backend.insert(record)
        for again in (record, make_record(id=record.id, data='{"stolen":true}')):
            with pytest.raises(DuplicateId):
                await backend.insert(again)
        assert await backend.load(record.id, START) == record

    async def test_insert_parallel(self, backend: Backend) -> None:
        """Of parallel inserts of one id one succeeds, and its record is the one that is kept."""
        first = make_record()
        records = [first, *(make_record(id=first.id) for _ in range(PARALLEL - 1))]

        async def inserted(record: Record) -> bool:
            try:
                await backend.insert(record)
            except DuplicateId:
                return False
            return True

        done = await _in_parallel([partial(inserted, record) for record in records])
        assert sorted(done) == [False] * (PARALLEL - 1) + [True]
        assert await backend.load(first.id, START) == records[done.index(True)]

    async def test_insert_many(self, backend: Backend) -> None:
        """Records inserted in parallel are all kept, each under its own id."""
        records = [make_record(data=f'{{"n":{n}}}') for n in range(PARALLEL)]
        await _in_parallel([partial(backend.insert, record) for record in records])
        assert [await backend.load(record.id, START) for record in records] == records

    # replace

    @pytest.mark.parametrize("known", [True, False])
    async def test_replace(self, backend: Backend, known: bool) -> None:  # noqa: FBT001
        """A record that is as expected is replaced in every field, whether or not the caller has what was read."""
        record = make_record(client="{}", authenticated_at=START, idle_timeout=60, user_id="before")
        await backend.insert(record)
        changed = Record(
            id=record.id,
            secret_hash=hash_secret(new_secret()),
            user_id="after",
            data='{"changed":true}',
            version=next_version(record.version),
            created_at=START + 1 * MICROSECOND,
            last_seen_at=START + 2 * MICROSECOND,
            expires_at=START + timedelta(days=1),
            authenticated_at=None,
            idle_timeout=None,
            persistent=True,
            client=None,
            format=FORMAT + 1,
        )
        expected = expecting(record) if known else expecting(record)._replace(record=None)
        assert await backend.replace(changed, expected) is True
        assert _same(await backend.load(record.id, START), changed)

    @pytest.mark.parametrize(
        "fields",
        [
            pytest.param({"data": '{"changed":true}'}, id="data"),
            pytest.param({"secret_hash": bytes(32)}, id="secret_hash"),
            pytest.param({"user_id": "after"}, id="user_id"),
            pytest.param({"user_id": None}, id="user_id-gone"),
            pytest.param({"created_at": START + MICROSECOND}, id="created_at"),
            pytest.param({"last_seen_at": START + MICROSECOND}, id="last_seen_at"),
            pytest.param({"expires_at": START + MINUTE}, id="expires_at"),
            pytest.param({"authenticated_at": START}, id="authenticated_at"),
            pytest.param({"idle_timeout": 61}, id="idle_timeout"),
            pytest.param({"persistent": True}, id="persistent"),
            pytest.param({"client": None}, id="client"),
            pytest.param({"format": FORMAT + 1}, id="format"),
        ],
    )
    async def test_replace_one_field(self, backend: Backend, fields: dict[str, Any]) -> None:
        """A single field that differs from the record that was read is replaced, and no other is."""
        record = make_record(client="{}", idle_timeout=60, user_id="before")
        await backend.insert(record)
        changed = following(record, **fields)
        assert await backend.replace(changed, expecting(record)) is True
        assert _same(await backend.load(record.id, START), changed)

    @pytest.mark.parametrize("stale", ["version", "secret", "expired"])
    async def test_replace_unexpected(self, backend: Backend, stale: str) -> None:
        """A record with another version or secret, or that has expired, is not replaced and stays as it was (R30)."""
        record = make_record()
        await backend.insert(record)
        assert await backend.replace(following(record), _unmet(record, stale)) is False
        assert await backend.load(record.id, START) == record

    async def test_replace_before_expiry(self, backend: Backend) -> None:
        """A record can be replaced up to the last microsecond before it expires."""
        record = make_record()
        await backend.insert(record)
        changed = following(record)
        assert await backend.replace(changed, expecting(record, record.expires_at - MICROSECOND))
        assert await backend.load(record.id, START) == changed

    async def test_replace_absent(self, backend: Backend) -> None:
        """Replacing never creates a record: neither one that never was nor one that was deleted (R29)."""
        record = make_record()
        assert await backend.replace(following(record), expecting(record)) is False
        await backend.insert(record)
        await backend.delete(record.id)
        assert await backend.replace(following(record), expecting(record)) is False
        assert await backend.load(record.id, EVER) is None

    async def test_replace_same_values(self, backend: Backend) -> None:
        """Replacing a record by an equal one counts as done (R63)."""
        record = make_record()
        await backend.insert(record)
        assert await backend.replace(record, expecting(record)) is True

    async def test_replace_leaves_others(self, backend: Backend) -> None:
        """Replacing, touching and deleting one record leaves all others alone."""
        record, other = make_record(user_id="one"), make_record(user_id="one")
        await backend.insert(record)
        await backend.insert(other)
        changed = following(record, data="{}")
        await backend.replace(changed, expecting(record))
        await backend.touch(record.id, record.secret_hash, now=START + MINUTE, expires_at=START + timedelta(days=15))
        await backend.delete(record.id)
        assert await backend.load(other.id, START) == other

    async def test_replace_parallel(self, backend: Backend) -> None:
        """Of parallel replaces with the same expectation exactly one wins, and what it wrote is what is kept."""
        record = make_record()
        await backend.insert(record)
        changed = [following(record, data=f'{{"n":{n}}}') for n in range(PARALLEL)]
        done = await _in_parallel([partial(backend.replace, each, expecting(record)) for each in changed])
        assert sorted(done) == [False] * (PARALLEL - 1) + [True]
        assert await backend.load(record.id, START) == changed[done.index(True)]

    async def test_replace_loses_no_update(self, backend: Backend) -> None:
        """Parallel writers that load, replace and try again on a miss lose no update (R52)."""
        record = make_record(data="0")
        await backend.insert(record)

        async def count() -> None:
            while True:
                found = await backend.load(record.id, START)
                assert found is not None
                if await backend.replace(following(found, data=str(int(found.data) + 1)), expecting(found)):
                    return

        await _in_parallel([count] * PARALLEL)
        loaded = await backend.load(record.id, START)
        assert loaded is not None
        assert loaded.data == str(PARALLEL)

    async def test_replace_against_delete(self, backend: Backend) -> None:
        """A record deleted while others replace it is gone, whichever came first."""
        for _ in range(PARALLEL):
            record = make_record()
            await backend.insert(record)
            changed = following(record)
            _, deleted, _ = await _in_parallel(
                [
                    partial(backend.replace, changed, expecting(record)),
                    partial(backend.delete, record.id),
                    partial(backend.replace, following(changed), expecting(changed)),
                ]
            )
            assert deleted is True
            assert await backend.load(record.id, EVER) is None

    # touch

    async def test_touch(self, backend: Backend) -> None:
        """A touch sets last_seen_at and moves expires_at forward; version, data and everything else stay (R36)."""
        record = make_record(
            user_id="one", client="{}", authenticated_at=START, idle_timeout=60, persistent=True, data='{"b":1, "a":2}'
        )
        await backend.insert(record)
        now, later = START + MINUTE, record.expires_at + MINUTE + MICROSECOND
        assert await backend.touch(record.id, record.secret_hash, now=now, expires_at=later) is True
        assert _same(await backend.load(record.id, START), record._replace(last_seen_at=now, expires_at=later))

    async def test_touch_never_shortens(self, backend: Backend) -> None:
        """A touch with an earlier expires_at counts as a use but leaves the expiry where it is."""
        record = make_record()
        await backend.insert(record)
        now = START + MINUTE
        assert await backend.touch(record.id, record.secret_hash, now=now, expires_at=now + MICROSECOND) is True
        assert await backend.load(record.id, START) == record._replace(last_seen_at=now)

    async def test_touch_goes_forward(self, backend: Backend) -> None:
        """A touch at or before last_seen_at does nothing."""
        record = make_record()
        await backend.insert(record)
        later = record.expires_at + MINUTE
        for now in (START, START - MICROSECOND):
            assert await backend.touch(record.id, record.secret_hash, now=now, expires_at=later) is False
        assert await backend.load(record.id, START) == record
        assert await backend.touch(record.id, record.secret_hash, now=START + MICROSECOND, expires_at=later) is True

    async def test_touch_wrong_secret(self, backend: Backend) -> None:
        """A touch with another secret's hash does nothing: that secret has been renewed since."""
        record = make_record()
        await backend.insert(record)
        later = record.expires_at + MINUTE
        assert await backend.touch(record.id, bytes(32), now=START + MINUTE, expires_at=later) is False
        assert await backend.load(record.id, START) == record

    async def test_touch_expired(self, backend: Backend) -> None:
        """A touch revives no record: one that expires at this very instant has expired (R30)."""
        record = make_record()
        await backend.insert(record)
        later = record.expires_at + MINUTE
        for now in (record.expires_at, record.expires_at + MICROSECOND):
            assert await backend.touch(record.id, record.secret_hash, now=now, expires_at=later) is False
        assert await backend.load(record.id, START) == record
        last = record.expires_at - MICROSECOND
        assert await backend.touch(record.id, record.secret_hash, now=last, expires_at=later) is True

    async def test_touch_absent(self, backend: Backend) -> None:
        """A touch of an absent or deleted record does nothing, and creates nothing."""
        record = make_record()
        later = record.expires_at + MINUTE
        assert await backend.touch(record.id, record.secret_hash, now=START + MINUTE, expires_at=later) is False
        await backend.insert(record)
        await backend.delete(record.id)
        assert await backend.touch(record.id, record.secret_hash, now=START + MINUTE, expires_at=later) is False
        assert await backend.load(record.id, EVER) is None

    async def test_touch_parallel(self, backend: Backend) -> None:
        """Of parallel touches at one instant one is done; of parallel touches at several, the last stays."""
        record = make_record()
        await backend.insert(record)

        def touch(now: datetime) -> Callable[[], Awaitable[bool]]:
            later = now + timedelta(days=14)
            return partial(backend.touch, record.id, record.secret_hash, now=now, expires_at=later)

        done = await _in_parallel([touch(START + MICROSECOND)] * PARALLEL)
        assert sorted(done) == [False] * (PARALLEL - 1) + [True]
        await _in_parallel([touch(START + n * MINUTE) for n in range(PARALLEL, 0, -1)])
        last = START + PARALLEL * MINUTE
        assert await backend.load(record.id, START) == record._replace(
            last_seen_at=last, expires_at=last + timedelta(days=14)
        )

    async def test_touch_between_read_and_replace(self, backend: Backend) -> None:
        """A touch does not make a replace miss: what the replace expects is still there."""
        record = make_record()
        await backend.insert(record)
        await backend.touch(record.id, record.secret_hash, now=START + MINUTE, expires_at=record.expires_at)
        assert await backend.replace(following(record), expecting(record))

    # delete

    async def test_delete(self, backend: Backend) -> None:
        """Deleting a record tells that it was there; deleting it again, or an id that never was, that it was not."""
        record = make_record()
        await backend.insert(record)
        assert await backend.delete(record.id) is True
        assert await backend.load(record.id, EVER) is None
        assert await backend.delete(record.id) is False
        assert await backend.delete(new_id(START)) is False

    async def test_delete_expected(self, backend: Backend) -> None:
        """A record that is as expected is deleted, and a second time there is none."""
        record = make_record()
        await backend.insert(record)
        assert await backend.delete(record.id, expecting(record)) is True
        assert await backend.load(record.id, EVER) is None
        assert await backend.delete(record.id, expecting(record)) is False

    @pytest.mark.parametrize("stale", ["version", "secret", "expired"])
    async def test_delete_unexpected(self, backend: Backend, stale: str) -> None:
        """A record with another version or secret, or that has expired, is not deleted by one who expects otherwise."""
        record = make_record()
        await backend.insert(record)
        assert await backend.delete(record.id, _unmet(record, stale)) is False
        assert await backend.load(record.id, START) == record

    async def test_delete_parallel(self, backend: Backend) -> None:
        """Of parallel deletes exactly one tells that it deleted the record."""
        record = make_record()
        await backend.insert(record)
        calls = [partial(backend.delete, record.id), partial(backend.delete, record.id, expecting(record))]
        assert sorted(await _in_parallel(calls * (PARALLEL // 2))) == [False] * (PARALLEL - 1) + [True]

    async def test_delete_frees_the_id(self, backend: Backend) -> None:
        """A deleted id may be inserted again."""
        record = make_record()
        await backend.insert(record)
        await backend.delete(record.id)
        await backend.insert(record)
        assert await backend.load(record.id, START) == record

    # purge

    async def test_purge(self, backend: Backend) -> None:
        """A purge deletes what expires at or before its instant and tells how many that were; the rest stays."""
        spans = (-MINUTE, -MICROSECOND, timedelta(0), MICROSECOND, MINUTE)
        records = [make_record(expires_at=START + MINUTE + span) for span in spans]
        for record in records:
            await backend.insert(record)
        assert await backend.purge(START + MINUTE, 100) == 3
        assert [await backend.load(record.id, EVER) for record in records] == [None] * 3 + records[3:]
        assert await backend.purge(START + MINUTE, 100) == 0

    async def test_purge_limit(self, backend: Backend) -> None:
        """A purge deletes no more than its limit, the oldest first."""
        records = [make_record(expires_at=START + n * MICROSECOND) for n in (3, 0, 4, 1, 2)]
        for record in records:
            await backend.insert(record)
        assert await backend.purge(START + MINUTE, 2) == 2
        left = [await backend.load(record.id, EVER) for record in records]
        assert left == [records[0], None, records[2], None, records[4]]
        assert await backend.purge(START + MINUTE, 2) == 2
        assert await backend.purge(START + MINUTE, 2) == 1
        assert await backend.purge(START + MINUTE, 2) == 0

    async def test_purge_nothing(self, backend: Backend) -> None:
        """A purge of an empty backend deletes nothing."""
        assert await backend.purge(START, 1) == 0

    async def test_purge_parallel(self, backend: Backend) -> None:
        """Parallel purges delete every expired record, and no record is counted twice."""
        for n in range(PARALLEL):
            await backend.insert(make_record(expires_at=START + n * MICROSECOND))
        live = make_record()
        await backend.insert(live)

        async def drain() -> int:
            deleted = 0
            while count := await backend.purge(START + MINUTE, 3):
                deleted += count
            return deleted

        assert sum(await _in_parallel([drain] * 4)) == PARALLEL
        assert await backend.load(live.id, START) == live

    async def test_purge_against_touch(self, backend: Backend) -> None:
        """A record that a touch has extended is not deleted by a purge that ran meanwhile (R86)."""
        records = [make_record(expires_at=START + MINUTE) for _ in range(PARALLEL)]
        for record in records:
            await backend.insert(record)
        later = START + timedelta(days=1)
        calls: list[Callable[[], Awaitable[int]]] = [
            partial(backend.touch, record.id, record.secret_hash, now=START + MICROSECOND, expires_at=later)
            for record in records
        ]
        calls.append(partial(backend.purge, START + MINUTE, PARALLEL))
        *touched, _ = await _in_parallel(calls)
        left = [await backend.load(record.id, EVER) for record in records]
        assert [record is not None for record in left] == touched

    # all of them

    async def test_cancelled_call(self, backend: Backend) -> None:
        """A call that is cancelled midway leaves the old record or the new one, and the backend works on."""
        record = make_record()
        await backend.insert(record)
        changed = following(record, data='{"changed":true}')
        async with anyio.create_task_group() as group:

            async def write() -> None:
                await backend.replace(changed, expecting(record))

            group.start_soon(write)
            await checkpoint()
            group.cancel_scope.cancel()
        assert group.cancel_scope.cancel_called
        assert await backend.load(record.id, START) in (record, changed)
        await backend.insert(make_record())

    async def test_aclose(self, backend: Backend) -> None:
        """Closing finishes what is under way; it may be done twice, and the backend may be used again afterwards."""
        records = [make_record() for _ in range(PARALLEL)]
        async with anyio.create_task_group() as group:
            for record in records:
                group.start_soon(backend.insert, record)
            await checkpoint()
            await backend.aclose()
        await backend.aclose()
        assert [await backend.load(record.id, START) for record in records] == records
        await backend.insert(make_record())

    # UserSessions

    async def test_list(self, backend: Backend, users: UserSessions) -> None:
        """A user's live records are listed whole, the most recently seen first."""
        records = [
            make_record(user_id="me", last_seen_at=START + n * MICROSECOND, client="{}", data=f'{{"n":{n}}}')
            for n in (2, 4, 0, 3, 1)
        ]
        for record in records:
            await backend.insert(record)
        await backend.insert(make_record(user_id="you"))
        await backend.insert(make_record(user_id=None))
        await backend.insert(make_record(user_id="me", expires_at=START))
        listed = await users.list_for_user("me", START)
        assert list(listed) == sorted(records, key=lambda record: record.last_seen_at, reverse=True)
        assert all(_same(record, next(r for r in records if r.id == record.id)) for record in listed)

    async def test_list_limit(self, backend: Backend, users: UserSessions) -> None:
        """A list has no more records than its limit, and by default no more than a hundred."""
        records = [make_record(user_id="me", last_seen_at=START - n * MICROSECOND) for n in range(101)]
        for record in records:
            await backend.insert(record)
        assert list(await users.list_for_user("me", START, limit=2)) == records[:2]
        assert list(await users.list_for_user("me", START)) == records[:100]

    async def test_list_now(self, backend: Backend, users: UserSessions) -> None:
        """A list without an instant holds what is live at this moment."""
        now = utc_now()
        live = make_record(user_id="me", expires_at=now + timedelta(days=1))
        over = make_record(user_id="me", expires_at=now - MINUTE)
        await backend.insert(live)
        await backend.insert(over)
        assert list(await users.list_for_user("me")) == [live]

    async def test_list_follows_replace(self, backend: Backend, users: UserSessions) -> None:
        """A record that is bound to another user moves to that user's list, and unbound to nobody's."""
        record = make_record(user_id="me")
        await backend.insert(record)
        bound = following(record, user_id="you")
        await backend.replace(bound, expecting(record))
        assert list(await users.list_for_user("me", START)) == []
        assert list(await users.list_for_user("you", START)) == [bound]
        await backend.replace(following(bound, user_id=None), expecting(bound))
        assert list(await users.list_for_user("you", START)) == []

    async def test_users_are_separate(self, backend: Backend, users: UserSessions) -> None:
        """User ids that look alike are different users, to the list and to the delete."""
        alike = (
            "abc", "Abc", "ABC", "abc ", " abc", "äbc", "abç", "a%", "a_c", "abc/", "abc%20", "abc+", "0", "00",
            "\N{LATIN SMALL LETTER A WITH DIAERESIS}", "a\N{COMBINING DIAERESIS}", "ß", "ss", "null", "None", "*",
        )  # fmt: skip
        records = {user_id: make_record(user_id=user_id) for user_id in alike}
        for record in records.values():
            await backend.insert(record)
        for user_id, record in records.items():
            assert list(await users.list_for_user(user_id, START)) == [record], user_id
        for user_id, record in records.items():
            assert await users.delete_for_user(user_id) == 1, user_id
            assert await backend.load(record.id, START) is None

    async def test_user_id_of_digits(self, backend: Backend, users: UserSessions) -> None:
        """An int stands for its digits."""
        record = make_record(user_id="-123")
        await backend.insert(record)
        assert list(await users.list_for_user(-123, START)) == [record]
        assert await users.delete_for_user(-123) == 1

    @pytest.mark.parametrize("user_id", [None, "", True, 1.0, b"1", "x" * (MAX_USER_ID + 1)], ids=repr)
    async def test_nobody(self, backend: Backend, users: UserSessions, user_id: Any) -> None:
        """What cannot be a user id is refused, and the sessions without a user are safe from it (R40)."""
        record = make_record(user_id=None)
        await backend.insert(record)
        with pytest.raises(InvalidData):
            await users.list_for_user(user_id, START)
        with pytest.raises(InvalidData):
            await users.delete_for_user(user_id)
        with pytest.raises(InvalidData):
            await users.trim_for_user(user_id, 1, newest=record.id, now=START)
        assert await backend.load(record.id, START) == record

    async def test_delete_for_user(self, backend: Backend, users: UserSessions) -> None:
        """All of a user's records are deleted and counted, nobody else's (R39)."""
        mine = [make_record(user_id="me") for _ in range(3)]
        others = [make_record(user_id="you"), make_record(user_id=None)]
        for record in [*mine, *others]:
            await backend.insert(record)
        assert await users.delete_for_user("me") == 3
        assert [await backend.load(record.id, EVER) for record in mine] == [None] * 3
        assert [await backend.load(record.id, EVER) for record in others] == others
        assert await users.delete_for_user("me") == 0

    async def test_delete_for_user_keep(self, backend: Backend, users: UserSessions) -> None:
        """The one record to keep is kept, if it is the user's; an id of somebody else's keeps nothing of the user's."""
        mine = [make_record(user_id="me") for _ in range(3)]
        other = make_record(user_id="you")
        for record in [*mine, other]:
            await backend.insert(record)
        assert await users.delete_for_user("me", keep=mine[1].id) == 2
        assert [await backend.load(record.id, EVER) for record in mine] == [None, mine[1], None]
        assert await users.delete_for_user("me", keep=other.id) == 1
        assert await backend.load(other.id, EVER) == other

    async def test_delete_for_user_against_replace(self, backend: Backend, users: UserSessions) -> None:
        """Once a user's records are deleted, no replace under way brings one back (R39)."""
        records = [make_record(user_id="me") for _ in range(PARALLEL)]
        for record in records:
            await backend.insert(record)
        calls: list[Callable[[], Awaitable[int]]] = [
            partial(backend.replace, following(record), expecting(record)) for record in records
        ]
        calls.append(partial(users.delete_for_user, "me"))
        *_, deleted = await _in_parallel(calls)
        assert deleted == PARALLEL
        assert list(await users.list_for_user("me", EVER)) == []

    async def test_trim(self, backend: Backend, users: UserSessions) -> None:
        """Of a user's live records the most recently seen are kept; of those seen at one instant, the one that is named
        (R41).
        """
        spans = (3, 0, 1, 2, 2, 2)
        mine = [make_record(user_id="me", last_seen_at=START + n * MICROSECOND) for n in spans]
        others = [
            make_record(user_id="you", last_seen_at=START - MINUTE),
            make_record(user_id=None),
            make_record(user_id="me", expires_at=START),
        ]
        for record in [*mine, *others]:
            await backend.insert(record)
        assert await users.trim_for_user("me", 5, newest=mine[4].id, now=START) == 1
        assert [await backend.load(record.id, EVER) for record in mine] == [mine[0], None, *mine[2:]]
        assert await users.trim_for_user("me", 2, newest=mine[4].id, now=START) == 3
        assert list(await users.list_for_user("me", START)) == [mine[0], mine[4]]
        assert await users.trim_for_user("me", 2, newest=mine[2].id, now=START) == 0
        assert await users.trim_for_user("me", 1, newest=mine[4].id, now=START) == 1
        assert list(await users.list_for_user("me", START)) == [mine[0]]
        assert [await backend.load(record.id, EVER) for record in others] == others

    async def test_trim_by_id(self, backend: Backend, users: UserSessions) -> None:
        """Of records seen at one instant, none of which is named, those with the greater ids are kept (R41)."""
        records = sorted((make_record(user_id="me") for _ in range(PARALLEL)), key=lambda record: record.id.int)
        for record in records:
            await backend.insert(record)
        assert await users.trim_for_user("me", 2, newest=new_id(START), now=START) == PARALLEL - 2
        assert [await backend.load(record.id, START) for record in records] == [None] * (PARALLEL - 2) + records[-2:]

    async def test_trim_parallel(self, backend: Backend, users: UserSessions) -> None:
        """Of parallel inserts, each of which trims afterwards, as many records are left as the limit says (R41)."""

        async def enter(n: int) -> int:
            record = make_record(user_id="me", last_seen_at=START + n * MICROSECOND)
            await backend.insert(record)
            return await users.trim_for_user("me", 3, newest=record.id, now=START)

        ended = await _in_parallel([partial(enter, n) for n in range(PARALLEL)])
        assert sum(ended) == PARALLEL - 3
        left = await users.list_for_user("me", START)
        assert [record.last_seen_at for record in left] == [START + (PARALLEL - n) * MICROSECOND for n in (1, 2, 3)]

    async def test_delete_all(self, backend: Backend, users: UserSessions) -> None:
        """Everybody's records are deleted and counted (R42)."""
        records = [make_record(user_id=user_id) for user_id in ("me", "you", None)]
        for record in records:
            await backend.insert(record)
        assert await users.delete_all() == 3
        assert [await backend.load(record.id, EVER) for record in records] == [None] * 3
        assert await users.delete_all() == 0


def _same(found: Record | None, record: Record) -> bool:
    """Assert that two records are equal, field by field and type by type, and every instant of *found* is in UTC."""
    assert found == record
    for name in Record._fields:
        value, wanted = getattr(found, name), getattr(record, name)
        assert isinstance(value, type(wanted)), name
        if isinstance(value, datetime):
            assert value.utcoffset() == timedelta(0), name
    return True


def _unmet(record: Record, stale: str) -> Expected:
    """Return an expectation that *record* does not meet."""
    return {
        "version": expecting(record)._replace(version=record.version - 1),
        "secret": expecting(record)._replace(secret_hash=bytes(32)),
        "expired": expecting(record, record.expires_at),
    }[stale]


async def _in_parallel(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Return what each of the calls returns, in their order."""
    outcomes: dict[int, T] = {}

    async def run(place: int, call: Callable[[], Awaitable[T]]) -> None:
        outcomes[place] = await call()

    async with anyio.create_task_group() as group:
        for place, call in enumerate(calls):
            group.start_soon(run, place, call)
    return [outcomes[place] for place in range(len(calls))]
