"""PgBouncer between an application and its database, in transaction mode, with the settings that the README gives."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

import pytest
import sqlalchemy as sa
from anyio.lowlevel import checkpoint
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from sqlsessions.session import Session
from tests.faults.ways import Way
from tests.looking import PATIENCE, pids
from tests.servers import PgBouncer, PostgresServer
from tests.staging import Browser, Site, Staged

pytestmark = pytest.mark.anyio

VISITORS = 20


@dataclass(frozen=True)
class Scene:
    """A site, and what is below it."""

    site: Site
    bouncer: PgBouncer
    server: PostgresServer
    url: str
    #: The application's, which the backend takes its settings from.
    engine: AsyncEngine


@pytest.fixture
def bouncer(pgbouncer: PgBouncer, victim: PostgresServer) -> Iterator[PgBouncer]:
    """A PgBouncer that may be ill-treated, in front of a server that may be; each transaction meets another process."""
    with PgBouncer(victim, {"server_login_retry": "1"}) as bouncer:
        yield bouncer


@pytest.fixture
async def scene(
    way: Way, bouncer: PgBouncer, victim: PostgresServer, victim_url: str, anyio_backend: str
) -> AsyncIterator[Scene]:
    """A site behind PgBouncer."""
    engine = create_async_engine(
        bouncer.url("sessions"),
        connect_args={
            "statement_cache_size": 0,
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": lambda: "",
        },
    )
    site = Site(Staged(way.backend(engine)))
    yield Scene(site, bouncer, victim, victim_url, engine)
    await site.backend.aclose()
    await engine.dispose()


def count(session: Session) -> None:
    """Change the session."""
    session["n"] = session.get("n", 0) + 1


def read(session: Session) -> None:
    """Look into the session."""
    session.get("n")


async def served(browsers: list[Browser]) -> None:
    """Assert that all are served at once, and that what they change is kept."""
    before = [(await browser.data())["n"] for browser in browsers]
    answers = await asyncio.gather(*(browser.do(count) for browser in browsers))
    assert {answer.status for answer in answers} == {200}
    assert [(await browser.data())["n"] for browser in browsers] == [n + 1 for n in before]


async def test_every_transaction_meets_another_connection(scene: Scene) -> None:
    """Many visitors share two connections of PgBouncer's, and each keeps what is theirs (R117).

    PgBouncer gives the connection away that was used last, so a transaction of somebody else's has ours.
    """
    browsers = [await scene.site.filled(n=0) for _ in range(5 * VISITORS)]
    for _ in range(3):
        await served(browsers)
        async with scene.engine.connect() as connection:
            await connection.execute(sa.text("SELECT 1"))
            await served(browsers)
    assert len(await pids(scene.url)) == 2


def killed(scene: Scene) -> None:
    """The connections between PgBouncer and the server are killed."""
    scene.server.execute("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = 'sessions'")


def crashed(scene: Scene) -> None:
    """The server behind PgBouncer crashes, and recovers."""
    scene.server.stop("immediate")
    scene.server.start()


def restarted(scene: Scene) -> None:
    """PgBouncer itself is started anew."""
    scene.bouncer.stop()
    scene.bouncer.start()


@pytest.mark.parametrize("fault", [killed, crashed, restarted])
async def test_what_breaks_behind_it(scene: Scene, fault: Callable[[Scene], None]) -> None:
    """What breaks at PgBouncer or behind it is replaced: the next requests are served (R74, R117)."""
    browsers = [await scene.site.filled(n=0) for _ in range(VISITORS)]
    await served(browsers)
    fault(scene)
    await served(browsers)


async def test_it_refuses_for_a_while(scene: Scene) -> None:
    """While the server behind it is gone, and PgBouncer still there, sessions are a 503, and no cookie is touched."""
    browser = await scene.site.filled(n=0)
    before = dict(browser.cookies)
    scene.server.stop()
    try:
        for _ in range(3):
            answer = await browser.do(count)
            assert (answer.status, answer.set_cookies) == (503, [])
    finally:
        scene.server.start()
    assert dict(browser.cookies) == before
    async with asyncio.timeout(PATIENCE):
        while (await browser.do(read)).status != 200:  # PgBouncer tries the server again in its own time
            await checkpoint()
    await served([browser])
