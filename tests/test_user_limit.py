"""How many sessions a user may have at once: `max_sessions_per_user`."""

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from sqlsessions import ConfigurationError, InMemoryBackend, SessionMiddleware, SQLAlchemyBackend
from sqlsessions.errors import BackendUnavailable
from sqlsessions.events import Event
from tests.asgi import KEY, Browser, Clock, Handler, Request, Site, read, serve
from tests.commands import ENVIRONMENT, ROOT
from tests.looking import closing, sql
from tests.staging import Staged

pytestmark = pytest.mark.anyio

ADA = {"user_id": "ada"}


def log_in(user: str = "ada") -> Handler:
    """Return a handler that binds the session to *user*."""

    def handler(request: Request) -> None:
        request.session["user_id"] = user

    return handler


class Ticking(Clock):
    """A clock that no two requests see at the same instant."""

    def __call__(self) -> object:  # type: ignore[override]
        """Tell the time."""
        self.now += timedelta(microseconds=1)
        return self.now


@pytest.fixture
def limited(site: Site) -> Site:
    """A site on each backend that allows three sessions."""
    return site.reconfigured(max_sessions_per_user=3)


async def logged_in(site: Site, number: int, user: str = "ada") -> list[Browser]:
    """Return browsers that have logged in one after the other."""
    browsers = [site.browser() for _ in range(number)]
    for browser in browsers:
        await browser.visit(log_in(user))
    return browsers


async def alive(browsers: list[Browser]) -> list[bool]:
    """Tell of each browser whether it is logged in."""
    return [bool((await browser.visit(read)).json()) for browser in browsers]


async def test_oldest_ends(limited: Site) -> None:
    """A login beyond the limit ends the session that was unused for longest, and says so; nobody else's (R41)."""
    (other,) = await logged_in(limited, 1, "bob")
    anonymous = await limited.visitor()
    browsers = []
    for _ in range(3):
        browsers += await logged_in(limited, 1)
        limited.clock.advance(minutes=10)
    await browsers[0].visit(read)
    limited.clock.advance(minutes=1)
    limited.forget()
    browsers += await logged_in(limited, 1)
    assert limited.statements == ["INSERT", "DELETE"]
    assert limited.events[-1] == Event("revoked", None, "ada", count=1)
    assert await alive([*browsers, other, anonymous]) == [True, False, True, True, True, True]


async def test_newest_stays(limited: Site) -> None:
    """The session that a login has just made stays, also where the clock stands still (R41)."""
    for _ in range(10):
        browsers = await logged_in(limited, 4)
        assert (await alive(browsers))[-1]
    assert len(await limited.records()) == 3


async def test_a_user_who_goes(limited: Site) -> None:
    """Unbinding a session ends nobody's."""
    browsers = await logged_in(limited, 3)
    await browsers[0].visit(lambda request: request.session.update(n=1))
    assert (await browsers[0].visit(lambda request: request.session.pop("user_id") and None)).status == 200
    assert await alive(browsers) == [True, True, True]
    assert sorted(str(record.user_id) for record in await limited.records()) == ["None", "ada", "ada"]


async def test_binding_a_session_counts(limited: Site) -> None:
    """A visitor's session that is bound to a user counts as a new one of that user; the same user again does not (R41).

    Nor does a session count that has expired and was not purged yet.
    """
    await logged_in(limited, 3)
    limited.clock.advance(days=14)
    browsers = await logged_in(limited, 2)
    limited.clock.advance(seconds=1)
    visitor = await limited.visitor()
    await visitor.visit(log_in())
    assert await alive([*browsers, visitor]) == [True] * 3
    assert len(await limited.records()) == 6
    limited.clock.advance(seconds=1)
    limited.forget()
    await visitor.visit(lambda request: request.session.login("ada"))
    assert limited.statements == ["SELECT", "UPDATE"]
    another = await limited.visitor()
    await another.visit(log_in())
    assert sorted(await alive(browsers)) == [False, True]
    assert await alive([visitor, another]) == [True] * 2


async def test_without_a_limit(site: Site) -> None:
    """By default a user may have any number, and a login costs no statement more (R41)."""
    browsers = await logged_in(site, 5)
    assert site.statements == ["INSERT"] * 5
    assert await alive(browsers) == [True] * 5


async def nobody(site: Site) -> Browser:
    """Return a browser that has never been here."""
    return site.browser()


@pytest.mark.parametrize("begin", [nobody, Site.visitor], ids=["new", "bound"])
async def test_parallel_logins(site: Site, begin: Callable[[Site], Awaitable[Browser]]) -> None:
    """Of fifty logins at once every one succeeds, and in the end there are as many sessions as allowed (R41)."""
    site = site.reconfigured(max_sessions_per_user=3, clock=Ticking())
    browsers = [await begin(site) for _ in range(50)]
    answers = await asyncio.gather(*(browser.visit(log_in()) for browser in browsers))
    assert all(answer.status == 200 and answer.set_cookie for answer in answers)
    assert sum(await alive(browsers)) == 3
    assert len(await site.records()) == 3


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
async def test_isolation_levels(postgres_sessions_url: str, level: str) -> None:
    """So there are whatever isolation the server has by default, on as many connections as there are logins (R41)."""
    settings = {"server_settings": {"default_transaction_isolation": level}}
    engine = create_async_engine(postgres_sessions_url, connect_args=settings)
    async with closing(SQLAlchemyBackend(engine, pool_size=20)) as backend:
        site = Site(backend, [], max_sessions_per_user=3, clock=Ticking())
        browsers = [site.browser() for _ in range(20)]
        await asyncio.gather(*(browser.visit(log_in()) for browser in browsers))
        assert sum(await alive(browsers)) == 3
        assert "unavailable" not in site.kinds


async def test_logins_that_overtake(sessions_url: str) -> None:
    """A login whose trim is slow ends no session that it should not, whatever came meanwhile (R41)."""
    async with closing(SQLAlchemyBackend(sessions_url)) as table:
        backend = Staged(table)
        site = Site(backend, backend.calls, max_sessions_per_user=1, clock=Ticking())
        slow, fast = site.browser(), site.browser()
        async with backend.hold("trim", slow.visit(log_in())) as request:
            await fast.visit(log_in())
        assert (await request).set_cookie
        assert await alive([slow, fast]) == [False, True]


PROCESS = """
import asyncio, sys
from sqlsessions import SessionMiddleware, SQLAlchemyBackend
from tests.asgi import KEY, Browser, serve

def log_in(request):
    request.session["user_id"] = "ada"

async def main():
    backend = SQLAlchemyBackend(sys.argv[1])
    app = SessionMiddleware(serve, secret_key=KEY, backend=backend, max_sessions_per_user=3, purge_interval=None)
    await backend.ping()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    answers = await asyncio.gather(*(Browser(app).visit(log_in) for _ in range(20)))
    assert all(answer.status == 200 and answer.set_cookie for answer in answers)
    await backend.aclose()

asyncio.run(main())
"""


def test_processes(sessions_url: str) -> None:
    """Processes that know nothing of each other leave as many sessions as allowed, too (R41)."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, sessions_url],
            env=ENVIRONMENT, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        with process:
            assert process.wait(60) == 0
    (row,) = asyncio.run(sql(sessions_url, "SELECT count(*) FROM web_sessions WHERE user_id = 'ada'"))
    assert row[0] == 3


async def test_failing_trim(statements: list[str]) -> None:
    """A login whose trim fails is a login all the same, with an event; the next one ends what is too much (R41)."""
    records = InMemoryBackend()
    backend = Staged(records)
    site = Site(backend, backend.calls, max_sessions_per_user=1)
    await logged_in(site, 1)
    backend.failing["trim"] = BackendUnavailable("down")
    site.clock.advance(seconds=1)
    (browser,) = await logged_in(site, 1)
    assert site.events[-1] == Event("unavailable", site.events[-1].session_id, "ada", detail="BackendUnavailable")
    assert (await browser.visit(read)).json() == ADA
    assert len(await records.list_for_user("ada", site.clock())) == 2
    del backend.failing["trim"]
    site.clock.advance(seconds=1)
    await logged_in(site, 1)
    assert len(await records.list_for_user("ada", site.clock())) == 1


def test_settings() -> None:
    """A limit that would let nobody in, or that the backend cannot keep, is refused at construction (R41)."""

    class OnlyRecords:
        """A backend that does not find records by their user."""

        load = insert = replace = touch = delete = purge = aclose = InMemoryBackend.load

    for backend, limit, message in (
        (InMemoryBackend(), 0, "max_sessions_per_user must be at least 1, not 0"),
        (OnlyRecords(), 1, "OnlyRecords lacks methods of UserSessions"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            SessionMiddleware(serve, secret_key=KEY, backend=backend, max_sessions_per_user=limit)  # type: ignore[arg-type]
