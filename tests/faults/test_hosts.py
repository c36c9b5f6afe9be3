"""A URL that names several servers: which of them is used, and how long the others may take to say nothing."""

import time
from datetime import timedelta

import pytest

from sqlsessions.errors import BackendUnavailable
from tests.faults.ways import SLACK, Way
from tests.looking import closing, everything, several, silent

pytestmark = pytest.mark.anyio

#: Shares of it are long enough for a busy machine to connect in.
DEADLINE = timedelta(seconds=1.5)


@pytest.mark.parametrize("hosts", ["silent", "refused", "silent refused", "silent silent"])
async def test_a_first_host_that_is_not_there(way: Way, postgres_sessions_url: str, hosts: str) -> None:
    """A host that hangs gets a share of the deadline, so that the next one is asked in time (asyncpg asks none)."""
    async with silent() as address:
        addresses = [address if host == "silent" else "127.0.0.1:1" for host in hosts.split()]
        async with closing(way.backend(several(postgres_sessions_url, *addresses), DEADLINE)) as backend:
            for _ in range(2):
                await everything(backend)
                await backend.aclose()


async def test_all_hosts_hang(way: Way, postgres_sessions_url: str) -> None:
    """If no host answers, the caller is told so within the deadline (R73)."""
    async with silent() as one, silent() as other:
        url = several(postgres_sessions_url).set(query={"host": (one, other)})
        async with closing(way.backend(url, DEADLINE)) as backend:
            begun = time.monotonic()
            with pytest.raises(BackendUnavailable):
                await backend.ping()
            assert time.monotonic() - begun < (DEADLINE + SLACK).total_seconds()


@pytest.mark.parametrize(("wanted", "found"), [("read-write", True), ("any", True), ("standby", False)])
async def test_the_server_that_is_wanted(way: Way, postgres_sessions_url: str, wanted: str, found: bool) -> None:
    """A host of another kind than is wanted is passed over; if all are, that is an outage."""
    async with silent() as address:
        url = several(postgres_sessions_url, address, target_session_attrs=wanted)
        async with closing(way.backend(url, DEADLINE)) as backend:
            if found:
                await everything(backend)
            else:
                with pytest.raises(BackendUnavailable):
                    await backend.ping()
