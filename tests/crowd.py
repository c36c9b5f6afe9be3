"""A table as large as a busy site's: up to millions of sessions, made by the server itself in seconds."""

import hashlib
from datetime import timedelta
from uuid import UUID

from sqlsessions.testing import START
from tests.looking import sql

#: Each session began a second after the one before it, the last of them at this instant.
NOW = START

#: The sessions per user; three of ten belong to nobody.
PER_USER = 3

#: The number is noise that the server and Python agree about. Sessions expire in about the order in which they began,
#: but not quite: some people come back. So a tenth of the table at a time is dealt out by a step prime to its size.
_FILL = """
INSERT INTO web_sessions
    (id, secret_hash, user_id, data, version, created_at, last_seen_at, expires_at, persistent, format)
SELECT
    (lpad(to_hex((extract(epoch FROM created_at) * 1000)::bigint), 12, '0')
        || '7' || left(noise, 3) || '8' || right(noise, 15))::uuid,
    sha256(convert_to(noise, 'utf8')),
    CASE WHEN number % 10 < 7 THEN (number / {per_user})::text END,
    ('{{"cart":[' || rtrim(repeat(
        '{{"sku":"' || left(noise, 8) || '","name":"Item ' || right(noise, 12) || '","quantity":1,"price":"12.90"}},',
        {items}), ',') || ']}}')::json,
    number,
    created_at,
    created_at,
    timestamptz '{now}' + (rank - {expired} + 1) * interval '1 second',
    false,
    1
FROM generate_series(0, {rows} - 1) number
CROSS JOIN LATERAL (SELECT
    md5(number::text) AS noise,
    timestamptz '{now}' - ({rows} - 1 - number) * interval '1 second' AS created_at,
    number / {tenth} * {tenth} + number % {tenth} * 7919::bigint % {tenth} AS rank
) AS computed
"""

_CONSTRAINTS = """
SELECT conname AS name, pg_get_constraintdef(oid) AS definition FROM pg_constraint
WHERE conrelid = 'web_sessions'\\:\\:regclass AND contype = 'p'
"""

_INDEXES = """
SELECT relname AS name, pg_get_indexdef(indexrelid) AS definition FROM pg_index JOIN pg_class ON oid = indexrelid
WHERE indrelid = 'web_sessions'\\:\\:regclass AND NOT indisprimary
"""


async def fill(url: str, rows: int, *, expired: int = 0, items: int = 1) -> None:
    """Add *rows* sessions to the empty table, of which *expired* have expired by `NOW`, with *items* in each cart.

    An item takes 75 bytes. *rows* is a multiple of ten; the table is vacuumed and analyzed, as after a quiet hour.
    """
    statement = _FILL.format(
        rows=rows, expired=expired, items=items, tenth=rows // 10, per_user=PER_USER, now=NOW.isoformat()
    )
    # Indexes made at the end take half the time.
    constraints, indexes = await sql(url, _CONSTRAINTS), await sql(url, _INDEXES)
    await sql(
        url,
        *(f"ALTER TABLE web_sessions DROP CONSTRAINT {row.name}" for row in constraints),
        *(f"DROP INDEX {row.name}" for row in indexes),
        statement.replace(":", "\\:"),  # the colons of a cast are no parameters
        *(f"ALTER TABLE web_sessions ADD CONSTRAINT {row.name} {row.definition}" for row in constraints),
        *(row.definition for row in indexes),
        "VACUUM (ANALYZE) web_sessions",
    )


def id_of(number: int, rows: int) -> UUID:
    """Return the id of the session with this number, from 0, among *rows*."""
    milliseconds = int((NOW - timedelta(seconds=rows - 1 - number)).timestamp() * 1000)
    noise = hashlib.md5(str(number).encode(), usedforsecurity=False).hexdigest()
    return UUID(f"{milliseconds:012x}7{noise[:3]}8{noise[-15:]}")
