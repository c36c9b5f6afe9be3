"""The arithmetic of expiry, and what a record shows of itself."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqlsessions.errors import ConfigurationError, InvalidData
from sqlsessions.record import MAX_USER_ID, Expected, Record, Timeouts, next_version, principal, utc_now
from sqlsessions.testing import MICROSECOND, MINUTE, START, FakeClock, expecting, following, make_record

DAY = timedelta(days=1)


def record(**fields: Any) -> Record:
    """Return a record whose stored expiry is no limit."""
    return make_record(**{"expires_at": datetime.max.replace(tzinfo=UTC), **fields})


# principals


@pytest.mark.parametrize(
    ("user_id", "stored"),
    [(None, None), ("me", "me"), (1, "1"), (0, "0"), (-5, "-5"), (10**254, "1" + "0" * 254), ("x" * 255, "x" * 255)],
    ids=lambda value: repr(value)[:20],
)
def test_principal(user_id: object, stored: str | None) -> None:
    """A user id is kept as a str: an int as its digits, None as nobody."""
    assert principal(user_id) == stored


@pytest.mark.parametrize(
    "user_id",
    ["", True, False, 1.0, b"me", ["me"], "x" * (MAX_USER_ID + 1), 10**255, 10**5000, "a\0b", "\ud800"],
    ids=lambda value: type(value).__name__,
)
def test_no_principal(user_id: object) -> None:
    """What a column cannot hold, and what could be taken for somebody else, is refused."""
    with pytest.raises(InvalidData, match="a user id must be"):
        principal(user_id)


def test_principal_is_a_plain_str() -> None:
    """A subclass of str is kept as a str, so that no driver meets it."""

    class Name(str):
        __slots__ = ()

    assert type(principal(Name("me"))) is str


# records


def test_repr_of_record() -> None:
    """A record shows its id and expiry, and nothing that anybody could use or would rather not see in a log."""
    secret = make_record(
        user_id="somebody", data='{"password":"123"}', secret_hash=b"hash of the secret", client='"ip"'
    )
    assert repr(secret) == f"<Record {secret.id} expires_at=2040-03-14T12:34:56.123456+00:00>"
    assert repr(expecting(secret)) == f"<Expected version={secret.version}>"


@pytest.mark.parametrize(
    ("change", "matches"),
    [
        ({}, True),
        ({"version": 1}, False),
        ({"secret_hash": b"another"}, False),
        ({"now": START + 14 * DAY - MICROSECOND}, True),
        ({"now": START + 14 * DAY}, False),
    ],
    ids=str,
)
def test_expected(change: dict[str, Any], matches: bool) -> None:
    """A record matches with the same version and secret, before it expires."""
    found = make_record()
    assert expecting(found)._replace(**change).matches(found) is matches


def test_utc_now() -> None:
    """The clock used by default is aware and in UTC."""
    assert utc_now().utcoffset() == timedelta(0)


# timeouts


@pytest.mark.parametrize("name", ["idle", "absolute", "anonymous"])
@pytest.mark.parametrize("span", [timedelta(0), timedelta(microseconds=999_999), -DAY], ids=str)
def test_timeouts_refused(name: str, span: timedelta) -> None:
    """A timeout of less than a second is refused, by the name of its setting."""
    with pytest.raises(ConfigurationError, match=rf"^{name}\w*_timeout"):
        Timeouts(**{name: span})


@pytest.mark.parametrize(
    ("fields", "expires_at"),
    [
        ({}, START + 2 * DAY),
        ({"last_seen_at": START + DAY}, START + 3 * DAY),
        ({"last_seen_at": START + 9 * DAY}, START + 10 * DAY),
        ({"last_seen_at": START + 9 * DAY, "authenticated_at": START + 8 * DAY}, START + 11 * DAY),
        ({"idle_timeout": 60}, START + MINUTE),
        ({"idle_timeout": 10**6 * 86400}, START + 10 * DAY),
    ],
    ids=str,
)
def test_expires_at(fields: dict[str, Any], expires_at: datetime) -> None:
    """A session ends after its own or the configured idle timeout, and in any case the absolute one after login."""
    timeouts = Timeouts(idle=2 * DAY, absolute=10 * DAY)
    assert timeouts.expires_at(record(**fields)) == expires_at


@pytest.mark.parametrize(
    ("fields", "idle"),
    [({}, MINUTE), ({"user_id": "ada"}, DAY), ({"idle_timeout": 3600}, 60 * MINUTE)],
    ids=["anonymous", "bound", "own"],
)
def test_anonymous_idle_timeout(fields: dict[str, Any], idle: timedelta) -> None:
    """Sessions without a user may have an idle timeout of their own, which yields to the one of a session (R47)."""
    assert Timeouts(idle=DAY, anonymous=MINUTE).idle_of(record(**fields)) == idle


def test_never() -> None:
    """Timeouts beyond the calendar mean its last instant."""
    timeouts = Timeouts(idle=timedelta.max, absolute=timedelta.max)
    assert timeouts.expires_at(record()) == datetime.max.replace(tzinfo=UTC)
    assert not timeouts.expired(record(), START)


@pytest.mark.parametrize(
    ("stored", "configured", "age", "expired"),
    [
        (DAY, 2 * DAY, DAY - MICROSECOND, False),
        (DAY, 2 * DAY, DAY, True),  # lengthening revives nobody
        (2 * DAY, DAY, DAY - MICROSECOND, False),
        (2 * DAY, DAY, DAY, True),  # shortening ends those who are there
    ],
    ids=["live", "stored-over", "configured-live", "configured-over"],
)
def test_expired(stored: timedelta, configured: timedelta, age: timedelta, expired: bool) -> None:
    """A session is over at the earlier of what was stored and what the timeouts configured now say (R35, R38)."""
    assert Timeouts(idle=configured).expired(record(expires_at=START + stored), START + age) is expired


def test_absolute_timeout_is_kept() -> None:
    """However often a session is used, it ends when its absolute timeout does (R34)."""
    timeouts, clock = Timeouts(), FakeClock()
    used = record()
    while not timeouts.expired(used, clock()):
        used = used._replace(last_seen_at=clock(), expires_at=timeouts.expires_at(used._replace(last_seen_at=clock())))
        clock.advance(timedelta(hours=6))
    assert clock() == START + timeouts.absolute


@pytest.mark.parametrize(
    ("idle", "own", "interval"),
    [
        (14 * DAY, None, 5 * MINUTE),
        (50 * MINUTE, None, 5 * MINUTE),
        (10 * MINUTE, None, MINUTE),
        (14 * DAY, 60, timedelta(seconds=6)),
        (10 * MINUTE, 14 * 86400, 5 * MINUTE),
    ],
    ids=str,
)
def test_touch_interval(idle: timedelta, own: int | None, interval: timedelta) -> None:
    """A touch is due after five minutes, or a tenth of a short idle timeout; not a microsecond earlier."""
    timeouts, seen = Timeouts(idle=idle), record(idle_timeout=own)
    assert timeouts.touch_interval(seen) == interval
    assert timeouts.touch_due(seen, START + interval)
    assert not timeouts.touch_due(seen, START + interval - MICROSECOND)
    assert not timeouts.touch_due(seen, START - DAY)


spans = st.timedeltas(min_value=timedelta(seconds=1), max_value=timedelta.max)
instants = st.datetimes(min_value=datetime(2000, 1, 1), max_value=datetime(9000, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


@given(
    idle=spans, absolute=spans, anonymous=st.none() | spans, created=instants, seen=instants, now=instants,
    own=st.none() | st.integers(1, 2**31 - 1),
)  # fmt: skip
def test_expiry_is_consistent(
    *, idle: timedelta, absolute: timedelta, anonymous: timedelta | None, created: datetime, seen: datetime,
    now: datetime, own: int | None,
) -> None:  # fmt: skip
    """For any timeouts and instants: never an error, never beyond either timeout, and over exactly from then on."""
    timeouts = Timeouts(idle=idle, absolute=absolute, anonymous=anonymous)
    found = record(created_at=created, last_seen_at=seen, idle_timeout=own)
    end = timeouts.expires_at(found)
    assert end.utcoffset() == timedelta(0)
    assert end - seen <= timeouts.idle_of(found)
    assert end - created <= absolute
    assert timeouts.expired(found, now) is (now >= end)


# what the tests are made with


def test_fake_clock() -> None:
    """A fake clock stands still until it is advanced."""
    clock = FakeClock()
    assert clock() == clock() == START
    clock.advance(DAY)
    assert clock() == START + DAY
    clock.advance(-2 * DAY)
    assert clock() == START - DAY


def test_make_record() -> None:
    """Records made for tests differ in id, secret and version, and are otherwise what was asked for."""
    one, other = make_record(), make_record(data="{}")
    assert one.id != other.id
    assert one.secret_hash != other.secret_hash
    assert one.version != other.version
    assert other.data == "{}"
    assert following(one).version > one.version
    assert following(one, data="{}").data == "{}"
    assert Expected(one.version, one.secret_hash, START, one) == expecting(one)


def test_versions() -> None:
    """A version is greater than the one before, by a random amount; two thousand million of them fit in 64 bits."""
    assert all(7 < next_version(7) <= 7 + 2**32 for _ in range(1000))
    assert len({next_version(7) for _ in range(1000)}) == 1000
    assert 2**31 * 2**32 <= 2**63
    assert all(0 <= next_version(2**63 - 1) < 2**32 for _ in range(1000))
