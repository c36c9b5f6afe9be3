"""Compare sqlsessions with its peers and with what the drivers can do: `python3 dev.py bench`."""

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import packages_distributions, version
from pathlib import Path
from textwrap import fill

import uvloop
from starlette.types import ASGIApp

from benchmarks import driver, wrk
from benchmarks.report import LEGEND, Results, goals, plot, tables
from benchmarks.rows import ROWS, Row
from benchmarks.stage import Stage
from tests.servers import Unavailable

_HERE = Path(__file__).resolve().parent

#: Whose versions the results name, where they are installed.
_PACKAGES = (
    *("fastapi", "starlette", "uvicorn", "uvloop", "httptools", "sqlalchemy", "asyncpg", "aiosqlite"),
    *("starsessions", "redis", "litestar", "advanced-alchemy", "django", "psycopg"),
)


def main() -> None:
    """Measure and print; keep what a whole run has found beside this file."""
    options = _options()
    asked = [ROWS[key] for key in options.only or ROWS]
    rows = [row for row in ROWS.values() if row in asked or any(row.key == one.baseline for one in asked)]
    results = Results()
    with Stage() as stage:
        uvloop.run(_in_process(rows, stage, results, options))
        if options.http:
            _over_http(rows, stage, results, options)
        circumstances = _circumstances(stage)
    print(circumstances, tables(results), goals(results), sep="\n\n")
    if options.http and not options.only and not options.quick:
        picture = "![Requests/s of every row](results.png)"
        parts = ["# Results", circumstances, picture, LEGEND, "## Goals", goals(results), tables(results)]
        (_HERE / "results.md").write_text("\n\n".join(parts) + "\n")
        plot(results, _HERE / "results.png")


async def _in_process(rows: Sequence[Row], stage: Stage, results: Results, options: argparse.Namespace) -> None:
    for row in rows:
        _say(f"{row.title}: does it work, and with how many statements?")
        try:
            url = stage.url(row)
            with stage.counting(row):
                app = row.application(url)
                async with driver.running(app):
                    if not row.is_baseline:
                        await driver.check(app)
                    await driver.count_statements(row, app, results, partial(stage.counted, row))
        except (Unavailable, ModuleNotFoundError) as error:
            results.skipped[row.key] = str(error)
    async with AsyncExitStack() as stack:
        applications: dict[Row, ASGIApp] = {}
        for row in rows:
            if row.key not in results.skipped:
                applications[row] = row.application(stage.url(row))
                await stack.enter_async_context(driver.running(applications[row]))
        await driver.measure(applications, results, rounds=options.rounds, seconds=options.seconds, say=_say)


def _over_http(rows: Sequence[Row], stage: Stage, results: Results, options: argparse.Namespace) -> None:
    urls = {row: stage.url(row) for row in rows if row.key not in results.skipped}
    try:
        # Whole seconds are all that wrk takes.
        wrk.measure(urls, results, rounds=options.rounds, seconds=math.ceil(options.seconds), say=_say)
    except Unavailable as error:
        _say(f"over HTTP: skipped: {error}")


def _circumstances(stage: Stage) -> str:
    """Return when, where and on what this was measured."""
    installed = packages_distributions()
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES if name.replace("-", "_") in installed)
    machine = f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    return fill(f"{datetime.now(UTC):%Y-%m-%d}: {machine}, {stage.versions}, {packages}.", 120)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("dev.py bench", description="Compare sqlsessions with its peers.")
    parser.add_argument("--rounds", type=int, help="over all rows, of which the medians are told (5)")
    parser.add_argument("--seconds", type=float, help="for each number in each round (0.5)")
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=ROWS, help=f"of these: {', '.join(ROWS)}")
    parser.add_argument("--http", action=argparse.BooleanOptionalAction, help="also with uvicorn and wrk (yes)")
    parser.add_argument("--quick", action="store_true", help="one short round, without HTTP: to see that it works")
    options = parser.parse_args()
    whole, quick = {"rounds": 5, "seconds": 0.5, "http": True}, {"rounds": 1, "seconds": 0.02, "http": False}
    for name, value in (quick if options.quick else whole).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds is 1 at least, and --seconds more than 0")
    return options


_STARTED = time.monotonic()


def _say(what: str) -> None:
    print(f"bench: {time.monotonic() - _STARTED:4.0f} s  {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
