"""The stored row and the arithmetic of its expiry. No I/O, no clock of its own: every function is given the instant."""

import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from sqlsessions.errors import BackendError, ConfigurationError, InvalidData

#: The layout of a row that this version writes. Readers tolerate higher numbers, so that during a rolling deploy N
#: and N+1 share a table.
FORMAT = 1


#: The longest interval between two touches of a session in use.
_TOUCH = timedelta(minutes=5)

#: Characters of a user id: the width of its column.
MAX_USER_ID = 255

#: Fewer than 255 decimal digits and a sign.
_FEW_BITS = 800
#: More than 255 decimal digits, and fewer than the 4,300 that Python refuses to print.
_MANY_BITS = 10_000


def utc_now() -> datetime:
    """Return the current instant as an aware UTC datetime: the clock used unless another is injected."""
    return datetime.now(UTC)


def principal(user_id: object) -> str | None:
    """Return *user_id* as a record keeps it: a str or int as str, None as None; raise `InvalidData` for anything else.

    1 and "1" are one user. True is not 1 here, and an empty str is nobody, which must not be listed or revoked as if
    it were somebody.
    """
    if user_id is None:
        return None
    if type(user_id) is int:
        bits = user_id.bit_length()
        if bits < _FEW_BITS:
            return str(user_id)
        if bits < _MANY_BITS:
            user_id = str(user_id)
    if not isinstance(user_id, str) or not 1 <= len(user_id) <= MAX_USER_ID or not _storable(user_id):
        raise InvalidData(
            f"a user id must be an int, or a str of 1 to {MAX_USER_ID} characters that text columns take; "
            f"this is {type(user_id).__name__}"
        )
    return str(user_id)


class Record(NamedTuple):
    """One stored session: what a backend keeps. Instants are aware UTC datetimes.

    *id*: the public handle; safe to log and to show, it authenticates nobody. *secret_hash*: SHA-256 of the secret half
    that only the cookie holds. *user_id*: the principal this session is bound to, or None for an anonymous session.
    *data*: the payload, as the JSON text of one object; a backend passes it through unchanged. *version*: changes with
    every ``replace``; the increments are random, so that a writer recognises its own write by it. *created_at*: when it
    was first stored. *last_seen_at*: when a use of it was last noted. *expires_at*: when it ends, if it is not used
    again. *authenticated_at*: when a principal was last bound, or unbound; the start of the absolute timeout and of
    "confirm your password" checks. *idle_timeout*: this session's own in seconds ("remember me"), or None for the
    configured one. *persistent*: whether the cookie outlives the browser. *client*: where the session was opened, as
    JSON text with ``ip`` and ``user_agent``; None unless ``record_client=True``. *format*: the layout that the row was
    written in.
    """

    id: UUID
    secret_hash: bytes
    user_id: str | None
    data: str
    version: int
    created_at: datetime
    last_seen_at: datetime
    expires_at: datetime
    authenticated_at: datetime | None = None
    idle_timeout: int | None = None
    persistent: bool = False
    client: str | None = None
    format: int = FORMAT

    def written(self, data: str) -> "Record":
        """Return the record with other *data*, as this version writes it: what most writes change, and no more.

        Whatever layout it was read in (R100), it is in ours then.
        """
        # By places, since by names it takes five times as long.
        return tuple.__new__(Record, (*self[:3], data, next_version(self.version), *self[5:12], FORMAT))

    def __repr__(self) -> str:
        """Show the id and the expiry only: data and hash stay out of logs (OWASP Logging Cheat Sheet)."""
        return f"<Record {self.id} expires_at={self.expires_at.isoformat()}>"


class Expected(NamedTuple):
    """What a row must still be for a compare-and-swap to write it: the version and secret read, and not expired at
    *now*.
    """

    version: int
    secret_hash: bytes
    now: datetime
    #: The record as it was read, if the caller has it. A backend may leave alone
    #: what is the same in the new one.
    record: Record | None = None

    def __repr__(self) -> str:
        return f"<Expected version={self.version}>"

    def matches(self, record: Record) -> bool:
        """Tell whether *record* is still the one that was read; an expiry equal to *now* has expired."""
        return (
            record.version == self.version and record.secret_hash == self.secret_hash and record.expires_at > self.now
        )


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a session lives: after its last use (idle), and at all (absolute, from the last login)."""

    idle: timedelta = timedelta(days=14)
    absolute: timedelta = timedelta(days=30)
    #: The idle timeout of sessions without a user, if they have one of their own.
    anonymous: timedelta | None = None

    def __post_init__(self) -> None:
        spans = {"idle_timeout": self.idle, "absolute_timeout": self.absolute, "anonymous_idle_timeout": self.anonymous}
        for name, value in spans.items():
            if value is None and name == "anonymous_idle_timeout":
                continue
            if not is_span(value, timedelta(seconds=1)):
                raise ConfigurationError(f"{name} must be a timedelta of at least one second, not {value!r:.80}")

    def idle_of(self, record: Record) -> timedelta:
        """Return the idle timeout in force for *record*: its own, else the configured one."""
        if record.idle_timeout is not None:
            return timedelta(seconds=record.idle_timeout)
        return self.idle if self.anonymous is None or record.user_id is not None else self.anonymous

    def touch_interval(self, record: Record) -> timedelta:
        """Return how long a touch waits after the previous one: five minutes, or a tenth of a short idle timeout."""
        return min(_TOUCH, self.idle_of(record) / 10)

    def expires_at(self, record: Record) -> datetime:
        """Return the instant *record* ends if it is never used again after its ``last_seen_at``."""
        begun = record.authenticated_at or record.created_at
        return min(_later(record.last_seen_at, self.idle_of(record)), _later(begun, self.absolute))

    def expired(self, record: Record, now: datetime) -> bool:
        """Tell whether *record* is over at *now*.

        The timeouts configured now are applied to the stored instants, so that shortening them in the configuration
        ends existing sessions too; lengthening them never revives one.
        """
        return (
            record.expires_at <= now
            or now - record.last_seen_at >= self.idle_of(record)
            or now - (record.authenticated_at or record.created_at) >= self.absolute
        )

    def touch_due(self, record: Record, now: datetime) -> bool:
        """Tell whether enough time has passed for a use of *record* at *now* to be worth a write."""
        since = now - record.last_seen_at
        return since >= _TOUCH or since * 10 >= self.idle_of(record)


def is_span(value: object, least: timedelta) -> bool:
    """Tell whether *value* is a timedelta, which a setting in seconds is not, and no less than *least*."""
    return isinstance(value, timedelta) and value >= least


def checked_id(id: UUID) -> UUID:  # noqa: A002
    """Return *id*; raise `BackendError` for what is no UUID, whose text a driver might take, but not among others."""
    if isinstance(id, UUID):
        return id
    raise BackendError(f"a session's id is a UUID, not {type(id).__name__}")


def checked_limit(limit: int) -> int:
    """Return *limit*; raise `BackendError` for a negative one, which databases take for none, or refuse."""
    if limit < 0:
        raise BackendError(f"a limit is at least 0, not {limit}")
    return limit


def next_version(version: int) -> int:
    """Return a version that no other writer following *version* will choose (but for one chance in four thousand
    million).

    A writer whose connection broke after sending reads the row again and knows by this whether the write is its own.
    2³¹ writes fit, and then it begins anew: all that matters is that it is another.
    """
    # A call of the operating system would cost more than all the rest of an update.
    return (version + 1 + random.getrandbits(32)) % 2**63  # not a secret


def _storable(text: str) -> bool:
    """Tell whether every database takes *text* in a column: PostgreSQL refuses NUL, UTF-8 a lone surrogate."""
    if "\0" in text:
        return False
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _later(instant: datetime, span: timedelta) -> datetime:
    try:
        return instant + span
    except OverflowError:  # "never", as a timedelta of thousands of years
        return datetime.max.replace(tzinfo=UTC)
