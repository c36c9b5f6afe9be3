"""The benchmarks run without their peers, see what they are to see, and draw the right conclusions."""

from contextlib import AsyncExitStack
from functools import partial

import pytest
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from benchmarks import driver
from benchmarks.endpoints import ENDPOINTS, application
from benchmarks.report import GOALS, Cell, Goal, Results, Sample, goals, percentile, tables
from benchmarks.rows import ROWS
from benchmarks.stage import Stage
from tests.servers import PostgresServer

pytestmark = pytest.mark.anyio

#: The rows that need no more than the tests do.
HERE = [row for row in ROWS.values() if row.factory.startswith(("ours:", "peers.raw:", "peers.cookie:"))]

READ, WRITE = Cell("postgresql", "/read", "32"), Cell("postgresql", "/write", "32")


class Forgetful:
    """A middleware that gives every request an empty session."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forget."""
        await self._app({**scope, "session": {"n": 0}}, receive, send)


def sample(per_second: float, cpu: float | None = None) -> Sample:
    """Return what a round saw."""
    return Sample(per_second, 0.001, 0.002, cpu)


def rounds(cells: dict[Cell, list[float]]) -> Results:
    """Return results with these requests per second."""
    return Results({cell: [sample(each) for each in found] for cell, found in cells.items()})


async def test_in_process(sqlite_sessions_url: str, postgres_sessions_url: str) -> None:
    """Every row keeps sessions, every cell has a sample, and the table of each endpoint every row."""
    results = Results()
    urls = {"": "", "SQLite": sqlite_sessions_url, "PostgreSQL": postgres_sessions_url}
    async with AsyncExitStack() as stack:
        applications = {row: row.application(urls[row.store]) for row in HERE}
        for row, app in applications.items():
            await stack.enter_async_context(driver.running(app))
            if not row.is_baseline:
                await driver.check(app)
        await driver.measure(applications, results, rounds=1, seconds=0, say=lambda _: None)
    cells = {Cell(row.key, endpoint, setting) for row in HERE for endpoint in ENDPOINTS for setting in ("1", "32")}
    assert results.samples.keys() == cells
    assert {len(samples) for samples in results.samples.values()} == {1}
    assert all(found.per_second > 0 and found.p50 <= found.p99 for each in results.samples.values() for found in each)
    lines = tables(results).splitlines()
    for row in HERE:
        assert sum(line.strip("|* ").startswith((f"{row.title} ", f"{row.title}*")) for line in lines) == 8


async def test_statements(postgres: PostgresServer) -> None:
    """What is counted is what a server was sent: to read takes one statement, to write one more."""
    results = Results()
    with Stage() as stage:
        for row in [ROWS["asyncpg"], ROWS["aiosqlite"]]:
            with stage.counting(row):
                app = row.application(stage.url(row))
                async with driver.running(app):
                    await driver.count_statements(row, app, results, partial(stage.counted, row))
    expected = {"/none": 1, "/read": 1, "/write": 2, "/login": 1}
    assert results.statements == {
        Cell(key, endpoint, setting): expected[endpoint]
        for key in ("asyncpg", "aiosqlite")
        for endpoint in ENDPOINTS
        for setting in ("1", "32")
    }


async def test_forgetful_application() -> None:
    """An application that keeps nothing is not measured."""
    with pytest.raises(RuntimeError, match="the answer is"):
        await driver.check(application(Middleware(Forgetful)))


async def test_failing_application() -> None:
    """A request that fails is not a fast one."""
    with pytest.raises(RuntimeError, match="/read was answered with 404"):
        await driver.Client(FastAPI()).get("/read")


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.text)
def test_goal(goal: Goal) -> None:
    """Each goal compares its own two cells, and nothing is met that was not measured."""
    against = goal.ours._replace(row=goal.against)
    baseline = goal.ours._replace(row="fastapi")
    at_most = goal.measure == "added CPU"
    assert goal.verdict(Results()) == "not measured"
    for factor, verdict in [(0.99, "met" if at_most else "not met"), (1.01, "not met" if at_most else "met")]:
        results = Results()
        results.add(baseline, sample(1000, 0.5))
        if at_most:  # the requests/s say the opposite
            results.add(against, sample(100 / factor, 0.5 + 0.25))
            results.add(goal.ours, sample(100, 0.5 + 0.25 * goal.limit * factor))
        else:
            results.add(against, sample(100, 0.75))
            results.add(goal.ours, sample(100 * goal.limit * factor, 0.75))
        assert goal.verdict(results) == verdict
        (line,) = [line for line in goals(results).splitlines() if goal.text in line]
        assert [part.strip() for part in line.split("|")[2:4]] == [f"{goal.limit * factor:.2f}", verdict]


def test_ratio_of_rounds() -> None:
    """A slow round is slow for both: ratios are taken in each, and then their median."""
    results = rounds({READ: [10, 400, 3000], WRITE: [10, 100, 1000]})
    assert results.throughput(READ, WRITE) == 3


def test_added_cpu() -> None:
    """CPU is what is added to the baseline of the same round."""
    results = Results()
    for base in (0.5, 2.0):
        results.add(Cell("fastapi", "/read", "32"), sample(1, base))
        results.add(READ, sample(1, base + 0.25))
    assert results.added_cpu(READ) == 0.25


def test_percentile() -> None:
    """The value that this share does not exceed."""
    assert percentile([3, 1, 2, 4], 0.5) == 3
    assert percentile([1], 0.99) == 1


def test_skipped_row() -> None:
    """A row without its server says so in its place."""
    results = rounds({READ: [1]})
    results.skipped["starsessions-redis"] = "no redis-server on PATH"
    assert "| starsessions, Redis " in tables(results)
    assert "skipped: no redis-server on PATH" in tables(results)
