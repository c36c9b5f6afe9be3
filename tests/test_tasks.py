"""What one request does at the same time: tasks of its handler that meet at its session.

One waits at a gate in front of its statement, or behind it; another goes on meanwhile; the gate opens.
"""

import asyncio
import copy
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from starlette.responses import Response

from sqlsessions import Session, SessionGone, SQLAlchemyBackend, load_session
from sqlsessions.backends.memory import InMemoryBackend
from sqlsessions.errors import BackendUnavailable
from tests.asgi import Request
from tests.staging import Browser, Do, Site, Staged

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["memory", "sqlite_sessions_url", "postgres_sessions_url"], ids=["memory", "sqlite", "postgres"])
def site(request: pytest.FixtureRequest) -> Site:
    """An application on a backend of each kind, with gates around its statements."""
    if request.param == "memory":
        return Site(Staged(InMemoryBackend()))
    return Site(Staged(SQLAlchemyBackend(request.getfixturevalue(request.param))))


async def count(session: Session) -> None:
    """Count one at once."""
    await session.atomic(lambda data: data | {"n": data["n"] + 1})


async def save(session: Session) -> None:
    """Change something and commit it."""
    session["saved"] = True
    await session.save()


def while_it_waits(
    site: Site, verb: str, work: Callable[[Session], Awaitable[object]], meanwhile: Do, *, after: bool = True
) -> Do:
    """Return a handler which goes on to *meanwhile* while its own *work* waits behind, or before, its next *verb*."""

    async def handle(session: Session) -> None:
        gate = site.backend.gate(verb, after=after)
        task = asyncio.ensure_future(work(session))
        await gate.full()
        try:
            meanwhile(session)
        finally:
            gate.open()
        await task

    return handle


#: What waits: which statement of it, and what a session that has been ended is asked for.
WAITING: list[tuple[str, Callable[[Session], Awaitable[object]]]] = [
    ("replace", count),
    ("replace", save),
    ("load", Session.reload),
]
waiting = pytest.mark.parametrize(("verb", "work"), WAITING, ids=["atomic", "save", "reload"])


@waiting
async def test_a_logout_meanwhile(site: Site, verb: str, work: Callable[[Session], Awaitable[object]]) -> None:
    """A session that is cleared while an operation on it is under way stays cleared (R28)."""
    browser = await site.filled(user_id="ada", n=1)
    copied = browser.twin()
    answer = await browser.do(while_it_waits(site, verb, work, Session.clear))
    assert answer.status == 200
    assert browser.cookies == {}
    assert await copied.data() == {}
    assert await site.records() == []


async def test_a_logout_after_a_timeout(site: Site) -> None:
    """The same where the handler has given up waiting: what it waited for goes on, and does not undo the logout."""
    browser = await site.filled(user_id="ada", n=1)

    async def give_up(session: Session) -> None:
        gate = site.backend.gate("replace", after=True)
        task = asyncio.ensure_future(count(session))
        await gate.full()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        session.clear()
        gate.open()

    await browser.do(give_up)
    assert await site.records() == []


@waiting
async def test_what_is_set_meanwhile(site: Site, verb: str, work: Callable[[Session], Awaitable[object]]) -> None:
    """What a handler sets or deletes while an operation is under way is kept on top of its outcome (R58)."""
    browser = await site.filled(n=1, old=True)

    def meanwhile(session: Session) -> None:
        session["late"] = [1]
        del session["old"]

    await browser.do(while_it_waits(site, verb, work, meanwhile))
    found = await browser.data()
    assert found == {"n": 2 if work is count else 1, "late": [1]} | ({"saved": True} if work is save else {})


async def test_a_login_meanwhile(site: Site) -> None:
    """A user who is bound while an atomic() is under way is bound, with a new cookie."""
    browser = await site.filled(n=1)
    answer = await browser.do(while_it_waits(site, "replace", count, lambda session: session.login("ada")))
    assert len(answer.set_cookies) == 1
    assert await browser.data() == {"n": 2, "user_id": "ada"}


async def test_what_is_set_while_a_session_begins(site: Site) -> None:
    """What is set while atomic() creates the session is in it as well, and what atomic() returned is nobody else's."""
    browser, returned = site.browser(), []

    async def begin(session: Session) -> None:
        returned.append(await session.atomic(lambda _: {"cart": [1]}))

    await browser.do(while_it_waits(site, "insert", begin, lambda session: session.update(late=True)))
    returned[0]["cart"].append(2)
    assert await browser.data() == {"cart": [1], "late": True}


async def test_what_is_set_while_a_lost_race_is_made_good(site: Site) -> None:
    """A save() that has to merge takes what is set during that as well."""
    slow = await site.filled(n=1)
    fast = slow.twin()

    async def handle(session: Session) -> None:
        before, reading = site.backend.gate("replace"), site.backend.gate("load", after=True)
        task = asyncio.ensure_future(save(session))
        await before.full()
        theirs = asyncio.ensure_future(fast.do(lambda session: session.update(theirs=True)))
        await reading.full()
        reading.open()
        await theirs
        merging = site.backend.gate("load", after=True)
        before.open()
        await merging.full()
        session["late"] = True
        merging.open()
        await task

    await slow.do(handle)
    assert await slow.data() == {"n": 1, "saved": True, "theirs": True, "late": True}


async def test_a_logout_while_a_lost_race_is_made_good(site: Site) -> None:
    """Into a session that ends while another's change is merged into it, that does not come back (R28)."""
    browser = await site.filled(n=1)
    other = browser.twin()

    async def handle(session: Session) -> None:
        writing, merging = site.backend.gate("replace"), None
        task = asyncio.ensure_future(save(session))
        await writing.full()
        theirs = asyncio.ensure_future(other.do(lambda session: session.update(theirs=True)))
        await theirs
        merging = site.backend.gate("load", after=True)
        writing.open()
        await merging.full()
        session.clear()
        merging.open()
        await task

    await browser.do(handle)
    assert (await site.records(), browser.cookies) == ([], {})


async def test_a_reload(site: Site) -> None:
    """reload() drops what was set, deleted and changed within, and what others have stored since is there."""
    browser = await site.filled(n=1, cart=[1], kept=True)
    other = browser.twin()

    async def handle(session: Session) -> None:
        session["n"] = session["m"] = 2
        session["cart"].append(2)
        del session["kept"]
        session.persistent = True
        await other.do(lambda session: session.update(theirs=True))
        await session.reload()
        assert session == {"n": 1, "cart": [1], "kept": True, "theirs": True}
        assert not session.modified

    await browser.do(handle)
    assert site.backend.calls[-1] == "load"
    assert await browser.data() == {"n": 1, "cart": [1], "kept": True, "theirs": True}


async def test_a_reload_of_nothing(site: Site) -> None:
    """reload() of a session that is not stored empties it."""

    async def handle(session: Session) -> None:
        session["n"] = 1
        session.login("ada")
        await session.reload()
        assert session == {}

    browser = site.browser()
    await browser.do(handle)
    assert (await site.records(), browser.cookies) == ([], {})


async def test_a_reload_beside_a_save(site: Site) -> None:
    """A reload() that began before a save() does not bring back what was stored then."""
    browser = await site.filled(n=1)

    async def handle(session: Session) -> None:
        gate = site.backend.gate("load", after=True)
        reloading = asyncio.ensure_future(session.reload())
        await gate.full()
        session["n"] = 2
        saving = asyncio.ensure_future(session.save())
        await asyncio.sleep(0)
        gate.open()
        await asyncio.gather(reloading, saving)
        assert session["n"] == 2

    await browser.do(handle)
    assert await browser.data() == {"n": 2}


async def test_two_saves_of_a_session_that_is_gone(site: Site) -> None:
    """Each of several who wait for the same commit hears that the session is gone."""
    browser = await site.filled(n=1)

    found: list[object] = []

    async def handle(session: Session) -> None:
        await browser.twin().do(Session.clear)
        session["n"] = 2
        found.extend(await asyncio.gather(session.save(), session.save(), return_exceptions=True))

    await browser.do(handle)
    assert [type(each) for each in found] == [SessionGone, SessionGone]


async def test_what_is_set_after_it_was_told_gone(site: Site) -> None:
    """A handler that was told so, and goes on to set something, is told again, as the settings want it."""
    for on_gone, status in (("drop", 200), ("raise", 409)):
        again = site.reconfigured(on_gone=on_gone)
        browser = await site.filled(n=1)

        async def handle(session: Session, browser: Browser = browser) -> None:
            await browser.twin().do(Session.clear)
            for _ in range(2):
                with pytest.raises(SessionGone):
                    await session.reload()
            session.login("ada")

        site.forget()
        browser.app = again.app
        assert (await browser.do(handle)).status == status
        assert site.kinds == ["revoked", "gone", "gone"]
        assert await site.records() == []


@pytest.mark.parametrize("on_gone", ["drop", "raise"])
async def test_what_begins_after_it_was_told_gone(site: Site, on_gone: str) -> None:
    """A handler that was told so may begin anew: clear() is no end of what it sets then (R28)."""
    browser = await site.filled(n=1)

    async def handle(session: Session) -> None:
        await browser.twin().do(Session.clear)
        session["n"] = 2
        with pytest.raises(SessionGone):
            await session.save()
        session.clear()
        with pytest.raises(SessionGone):
            await session.reload()
        session.clear()
        session["new"] = 1
        await session.save()
        session["newer"] = 2

    browser.app = site.reconfigured(on_gone=on_gone).app
    assert (await browser.do(handle)).status == 200
    assert await browser.data() == {"new": 1, "newer": 2}


@pytest.mark.parametrize("on_gone", ["drop", "raise"])
async def test_two_logouts(site: Site, on_gone: str) -> None:
    """Of two logouts at once each makes its browser forget the cookie: ending what has ended is no conflict (R28)."""
    slow = await site.filled(n=1)
    slow.app = site.reconfigured(on_gone=on_gone).app
    fast = slow.twin()
    async with site.backend.hold("delete", slow.do(Session.clear)) as request:
        await fast.do(Session.clear)
    answer = await request
    assert (answer.status, len(answer.set_cookies), slow.cookies) == (200, 1, {})


async def test_two_tasks_that_load(site: Site) -> None:
    """Where nothing is loaded by itself, tasks that each do it do not undo each other's changes."""
    browser = await site.filled(n=1)
    lazy = browser.twin(site.reconfigured(autoload_cookie=False).app)

    async def handle(request: Request) -> None:
        gate = site.backend.gate("load", arrivals=2, after=True)

        async def change(key: str) -> None:
            session = await load_session(request)
            session[key] = True

        tasks = [asyncio.ensure_future(change(key)) for key in "ab"]
        await gate.full()
        gate.open()
        await asyncio.gather(*tasks)

    await lazy.visit(handle)
    assert await browser.data() == {"n": 1, "a": True, "b": True}


async def test_two_tasks_that_load_of_which_one_fails(site: Site) -> None:
    """Where one of them finds the database away, the session is that of the other."""
    browser = await site.filled(n=1)
    lazy = browser.twin(site.reconfigured(autoload_cookie=False).app)

    async def handle(request: Request) -> int:
        gate = site.backend.gate("load")
        slow = asyncio.ensure_future(load_session(request))
        await gate.full()
        session = await load_session(request)
        session["n"] = 2
        site.backend.failing["load"] = BackendUnavailable()
        gate.open()
        assert await slow is session
        site.backend.failing.clear()
        return int(session["n"])

    assert (await lazy.visit(handle)).json() == 2
    assert await browser.data() == {"n": 2}


async def test_a_write_to_a_session_that_could_not_be_loaded(site: Site) -> None:
    """With on_unavailable="anonymous" such a write is refused, also if another load_session() would succeed now."""
    browser = await site.filled(n=1)
    browser.app = site.reconfigured(on_unavailable="anonymous").app
    site.backend.failing["load"] = BackendUnavailable()

    async def handle(request: Request) -> None:
        request.session["late"] = True
        site.backend.failing.clear()
        await load_session(request)

    assert (await browser.visit(handle)).status == 503
    assert await browser.data() == {"n": 1}


# From one user to another.


@pytest.mark.parametrize("bind", [lambda session: session.login("bob"), lambda session: session.update(user_id="bob")])
async def test_what_was_set_to_the_same(site: Site, bind: Do) -> None:
    """A key that this request has set is the new user's, also if the former one's had the same value (R44)."""
    browser = await site.filled(user_id="ada", role="member", cart=[], name="Ada", private=True)

    def log_in(session: Session) -> None:
        session["role"] = "member"
        session["cart"] = []
        session["name"] = "Bob"
        session.pop("private")
        bind(session)

    await browser.do(log_in)
    assert await browser.data() == {"user_id": "bob", "role": "member", "cart": [], "name": "Bob"}


async def test_what_was_changed_within(site: Site) -> None:
    """A value that this request has only changed within is the former user's still (R44)."""
    browser = await site.filled(user_id="ada", flash=["Your result is in"], profile={"email": "ada@example.com"})

    def log_in(session: Session) -> None:
        session.setdefault("flash", []).append("Welcome")
        session["profile"]["logins"] = 1
        session.setdefault("theme", "dark")
        session.login("bob")

    await browser.do(log_in)
    assert await browser.data() == {"user_id": "bob", "theme": "dark"}


async def test_what_was_dropped_is_not_taken_along(site: Site) -> None:
    """What reload() has dropped was not set: the stored value of its key stays behind (R44)."""
    browser = await site.filled(user_id="ada", cart=["ada's"])

    async def log_in(session: Session) -> None:
        session["cart"] = []
        await session.reload()
        session.login("bob")

    await browser.do(log_in)
    assert await browser.data() == {"user_id": "bob"}


async def test_what_the_former_user_did_meanwhile(site: Site) -> None:
    """What another request of the former user has stored since stays behind, under whatever key it is (R44)."""
    browser = await site.filled(user_id="ada", role="member")
    other = browser.twin()

    async def log_in(session: Session) -> None:
        session["role"] = "member"
        session.pop("flash", None)
        with suppress(KeyError):
            del session["flash"]
        session.login("bob")
        await other.do(lambda ada: ada.update(role="admin", flash="Ada's"))

    await browser.do(log_in)
    assert await browser.data() == {"user_id": "bob", "role": "member"}


async def test_what_was_overwritten_before_the_users_were_exchanged(site: Site) -> None:
    """What this request set for the former user, and another one has changed since, is the former user's (R44)."""
    browser = await site.filled(user_id="ada")
    other = browser.twin()

    async def log_in(session: Session) -> None:
        session["note"] = "ours"
        await session.save()
        await other.do(lambda ada: ada.update(note="Ada's"))
        session["n"] = 1
        await session.save()
        assert session["note"] == "Ada's"
        session.login("bob")

    await browser.do(log_in)
    assert await browser.data() == {"user_id": "bob", "n": 1}


async def test_a_user_of_two_keys(site: Site) -> None:
    """Where the user is in several keys, all of them have to be set: else it would be nobody's session."""

    def user(data: Any) -> str | None:
        return f"{data.get('realm')}:{data['id']}" if "id" in data else None

    two = site.reconfigured(user_key=user)
    browser = Browser(two.app)
    await browser.do(lambda session: session.update(realm="eu", id=1))
    await browser.do(lambda session: session.update(realm="eu", id=2))
    (record,) = await site.records()
    assert record.user_id == "eu:2"
    assert await browser.data() == {"realm": "eu", "id": 2}
    with pytest.raises(ValueError, match="set all that it looks at"):
        await browser.do(lambda session: session.update(id=3))
    assert await site.records() == [record]


async def test_a_logout_while_users_are_exchanged(site: Site) -> None:
    """A session that is cleared while it passes to another user is nobody's."""
    browser = await site.filled(user_id="ada")

    async def log_in(session: Session) -> None:
        session.login("bob")
        await session.save()

    await browser.do(while_it_waits(site, "delete", log_in, Session.clear))
    assert (await site.records(), browser.cookies) == ([], {})


# What is asked for while the same is under way.


async def begin_anew(session: Session) -> None:
    """End the session, and commit another."""
    session.clear()
    session["order"] = 1
    await session.save()


async def test_a_second_end_meanwhile(site: Site) -> None:
    """A session that ends once more while what followed its first end is committed has ended, also on a 5xx (R28)."""
    browser = await site.filled(x=1)
    await browser.do(while_it_waits(site, "insert", begin_anew, Session.clear), status=500)
    assert await site.records() == []


def stay(session: Session) -> None:
    """Ask for a cookie that outlives the browser."""
    session.persistent = True


@pytest.mark.parametrize("status", [200, 500])
async def test_a_setting_meanwhile(site: Site, status: int) -> None:
    """What is asked for while a new session is committed is another matter: what was committed stays, on a 5xx, too."""
    browser = await site.filled(x=1)
    await browser.do(while_it_waits(site, "insert", begin_anew, stay), status=status)
    assert site.backend.calls == ["load", "delete", "insert", *(["replace"] if status == 200 else [])]
    (record,) = await site.records()
    assert (record.data, record.persistent) == ('{"order":1}', status == 200)
    assert await browser.data() == {"order": 1}


@pytest.mark.parametrize("user_key", ["user_id", None])
@pytest.mark.parametrize("end", [Session.clear, lambda session: session.login("bob")], ids=["logout", "login"])
async def test_an_end_while_the_secret_is_renewed(site: Site, user_key: str | None, end: Do) -> None:
    """A logout or another login that comes while a renewal is committed is not taken for done with that (R28)."""
    browser = Browser(site.reconfigured(user_key=user_key).app)
    await browser.do(lambda session: session.login("ada"))

    async def work(session: Session) -> None:
        session.renew()
        await session.save()

    await browser.do(while_it_waits(site, "replace", work, end))
    assert [record.user_id for record in await site.records()] == ([] if end is Session.clear else ["bob"])


async def test_an_end_of_what_was_begun_here(site: Site) -> None:
    """A browser that has no cookie is sent none for a session that begins and ends in one request."""

    async def handle(session: Session) -> None:
        session.persistent = True
        session["n"] = 1
        await session.save()
        session.clear()
        assert not session.persistent

    answer = await site.browser().do(handle)
    assert (answer.set_cookies, await site.records()) == ([], [])


async def test_timeouts_meanwhile(site: Site) -> None:
    """A timeout that is set while another one is committed is committed after it."""
    browser = await site.filled(x=1)

    async def work(session: Session) -> None:
        session.set_timeouts(idle=timedelta(hours=1))
        await session.save()

    await browser.do(
        while_it_waits(site, "replace", work, lambda session: session.set_timeouts(idle=timedelta(hours=2)))
    )
    (record,) = await site.records()
    assert record.idle_timeout == 7200


async def test_a_5xx_while_the_secret_is_renewed(site: Site) -> None:
    """A 5xx takes the cookie of a commit along that is under way: the browser would be nobody from then on."""
    browser = await site.filled(cart=[1])
    saves: list[asyncio.Task[None]] = []

    async def give_up(session: Session) -> None:
        session.login("ada")
        gate = site.backend.gate("replace")
        saves.append(asyncio.create_task(session.save()))
        await gate.full()
        asyncio.get_running_loop().call_soon(gate.open)

    await browser.do(give_up, status=504)
    await asyncio.gather(*saves)
    assert await browser.data() == {"cart": [1], "user_id": "ada"}


# Work on a session that is not stored.


async def test_a_clear_before_atomic(site: Site) -> None:
    """What atomic() has committed stays, where there had been nothing for clear() to end."""
    browser = site.browser()

    async def begin(session: Session) -> None:
        session.clear()
        assert await session.atomic(lambda data: data | {"n": 1}) == {"n": 1}
        assert session == {"n": 1}

    await browser.do(begin)
    assert await browser.data() == {"n": 1}


@pytest.mark.parametrize("do", [Session.clear, lambda session: session.login("eve")])
async def test_what_was_asked_for_before_the_session_could_be_loaded(site: Site, do: Do) -> None:
    """An end or a login is not turned into its opposite by a second try to load, after the first one failed (R28)."""
    anonymous = site.reconfigured(on_unavailable="anonymous")
    browser = (await site.filled(user_id="ada")).twin(anonymous.app)
    before = await site.records()

    async def handler(request: Request) -> Response:
        do(request.session)
        site.backend.failing.clear()
        await load_session(request)
        return Response()

    site.backend.failing["load"] = BackendUnavailable("down")
    answer = await browser.visit(handler)
    assert (answer.status, await site.records()) == (503, before)
    assert await browser.data() == {"user_id": "ada"}


# The end of a session whose request fails.


def unstorable(session: Session) -> None:
    """End the session, and begin another with what JSON has not."""
    session.clear()
    session["at"] = {1}


async def unstorable_save(session: Session) -> None:
    """The same, and commit it."""
    unstorable(session)
    await session.save()


@pytest.mark.parametrize("do", [unstorable, unstorable_save])
async def test_an_end_beside_what_cannot_be_stored(site: Site, do: Do) -> None:
    """A session ends even if what was set after that cannot be stored, and the request is an error (R28)."""
    browser = await site.filled(user_id="ada")
    copied = browser.twin()
    with pytest.raises(ValueError, match=r"session\['at'\] is a builtins.set"):
        await browser.do(do)
    assert await site.records() == []
    assert await copied.data() == {}


async def test_an_end_with_a_function_for_the_user(site: Site) -> None:
    """A function of the data that finds no user in a session without any is not asked: nobody is logged in there."""
    browser = Browser(site.reconfigured(user_key=lambda data: data["auth"]["id"]).app)
    await browser.do(lambda session: session.update(auth={"id": 1}))
    assert (await browser.do(Session.clear)).status == 200
    assert (await site.records(), browser.cookies) == ([], {})


# What the next commit finds.


async def test_a_value_that_cannot_be_stored_beside_atomic(site: Site) -> None:
    """A pending value that JSON has not does not undo what atomic() has committed, and is refused at its own commit."""
    browser = await site.filled(when="", n=1)

    async def handle(session: Session) -> None:
        session["when"] = {1}
        await session.atomic(lambda data: data | {"n": data["n"] + 1})
        assert session["n"] == 2
        assert session.modified
        session["when"] = "later"

    await browser.do(handle)
    assert await browser.data() == {"when": "later", "n": 2}


async def test_copies_are_left_alone(site: Site) -> None:
    """What a handler holds of the session is still part of it after an operation that waited (R55)."""
    browser = await site.filled(cart=[1], n=1)

    async def handle(session: Session) -> None:
        cart = session["cart"]
        await count(session)
        cart.append(2)
        assert copy.copy(session) == {"cart": [1, 2], "n": 2}

    await browser.do(handle)
    assert await browser.data() == {"cart": [1, 2], "n": 2}
