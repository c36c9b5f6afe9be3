"""Requests that meet at one session, in every order that matters, on each kind of backend.

Nothing here waits for time to pass: a slow request stands at a gate in front of its statement, the world changes, the
gate opens.
"""

import asyncio
import copy
import itertools
import operator
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from sqlsessions import Session, SessionGone, SQLAlchemyBackend, purge
from sqlsessions.backends.memory import InMemoryBackend
from sqlsessions.credentials import new_id
from sqlsessions.errors import InvalidData
from sqlsessions.manager import _Turns
from sqlsessions.payload import decode
from sqlsessions.record import Expected, next_version
from tests.asgi import Answer
from tests.looking import blocked, sql
from tests.staging import NO_ID, Browser, Do, Site, Staged

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["memory", "sqlite_sessions_url", "postgres_sessions_url"], ids=["memory", "sqlite", "postgres"])
def backend(request: pytest.FixtureRequest) -> Staged:
    """A backend of each kind, with gates in front of its statements."""
    if request.param == "memory":
        return Staged(InMemoryBackend())
    return Staged(SQLAlchemyBackend(request.getfixturevalue(request.param)))


@pytest.fixture
def site(backend: Staged) -> Site:
    """An application on that backend."""
    return Site(backend)


def increment(data: dict[str, Any]) -> None:
    """Count one, for `Session.atomic`."""
    data["count"] = data.get("count", 0) + 1


# A session that ends while a request with it is under way.


async def log_out(_: Site, browser: Browser) -> None:
    """End the session by its own logout."""
    await browser.do(Session.clear)


async def log_in(_: Site, browser: Browser) -> None:
    """Renew the secret by a login."""
    await browser.do(lambda session: session.login("somebody"))


async def renew(_: Site, browser: Browser) -> None:
    """Renew the secret."""
    await browser.do(Session.renew)


async def revoke(site: Site, _: Browser) -> None:
    """End the session by its id."""
    assert await site.backend.revoke((await site.record()).id)


async def revoke_all(site: Site, _: Browser) -> None:
    """End all of the user's sessions."""
    assert await site.backend.revoke_all("somebody") == 1


async def expire(site: Site, _: Browser) -> None:
    """Let the session expire."""
    # Staged while the handler runs: a commit is judged by the clock at its beginning.
    site.clock.advance(days=15)


async def expire_and_purge(site: Site, _: Browser) -> None:
    """Let the session expire and be deleted."""
    site.clock.advance(days=15)
    assert await purge(site.backend, clock=site.clock) == 1


ENDS = [log_out, log_in, renew, revoke, revoke_all, expire, expire_and_purge]


def write(session: Session) -> None:
    """Set a key."""
    session["late"] = True


def write_nested(session: Session) -> None:
    """Change something inside a value."""
    session["cart"].append("late")


def touch(session: Session) -> None:
    """Use the session, and change nothing."""
    session.mark_accessed()


def pop_to_empty(session: Session) -> None:
    """Delete every key."""
    for key in list(session):
        del session[key]


async def count(session: Session) -> None:
    """Update atomically."""
    await session.atomic(increment)


async def save(session: Session) -> None:
    """Set a key and commit at once."""
    session["late"] = True
    await session.save()


def become_another(session: Session) -> None:
    """Switch to another user."""
    session.login("another")


def log_in_again(session: Session) -> None:
    """Set a key and renew the secret."""
    session["late"] = True
    session.login("somebody")


#: What the slow request does, and the statement before which it stands.
WRITES: list[tuple[Do, str]] = [
    (write, "replace"),
    (write_nested, "replace"),
    (touch, "touch"),
    (pop_to_empty, "delete"),
    (count, "replace"),
    (save, "replace"),
    (become_another, "delete"),
    (log_in_again, "replace"),
]


async def overtaken(
    site: Site, end: Callable[[Site, Browser], Awaitable[None]], do: Do, verb: str
) -> tuple[Answer, list[str]]:
    """Return the reply to a request during which its session ended, and the events; nothing may have been written."""
    slow = await site.filled(user_id="somebody", cart=["early"])
    site.clock.advance(minutes=10)  # so that a touch is due
    fast = slow.twin()
    async with site.backend.hold(verb, slow.do(do), after=verb == "load") as request:
        await end(site, fast)
        left = await site.records()
    reply = await request
    told = site.kinds
    assert await site.records() == left
    assert await slow.data() == {}
    assert reply.set_cookies == []
    await site.backend.delete_all()
    return reply, told


@pytest.mark.parametrize("end", ENDS)
async def test_what_has_ended_stays_ended(site: Site, end: Callable[[Site, Browser], Awaitable[None]]) -> None:
    """A request that is slower than the end of its session revives nothing, writes nothing and sets no cookie.

    R29, R30, R31, R32: a logout, a renewed secret, a revocation, a purge or the expiry wins over every kind of write.
    """
    outcome = "superseded" if end in (log_in, renew) else "gone"
    for do, verb in WRITES:
        reply, told = await overtaken(site, end, do, "load" if end is expire else verb)
        # save() and atomic() tell the handler, and this one has not caught it.
        assert reply.status == (409 if do in (count, save) else 200), do
        assert told.count(outcome) == (do is not touch), do


@pytest.mark.parametrize("end", [log_out, renew, expire])
async def test_a_dropped_change_can_be_an_error(
    backend: Staged, end: Callable[[Site, Browser], Awaitable[None]]
) -> None:
    """With on_gone="raise", a change to a session that has ended is answered 409, and a mere touch is not (R32)."""
    site = Site(backend, on_gone="raise")
    for do, _ in WRITES:
        reply, _ = await overtaken(site, end, do, "load")
        assert reply.status == (200 if do is touch else 409), do


async def test_the_handler_learns_that_its_session_has_ended(site: Site) -> None:
    """save(), atomic() and reload() raise SessionGone, again and again, and the response is the handler's (R32)."""
    slow = await site.filled(cart=[])

    async def persist(session: Session) -> None:
        session["late"] = True
        for method in (session.save, session.save, session.reload, lambda: session.atomic(increment)):
            with pytest.raises(SessionGone):
                await method()

    fast = slow.twin()
    async with site.backend.hold("replace", slow.do(persist)) as request:
        await log_out(site, fast)
    reply = await request
    assert (reply.status, reply.set_cookies) == (200, [])
    assert await site.records() == []


async def test_gone_while_only_read_is_not_an_event(site: Site) -> None:
    """A request that only read a session that ended meanwhile had nothing to lose: no event, no cookie (R29)."""
    slow = await site.filled(cart=[])
    fast = slow.twin()
    async with site.backend.hold("load", slow.do(touch), after=True) as request:
        await log_out(site, fast)
    assert (await request).set_cookies == []
    assert site.kinds == ["revoked"]


async def test_a_renewed_cookie_is_withdrawn_when_the_session_ends_before_the_headers(site: Site) -> None:
    """A secret renewed by save() is not sent any more if the session is revoked before the response begins (R29)."""
    slow = await site.filled(cart=[])

    async def renew_and_go_on(session: Session) -> None:
        session.renew()
        await session.save()
        await site.backend.revoke((await site.record()).id)
        session["late"] = True

    reply = await slow.do(renew_and_go_on)
    assert (reply.status, reply.set_cookies) == (200, [])
    assert await site.records() == []


async def test_logging_out_wins_over_a_renewed_secret(site: Site) -> None:
    """A logout deletes by id, so that a parallel renewal of the secret does not save the session from it (R28)."""
    slow = await site.filled(user_id="somebody")
    fast = slow.twin()
    async with site.backend.hold("delete", slow.do(Session.clear)) as request:
        await log_in(site, fast)
    assert (await request).set_cookies[0].attributes["max-age"] == "0"
    assert await site.records() == []
    assert await fast.data() == {}


# A planted session.


@pytest.mark.parametrize("do", [write, write_nested, pop_to_empty, count, save, log_in_again])
async def test_a_fixated_secret_gains_nothing(site: Site, do: Do) -> None:
    """An attacker who planted his cookie has it superseded by the victim's login, even in a request under way (R26).

    He writes nothing into the victim's session, gets no cookie for it, and is anonymous from then on.
    """
    attacker = await site.filled(cart=["planted"])
    victim = attacker.twin()
    async with site.backend.hold("delete" if do is pop_to_empty else "replace", attacker.do(do)) as request:
        await victim.do(lambda session: session.update(user_id="victim", cart=[]))
        before = await site.record()
    reply = await request
    assert await site.record() == before
    assert decode(before.data) == {"cart": [], "user_id": "victim"}
    assert reply.set_cookies == []
    assert "superseded" in site.kinds
    assert await attacker.data() == {}
    assert await victim.data() == {"cart": [], "user_id": "victim"}


async def test_a_fixated_secret_cannot_extend_the_victims_session(site: Site) -> None:
    """The touch of a request that holds a superseded secret touches nothing (R26, R29)."""
    attacker = await site.filled(cart=["planted"])
    site.clock.advance(minutes=10)
    victim = attacker.twin()
    async with site.backend.hold("touch", attacker.do(touch)) as request:
        await victim.do(lambda session: session.login("victim"))
        before = await site.record()
        site.clock.advance(minutes=10)
    await request
    assert await site.record() == before


# All orders.

#: Which of the requests a statement belongs to; tasks inherit it.
whose: ContextVar[int] = ContextVar("whose")


class Turnstile:
    """Lets the statements of several requests happen in one given order; what is not in it goes when it is over."""

    def __init__(self, backend: Staged, order: tuple[int, ...]) -> None:
        self._order = list(order)
        self._changed = asyncio.Condition()
        backend.around = dict.fromkeys(("load", "insert", "replace", "delete", "touch"), self._in_turn)

    async def pass_through(self, number: int, browser: Browser, do: Do) -> Answer:
        """Make one of the requests."""
        whose.set(number)
        reply = await browser.do(do)
        async with self._changed:
            self._order = [other for other in self._order if other != number]
            self._changed.notify_all()
        return reply

    @asynccontextmanager
    async def _in_turn(self, _: UUID) -> AsyncIterator[None]:
        number = whose.get()
        async with self._changed:
            await self._changed.wait_for(lambda: number not in self._order or self._order[0] == number)
            yield
            if number in self._order:
                self._order.remove(number)
            self._changed.notify_all()


def orders(*requests: int) -> list[tuple[int, ...]]:
    """Return every order in which the statements of requests with so many of them can happen."""
    steps = [number for number, statements in enumerate(requests) for _ in range(statements)]
    return sorted(set(itertools.permutations(steps)))


async def in_order(site: Site, order: tuple[int, ...], *requests: tuple[Browser, Do]) -> list[Answer]:
    """Make the requests in parallel, their statements in that order."""
    turnstile = Turnstile(site.backend, order)
    replies = await asyncio.gather(
        *(
            asyncio.create_task(turnstile.pass_through(number, browser, do))
            for number, (browser, do) in enumerate(requests)
        )
    )
    site.backend.around = {}
    return replies


def setting(key: str) -> Do:
    """Return a handler that sets one key."""
    return lambda session: session.update({key: True})


async def test_every_order_of_three_writers_keeps_all_keys(site: Site) -> None:
    """Of three requests that set a key each, all three keys survive, in each of the 90 orders of statements (R52)."""
    for order in orders(2, 2, 2):
        browser = await site.filled(old=True)
        replies = await in_order(site, order, *((browser.twin(), setting(key)) for key in "abc"))
        assert [reply.status for reply in replies] == [200, 200, 200], order
        assert await browser.data() == {"old": True, "a": True, "b": True, "c": True}, order
        await browser.do(Session.clear)


async def test_every_order_of_two_writers_and_a_logout_ends_the_session(site: Site) -> None:
    """Two writers and a logout, in each of the 90 orders of statements: nothing is left, nobody is given a cookie.

    R28, R29: the acknowledged logout wins, whoever came before, between or after.
    """
    for order in orders(2, 2, 2):
        browser = await site.filled(old=True)
        first, second, last = browser.twin(), browser.twin(), browser.twin()
        replies = await in_order(site, order, (first, setting("a")), (second, setting("b")), (last, Session.clear))
        # A writer that came after the logout is a visitor without a session, who may begin one; with the old id never.
        begun = [twin for twin, reply in zip((first, second), replies, strict=False) if reply.set_cookies]
        assert await browser.data() == {}, order
        assert len(await site.records()) == len(begun), order
        for twin in begun:
            assert "old" not in await twin.data(), order
            await twin.do(Session.clear)


async def test_every_order_of_a_writer_and_a_login_leaves_one_secret(site: Site) -> None:
    """A writer and a login, in each order: the old secret dies, and only what came before the login is kept (R26)."""
    for order in orders(2, 2):
        attacker = await site.filled(old=True)
        victim, planted = attacker.twin(), attacker.twin()
        await in_order(site, order, (attacker, setting("planted")), (victim, lambda session: session.login("victim")))
        written_first = _last(order, 0) < _last(order, 1)
        data = await victim.data()
        assert data["user_id"] == "victim", order
        assert ("planted" in data) == written_first, order
        assert await planted.data() == {}, order
        await victim.do(Session.clear)
        await attacker.do(Session.clear)


def _last(order: tuple[int, ...], number: int) -> int:
    return max(place for place, step in enumerate(order) if step == number)


async def test_every_order_of_two_renewals_leaves_one_secret(site: Site) -> None:
    """Two renewals of one secret, in each order: exactly one secret lives, and whoever lost gets no cookie (R27)."""
    for order in orders(2, 2):
        browser = await site.filled(cart=["kept"])
        twins = [browser.twin(), browser.twin()]
        replies = await in_order(site, order, *((twin, Session.renew) for twin in twins))
        renewed = [twin for twin, reply in zip(twins, replies, strict=True) if reply.set_cookies]
        assert len(renewed) == 1, order
        assert await renewed[0].data() == {"cart": ["kept"]}, order
        assert await browser.data() == {}, order
        assert len(await site.records()) == 1, order
        await renewed[0].do(Session.clear)


# Merging.


async def test_twenty_requests_that_set_twenty_keys(site: Site) -> None:
    """Twenty parallel requests that set a key each lose none of them (R52)."""
    browser = await site.filled(old=True)
    gate = site.backend.gate("replace", arrivals=20)
    requests = [asyncio.create_task(browser.twin().do(setting(f"key {number}"))) for number in range(20)]
    await gate.full()  # all have read the same, and each is about to write
    gate.open()
    replies = await asyncio.gather(*requests)
    assert {reply.status for reply in replies} == {200}
    assert await browser.data() == {"old": True} | {f"key {number}": True for number in range(20)}


async def test_a_merge_keeps_deletions_and_the_later_word(site: Site) -> None:
    """On top of a parallel write, keys deleted here stay deleted, and on a key set by both ours wins (R52)."""
    slow = await site.filled(gone="x", both="x", left="x")
    fast = slow.twin()

    def ours(session: Session) -> None:
        del session["gone"]
        session.update(both="ours", new="ours")

    async with site.backend.hold("replace", slow.do(ours)) as request:
        await fast.do(lambda session: session.update(both="theirs", left="theirs", added="theirs"))
    assert (await request).status == 200
    assert await slow.data() == {"both": "ours", "left": "theirs", "added": "theirs", "new": "ours"}


async def test_theirs_deletions_count_in_a_merge(site: Site) -> None:
    """A key that a parallel request deleted does not come back with ours, unless ours has changed it (R52)."""
    slow = await site.filled(a="x", b="x", c="x")
    fast = slow.twin()
    async with site.backend.hold("replace", slow.do(lambda session: session.update(b="ours"))) as request:
        await fast.do(lambda session: (session.pop("a"), session.pop("b")))
    await request
    assert await slow.data() == {"b": "ours", "c": "x"}


async def test_nested_writes_are_merged_by_their_top_level_key(site: Site) -> None:
    """A change inside a value is a change of its top-level key, and the other keys are merged around it (R52, R55)."""
    slow = await site.filled(cart={"items": [1]}, seen=[])
    fast = slow.twin()
    async with site.backend.hold("replace", slow.do(lambda session: session["cart"]["items"].append(2))) as request:
        await fast.do(lambda session: session["seen"].append("page"))
    await request
    assert await slow.data() == {"cart": {"items": [1, 2]}, "seen": ["page"]}


async def test_the_user_column_follows_the_merged_data(site: Site) -> None:
    """A login that has to merge with a parallel write leaves row and data with the same user (R52)."""
    slow = await site.filled(cart=[])
    fast = slow.twin()
    async with site.backend.hold("replace", slow.do(lambda session: session.update(user_id=7))) as request:
        await fast.do(lambda session: session["cart"].append("book"))
    assert len((await request).set_cookies) == 1
    record = await site.record()
    assert (record.user_id, decode(record.data)) == ("7", {"cart": ["book"], "user_id": 7})
    assert record.authenticated_at == site.clock()
    assert await fast.data() == {}


async def test_emptied_here_and_filled_elsewhere(site: Site) -> None:
    """A session popped empty is kept with what a parallel request has put into it meanwhile (R52)."""
    slow = await site.filled(old=True)
    fast = slow.twin()
    async with site.backend.hold("delete", slow.do(pop_to_empty)) as request:
        await fast.do(setting("new"))
    assert (await request).set_cookies == []
    assert await slow.data() == {"new": True}


async def test_a_switch_of_users_takes_only_its_own_keys_even_after_a_lost_race(site: Site) -> None:
    """From one user to another, what a parallel request wrote for the first does not come along (R44)."""
    slow = await site.filled(user_id="alice", private="alice's")
    fast = slow.twin()

    def switch(session: Session) -> None:
        session.update(language="de")
        session.login("bob")

    async with site.backend.hold("delete", slow.do(switch)) as request:
        await fast.do(lambda session: session.update(more="alice's"))
    await request
    assert await slow.data() == {"language": "de", "user_id": "bob"}
    assert (await site.record()).user_id == "bob"
    assert await fast.data() == {}


async def test_a_merge_does_not_detach_objects_that_the_handler_holds(site: Site) -> None:
    """What a handler took from the session before a lost race or an atomic() is still part of it afterwards (R55)."""
    slow = await site.filled(cart=[1])
    fast = slow.twin()

    async def hold_on(session: Session) -> None:
        cart = session["cart"]
        session["ours"] = True
        await session.save()
        cart.append(2)
        await session.atomic(increment)
        cart.append(3)

    async with site.backend.hold("replace", slow.do(hold_on)) as request:
        await fast.do(setting("theirs"))
    await request
    assert await slow.data() == {"cart": [1, 2, 3], "ours": True, "theirs": True, "count": 1}


def matched(session: Session) -> Any:
    """Take the cart out by a pattern."""
    match session:
        case {"cart": cart}:
            return cart


HOLDS: dict[str, Callable[[Session], Any]] = {
    "by key": lambda session: session["cart"],
    "get": lambda session: session.get("cart"),
    "setdefault": lambda session: session.setdefault("cart", []),
    "values": lambda session: next(iter(session.values())),
    "items": lambda session: dict(session.items())["cart"],
    "copy": lambda session: session.copy()["cart"],
    "copied": lambda session: copy.copy(session)["cart"],
    "unpacked": lambda session: {**session}["cart"],
    "a dict of it": lambda session: dict(session)["cart"],
    "a union": lambda session: (session | {})["cart"],
    "a union from the right": lambda session: ({} | session)["cart"],
    "a pattern": matched,
    "a getter": operator.itemgetter("cart"),
}


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
async def test_whatever_way_a_value_was_had(site: Site, hold: Callable[[Session], Any]) -> None:
    """A change inside a value is saved, by whichever of a dict's ways the handler came to hold it (R55)."""
    browser = await site.filled(cart=[1], n=1)
    await browser.do(lambda session: hold(session).append(2))
    assert await browser.data() == {"cart": [1, 2], "n": 1}


@pytest.mark.parametrize("put", [lambda s, v: s.update(cart=v), lambda s, v: s.setdefault("cart", v), dict.__setitem__])
async def test_what_was_put_in_goes_on_changing(site: Site, put: Any) -> None:
    """A value that a handler put in and keeps is saved as it is in the end, after a save() too (R55)."""
    browser = await site.filled(n=1)

    async def go_on(session: Session) -> None:
        cart = [1]
        if put is dict.__setitem__:
            session["cart"] = cart
        else:
            put(session, cart)
        await session.save()
        cart.append(2)

    await browser.do(go_on)
    assert await browser.data() == {"n": 1, "cart": [1, 2]}


@pytest.mark.parametrize("value", [True, 1.0])
async def test_equal_is_not_the_same(site: Site, value: object) -> None:
    """A value of another type that Python calls equal is a change (R54, R89)."""
    browser = await site.filled(n=1)
    await browser.do(lambda session: session.update(n=value))
    found = await browser.data()
    assert (found, type(found["n"])) == ({"n": value}, type(value))


async def test_another_order(site: Site) -> None:
    """A key that was taken out and put back is last, as in any dict, and stays so."""
    browser = await site.filled(a=1, b=2)
    await browser.do(lambda session: session.update(a=session.pop("a")))
    assert list(await browser.data()) == ["b", "a"]


async def test_a_reader_writes_nothing_beside_a_writer(site: Site) -> None:
    """A request that only reads never writes data back, however long it takes beside a writer (R54)."""
    reader = await site.filled(cart=[1])
    writer = reader.twin()
    async with site.backend.hold("load", reader.do(lambda session: session["cart"]), after=True) as request:
        await writer.do(lambda session: session["cart"].append(2))
    await request
    assert site.statements == ["load", "load", "replace"]
    assert await reader.data() == {"cart": [1, 2]}


async def test_a_touch_beside_a_writer_leaves_the_data_alone(site: Site) -> None:
    """A reader whose touch is due extends the session and nothing else, even if somebody wrote meanwhile (R54)."""
    reader = await site.filled(cart=[1])
    site.clock.advance(minutes=10)
    writer = reader.twin()
    async with site.backend.hold("touch", reader.do(touch)) as request:
        await writer.do(lambda session: session["cart"].append(2))
        before = await site.record()
        site.clock.advance(minutes=10)
    await request
    after = await site.record()
    assert (after.data, after.version) == (before.data, before.version)


async def test_sessions_are_private_to_their_request(site: Site) -> None:
    """What one request does to its session object is not seen by another until it is committed (R69)."""
    browser = await site.filled(cart=[1])
    kept: list[Session] = []
    await browser.do(kept.append)
    kept[0]["cart"].append("after the end")
    seen: list[object] = []

    async def look(session: Session) -> None:
        session["cart"].append(2)
        seen.append(await browser.twin().data())

    await browser.do(look)
    assert seen == [{"cart": [1]}]
    assert await browser.data() == {"cart": [1, 2]}


# Atomic updates.


async def test_fifty_increments_make_fifty(site: Site) -> None:
    """Fifty parallel atomic() increments lose none (R53)."""
    browser = await site.filled(count=0)
    gate = site.backend.gate("load", arrivals=50, after=True)
    requests = [asyncio.create_task(browser.twin().do(count)) for _ in range(50)]
    await gate.full()
    gate.open()
    replies = await asyncio.gather(*requests)
    assert {reply.status for reply in replies} == {200}
    assert await browser.data() == {"count": 50}


async def test_fifty_increments_from_two_processes_make_fifty(sessions_url: str) -> None:
    """No increment is lost between processes either, where nothing but the row is shared (R53)."""
    site = Site(Staged(SQLAlchemyBackend(sessions_url)))
    elsewhere = site.second_process(SQLAlchemyBackend(sessions_url))
    browser = await site.filled(count=0)
    twins = [browser.twin(app) for app in (site.app, elsewhere) for _ in range(25)]
    replies = await asyncio.gather(*(twin.do(count) for twin in twins))
    assert {reply.status for reply in replies} == {200}
    assert await browser.data() == {"count": 50}


async def test_keys_from_two_processes_all_survive(sessions_url: str) -> None:
    """Nor is a key lost that is set beside another process (R52)."""
    site = Site(Staged(SQLAlchemyBackend(sessions_url)))
    elsewhere = site.second_process(SQLAlchemyBackend(sessions_url))
    browser = await site.filled(old=True)
    twins = [browser.twin(app) for app in (site.app, elsewhere) for _ in range(10)]
    await asyncio.gather(*(twin.do(setting(str(number))) for number, twin in enumerate(twins)))
    assert await browser.data() == {"old": True} | {str(number): True for number in range(20)}


async def test_turns_are_an_event_loops_own() -> None:
    """Nobody waits for a turn in another event loop, which could not wake him (R65)."""
    turns = _Turns()

    async def enter() -> None:
        async with asyncio.timeout(5), turns.of(NO_ID):
            pass

    async with turns.of(NO_ID):
        await asyncio.to_thread(asyncio.run, enter())


async def test_atomic_sees_what_is_stored_and_not_what_is_pending(site: Site) -> None:
    """atomic() gets the stored data; what is pending in this request stays on top, and is committed later (R53)."""
    slow = await site.filled(count=1, old=True)
    fast = slow.twin()
    seen: list[dict[str, Any]] = []

    async def work(session: Session) -> None:
        session["pending"] = True
        del session["old"]
        seen.append(await session.atomic(increment))
        seen.append(dict(session))
        seen.append(decode((await site.record()).data))

    async with site.backend.hold("replace", slow.do(work)) as request:
        await fast.do(lambda session: session.update(count=10))
    await request
    assert seen[0] == {"count": 11, "old": True}
    assert seen[1] == {"count": 11, "pending": True}
    assert seen[2] == {"count": 11, "old": True}
    assert await slow.data() == {"count": 11, "pending": True}


@pytest.mark.parametrize(
    ("change", "reason"),
    [(lambda data: data | {"user_id": "eve"}, "use login"), (lambda _: [1], "returns a mapping or None, not list")],
)
async def test_what_atomic_refuses(site: Site, change: Any, reason: str) -> None:
    """atomic() binds no user, and takes nothing but data; nothing is stored then (R53)."""
    browser = await site.filled(count=1)
    before = await site.records()

    async def work(session: Session) -> None:
        with pytest.raises(InvalidData, match=reason):
            await session.atomic(change)
        assert await site.records() == before

    await browser.do(work)
    assert await site.records() == before


async def test_atomic_stays_on_a_failure_and_the_rest_does_not(site: Site) -> None:
    """On a 5xx, what atomic() committed stays committed, and what was only pending is dropped (R53, R56)."""
    browser = await site.filled(count=1)

    async def work(session: Session) -> None:
        session["pending"] = True
        await session.atomic(increment)

    assert (await browser.do(work, status=500)).status == 500
    assert await browser.data() == {"count": 2}


async def test_the_stored_copy_given_to_atomic_is_fresh_each_time(site: Site) -> None:
    """A change that has to run again starts from what is stored then, and leaves no trace of its first run (R53)."""
    slow = await site.filled(log=[])
    fast = slow.twin()
    async with site.backend.hold(
        "replace", slow.do(lambda session: session.atomic(lambda data: data["log"].append("slow")))
    ) as request:
        await fast.do(lambda session: session["log"].append("fast"))
    await request
    assert await slow.data() == {"log": ["fast", "slow"]}


async def test_two_commits_of_one_request_do_not_meet(site: Site) -> None:
    """Parallel save()s of one request make one session, and parallel atomic()s lose no update (R52, R53)."""
    browser = site.browser()

    async def work(session: Session) -> None:
        session["cart"] = []
        await asyncio.gather(session.save(), session.save())
        await asyncio.gather(*(session.atomic(increment) for _ in range(5)))

    await browser.do(work)
    assert decode((await site.record()).data) == {"cart": [], "count": 5}
    assert await browser.data() == {"cart": [], "count": 5}


# Losing for ever.


@pytest.mark.parametrize(
    ("do", "verb"), [(write, "replace"), (count, "replace"), (log_in_again, "replace"), (pop_to_empty, "delete")]
)
async def test_a_request_that_always_loses_is_a_503(site: Site, do: Do, verb: str) -> None:
    """When other writers win every time, the answer is 503 with Retry-After, and nothing of the request is stored."""
    browser = await site.filled(cart=[])
    rivals = itertools.count()

    @asynccontextmanager
    async def lose(id_: UUID) -> AsyncIterator[None]:
        found = await site.backend.backend.load(id_, site.clock())
        assert found is not None
        rival = found._replace(version=next_version(found.version), data=f'{{"cart":[{next(rivals)}]}}')
        assert await site.backend.backend.replace(rival, Expected(found.version, found.secret_hash, site.clock()))
        yield

    site.backend.around[verb] = lose
    reply = await browser.do(do)
    assert (reply.status, reply.header("retry-after"), reply.set_cookies) == (503, "2", [])
    assert site.kinds == ["conflict"]
    record = await site.record()
    assert (decode(record.data), record.user_id) == ({"cart": [next(rivals) - 1]}, None)


# Beginnings.


async def test_a_taken_id_is_left_to_its_owner(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the id generator repeats itself, the other session is untouched and the new one gets another id (R5)."""
    first = await site.filled(owner="first")
    taken = (await site.record()).id
    ids = iter([taken])
    monkeypatch.setattr("sqlsessions.manager.new_id", lambda now: next(ids, None) or new_id(now))
    second = await site.filled(owner="second")
    assert await first.data() == {"owner": "first"}
    assert await second.data() == {"owner": "second"}
    assert len(await site.records()) == 2


async def test_a_login_submitted_twice_leaves_one_session(site: Site) -> None:
    """Of two parallel logins with one cookie, one is superseded: one row, one secret, one new cookie (R26, R27)."""
    browser = await site.filled(cart=["book"])
    twins = [browser.twin(), browser.twin()]
    gate = site.backend.gate("replace", arrivals=2)
    requests = [asyncio.create_task(twin.do(lambda session: session.login("somebody"))) for twin in twins]
    await gate.full()
    gate.open()
    replies = await asyncio.gather(*requests)
    assert sorted(len(reply.set_cookies) for reply in replies) == [0, 1]
    winner = next(twin for twin, reply in zip(twins, replies, strict=True) if reply.set_cookies)
    assert await winner.data() == {"cart": ["book"], "user_id": "somebody"}
    assert await browser.data() == {}
    assert len(await site.backend.list_for_user("somebody", site.clock())) == 1


async def test_a_login_submitted_twice_as_two_users_mixes_nobody(site: Site) -> None:
    """Of two parallel logins of different users with the same cookie, one wins and nothing of the other is in it (R44).

    The loser's data must not be merged into the winner's session, nor the other way round.
    """
    browser = await site.filled(cart=["book"])
    twins = {user: browser.twin() for user in ("alice", "bob")}
    gate = site.backend.gate("replace", arrivals=2)

    def login(user: str) -> Do:
        return lambda session: session.update({"user_id": user, f"of {user}": True})

    requests = {user: asyncio.create_task(twin.do(login(user))) for user, twin in twins.items()}
    await gate.full()
    gate.open()
    replies = {user: await request for user, request in requests.items()}
    (winner,) = [user for user, reply in replies.items() if reply.set_cookies]
    assert await twins[winner].data() == {"cart": ["book"], "user_id": winner, f"of {winner}": True}
    assert (await site.record()).user_id == winner


# Revoking all.


async def test_revoking_all_leaves_no_writer_alive(site: Site) -> None:
    """Against fifty writers under way, revoke_all(user) leaves not one session and hands out no cookie (R39)."""
    writers: list[Browser] = []
    for _ in range(5):
        browser = await site.filled(user_id="somebody", cart=[])
        writers += [browser.twin() for _ in range(10)]
    stranger = await site.filled(user_id="stranger")
    gate = site.backend.gate("replace", arrivals=50)
    requests = [asyncio.create_task(writer.do(write)) for writer in writers]
    await gate.full()
    assert await site.backend.revoke_all("somebody") == 5
    gate.open()
    replies = await asyncio.gather(*requests)
    assert [cookie for reply in replies for cookie in reply.set_cookies] == []
    assert [record.user_id for record in await site.records()] == ["stranger"]
    assert site.kinds.count("gone") == 50
    assert [await writer.data() for writer in writers[::10]] == [{}] * 5
    assert await stranger.data() == {"user_id": "stranger"}


async def test_logging_out_the_other_devices_keeps_this_one(site: Site) -> None:
    """revoke_all(user, keep=id) ends the others, whatever they are writing, and not the session that asked (R39)."""
    here = await site.filled(user_id="somebody")
    kept = await site.record()
    there = await site.filled(user_id="somebody")
    async with site.backend.hold("replace", there.do(write)) as request:
        assert await site.backend.revoke_all("somebody", keep=kept.id) == 1
    assert (await request).set_cookies == []
    assert await site.record() == kept
    assert await here.data() == {"user_id": "somebody"}


# Time passes while a request runs.


@pytest.mark.parametrize("waits", [False, True])
async def test_a_purge_spares_a_session_that_was_extended_meanwhile(postgres_sessions_url: str, *, waits: bool) -> None:
    """A session that a host with a slow clock extends while a purge is at it is not deleted: it is passed over, and by
    the form that waits, which some databases ask for, looked at again (R86).
    """
    backend = SQLAlchemyBackend(postgres_sessions_url)
    site = Site(Staged(backend))
    await site.filled(cart=[])
    record = await site.record()
    site.clock.advance(days=15)
    expired: dict[str, Any] = {"before": site.clock(), "limit": 9}
    extended = {"until": site.clock() + timedelta(days=1), "the_id": record.id}
    engine = create_async_engine(postgres_sessions_url)
    async with engine.begin() as other:
        await other.execute(sa.text("UPDATE web_sessions SET expires_at = :until WHERE id = :the_id"), extended)
        if waits:
            plain = backend._statements.purge.plain
            purging = asyncio.create_task(backend._run(lambda turn: turn.count(plain, expired)))
            await blocked(postgres_sessions_url)
        else:
            purging = asyncio.create_task(backend.purge(**expired))
            await asyncio.wait({purging})
    assert await purging == 0
    await engine.dispose()
    assert await sql(postgres_sessions_url, "SELECT id FROM web_sessions") == [(record.id,)]
    assert await backend.purge(**expired) == 0


async def test_the_instant_of_expiry_is_expired(backend: Staged) -> None:
    """A request that commits in the very instant its session expires is too late, and one tick before is not (R30)."""
    site = Site(backend, idle_timeout=timedelta(hours=1))
    for tick, kept in ((timedelta(microseconds=1), True), (timedelta(), False)):
        browser = await site.filled(cart=[])
        expires_at = (await site.records())[-1].expires_at
        async with backend.hold("load", browser.do(write), after=True) as request:
            site.clock.now = expires_at - tick
        await request
        assert ("gone" not in site.kinds) == kept
        assert ("late" in decode((await site.records())[-1].data)) == kept
