"""What strangers can send and broken storage can hold, as functions of bytes for a fuzzer to drive.

Each raises for a broken promise and for nothing else. `test_targets.py` runs them on the saved corpus and on random
bytes, ``python3 dev.py fuzz`` under atheris, which looks for input that takes new paths.
"""

import asyncio
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

from sqlsessions import cookies
from sqlsessions.backends.connections import checked
from sqlsessions.backends.memory import InMemoryBackend
from sqlsessions.credentials import CookieSigner, Credential
from sqlsessions.errors import CorruptData, InvalidData
from sqlsessions.events import Event
from sqlsessions.manager import SessionManager
from sqlsessions.payload import Limits, decode, encode
from sqlsessions.record import Expected, Record, Timeouts

#: CPU seconds that reading 64 KiB may take (R22), and the bytes that this is said of.
LIMIT = 0.02
LARGE = 64 * 1024
#: How much slower the code is made by being watched.
slack = 1.0

NAME = "__Host-session"
NOW = datetime(2040, 2, 29, 12, 34, 56, 123456, tzinfo=UTC)
SIGNER = CookieSigner(bytes(range(32)), previous_secret_keys=[bytes(range(32, 64))], cookie_name=NAME)
CREDENTIAL, OTHER = (Credential(UUID(int=number << 76 | 7 << 76), bytes([number]) * 32) for number in (1, 2))
#: The only values that anybody was ever given.
GENUINE = {SIGNER.sign(credential).encode(): credential for credential in (CREDENTIAL, OTHER)}
RECORD = Record(
    id=CREDENTIAL.id,
    secret_hash=CREDENTIAL.secret_hash,
    user_id=None,
    data='{"n":1}',
    version=7,
    created_at=NOW - timedelta(days=1),
    last_seen_at=NOW - timedelta(hours=1),
    expires_at=NOW + timedelta(days=1),
)
#: So many that no data of a fuzzer's is refused for its size.
ROOMY = Limits(2**30, 2**30)

_VALUES = re.compile(rb"(?:^|;)[ \t]*%b[ \t]*=([^;]*)" % NAME.encode())


def cookie(data: bytes) -> None:
    """Read Cookie headers, one a line: exactly our cookie is found, and only what we have signed is believed (R7, R21).

    A regular expression says what there is to find.
    """
    headers = [(b"cookie", line) for line in data.split(b"\n")]
    values = timed(lambda: cookies.read(headers, NAME.encode()), len(data))
    sent = dict.fromkeys(value.strip(b" \t") for _, line in headers for value in _VALUES.findall(line))
    assert values == (list(sent) if len(sent) <= cookies.MAX_CANDIDATES else None)
    visit, _ = timed(lambda: manager(InMemoryBackend()).open(values), len(data))
    genuine = [GENUINE[found] for found in values or () if found in GENUINE]
    assert visit._credential == (genuine[0] if len(genuine) == 1 else None)


def value(data: bytes) -> None:
    """Verify a signed value: only what we have signed is believed, in the one spelling it was given in (R7)."""
    unsigned = timed(lambda: SIGNER.unsign(data), len(data))
    assert (None if unsigned is None else unsigned[0]) == GENUINE.get(data)


def document(data: bytes) -> None:
    """Decode stored data: it is corrupt, or comes back the same, and reading it is never taken for a change (R99)."""
    text = data.decode("utf-8", "surrogateescape")
    try:
        read = timed(lambda: decode(text), len(data))
    except CorruptData:
        return
    canonical = encode(read, ROOMY)
    assert encode(decode(canonical), ROOMY) == canonical
    assert encode(read, ROOMY, known=text) == canonical
    assert encode(read, Limits(1, 1), known=text) == text


def row(data: bytes) -> None:
    """Load a session from a row of any values in any columns: never an error, and a reason wherever it is refused
    (R99).
    """
    kinds, rest = data[: len(Record._fields)].ljust(len(Record._fields), b"\0"), data[len(Record._fields) :]
    columns = {name: column(kind, rest, name) for name, kind in zip(Record._fields, kinds, strict=True)}
    asyncio.run(_visited(columns))


async def _visited(columns: dict[str, Any]) -> None:
    events: list[str] = []
    visit, session = manager(OneRow(columns), events).open([SIGNER.sign(CREDENTIAL).encode()])
    await visit.load()
    loaded = visit.record is not None
    assert events == [] or (not loaded and events in (["corrupt"], ["superseded"], ["expired"]))
    assert loaded == (events == [])
    assert loaded or not session
    await visit.commit()
    session["another"] = 1
    # Data that was stored under larger limits can be read; what is too large for today's is refused for that.
    try:
        await visit.commit()
    except InvalidData as error:
        if "the limit is" not in str(error):
            raise


class OneRow(InMemoryBackend):
    """A database that answers with one row, read as `SQLAlchemyBackend` reads rows, and lets everything be written."""

    def __init__(self, columns: dict[str, Any]) -> None:
        super().__init__()
        self._columns = columns

    async def load(self, id: UUID, now: datetime) -> Record | None:  # noqa: A002
        """Return the row."""
        return checked(list(self._columns.values()))

    async def replace(self, record: Record, expected: Expected) -> bool:
        """Replace it."""
        return True

    async def touch(self, id: UUID, secret_hash: bytes, *, now: datetime, expires_at: datetime) -> bool:  # noqa: A002
        """Touch it."""
        return True

    async def delete(self, id: UUID, expected: Expected | None = None) -> bool:  # noqa: A002
        """Delete it."""
        return True


def column(kind: int, rest: bytes, name: str) -> object:
    """Return what a driver may have found in a column: what belongs there, or something else made of *rest*."""
    number = int.from_bytes(rest[kind % 7 :][:8], signed=True)
    text = rest.decode("utf-8", "surrogateescape")
    return (
        getattr(RECORD, name), None, number, number % 4096, bool(number & 1), number / 3, rest, text, text[:300],
        datetime.fromtimestamp(number % 2**37, timezone(timedelta(hours=number % 23 - 11))),
        datetime.fromtimestamp(number % 2**37, UTC), datetime.max.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC),
        NOW, [number], {"n": number},
    )[kind % 16]  # fmt: skip


def manager(backend: InMemoryBackend, events: list[str] | None = None) -> SessionManager:
    """Return a manager with the default settings."""
    noted: list[str] = [] if events is None else events

    def note(event: Event) -> None:
        noted.append(event.kind)

    return SessionManager(
        backend=backend, signer=SIGNER, timeouts=Timeouts(), limits=Limits(), on_event=note, clock=lambda: NOW
    )


def timed(call: Callable[[], Any], size: int) -> Any:
    """Return what *call* returns; fail if it takes more CPU time than reading *size* bytes may.

    A collection of garbage may fall into any one call, so that the shortest of three counts.
    """
    error: CorruptData | None = None
    result, spent = None, 0.0
    for _ in range(3):
        begun = time.process_time()
        try:
            result = call()
        except CorruptData as corrupt:
            error = corrupt
        spent = time.process_time() - begun
        if spent <= LIMIT * slack * max(1, size / LARGE):
            break
    else:
        raise AssertionError(f"{size} bytes took {spent * 1000:.0f} ms")
    if error is not None:
        raise error
    return result


TARGETS: dict[str, Callable[[bytes], None]] = {"cookie": cookie, "value": value, "document": document, "row": row}
