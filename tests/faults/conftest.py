"""What the tests of this folder stand on: a server that may be ill-treated, and each way to talk to it in turn.

What a fault has cost is printed at the end of the run.
"""

import asyncio
from collections.abc import Callable, Iterator

import pytest

from tests.catalogue import create_from_metadata
from tests.faults.ways import WAYS, Way
from tests.servers import PostgresServer

OBSERVED = pytest.StashKey[list[str]]()


@pytest.fixture
def observed(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Takes down what was observed."""
    seen = request.config.stash.setdefault(OBSERVED, [])
    return lambda what: seen.append(f"{request.node.name}: {what}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what was observed."""
    if seen := config.stash.get(OBSERVED, []):
        terminalreporter.section("what faults cost")
        for line in seen:
            terminalreporter.write_line(line)


@pytest.fixture(scope="module", params=[*WAYS.values()], ids=[*WAYS])
def way(request: pytest.FixtureRequest) -> Way:
    """Each way in which a backend sends its statements."""
    assert isinstance(request.param, Way)
    return request.param


@pytest.fixture(scope="module")
def victim(postgres: PostgresServer) -> Iterator[PostgresServer]:
    """A server that may be stopped, killed and frozen; what it has acknowledged it knows after a crash."""
    with PostgresServer({"synchronous_commit": "on"}) as server:
        yield server


@pytest.fixture(scope="module")
def victim_url(victim: PostgresServer) -> str:
    """The URL of a database of that server, with our table."""
    url = victim.create_database("sessions")
    asyncio.run(create_from_metadata(url))
    return url
