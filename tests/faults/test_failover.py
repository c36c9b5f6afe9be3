"""A primary that dies, freezes or is demoted while its standby takes over, as an application's visitors meet it."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import sqlalchemy as sa
from anyio.lowlevel import checkpoint

from tests.catalogue import create_from_metadata
from tests.faults.crowd import Crowd
from tests.faults.ways import DEADLINE, LINUX, SLACK, Way
from tests.looking import PATIENCE, pids, sql
from tests.proxy import proxied
from tests.servers import PostgresServer, Standby
from tests.staging import Site, Staged

pytestmark = pytest.mark.anyio


@pytest.fixture
def cluster(postgres: PostgresServer) -> Iterator[tuple[PostgresServer, Standby]]:
    """A primary whose commits wait for its standby."""
    with PostgresServer({"synchronous_commit": "on"}) as primary:
        primary.create_database("sessions")
        asyncio.run(create_from_metadata(primary.url("sessions")))
        with Standby(primary) as standby:
            primary.execute("ALTER SYSTEM SET synchronous_standby_names TO 'ANY 1 (*)'")
            primary.execute("SELECT pg_reload_conf()")
            yield primary, standby


def both(primary: PostgresServer, standby: Standby) -> str:
    """Return the URL that names both."""
    hosts = "&".join(f"host=127.0.0.1:{server.port}" for server in (primary, standby))
    return f"postgresql+asyncpg://postgres@/sessions?{hosts}&target_session_attrs=read-write"


@pytest.mark.parametrize("death", ["killed", pytest.param("frozen", marks=LINUX)])
async def test_a_primary_that_dies_under_load(
    way: Way, cluster: tuple[PostgresServer, Standby], tmp_path: Path, *, death: str, observed: Callable[[str], None]
) -> None:
    """After a failover to the other host of the URL no acknowledged write is missing, no cookie has changed, and no
    worker was restarted (R74); nor if the first host hangs instead of being gone (R73).
    """
    primary, standby = cluster
    with way.worker(tmp_path, both(*cluster)) as one, way.worker(tmp_path, both(*cluster)) as other, ExitStack() as end:
        crowd = Crowd([one, other])
        visits = asyncio.create_task(crowd.come_and_go())
        await crowd.busy.wait()
        if death == "killed":
            primary.stop("kill")
        else:
            end.enter_context(primary.frozen())
        await crowd.noticed.wait()
        await asyncio.to_thread(standby.promote)
        crowd.over.set()
        await visits
    observed(str(crowd))


async def test_a_primary_that_is_demoted_under_load(
    way: Way, cluster: tuple[PostgresServer, Standby], tmp_path: Path, observed: Callable[[str], None]
) -> None:
    """Connections that lead to a server which has become read-only are given up, so that the address they were made
    for leads to the new primary: SQLSTATE 25006 would be repeated on them for ever (R81).
    """
    primary, standby = cluster
    async with proxied(primary.url("sessions")) as (proxy, url):
        with way.worker(tmp_path, url) as worker:
            crowd = Crowd([worker])
            visits = asyncio.create_task(crowd.come_and_go())
            await crowd.busy.wait()
            primary.execute("ALTER SYSTEM SET default_transaction_read_only TO on")
            primary.execute("SELECT pg_reload_conf()")
            await crowd.noticed.wait()
            await asyncio.to_thread(standby.promote)
            proxy.target = sa.make_url(standby.url("sessions"))
            crowd.over.set()
            await visits
            assert not await pids(primary.url("sessions"))
    observed(str(crowd))


async def test_a_standby_that_is_lost(way: Way, victim: PostgresServer, victim_url: str) -> None:
    """When commits hang because no standby confirms them, writes are given up at the deadline, though they may take
    effect later, and reads go on; then all does (R73).
    """
    site = Site(Staged(way.backend(victim_url)))
    browser = await site.filled(n=0)
    victim.execute("ALTER SYSTEM SET synchronous_standby_names TO 'ANY 1 (*)'")
    victim.execute("SELECT pg_reload_conf()")
    for _ in range(4):
        begun = time.monotonic()
        assert (await browser.do(lambda session: session.update(n=session["n"] + 1))).status == 503
        assert time.monotonic() - begun < (DEADLINE + SLACK).total_seconds()
        assert await browser.data() == {"n": 0}
    victim.execute("ALTER SYSTEM RESET synchronous_standby_names")
    victim.execute("SELECT pg_reload_conf()")
    async with asyncio.timeout(PATIENCE):
        while await sql(victim_url, "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"):
            await checkpoint()
    assert (await browser.do(lambda session: session.update(n=100))).status == 200
    assert await browser.data() == {"n": 100}
    await site.backend.aclose()
