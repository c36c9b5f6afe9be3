"""What the size of the table costs, and what its storage settings are worth: `python -m benchmarks.scale [part …]`.

Parts: `fillfactor` (room on the page for updates, 15 minutes), `purge` (half a million sessions while others read, 5
minutes), `reads` (a thousand to three million sessions, 3 minutes). Each runs on a PostgreSQL of its own with the
durability that PostgreSQL has by default, takes everything that is compared in turns, and prints medians as Markdown.
"""

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import asyncpg
import sqlalchemy as sa

from sqlsessions import SQLAlchemyBackend, migrate, purge
from sqlsessions.purge import CLOCK_TOLERANCE
from sqlsessions.record import Record
from sqlsessions.schema import Spelled, Statements, sessions_table
from sqlsessions.testing import following, make_record
from tests.crowd import NOW, fill, id_of
from tests.looking import sql
from tests.servers import PostgresServer

#: Unlike the tests' server, this one would survive a power failure.
DURABLE = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_buffers": "1GB",
    "max_wal_size": "8GB",
}
#: Minutes of updates are pressed into seconds here, and so is the pause between two looks for what to vacuum.
HURRIED = {**DURABLE, "autovacuum_naptime": "1s"}

FILLFACTORS = (60, 70, 80, 90, 100)
#: Bytes of JSON in one session.
SIZES = (200, 2_000)
SESSIONS = 2_000
UPDATES = 10_000
CLIENTS = 8
#: How often a session is changed in its life, where that is what is measured.
LIFE = 10

ROWS, EXPIRED = 1_000_000, 500_000
BATCH_SIZES = (1_000, 2_000, 5_000)
#: Readers that each rest between two reads: requests as they come, not as many as the machine can take.
READERS, REST = 4, 0.005

TABLE_SIZES = (1_000, 100_000, 1_000_000, 3_000_000)
READS = 2_000


# Room on the page


@dataclass(frozen=True)
class Cell:
    """What one kind of table went through."""

    load: str
    size: int
    vacuumed: bool
    fillfactor: int


@dataclass(frozen=True)
class Wear:
    """What a load of updates left of a table."""

    #: HOT updates among all.
    hot: float
    updates_per_second: float
    heap_mb: float
    index_mb: float
    #: Pages of table, index and TOAST looked at per read.
    buffers: float


async def measure_fillfactor(server: PostgresServer, rounds: int) -> None:
    """Print what updates do to a table, by its fillfactor."""
    cells = [Cell(*cell) for cell in itertools.product(("steady", "growing"), SIZES, (False, True), FILLFACTORS)]
    found: dict[Cell, list[Wear]] = {cell: [] for cell in cells}
    for turn in range(rounds):
        for cell in random.sample(cells, len(cells)):
            found[cell].append(await worn(server, cell))
            _say(f"fillfactor, round {turn + 1}: {cell} {found[cell][-1]}")
    head = [
        "load",
        "bytes",
        "autovacuum",
        "fillfactor",
        "HOT %",
        "updates/s",
        "heap MB",
        "indexes MB",
        "pages per read",
    ]
    _table(
        head,
        [
            [
                cell.load,
                f"{cell.size:,}",
                "on" if cell.vacuumed else "off",
                str(cell.fillfactor),
                *(f"{_middle(wears, name) * scale:,.{digits}f}" for name, scale, digits in _SHOWN),
            ]
            for cell, wears in found.items()
        ],
    )


_SHOWN = (("hot", 100, 1), ("updates_per_second", 1, 0), ("heap_mb", 1, 1), ("index_mb", 1, 1), ("buffers", 1, 2))


async def worn(server: PostgresServer, cell: Cell) -> Wear:
    """Return what a load of updates leaves of a table that is new."""
    async with _database(server, "worn") as url:
        await migrate.upgrade(url)
        vacuum = "on" if cell.vacuumed else "off"
        await sql(
            url,
            f"ALTER TABLE web_sessions SET (fillfactor = {cell.fillfactor}, autovacuum_enabled = {vacuum}, "
            f"toast.autovacuum_enabled = {vacuum})",
        )
        clients = [Client(await _connect(url), cell.size) for _ in range(CLIENTS)]
        for client in clients if cell.load == "steady" else []:
            await client.open(SESSIONS // CLIENTS)
        began = time.perf_counter()
        await asyncio.gather(*(client.steady() if cell.load == "steady" else client.growing() for client in clients))
        seconds = time.perf_counter() - began
        before = await _counted(url, clients)
        for client in clients:
            await client.read(READS // CLIENTS)
        after = await _counted(url, clients)
        for client in clients:
            await client.connection.close()
    return Wear(
        hot=before.hot / before.updated,
        updates_per_second=before.updated / seconds,
        heap_mb=before.heap / 1e6,
        index_mb=before.indexes / 1e6,
        buffers=(after.pages - before.pages) / READS,
    )


_COUNTED = """
SELECT n_tup_upd AS updated, n_tup_hot_upd AS hot, pg_table_size(relid) AS heap, pg_indexes_size(relid) AS indexes,
    heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read
    + coalesce(toast_blks_hit + toast_blks_read + tidx_blks_hit + tidx_blks_read, 0) AS pages
FROM pg_stat_user_tables JOIN pg_statio_user_tables USING (relid) WHERE pg_stat_user_tables.relname = 'web_sessions'
"""


async def _counted(url: str, clients: "Sequence[Client]") -> Any:
    """Return the server's counts, when its processes have told what they kept to themselves."""
    for client in clients:
        await client.connection.execute("SELECT pg_stat_force_next_flush()")
    [counted] = await sql(url, _COUNTED)
    return counted


class Client:
    """Changes sessions of its own, one after the other, as fast as it can."""

    def __init__(self, connection: "asyncpg.Connection[Any]", size: int) -> None:
        self.connection = connection
        self.size = size
        self.records: list[Record] = []
        names = Record._fields
        statements = Statements(sessions_table(sa.MetaData()), "postgresql")
        dialect = sa.make_url("postgresql+asyncpg://").get_dialect()()
        self._load = Spelled(statements.load, dialect)
        self._insert = Spelled(statements.insert.plain, dialect, names)
        self._replace = Spelled(statements.replace.plain, dialect, [name for name in names if name != "id"])

    async def open(self, count: int) -> None:
        """Open sessions that have their size."""
        for _ in range(count):
            await self._open(self._about())

    async def steady(self) -> None:
        """Change sessions by a fifth more or less."""
        for _ in range(UPDATES // CLIENTS):
            await self._change(random.randrange(len(self.records)), self._about())

    async def growing(self) -> None:
        """Open sessions, a few at a time, and let each grow from a tenth of its size to all of it."""
        changes: dict[int, int] = {}
        for _ in range(UPDATES // CLIENTS):
            while len(changes) < SESSIONS // CLIENTS // LIFE:
                changes[len(self.records)] = 1
                await self._open(self.size // LIFE)
            number = random.choice(list(changes))
            changes[number] += 1
            await self._change(number, self.size * changes[number] // LIFE)
            if changes[number] == LIFE:
                del changes[number]

    async def read(self, count: int) -> None:
        """Load sessions."""
        for record in random.choices(self.records, k=count):
            await self.connection.fetch(self._load.text, *self._load.values({"the_id": record.id, "now": NOW}))

    def _about(self) -> int:
        return int(self.size * random.uniform(0.8, 1.2))

    async def _open(self, size: int) -> None:
        record = make_record(data=cart(size))
        await self.connection.execute(self._insert.text, *self._insert.values(_values(record)))
        self.records.append(record)

    async def _change(self, number: int, size: int) -> None:
        before = self.records[number]
        after = self.records[number] = following(before, data=cart(size))
        expected = {"the_id": before.id, "the_version": before.version, "the_secret_hash": before.secret_hash}
        values = self._replace.values(_values(after) | expected | {"now": NOW})
        await self.connection.execute(self._replace.text, *values)


def cart(size: int) -> str:
    """Return a cart of about *size* bytes of JSON that compresses as carts do."""
    items: list[dict[str, Any]] = []
    length = 11
    while length < size:
        sku, quantity = random.getrandbits(32), random.randint(1, 9)
        item = {
            "sku": f"{sku:08x}",
            "name": random.choice(_GOODS),
            "quantity": quantity,
            "price": f"{sku % 9999 / 100}",
        }
        length += len(json.dumps(item, separators=(",", ":"))) + 1
        items.append(item)
    return json.dumps({"cart": items}, separators=(",", ":"))


_GOODS = ("Wool socks, grey", "Tea, green, 100 g", "Notebook A5, lined", "Lamp", "Bicycle bell", "Paper clips, 500")


def _values(record: Record) -> dict[str, Any]:
    return record._asdict()


# The purge beside readers


@dataclass(frozen=True)
class Shift:
    """What readers saw, in milliseconds, and how long the purge took beside them, if there was one."""

    p50: float
    p99: float
    seconds: float


async def measure_purge(server: PostgresServer, rounds: int) -> None:
    """Print how long a purge takes and what it does to others, by the size of its batches."""
    _say(f"purge: filling {ROWS:,} rows")
    await migrate.upgrade(server.create_database("crowd"))
    await fill(server.url("crowd"), ROWS, expired=EXPIRED, items=2)
    rows = []
    for apart in (True, False):
        without: dict[int, list[Shift]] = {size: [] for size in BATCH_SIZES}
        beside: dict[int, list[Shift]] = {size: [] for size in BATCH_SIZES}
        for turn in range(rounds):
            for size in random.sample(BATCH_SIZES, len(BATCH_SIZES)):
                async with _database(server, "purged", "crowd") as url:
                    without[size].append(await shift(url, apart=apart))
                    beside[size].append(await shift(url, apart=apart, batch_size=size))
                _say(f"purge, round {turn + 1}: {size} {'apart' if apart else 'together'} {beside[size][-1]}")
        for size in BATCH_SIZES:
            ratios = [purging.p99 / calm.p99 for purging, calm in zip(beside[size], without[size], strict=True)]
            rows.append(
                [
                    "of another process" if apart else "of the same event loop",
                    f"{size:,}",
                    f"{_middle(beside[size], 'seconds'):.1f}",
                    *(f"{_middle(shifts[size], name):.2f}" for name in ("p50", "p99") for shifts in (without, beside)),
                    f"{median(ratios):.2f}",
                ]
            )
    _table(
        ["reads", "batch", "purge s", "p50 ms without", "p50 ms with", "p99 ms without", "p99 ms with", "p99 ratio"],
        rows,
    )


async def shift(url: str, *, apart: bool, batch_size: int | None = None) -> Shift:
    """Return what readers see while half of the table is purged, or for a while in which it is not."""
    backend = SQLAlchemyBackend(url)
    async with _readers_apart(url) if apart else _readers(backend) as stop:
        seconds = await _purged(backend, batch_size)
        waits = await stop()
    await backend.aclose()
    hundredths = quantiles(waits, n=100)
    return Shift(p50=hundredths[49] * 1e3, p99=hundredths[98] * 1e3, seconds=seconds)


async def _purged(backend: SQLAlchemyBackend, batch_size: int | None) -> float:
    """Return the seconds that the purge took; without a batch size, wait for as long as one may take."""
    began = time.perf_counter()
    if batch_size is None:
        await asyncio.sleep(3)
    else:
        deleted = await purge(backend, batch_size=batch_size, clock=lambda: NOW + CLOCK_TOLERANCE)
        if deleted < EXPIRED:
            sys.exit(f"only {deleted:,} were purged")
    return time.perf_counter() - began


Stop = Callable[[], Awaitable[list[float]]]


@asynccontextmanager
async def _readers(backend: SQLAlchemyBackend) -> AsyncIterator[Stop]:
    """Read with this backend, in this event loop, until stopped; stopping returns the seconds that each read took."""
    waits: list[float] = []
    await _read_once(backend)
    tasks = [asyncio.create_task(_read(backend, waits)) for _ in range(READERS)]

    async def stop() -> list[float]:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return waits

    yield stop


@asynccontextmanager
async def _readers_apart(url: str) -> AsyncIterator[Stop]:
    """Do the same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", "--read", url]
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, limit=1 << 24)
    assert process.stdout is not None
    await process.stdout.readline()

    async def stop() -> list[float]:
        said, _ = await process.communicate(b"")
        waits: list[float] = json.loads(said)
        return waits

    yield stop


async def read_until_told(url: str) -> None:
    """Be the readers in a process of their own: say when they have begun; at the end of input, what they saw."""
    backend = SQLAlchemyBackend(url)
    async with _readers(backend) as stop:
        print("begun", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        print(json.dumps(await stop()))
    await backend.aclose()


async def _read(backend: SQLAlchemyBackend, waits: list[float]) -> None:
    while True:
        waits.append(await _read_once(backend))
        await asyncio.sleep(REST)


async def _read_once(backend: SQLAlchemyBackend, rows: int = ROWS) -> float:
    """Return the seconds that it takes to load a session at random, expired or not."""
    id_ = id_of(random.randrange(rows), rows)
    began = time.perf_counter()
    await backend.load(id_, NOW)
    return time.perf_counter() - began


# Reads by the number of rows


async def measure_reads(server: PostgresServer, rounds: int) -> None:
    """Print what loading a session takes, by the number of those that there are."""
    backends = {}
    for size in TABLE_SIZES:
        _say(f"reads: filling {size:,} rows")
        url = server.create_database(f"rows_{size}")
        await migrate.upgrade(url)
        await fill(url, size, items=2)
        backends[size] = SQLAlchemyBackend(url)
    medians: dict[int, list[float]] = {size: [] for size in TABLE_SIZES}
    for turn in range(rounds + 1):
        waits: dict[int, list[float]] = {size: [] for size in TABLE_SIZES}
        # One read from each in turn, so that whatever else the machine does slows all of them alike.
        for _, size in itertools.product(range(READS), TABLE_SIZES):
            waits[size].append(await _read_once(backends[size], size))
        for size in TABLE_SIZES if turn else ():  # the first round warms the memory
            medians[size].append(median(waits[size]) * 1e6)
            _say(f"reads, round {turn}: {size:,} rows {medians[size][-1]:.0f} µs")
    for backend in backends.values():
        await backend.aclose()
    smallest = TABLE_SIZES[0]
    rows = []
    for size, found in medians.items():
        ratios = [one / other for one, other in zip(found, medians[smallest], strict=True)]
        rows.append([f"{size:,}", f"{median(found):.0f}", f"{median(ratios):.2f}"])
    _table(["rows", "load p50 µs", f"to {smallest:,} rows"], rows)


# Common to all


@asynccontextmanager
async def _database(server: PostgresServer, name: str, template: str = "template1") -> AsyncIterator[str]:
    yield server.create_database(name, template)
    server.drop_database(name)


async def _connect(url: str) -> "asyncpg.Connection[Any]":
    connection: asyncpg.Connection[Any] = await asyncpg.connect(url.replace("+asyncpg", ""), ssl=False)
    return connection


def _middle(found: Sequence[object], name: str) -> float:
    return float(median(getattr(one, name) for one in found))


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _table(head: list[str], rows: list[list[str]]) -> None:
    lines = [head, ["---"] * len(head), *rows]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines), end="\n\n", flush=True)


PARTS = {"fillfactor": measure_fillfactor, "purge": measure_purge, "reads": measure_reads}


def main() -> None:
    """Run the parts that are named, or all."""
    parser = argparse.ArgumentParser("python -m benchmarks.scale", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help="fillfactor, purge, reads; all of them by default")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (default: 5)")
    parser.add_argument("--read", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        asyncio.run(read_until_told(options.read))
        return
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    for name in options.parts or PARTS:
        with PostgresServer(HURRIED if name == "fillfactor" else DURABLE) as server:
            asyncio.run(PARTS[name](server, options.rounds))


if __name__ == "__main__":
    main()
