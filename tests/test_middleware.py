"""The whole of it, by ASGI messages, on every backend: what a request costs, what it keeps, and whom it believes."""

import base64
import json
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import fastapi
import itsdangerous
import pytest
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.datastructures import Secret
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route

from sqlsessions import (
    CurrentSession,
    CurrentUserId,
    InMemoryBackend,
    Session,
    SessionAutoloadMiddleware,
    SessionMiddleware,
    SQLAlchemyBackend,
    current_user_id,
    load_session,
)
from sqlsessions.credentials import CookieSigner, Credential, new_id, new_secret
from sqlsessions.errors import BackendReadOnly, ConfigurationError, InvalidData, SessionNotLoaded
from sqlsessions.events import Event
from sqlsessions.payload import encode
from sqlsessions.record import Expected, Record
from tests.asgi import (
    COOKIE,
    KEY,
    OTHER_KEY,
    Answer,
    Browser,
    Request,
    Site,
    TellingBackend,
    ask,
    cookie_header,
    fill,
    ignore,
    read,
    serve,
)
from tests.looking import sql

pytestmark = pytest.mark.anyio


@pytest.fixture
def memory(statements: list[str]) -> Site:
    """A site whose sessions live in memory, for what no database has a part in."""
    return Site(TellingBackend(statements), statements)


def change(**data: Any) -> Callable[[Request], None]:
    """Return a handler that sets these keys."""
    return lambda request: request.session.update(data)


def end(request: Request) -> None:
    """Log out."""
    request.session.clear()


# What a request costs.


async def test_anonymous_request(site: Site) -> None:
    """A request without a cookie costs no statement, whether or not it looks into the session (R45)."""
    for handler in (ignore, read):
        answer = await site.browser().visit(handler)
        assert (site.statements, answer.set_cookie) == ([], None)


async def test_new_session(site: Site) -> None:
    """A session is made by one INSERT, when it is first filled."""
    answer = await site.browser().visit(fill)
    assert site.statements == ["INSERT"]
    assert answer.set_cookie
    assert answer.set_cookie.name == COOKIE


async def test_read(site: Site) -> None:
    """Reading a session costs one SELECT, sends no cookie, and finds what was kept."""
    browser = await site.visitor()
    answer = await browser.visit(read)
    assert (answer.json(), answer.set_cookie, site.statements) == ({"n": 1}, None, ["SELECT"])


async def test_change(site: Site) -> None:
    """Changing a session costs one SELECT and one UPDATE, and sends no cookie."""
    browser = await site.visitor()
    answer = await browser.visit(change(n=2))
    assert (site.statements, answer.set_cookie) == (["SELECT", "UPDATE"], None)
    assert (await browser.visit(read)).json() == {"n": 2}


async def test_nested_change(site: Site) -> None:
    """A change deep inside a value is kept like any other (R55)."""
    browser = await site.visitor(change(cart=[]))
    await browser.visit(lambda request: request.session["cart"].append({"id": 1}))
    await browser.visit(lambda request: request.session["cart"][0].update(count=2))
    assert (await browser.visit(read)).json() == {"cart": [{"id": 1, "count": 2}]}


async def test_change_through_the_scope(site: Site) -> None:
    """What writes to scope["session"], as middleware of others does, is kept as well (R55)."""
    browser = await site.visitor()
    await browser.visit(lambda request: request.scope["session"].__setitem__("n", 2))
    assert (await browser.visit(read)).json() == {"n": 2}


async def test_renewal(site: Site) -> None:
    """A renewal is part of the one UPDATE, keeps the id and the data, and kills the old cookie (R26)."""
    browser = await site.visitor()
    before, thief = await site.record(), browser.twin()

    def renew(request: Request) -> None:
        request.session.renew()
        request.session["m"] = 2

    answer = await browser.visit(renew)
    assert (site.statements, site.kinds) == (["SELECT", "UPDATE"], ["renewed"])
    assert answer.set_cookie
    after = await site.record()
    assert (after.id, after.created_at, after.user_id) == (before.id, before.created_at, None)
    assert after.secret_hash != before.secret_hash
    assert (await browser.visit(read)).json() == {"n": 1, "m": 2}
    assert (await thief.visit(read)).json() == {}
    assert site.kinds[1:] == ["superseded"]


async def test_logout(site: Site) -> None:
    """A logout costs one SELECT and one DELETE, expires the cookie, and leaves a stolen one dead (R28)."""
    browser = await site.visitor(change(user_id=1))
    thief = browser.twin()
    answer = await browser.visit(end)
    assert (site.statements, site.kinds, await site.records()) == (["SELECT", "DELETE"], ["revoked"], [])
    assert answer.set_cookie
    assert answer.set_cookie.attributes["max-age"] == "0"
    assert browser.cookies == {}
    assert (await thief.visit(read)).json() == {}


async def test_popped_empty(site: Site) -> None:
    """A session whose last key was removed is deleted, and its cookie expired."""
    browser = await site.visitor()
    await browser.visit(lambda request: request.session.pop("n"))
    assert (site.statements, await site.records(), browser.cookies) == (["SELECT", "DELETE"], [], {})


async def test_ended_and_begun_anew(site: Site) -> None:
    """clear() and then new keys is a new session, under another id, of which the old cookie knows nothing."""
    browser = await site.visitor(change(user_id=1, secret="old"))
    before, thief = await site.record(), browser.twin()

    def again(request: Request) -> None:
        request.session.clear()
        request.session["flash"] = "bye"

    answer = await browser.visit(again)
    assert site.statements == ["SELECT", "DELETE", "INSERT"]
    assert answer.set_cookie
    assert (await site.record()).id != before.id
    assert (await browser.visit(read)).json() == {"flash": "bye"}
    assert (await thief.visit(read)).json() == {}


def filled_and(action: Callable[[Session], object]) -> Callable[[Request], None]:
    """Return a handler that fills the session before it does *action*."""

    def handler(request: Request) -> None:
        fill(request)
        action(request.session)

    return handler


@pytest.mark.parametrize(
    "handler",
    [
        read,
        ignore,
        end,
        lambda request: "n" in request.session,
        lambda request: len(request.session),
        lambda request: request.session.get("n"),
        lambda request: request.session.pop("n", None),
        filled_and(lambda session: session.pop("n")),
        filled_and(Session.clear),
        lambda request: request.session.revoke(),
        lambda request: request.session.renew(),
        lambda request: setattr(request.session, "persistent", True),
        lambda request: request.session.set_timeouts(idle=timedelta(hours=1)),
        lambda request: request.session.update({}),
    ],
)
@pytest.mark.parametrize("cookie", ["none", "unknown"])
async def test_no_row_for_nothing(site: Site, handler: Callable[[Request], object], cookie: str) -> None:
    """A session never filled, or emptied again, gets no row and no cookie, with a dead cookie too (R45, R46, R49)."""
    browser = site.browser()
    if cookie == "unknown":
        browser.cookies[COOKIE] = genuine(new_id(site.clock()))
    answer = await browser.visit(handler)
    assert site.statements == ([] if cookie == "none" else ["SELECT"])
    assert (answer.set_cookie, await site.records()) == (None, [])


def genuine(session_id: UUID, secret: bytes | None = None, key: bytes = KEY, **options: Any) -> str:
    """Return a cookie value with a correct signature."""
    signer = CookieSigner(key, **{"cookie_name": COOKIE} | options)
    return signer.sign(Credential(session_id, secret or new_secret()))


# Whom it believes.


@pytest.mark.parametrize(
    "forge",
    [
        lambda value: "",
        lambda value: "x",
        lambda value: value[:-1],
        lambda value: value[1:],
        lambda value: value + "=",
        lambda value: value + "A",
        lambda value: value.swapcase(),
        lambda value: value.partition(".")[0],
        lambda value: value.partition(".")[0] + "." + "A" * 43,
        lambda value: '"' + value + '"',
        lambda value: "%41" + value[1:],
        lambda value: value + "\xa0",
        lambda value: "\xff" * len(value),
        lambda value: "\0" * len(value),
        lambda value: str(UUID(bytes=base64.urlsafe_b64decode(value[:66] + "==")[1:17])),
        lambda value: "." * len(value),
        lambda value: "x" * 60_000,
    ],
)
async def test_forged_cookie(site: Site, forge: Callable[[str], str]) -> None:
    """A cookie that was not signed by us never reaches the database; the visitor is anonymous (R6, R7, R40)."""
    browser = await site.visitor()
    answer = await ask(site.app, handler=read, headers=cookie_header(forge(browser.cookies[COOKIE])))
    assert (answer.json(), answer.set_cookie, site.statements) == ({}, None, [])
    assert site.kinds == ["bad_signature"]


async def test_every_changed_character(memory: Site) -> None:
    """Whichever character of a cookie is changed, and whatever to, it is refused before any SQL (R7)."""
    browser = await memory.visitor()
    value = browser.cookies[COOKIE]
    for place, character in enumerate(value):
        for other in "A_-.":
            if other != character:
                forged = value[:place] + other + value[place + 1 :]
                assert (await ask(memory.app, handler=read, headers=cookie_header(forged))).json() == {}
    assert memory.statements == []


async def test_client_chosen_id(site: Site) -> None:
    """An id that we did not issue is never adopted, even correctly signed: what is written gets an id of ours (R2)."""
    chosen = new_id(site.clock())
    browser = site.browser()
    browser.cookies[COOKIE] = genuine(chosen)
    answer = await browser.visit(fill)
    assert (site.statements, site.kinds) == (["SELECT", "INSERT"], ["unknown", "created"])
    assert (await site.record()).id != chosen
    assert answer.set_cookie
    assert (await browser.visit(read)).json() == {"n": 1}


async def test_id_of_another_session(site: Site) -> None:
    """The id of a living session without its secret opens nothing and harms nothing, and tells of itself (R4)."""
    victim = await site.visitor()
    before = await site.record()
    browser = site.browser()
    browser.cookies[COOKIE] = genuine(before.id)
    assert (await browser.visit(read)).json() == {}
    browser.cookies[COOKIE] = genuine(before.id, before.secret_hash)
    assert (await browser.visit(read)).json() == {}
    await browser.visit(end)
    assert site.kinds == ["superseded"] * 3
    assert await site.record() == before
    assert (await victim.visit(read)).json() == {"n": 1}


@pytest.mark.parametrize(
    "stranger",
    [
        {"cookie_name": "session"},
        {"cookie_name": "__Host-Session"},
        {"audience": "other"},
        {"cookie_name": "__Host-sessionother"},
        {"key": OTHER_KEY},
    ],
)
async def test_cookie_of_another_application(memory: Site, stranger: dict[str, Any]) -> None:
    """A value signed for another cookie, another audience or with another key is refused before any SQL (R8, R113)."""
    await memory.visitor()
    answer = await ask(memory.app, handler=read, headers=cookie_header(genuine((await memory.record()).id, **stranger)))
    assert (answer.json(), memory.statements, memory.kinds) == ({}, [], ["bad_signature"])


async def test_audience(site: Site) -> None:
    """Tenants that share a key and a table refuse each other's cookies (R113)."""
    ours, theirs = site.reconfigured(audience="ours"), site.reconfigured(audience="theirs")
    browser = await ours.visitor()
    assert (await browser.visit(read)).json() == {"n": 1}
    site.forget()
    browser.app = theirs.app
    assert (await browser.visit(read)).json() == {}
    assert (site.statements, site.kinds) == ([], ["bad_signature"])


@pytest.mark.parametrize("salt", [None, b"itsdangerous.Signer", b"cookie-session", b""])
async def test_cookie_of_starlette(memory: Site, salt: bytes | None) -> None:
    """What Starlette's own middleware, or any other itsdangerous signer, made with the same key is refused (R8)."""
    payload = base64.b64encode(json.dumps({"user_id": 1}).encode())
    signers = [
        itsdangerous.TimestampSigner(KEY) if salt is None else itsdangerous.Signer(KEY, salt=salt),
        itsdangerous.URLSafeTimedSerializer(KEY).make_signer(salt or b"x"),
    ]
    ours = base64.urlsafe_b64encode(b"\1" + new_id(memory.clock()).bytes + new_secret()).rstrip(b"=")
    for signer in signers:
        for value in (signer.sign(payload), signer.sign(ours)):
            answer = await ask(memory.app, handler=read, headers=cookie_header(value.decode()))
            assert answer.json() == {}
    assert memory.statements == []


async def test_duplicate_cookies(site: Site) -> None:
    """Of several cookies the one that verifies counts, in any order; two different ones that verify both fail (R21)."""
    mine, other = await site.visitor(), await site.visitor()
    value, another = mine.cookies[COOKIE], other.cookies[COOKIE]
    for values in ([value, "junk"], ["junk", value], [value, value], ["", value, "x" * 110]):
        answer = await ask(site.app, handler=read, headers=cookie_header(*values))
        assert (answer.json(), site.statements, site.kinds) == ({"n": 1}, ["SELECT"], [])
        site.forget()
    split = [*cookie_header("junk"), *cookie_header(value)]
    assert (await ask(site.app, handler=read, headers=split)).json() == {"n": 1}
    site.forget()
    for values in ([value, another], [another, value]):
        answer = await ask(site.app, handler=read, headers=cookie_header(*values))
        assert (answer.json(), answer.set_cookie, site.statements) == ({}, None, [])
        assert site.events.pop().kind == "duplicate_cookie"


async def test_too_many_cookies(memory: Site) -> None:
    """A cookie among more look-alikes than are read is refused with them, and an event says why (R22, R109)."""
    browser = await memory.visitor()
    value = browser.cookies[COOKIE]
    fillers = [f"filler{number}" for number in range(32)]
    answer = await ask(memory.app, handler=read, headers=cookie_header(*fillers[1:], value))
    assert (answer.json(), memory.kinds) == ({"n": 1}, [])
    memory.forget()
    for values in ([value, *fillers], [*fillers, value]):
        answer = await ask(memory.app, handler=read, headers=cookie_header(*values))
        assert (answer.json(), answer.set_cookie, memory.statements) == ({}, None, [])
        assert memory.events.pop().kind == "too_many_cookies"


async def test_session_from_elsewhere(site: Site) -> None:
    """A cookie's value in the URL, another header or the body opens nothing (R23)."""
    browser = await site.visitor()
    value = browser.cookies[COOKIE]
    answer = await ask(
        site.app, f"/{value}?{COOKIE}={value}&session={value}", method="POST", handler=read, body=value.encode(),
        headers=[(b"authorization", b"Bearer " + value.encode()), (COOKIE.lower().encode(), value.encode()),
                 (b"set-cookie", f"{COOKIE}={value}".encode()), (b"cookie2", f"{COOKIE}={value}".encode())],
    )  # fmt: skip
    assert (answer.json(), site.statements) == ({}, [])


async def test_key_rotation(site: Site) -> None:
    """A cookie of a previous key still counts, is re-issued once under the new key, and dies with its key (R9)."""
    browser = await site.visitor()
    late = browser.twin()
    site.clock.advance(seconds=1)
    rotated = site.reconfigured(secret_key=OTHER_KEY, previous_secret_keys=[KEY])
    browser.app = late.app = rotated.app
    answer = await browser.visit(read)
    assert answer.json() == {"n": 1}
    assert answer.set_cookie
    assert answer.header("cache-control") == "no-store"
    site.forget()
    answer = await browser.visit(read)
    assert (answer.json(), answer.set_cookie, site.statements) == ({"n": 1}, None, ["SELECT"])
    browser.app = late.app = site.reconfigured(secret_key=OTHER_KEY).app
    assert (await browser.visit(read)).json() == {"n": 1}
    assert (await late.visit(read)).json() == {}


async def test_key_rotation_without_access(site: Site) -> None:
    """A cookie of a previous key is re-issued even where nobody looks into the session, and Vary says so (R9, R103)."""
    browser = await site.visitor()
    site.clock.advance(seconds=1)
    browser.app = site.reconfigured(secret_key=OTHER_KEY, previous_secret_keys=[KEY]).app
    answer = await browser.visit(ignore)
    assert answer.set_cookie
    assert answer.header("vary") == "Cookie"
    browser.app = site.reconfigured(secret_key=OTHER_KEY).app
    assert (await browser.visit(read)).json() == {"n": 1}


async def test_key_rotation_of_a_dead_session(site: Site) -> None:
    """A cookie of a previous key whose session is gone is not re-issued (R9, R45)."""
    browser = site.browser()
    browser.cookies[COOKIE] = genuine(new_id(site.clock()))
    browser.app = site.reconfigured(secret_key=OTHER_KEY, previous_secret_keys=[KEY]).app
    answer = await browser.visit(ignore)
    assert (answer.set_cookie, site.statements) == (None, ["SELECT"])


# What a failed response keeps.


class CrashError(Exception):
    """What an application raises."""


@pytest.mark.parametrize("status", [500, 502, 503, 599])
async def test_server_error(site: Site, status: int) -> None:
    """A 5xx keeps no change, creates no session and sends no cookie (R56)."""

    def handler(request: Request) -> Response:
        request.session["m"] = request.session["user_id"] = 2
        return Response(status_code=status)

    browser = await site.visitor()
    for visitor in (browser, site.browser()):
        answer = await visitor.visit(handler)
        assert (answer.status, answer.set_cookie) == (status, None)
    assert site.statements == ["SELECT"]
    assert (await browser.visit(read)).json() == {"n": 1}


@pytest.mark.parametrize("status", [200, 302, 400, 401, 404, 422, 499])
async def test_client_error(site: Site, status: int) -> None:
    """Every other status keeps what was changed: a failed login may be counted."""

    def handler(request: Request) -> Response:
        request.session["tries"] = 1
        return Response(status_code=status)

    browser = site.browser()
    await browser.visit(handler)
    assert (await browser.visit(read)).json() == {"tries": 1}


async def test_exception(site: Site) -> None:
    """An exception keeps no change, and is passed on as it is (R56)."""

    def handler(request: Request) -> None:
        request.session["m"] = 2
        raise CrashError

    browser = await site.visitor()
    assert await browser.visit(handler, raises=CrashError) == Answer()
    assert site.statements == ["SELECT"]
    assert (await browser.visit(read)).json() == {"n": 1}


@pytest.mark.parametrize("finish", [Session.clear, Session.revoke])
async def test_logout_that_fails(site: Site, finish: Callable[[Session], None]) -> None:
    """A logout holds when the handler raises or answers 5xx afterwards; what was set after it does not (R28)."""

    def crash(request: Request) -> None:
        finish(request.session)
        request.session["m"] = 2
        raise CrashError

    def fail(request: Request) -> Response:
        finish(request.session)
        request.session["m"] = 2
        return Response(status_code=500)

    for handler, error in ((crash, CrashError), (fail, None)):
        browser = await site.visitor()
        await browser.twin().visit(handler, raises=error)
        assert (site.statements, await site.records()) == (["SELECT", "DELETE"], [])
        assert (await browser.visit(read)).json() == {}


async def test_no_response(site: Site) -> None:
    """When the application ends without a word, a logout holds and nothing else is kept (R28, R56)."""

    async def silent(scope: Any, receive: Any, send: Any) -> None:
        scope["handler"](Request(scope, receive))

    browser = await site.visitor()
    browser.app = SessionMiddleware(silent, backend=site.backend, **site.options)
    assert await browser.visit(change(n=2)) == Answer()
    assert site.statements == ["SELECT"]
    assert await browser.visit(end) == Answer()
    assert await site.records() == []


async def test_logout_in_a_task_that_fails(site: Site) -> None:
    """A logout in the middle of a body holds when the body breaks off."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        scope["session"]["m"] = 2
        scope["session"].clear()
        raise CrashError

    browser = await site.visitor()
    browser.app = SessionMiddleware(app, backend=site.backend, **site.options)
    await browser.visit(raises=CrashError)
    assert await site.records() == []


# How long it lives.


async def test_idle_timeout(site: Site) -> None:
    """Unused, a session ends to the microsecond, whatever the cookie says and with no purge (R12, R33, R35, R88)."""
    browser = await site.visitor()
    twin = browser.twin()
    site.clock.now = (await site.record()).expires_at - timedelta(microseconds=1)
    answer = await ask(site.app, handler=ignore, headers=cookie_header(browser.cookies[COOKIE]))
    assert (site.kinds, answer.set_cookie) == ([], None)
    site.clock.advance(microseconds=1)
    answer = await twin.visit(read)
    assert (answer.json(), answer.set_cookie, site.kinds) == ({}, None, ["unknown"])
    assert len(await site.records()) == 1


async def test_expired_session_is_not_reused(site: Site) -> None:
    """What is written with the cookie of an expired session begins another (R2, R30)."""
    browser = await site.visitor()
    before = await site.record()
    site.clock.advance(days=14)
    await browser.visit(change(m=2))
    assert {record.id for record in await site.records()} > {before.id}
    assert (await browser.visit(read)).json() == {"m": 2}


async def test_touch(site: Site) -> None:
    """Use extends a session by one UPDATE every five minutes, which leaves data and version alone (R36)."""
    browser = await site.visitor()
    before = await site.record()
    for seconds in (0, 60, 239):
        site.clock.advance(seconds=seconds)
        await browser.visit(read)
    assert site.statements == ["SELECT"] * 3
    site.forget()
    site.clock.advance(seconds=1)
    answer = await browser.visit(read)
    assert (site.statements, answer.set_cookie) == (["SELECT", "UPDATE"], None)
    now = site.clock()
    assert await site.record() == before._replace(last_seen_at=now, expires_at=now + timedelta(days=14))
    site.forget()
    await browser.visit(read)
    assert site.statements == ["SELECT"]


async def test_no_touch_without_access(site: Site) -> None:
    """A request that does not look into the session does not extend it."""
    browser = await site.visitor()
    site.clock.advance(days=1)
    await browser.visit(ignore)
    assert site.statements == ["SELECT"]


async def test_change_touches(site: Site) -> None:
    """A change moves the expiry only when a touch is due, in the same UPDATE (R36)."""
    browser = await site.visitor()
    before = await site.record()
    site.clock.advance(minutes=4)
    await browser.visit(change(n=2))
    assert (await site.record()).expires_at == before.expires_at
    site.clock.advance(minutes=1)
    await browser.visit(change(n=3))
    assert (await site.record()).expires_at == site.clock() + timedelta(days=14)
    assert site.statements == ["SELECT", "UPDATE"] * 2


async def test_short_idle_timeout(site: Site) -> None:
    """A touch is due after a tenth of a short idle timeout, so that use always keeps a session alive (R36)."""
    short = site.reconfigured(idle_timeout=timedelta(seconds=10))
    browser = await short.visitor()
    for _ in range(20):
        site.clock.advance(seconds=9)
        assert (await browser.visit(read)).json() == {"n": 1}
    site.clock.advance(seconds=10)
    assert (await browser.visit(read)).json() == {}


async def test_anonymous_idle_timeout(site: Site) -> None:
    """A session without a user may end sooner; with its user it lives longer, and after losing them as before (R47)."""
    site = site.reconfigured(anonymous_idle_timeout=timedelta(hours=1))
    browser, bot = await site.visitor(), await site.visitor()
    site.clock.advance(minutes=59)
    await browser.visit(change(user_id="ada"))
    site.clock.advance(minutes=1)
    assert (await bot.visit(read)).json() == {}
    site.clock.advance(days=13)
    await browser.visit(lambda request: request.session.pop("user_id") and None)
    (left,) = [record for record in await site.records() if record.expires_at > site.clock()]
    assert left.expires_at == site.clock() + timedelta(hours=1)
    site.clock.advance(minutes=59)
    assert (await browser.visit(read)).json() == {"n": 1}
    site.clock.advance(hours=1)
    assert (await browser.visit(read)).json() == {}


async def test_absolute_timeout(site: Site) -> None:
    """A session in use for 31 days ends after 30, to the microsecond: no touch, write or renewal extends it (R34)."""
    browser = await site.visitor()
    begun, alive = site.clock(), 0
    for number in range(31 * 2):
        site.clock.advance(hours=12)
        handler = (read, change(n=1, m=number), lambda request: (request.session.renew(), read(request))[1])[number % 3]
        await browser.visit(handler)
        alive += (await browser.visit(read)).json().get("n") == 1 and site.clock() < begun + timedelta(days=30)
    assert alive == 30 * 2 - 1
    fresh = await site.visitor()
    begun = site.clock()
    for day in range(1, 30):
        site.clock.now = begun + timedelta(days=day)
        await fresh.visit(read)
    site.clock.now = begun + timedelta(days=30, microseconds=-1)
    assert (await fresh.visit(read)).json() == {"n": 1}
    site.clock.advance(microseconds=1)
    assert (await fresh.visit(read)).json() == {}


async def test_login_begins_the_absolute_timeout(site: Site) -> None:
    """The absolute timeout runs from the last login; logging in again restarts it (R34)."""
    browser = await site.visitor(lambda request: request.session.login("ada"))
    for _ in range(3):
        for _ in range(29):
            site.clock.advance(days=1)
            await browser.visit(read)
        await browser.visit(lambda request: request.session.login("ada"))
    assert (await browser.visit(read)).json() == {"user_id": "ada"}
    assert (await site.record()).authenticated_at == site.clock()


async def test_unbinding_begins_the_absolute_timeout(site: Site) -> None:
    """What stays when the user goes lives on, however long ago the visitor had come; it is nobody's login (R34)."""
    site = site.reconfigured(absolute_timeout=timedelta(hours=12))
    browser = await site.visitor(change(cart=[1]))
    site.clock.advance(hours=11)
    await browser.visit(change(user_id="ada"))
    site.clock.advance(hours=2)
    await browser.visit(lambda request: request.session.pop("user_id") and None)
    site.clock.advance(hours=11, minutes=59)
    assert (await browser.visit(lambda request: [dict(request.session), request.session.authenticated_at])).json() == [
        {"cart": [1]},
        None,
    ]
    site.clock.advance(minutes=1)
    assert (await browser.visit(read)).json() == {}


async def test_shorter_timeouts(site: Site) -> None:
    """Shortening a timeout in the configuration ends existing sessions; lengthening it revives none (R38)."""
    browser = await site.visitor()
    site.clock.advance(days=2)
    for shorter in ({"idle_timeout": timedelta(days=2)}, {"absolute_timeout": timedelta(days=2)}):
        browser.app = site.reconfigured(**shorter).app
        assert (await browser.visit(read)).json() == {}
        assert site.events.pop().kind == "expired"
    browser.app = site.reconfigured(idle_timeout=timedelta(days=2, microseconds=1)).app
    assert (await browser.visit(ignore)).status == 200
    assert site.kinds == []
    site.clock.advance(days=12)
    browser.app = site.reconfigured(idle_timeout=timedelta(days=28)).app
    assert (await browser.visit(read)).json() == {}


def remember(request: Request) -> None:
    """Log in, to be remembered."""
    request.session.login("ada")
    request.session.set_timeouts(idle=timedelta(days=25))
    request.session.persistent = True


async def test_remember_me(site: Site) -> None:
    """set_timeouts() and persistent give one session an idle timeout of its own and a cookie that stays as long."""
    browser = site.browser()
    answer = await browser.visit(remember)
    assert answer.set_cookie
    assert answer.set_cookie.attributes["max-age"] == str(25 * 24 * 3600)
    assert (await site.record()).idle_timeout == 25 * 24 * 3600
    site.clock.advance(days=24)
    answer = await browser.visit(read)
    assert answer.json() == {"user_id": "ada"}
    # Touched: the cookie is told, and no further than to the end of the absolute timeout.
    assert answer.set_cookie
    assert answer.set_cookie.attributes["max-age"] == str(6 * 24 * 3600)
    answer = await browser.visit(read)
    assert answer.set_cookie is None


async def test_forget_me(site: Site) -> None:
    """Taking persistence and the timeout back is an UPDATE, shortens what was promised, and tells the browser (R34)."""
    browser = await site.visitor(remember)
    site.clock.advance(seconds=1)

    def forget(request: Request) -> None:
        request.session.persistent = False
        request.session.set_timeouts(idle=timedelta(minutes=1))

    answer = await browser.visit(forget)
    assert site.statements == ["SELECT", "UPDATE"]
    assert answer.set_cookie
    assert "max-age" not in answer.set_cookie.attributes
    record = await site.record()
    assert (record.expires_at, record.persistent) == (site.clock() + timedelta(minutes=1), False)
    await browser.visit(lambda request: request.session.set_timeouts(idle=None))
    assert (await site.record()).expires_at == site.clock() + timedelta(days=14)
    assert (await site.record()).idle_timeout is None


async def test_session_cookie(site: Site) -> None:
    """By default the cookie ends with the browser, and neither use nor a touch sends it again."""
    answer = await site.browser().visit(fill)
    assert answer.set_cookie
    assert not answer.set_cookie.attributes.keys() & {"max-age", "expires"}


async def test_persistent_by_default(site: Site) -> None:
    """With cookie_persistent=True the cookie stays as long as the session, and is sent again with each touch only."""
    browser = site.reconfigured(cookie_persistent=True).browser()
    answer = await browser.visit(fill)
    assert answer.set_cookie
    assert answer.set_cookie.attributes["max-age"] == str(14 * 24 * 3600)
    site.clock.advance(minutes=1)
    assert (await browser.visit(change(n=2))).set_cookie is None
    site.clock.advance(minutes=4)
    answer = await browser.visit(read)
    assert answer.set_cookie
    assert answer.set_cookie.attributes["max-age"] == str(14 * 24 * 3600)
    assert (answer.header("vary"), answer.header("cache-control")) == ("Cookie", "no-store")


async def test_endless_timeouts(site: Site) -> None:
    """Timeouts beyond the calendar mean "never": neither the database nor the cookie overflows (R20, R37)."""
    endless = site.reconfigured(idle_timeout=timedelta.max, absolute_timeout=timedelta.max, cookie_persistent=True)
    browser = endless.browser()
    answer = await browser.visit(fill)
    assert answer.set_cookie
    assert answer.set_cookie.attributes["max-age"] == str(400 * 24 * 3600)
    site.clock.advance(days=365 * 100)
    assert (await browser.visit(read)).json() == {"n": 1}


# Whose it is.


@pytest.mark.parametrize("bind", [change(user_id=7), lambda request: request.session.login(7)])
async def test_login(site: Site, bind: Callable[[Request], object]) -> None:
    """Binding a user keeps the data, renews the secret in the same UPDATE and kills a planted cookie (R26)."""
    browser = await site.visitor(change(cart=[1]))
    before, attacker = await site.record(), browser.twin()
    site.clock.advance(minutes=1)
    answer = await browser.visit(bind)
    assert (site.statements, site.kinds) == (["SELECT", "UPDATE"], ["renewed", "bound"])
    assert answer.set_cookie
    after = await site.record()
    assert (after.id, after.user_id, after.authenticated_at) == (before.id, "7", site.clock())
    assert (await browser.visit(read)).json() == {"cart": [1], "user_id": 7}
    assert (await attacker.visit(read)).json() == {}


@pytest.mark.parametrize("bind", [change(user_id=7), lambda request: request.session.login(7)])
async def test_login_without_a_session(site: Site, bind: Callable[[Request], object]) -> None:
    """Binding a user where there is no session is one INSERT."""
    browser = site.browser()
    await browser.visit(bind)
    assert (site.statements, site.kinds) == (["INSERT"], ["created", "bound"])
    record = await site.record()
    assert (record.user_id, record.authenticated_at) == ("7", site.clock())


async def test_unbinding(site: Site) -> None:
    """Removing the user key unbinds the session, renews the secret and keeps the rest."""
    browser = await site.visitor(change(user_id=7, theme="dark"))
    thief = browser.twin()
    await browser.visit(lambda request: request.session.pop("user_id") and None)
    assert (site.statements, site.kinds) == (["SELECT", "UPDATE"], ["renewed", "unbound"])
    record = await site.record()
    assert (record.user_id, record.authenticated_at) == (None, site.clock())
    assert (await browser.visit(read)).json() == {"theme": "dark"}
    assert (await thief.visit(read)).json() == {}


@pytest.mark.parametrize("bind", [change(user_id="bob"), lambda request: request.session.login("bob")])
async def test_another_user(site: Site, bind: Callable[[Request], Any]) -> None:
    """From one user to another: a new session with what this request has set, and nothing of the other's (R26, R44)."""

    def switch(request: Request) -> None:
        request.session["greeted"] = True
        bind(request)

    browser = await site.visitor(change(user_id="ada", cart=["secret"], greeted=False))
    before, old = await site.record(), browser.twin()
    await browser.visit(switch)
    assert (site.statements, site.kinds) == (["SELECT", "DELETE", "INSERT"], ["revoked", "created", "bound"])
    after = await site.record()
    assert after.id != before.id
    assert after.user_id == "bob"
    assert (await browser.visit(read)).json() == {"greeted": True, "user_id": "bob"}
    assert (await old.visit(read)).json() == {}


async def test_same_user(site: Site) -> None:
    """The same user in another spelling is no other: 1 and "1" are one (R44)."""
    browser = await site.visitor(change(user_id=1, cart=[1]))
    before = await site.record()
    answer = await browser.visit(change(user_id="1"))
    assert (site.statements, site.kinds, answer.set_cookie) == (["SELECT", "UPDATE"], [], None)
    assert (await site.record()).secret_hash == before.secret_hash
    assert (await browser.visit(read)).json() == {"user_id": "1", "cart": [1]}


async def test_same_user_again(site: Site) -> None:
    """login() of the same user renews the secret and stamps the time, for "confirm your password" (R43)."""
    browser = await site.visitor(change(user_id=1, cart=[1]))
    thief = browser.twin()
    site.clock.advance(hours=1)
    await browser.visit(lambda request: request.session.login(1))
    assert site.kinds == ["renewed"]
    assert (await site.record()).authenticated_at == site.clock()
    assert (await browser.visit(read)).json() == {"user_id": 1, "cart": [1]}
    assert (await thief.visit(read)).json() == {}


async def test_authenticated_within(site: Site) -> None:
    """Whether the user was bound lately is told by the clock, to the microsecond; logging in again counts (R43)."""
    span = timedelta(minutes=15)

    def lately(request: Request) -> bool:
        return request.session.authenticated_within(span)

    def again(request: Request) -> bool:
        request.session.login("ada")
        return lately(request)

    def bound_here(request: Request) -> list[bool]:
        before = lately(request)
        request.session["user_id"] = "bob"
        after = lately(request)
        del request.session["user_id"]
        return [before, after, lately(request)]

    browser = await site.visitor()
    assert (await browser.visit(lately)).json() is False
    await browser.visit(change(user_id="ada"))
    for passed, recent in ((span, True), (timedelta(microseconds=1), False)):
        site.clock.now += passed
        assert (await browser.visit(lately)).json() is recent
    assert (await browser.visit(bound_here)).json() == [False, True, False]
    await browser.visit(change(user_id="ada"))
    site.clock.advance(hours=1)
    assert (await browser.visit(lately)).json() is False
    assert (await browser.visit(again)).json() is True
    assert (await browser.visit(lately)).json() is True


@pytest.mark.parametrize("user_id", ["", "x" * 256, "a\0b", 1.0, True, False, [], {}, "\ud800"])
async def test_invalid_user_id(site: Site, user_id: Any) -> None:
    """What cannot be a user's id is an error of the application: 500, and the row is as it was (R40)."""
    browser = await site.visitor()
    before = await site.record()
    assert await browser.visit(change(user_id=user_id, n=2), raises=InvalidData) == Answer()
    assert (site.statements, await site.record()) == (["SELECT"], before)


async def test_user_none(site: Site) -> None:
    """None under the user key is nobody."""
    browser = await site.visitor(change(user_id=None))
    assert (await site.record()).user_id is None
    await browser.visit(change(user_id=1))
    await browser.visit(change(user_id=None))
    assert site.kinds == ["renewed", "bound", "renewed", "unbound"]


async def test_user_key(site: Site) -> None:
    """The user may be under another key."""
    other = site.reconfigured(user_key="sub")
    await other.browser().visit(change(sub="ada", user_id=7))
    assert (await site.record()).user_id == "ada"
    await other.browser().visit(lambda request: request.session.login("bob"))
    assert [json.loads(record.data) for record in await site.records() if record.user_id == "bob"] == [{"sub": "bob"}]


async def test_user_function(site: Site) -> None:
    """The user may be found by a function of the data, which gets a copy."""

    def find(data: Mapping[str, Any]) -> str | None:
        found: str | None = data.get("user", {}).get("sub")
        data.clear()  # type: ignore[attr-defined]
        return found

    other = site.reconfigured(user_key=find)
    browser = await other.visitor()
    answer = await browser.visit(change(user={"sub": "ada"}))
    assert answer.set_cookie
    assert (await site.record()).user_id == "ada"
    assert (await browser.visit(lambda request: request.session.user_id)).json() == "ada"
    await browser.visit(lambda request: request.session["user"].pop("sub") and None)
    assert (await site.record()).user_id is None
    assert (await browser.visit(read)).json() == {"n": 1, "user": {}}


@pytest.mark.parametrize("user_key", ["sub", lambda data: data.get("sub")], ids=["key", "function"])
async def test_a_user_key_that_is_new(site: Site, user_key: Any) -> None:
    """A session of before is bound when it is next used, and not only when it is changed: revoke_all would miss it."""
    browser = await site.reconfigured(user_key=None).visitor(change(sub="ada"))
    assert (await site.record()).user_id is None
    browser.app = site.reconfigured(user_key=user_key).app
    answer = await browser.visit(read)
    assert ((await site.record()).user_id, len(answer.set_cookies)) == ("ada", 1)
    assert (await browser.visit(read)).json() == {"sub": "ada"}


async def test_limits_that_are_lowered(site: Site) -> None:
    """What is stored already is read as ever, values in which it could be changed, too."""
    browser = await site.visitor(change(a=[1], b=2, c=3))
    before = await site.record()
    browser.app = site.reconfigured(max_keys=2, max_bytes=10).app
    assert (await browser.visit(lambda request: request.session["a"])).json() == [1]
    assert await site.record() == before


async def test_a_clock_that_is_behind(site: Site) -> None:
    """A host whose clock is behind takes nothing back: neither the last use of a session nor its end (R37)."""
    browser = await site.reconfigured(cookie_persistent=True).visitor(change(user_id=1))
    before = await site.record()
    site.clock.advance(minutes=-10)
    await browser.visit(lambda request: request.session.login(1))
    after = await site.record()
    assert (after.last_seen_at, after.expires_at) == (before.last_seen_at, before.expires_at)


async def test_user_function_and_login(site: Site) -> None:
    """login() of one user while the function finds another is refused rather than guessed at."""

    def find(data: Mapping[str, Any]) -> str | None:
        return data.get("sub")

    def both(request: Request) -> None:
        request.session.login("ada")
        request.session["sub"] = "ada"

    other = site.reconfigured(user_key=find)
    await other.browser().visit(both)
    assert (await site.record()).user_id == "ada"
    await other.browser().visit(lambda request: request.session.login("ada"), raises=InvalidData)


async def test_no_user_key(site: Site) -> None:
    """With user_key=None the data means nothing and login() alone binds; a row without data can be somebody's."""
    other = site.reconfigured(user_key=None)
    browser = await other.visitor(change(user_id=1))
    assert (await site.record()).user_id is None
    await browser.visit(lambda request: request.session.login("ada"))
    assert (site.kinds, (await site.record()).user_id) == (["renewed", "bound"], "ada")
    await browser.visit(change(n=2))
    assert ((await site.record()).user_id, site.kinds[2:]) == ("ada", [])
    await browser.visit(lambda request: request.session.login("bob"))
    record = await site.record()
    assert (record.user_id, record.data) == ("bob", "{}")
    assert (await browser.visit(lambda request: request.session.user_id)).json() == "bob"
    await browser.visit(end)
    assert await site.records() == []


# What it tells.


async def test_events(site: Site) -> None:
    """Each thing that happens is one event with the handle and the user, and never a secret (R109, R13)."""
    browser = site.browser()
    await browser.visit(fill)
    first = await site.record()
    await browser.visit(change(user_id="ada"))
    value = browser.cookies[COOKIE]
    await browser.visit(change(user_id="bob", n=2))
    second = await site.record()
    await browser.visit(lambda request: request.session.pop("user_id") and None)
    await browser.visit(end)
    told = [(event.kind, event.session_id, event.user_id) for event in site.events]
    assert told == [
        ("created", first.id, None),
        ("renewed", first.id, "ada"),
        ("bound", first.id, "ada"),
        ("revoked", first.id, "ada"),
        ("created", second.id, "bob"),
        ("bound", second.id, "bob"),
        ("renewed", second.id, None),
        ("unbound", second.id, None),
        ("revoked", second.id, None),
    ]
    assert value not in repr(site.events)
    assert repr(first.secret_hash) not in repr(site.events)


async def test_gone_event(site: Site) -> None:
    """A change to a session that ended meanwhile is dropped, and an event says so; the response is as it was (R32)."""
    browser = await site.visitor()

    async def handler(request: Request) -> str:
        request.session["n"] = 2
        await site.backend.delete((await site.record()).id)
        return "done"

    answer = await browser.visit(handler)
    assert (answer.status, answer.json(), answer.set_cookie) == (200, "done", None)
    assert (site.kinds, await site.records()) == (["gone"], [])


async def test_gone_raised(site: Site) -> None:
    """With on_gone="raise" such a change is a 409 instead, which says nothing of why (R32, R110)."""
    strict = site.reconfigured(on_gone="raise")
    browser = await strict.visitor()

    async def handler(request: Request) -> str:
        request.session["n"] = 2
        await site.backend.delete((await site.record()).id)
        return "done"

    answer = await browser.visit(handler)
    assert (answer.status, answer.body, answer.set_cookie) == (409, b"Conflict: the session has ended", None)
    assert (answer.header("cache-control"), answer.header("retry-after")) == ("no-store", None)


@pytest.mark.parametrize(
    "data",
    [
        "null", "[]", "1", '"{}"', '{"n": 1e999}', '[{"n": 1}]', '{"n": "\\ud800"}', '{"n": %s}' % ("["*31 + "]"*31),
        '{"user_id": [1]}', '{"user_id": ""}', '{"user_id": true}', '{"user_id": "a\\u0000"}',
    ],
)  # fmt: skip
async def test_corrupt_row(site: Site, data: str) -> None:
    """A row that we cannot have written is an anonymous visitor and an event, again and again, never a 5xx (R99)."""
    await corrupted(site, data)


@pytest.mark.parametrize("data", ["", "{", "[1", "{'n': 1}", '{"n": NaN}', "gASVBgAAAAAAAABLAS4=", "[" * 100_000])
async def test_corrupt_row_that_is_no_json(memory: Site, data: str) -> None:
    """Nor does text that is not JSON at all, where a database would let it in, break anything (R98, R99)."""
    await corrupted(memory, data)


async def corrupted(site: Site, data: str) -> None:
    """Make sure of a session whose stored data is changed to *data*."""
    browser = await site.visitor()
    record = await site.record()
    await site.backend.replace(record._replace(data=data), Expected(record.version, record.secret_hash, site.clock()))
    site.forget()
    for _ in range(2):
        answer = await browser.visit(read)
        assert (answer.status, answer.json(), answer.set_cookie) == (200, {}, None)
    assert (site.kinds, site.statements) == (["corrupt"] * 2, ["SELECT"] * 2)


@pytest.mark.parametrize("idle_timeout", [10**15, -(10**15), 2**63 - 1])
async def test_corrupt_timeout(sqlite_sessions_url: str, statements: list[str], idle_timeout: int) -> None:
    """Nor does a timeout beyond any calendar, which SQLite has room for (R99)."""
    site = Site(SQLAlchemyBackend(sqlite_sessions_url), statements)
    browser = await site.visitor()
    await sql(sqlite_sessions_url, "UPDATE web_sessions SET idle_timeout = :seconds", seconds=idle_timeout)
    for _ in range(2):
        answer = await browser.visit(read)
        assert (answer.status, answer.json(), answer.set_cookie) == (200, {}, None)
    assert site.kinds == ["corrupt"] * 2
    await site.backend.aclose()


async def test_largest_version(memory: Site) -> None:
    """A row of the largest version that a column takes is written like any other (R99)."""
    browser = await memory.visitor()
    record = await memory.record()
    await memory.backend.replace(record._replace(version=2**63 - 1), Expected(0, record.secret_hash, memory.clock()))
    await browser.visit(change(n=2))
    assert ((await memory.record()).data, (await memory.record()).version < 2**63) == ('{"n":2}', True)


@pytest.mark.parametrize(
    ("use", "status"),
    [
        (lambda session: session.save(), 409),
        (lambda session: session.reload(), 409),
        (lambda session: session.atomic(lambda data: data | {"m": 1}), 409),
        (None, 200),
    ],
    ids=["save", "reload", "atomic", "commit"],
)
async def test_corrupt_meanwhile(memory: Site, use: Callable[[Session], Awaitable[object]] | None, status: int) -> None:
    """A row that becomes unreadable while a request runs is gone to it, with an event that says why (R99)."""
    browser = await memory.visitor()

    async def handler(request: Request) -> None:
        request.session["n"] = 2
        record = await memory.record()
        spoiled = record._replace(data="{", version=record.version + 1)
        await memory.backend.replace(spoiled, Expected(record.version, record.secret_hash, memory.clock()))
        if use is not None:
            await use(request.session)

    answer = await browser.visit(handler)
    assert (answer.status, answer.set_cookie, memory.kinds) == (status, None, ["corrupt"])
    assert (await memory.record()).data == "{"


class Rival(TellingBackend):
    """A backend where somebody else is always faster."""

    async def replace(self, record: Record, expected: Expected) -> bool:
        """Replace what somebody else has replaced just before."""
        found = self._records[record.id]
        self._records[record.id] = found._replace(version=found.version + 1)
        return await super().replace(record, expected)


async def test_conflict(statements: list[str]) -> None:
    """A change that loses again and again is given up: 503, Retry-After, an event, and nothing is stored (R52)."""
    site = Site(Rival(statements), statements)
    browser = await site.visitor()
    answer = await browser.visit(change(n=2))
    assert (answer.status, answer.header("retry-after"), answer.body) == (503, "2", b"Service Unavailable")
    assert (site.kinds, answer.set_cookie) == (["conflict"], None)
    assert (await browser.visit(read)).json() == {"n": 1}


async def test_purge_event(statements: list[str]) -> None:
    """What the purge deleted is an event with a number."""
    site = Site(InMemoryBackend(), statements)
    await site.visitor()
    await site.visitor()
    site.clock.advance(days=15)
    await site.app._purger._purge()
    await site.app._purger._purge()
    assert site.events == [Event("purged", count=2)]


async def test_failing_hook(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """An on_event that raises breaks no request; the log names the event and no data (R107)."""

    def hook(event: Event) -> None:
        raise CrashError

    browser = site.reconfigured(on_event=hook).browser()
    answer = await browser.visit(change(password="hunter2"))
    assert (answer.status, (await browser.visit(read)).json()) == (200, {"password": "hunter2"})
    assert [record.getMessage() for record in caplog.records] == ["sqlsessions: on_event failed for 'created'"]
    assert "hunter2" not in caplog.text


# What it refuses.


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({"when": datetime(2026, 1, 1)}, r"session\['when'\] is a datetime.datetime"),  # noqa: DTZ001
        ({"cart": [0, 1, 2, {3}]}, r"session\['cart'\]\[3\] is a builtins.set"),
        ({"a": {"b": (1,)}}, r"session\['a'\]\['b'\] is a builtins.tuple"),
        ({"n": float("nan")}, r"session\['n'\] is nan"),
        ({"a": {1: 2}}, r"session\['a'\] has the key 1"),
        ({"text": "\ud800"}, r"session\['text'\] holds a lone surrogate"),
        ({"large": "x" * 70_000}, r"the limit is 65,536 bytes"),
        ({str(number): 1 for number in range(2000)}, r"session has 200[01] keys; the limit is 1024"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_invalid_data(site: Site, data: dict[str, Any], path: str) -> None:
    """Data that a database would alter is an error that names its path, before any SQL; the row stays (R48, R89)."""

    def handler(request: Request) -> Response:
        request.session.update(data)
        return RedirectResponse("/done")

    browser = await site.visitor()
    before = await site.record()
    for visitor in (browser, site.browser()):
        with pytest.raises(InvalidData, match=path):
            await visitor.visit(handler)
    assert (site.statements, await site.records()) == (["SELECT"], [before])


def test_invalid_data_in_fastapi(memory: Site) -> None:
    """In an application such an error is a 500 like any other: the response that was begun is not sent (R57)."""
    app = fastapi.FastAPI()
    app.add_middleware(SessionMiddleware, backend=InMemoryBackend(), secret_key=KEY)

    @app.get("/")
    def handler(request: fastapi.Request) -> str:
        request.session["n"] = {1}
        return "fine"

    client = TestClient(app, base_url="https://testserver", raise_server_exceptions=False)
    answer = client.get("/")
    assert (answer.status_code, answer.text) == (500, "Internal Server Error")
    assert "set-cookie" not in answer.headers


async def test_limits(site: Site) -> None:
    """max_bytes and max_keys are exact: at the limit is fine, one more is not (R48)."""
    strict = site.reconfigured(max_bytes=100, max_keys=3)
    room = 100 - len(encode({"a": ""}, strict.app._manager.limits))
    browser = strict.browser()
    await browser.visit(change(a="x" * room))
    await browser.visit(change(a="x" * (room + 1)), raises=InvalidData)
    await browser.visit(change(a="é" * (room // 2)))
    await browser.visit(change(a="é" * (room // 2 + 1)), raises=InvalidData)
    await browser.visit(change(a=1, b=2, c=3))
    await browser.visit(change(d=4), raises=InvalidData)
    assert (await browser.visit(read)).json() == {"a": 1, "b": 2, "c": 3}


class Broken(TellingBackend):
    """A backend of which an operation can be made to fail."""

    failing = ""

    async def load(self, id: UUID, now: datetime) -> Record | None:  # noqa: A002
        """Fail, or do as ever."""
        self._check("load")
        return await super().load(id, now)

    async def insert(self, record: Record) -> None:
        """Fail, or do as ever."""
        self._check("insert")
        await super().insert(record)

    async def replace(self, record: Record, expected: Expected) -> bool:
        """Fail, or do as ever."""
        self._check("replace")
        return await super().replace(record, expected)

    async def touch(self, id: UUID, secret_hash: bytes, *, now: datetime, expires_at: datetime) -> bool:  # noqa: A002
        """Fail, or do as ever."""
        self._check("touch")
        return await super().touch(id, secret_hash, now=now, expires_at=expires_at)

    async def delete(self, id: UUID, expected: Expected | None = None) -> bool:  # noqa: A002
        """Fail, or do as ever."""
        self._check("delete")
        return await super().delete(id, expected)

    def _check(self, operation: str) -> None:
        if operation == self.failing:
            raise BackendReadOnly("could not execute the secret statement")


@pytest.fixture
def broken(statements: list[str]) -> tuple[Site, Broken]:
    """A site, and its backend, of which an operation can be made to fail."""
    backend = Broken(statements)
    return Site(backend, statements), backend


@pytest.mark.parametrize(
    ("failing", "handler"),
    [("load", read), ("insert", fill), ("replace", change(n=2)), ("delete", end), ("replace", change(user_id=1))],
)
async def test_failing_backend(broken: tuple[Site, Broken], failing: str, handler: Callable[[Request], object]) -> None:
    """A backend that fails is a 503 with Retry-After, without any cookie or detail (R57, R76, R78, R79, R110)."""
    site, backend = broken
    browser = await site.visitor() if failing != "insert" else site.browser()
    before = await site.records()
    backend.failing = failing
    answer = await browser.visit(handler)
    assert (answer.status, answer.body) == (503, b"Service Unavailable")
    assert (answer.header("retry-after"), answer.header("cache-control"), answer.set_cookie) == ("2", "no-store", None)
    assert await site.records() == before
    backend.failing = ""
    assert (await browser.visit(read)).json() == ({"n": 1} if before else {})


async def test_failing_backend_and_head(broken: tuple[Site, Broken]) -> None:
    """The answer to a HEAD request says how long a body would be, and has none (RFC 9110 §9.3.2)."""
    site, backend = broken
    backend.failing = "insert"
    answer = await site.browser().visit(fill, method="HEAD")
    assert (answer.status, answer.body, answer.header("content-length")) == (503, b"", "19")


async def test_unavailable_and_unused(broken: tuple[Site, Broken]) -> None:
    """While the backend fails, routes that do not use the session work, with their cookie untouched (R77, R78)."""
    site, backend = broken
    browser = await site.visitor()
    backend.failing = "load"
    answer = await browser.visit(ignore)
    assert (answer.status, answer.set_cookie, answer.header("vary")) == (200, None, None)
    assert [(event.kind, event.detail) for event in site.events] == [("unavailable", "BackendReadOnly")]


async def test_unavailable_as_anonymous(broken: tuple[Site, Broken]) -> None:
    """With on_unavailable="anonymous" a failed load is an empty session that cannot be written or ended (R76)."""
    site, backend = broken
    tolerant = site.reconfigured(on_unavailable="anonymous")
    browser = await tolerant.visitor(change(user_id=1))
    backend.failing = "load"
    answer = await browser.visit(lambda request: [dict(request.session), request.session.user_id])
    assert (answer.status, answer.json(), answer.set_cookie) == (200, [{}, None], None)
    for handler in (fill, end, change(user_id=2)):
        answer = await browser.visit(handler)
        assert (answer.status, answer.set_cookie) == (503, None)
    backend.failing = ""
    assert (await browser.visit(read)).json() == {"user_id": 1}


async def test_failing_touch(broken: tuple[Site, Broken]) -> None:
    """A touch that fails is an event and nothing more, and is tried once a request (R80)."""
    site, backend = broken
    browser = await site.visitor()
    site.clock.advance(minutes=5)
    backend.failing = "touch"
    answer = await browser.visit(read)
    assert (answer.status, answer.json(), answer.set_cookie) == (200, {"n": 1}, None)
    assert site.kinds == ["unavailable"]


async def test_touch_that_came_too_late(site: Site) -> None:
    """Of two requests at once one touches; the other's touch finds nothing to do, once (R36)."""
    browser = await site.visitor()
    site.clock.advance(minutes=5)

    async def handler(request: Request) -> Any:
        await browser.twin().visit(read)
        return dict(request.session)

    assert (await browser.visit(handler)).json() == {"n": 1}
    assert site.statements == ["SELECT", "SELECT", "UPDATE", "UPDATE"]


# Where it came from.


async def test_record_client(site: Site) -> None:
    """With record_client=True the row says where the session was opened; by default nothing personal is kept."""
    headers = [(b"user-agent", b"Mozilla/5.0 (\xe9)" + b"x" * 1000)]
    await site.browser().visit(fill, headers=headers)
    assert (await site.record()).client is None
    await site.backend.delete((await site.record()).id)
    curious = site.reconfigured(record_client=True)
    browser = curious.browser()
    await browser.visit(fill, headers=headers)
    found = (await site.record()).client
    assert json.loads(found or "") == {
        "ip": "192.0.2.1",
        "user_agent": "Mozilla/5.0 (é)" + "x" * (512 - len("Mozilla/5.0 (é)")),
    }
    await browser.visit(change(n=2), headers=[(b"user-agent", b"other")])
    assert (await site.record()).client == found


@pytest.mark.parametrize("client", [None, ("", 0), ("::1", 80)])
async def test_record_client_unknown(memory: Site, client: tuple[str, int] | None) -> None:
    """A client without an address or a user agent, as behind a Unix socket, is recorded as unknown."""
    await memory.reconfigured(record_client=True).browser().visit(fill, client=client)
    found = json.loads((await memory.record()).client or "")
    assert found == {"ip": client[0] if client else None, "user_agent": None}


async def test_record_client_of_any_length(site: Site) -> None:
    """An address or a user agent of any length and bytes fills no table, and is no error on any database (R48)."""
    agent = bytes(range(1, 256)) * 100
    forged = "\0\ud800" + "9" * 100_000
    await (
        site.reconfigured(record_client=True)
        .browser()
        .visit(fill, client=(forged, 80), headers=[(b"user-agent", agent)])
    )
    found = json.loads((await site.record()).client or "")
    assert found == {"ip": forged[:64], "user_agent": agent.decode("latin-1")[:512]}


# Where it is installed.


async def test_installed_twice(site: Site) -> None:
    """Installed twice under one cookie name, the inner one passes through: one session, one cookie (R66, R17)."""
    inner = SessionMiddleware(serve, backend=InMemoryBackend(), **site.options)
    browser = Browser(SessionMiddleware(inner, backend=site.backend, **site.options))
    answer = await browser.visit(fill)
    assert (len(answer.set_cookies), site.statements, inner._manager.backend) == (1, ["INSERT"], inner._manager.backend)
    assert (await browser.visit(read)).json() == {"n": 1}
    assert len(await site.records()) == 1


async def test_two_sessions(site: Site) -> None:
    """Installed under two names, each has a session of its own, and the inner one is request.session (R66)."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await inner(scope, receive, send)
        scope["session"]["late"] = "outer"

    def both(request: Request) -> None:
        request.session["n"] = "inner"

    inner = SessionMiddleware(serve, backend=site.backend, **site.options | {"cookie_name": "inner"})
    outer = SessionMiddleware(inner, backend=site.backend, **site.options | {"cookie_name": "outer"})
    browser = Browser(outer)
    await browser.visit(both)
    assert (list(browser.cookies), site.statements) == (["inner"], ["INSERT"])
    browser.app = SessionMiddleware(serve, backend=site.backend, **site.options | {"cookie_name": "outer"})
    await browser.visit(change(n="outer"))
    browser.app = SessionMiddleware(app, backend=site.backend, **site.options | {"cookie_name": "outer"})
    assert (await browser.visit(read)).json() == {"n": "inner"}
    browser.app = SessionMiddleware(serve, backend=site.backend, **site.options | {"cookie_name": "outer"})
    assert (await browser.visit(read)).json() == {"n": "outer", "late": "outer"}


async def test_an_application_that_is_called_again(site: Site) -> None:
    """What calls the application again, as a retry does, has its session again, and no logout is passed over."""

    async def forget(message: Any) -> None: ...

    async def twice(scope: Any, receive: Any, send: Any) -> None:
        await site.app(scope, receive, forget)
        await site.app(scope, receive, send)

    def count(request: Request) -> None:
        request.session["n"] += 1

    browser = await site.visitor()
    browser.app = twice
    await browser.visit(count)
    assert (await browser.visit(read)).json() == {"n": 3}
    looks: list[object] = []

    def log_out_at_second_sight(request: Request) -> None:
        looks.append(read(request))
        if len(looks) > 1:
            request.session.clear()

    answer = await browser.visit(log_out_at_second_sight)
    assert (len(answer.set_cookies), await site.records()) == (1, [])


async def test_what_the_application_notes_in_its_scope(site: Site) -> None:
    """A middleware outside sees what the application has noted in the scope, as tracing looks for the route there."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["route"] = "/users/{id}"
        await serve(scope, receive, send)

    async def tracing(scope: Any, receive: Any, send: Any) -> None:
        await inner(scope, receive, send)
        seen.append(scope.get("route"))

    inner = SessionMiddleware(app, backend=site.backend, **site.options)
    await Browser(tracing).visit(read)
    assert seen == ["/users/{id}"]


async def test_mounted(site: Site) -> None:
    """In a mounted application the cookie is for that path if it is asked to be, else for all paths (R24, R66)."""

    def route(request: Request) -> JSONResponse:
        request.session["n"] = request.session.get("n", 0) + 1
        return JSONResponse(request.session["n"])

    def mounted(**options: Any) -> Starlette:
        middleware = Middleware(SessionMiddleware, backend=site.backend, **site.options, **options)
        return Starlette(routes=[Mount("/admin", Starlette(routes=[Route("/x", route)], middleware=[middleware]))])

    for options, root_path, path in (
        ({}, "", "/"),
        ({"cookie_path": None}, "", "/admin"),
        ({"cookie_path": None}, "/proxied", "/proxied/admin"),
        ({"cookie_path": "/admin/"}, "", "/admin/"),
    ):
        browser = Browser(mounted(**options))
        answer = await browser.visit(path=f"{root_path}/admin/x", root_path=root_path)
        assert answer.set_cookie
        assert answer.set_cookie.attributes["path"] == path
        assert (await browser.visit(path=f"{root_path}/admin/x", root_path=root_path)).json() == 2


async def test_a_mount_within_the_application(site: Site) -> None:
    """What is mounted below the middleware does not say for which path the cookie is: the application is (R66)."""

    def route(request: Request) -> JSONResponse:
        request.session["n"] = 1
        return JSONResponse(1)

    app = Starlette(routes=[Mount("/auth", Starlette(routes=[Route("/in", route)]))])
    for root_path, path in ("", "/"), ("/proxied", "/proxied"):
        browser = Browser(SessionMiddleware(app, backend=site.backend, **site.options, cookie_path=None))
        answer = await browser.visit(path=f"{root_path}/auth/in", root_path=root_path)
        assert answer.set_cookie
        assert answer.set_cookie.attributes["path"] == path


async def test_mounts_below_one_middleware(site: Site) -> None:
    """Sub-applications share the session of a middleware around them, also if they install it again (R66)."""

    async def route(request: Request) -> JSONResponse:
        request.session[request.path_params.get("key", "root")] = True
        return JSONResponse(sorted(request.session))

    middleware = [Middleware(SessionMiddleware, backend=site.backend, **site.options)]
    app = Starlette(
        routes=[
            Mount("/a", Starlette(routes=[Route("/{key}", route)])),
            Mount("/b", Starlette(routes=[Route("/{key}", route)], middleware=middleware)),
            Route("/", route),
        ],
        middleware=middleware,
    )
    browser = Browser(app)
    await browser.visit()
    await browser.visit(path="/a/x")
    assert (await browser.visit(path="/b/y")).json() == ["root", "x", "y"]
    assert len(await site.records()) == 1


async def test_another_backend_below_the_same_cookie(memory: Site, caplog: pytest.LogCaptureFixture) -> None:
    """A middleware below another one with the same cookie but a backend of its own is passed over, and says so once."""
    ours = InMemoryBackend()
    inner = SessionMiddleware(serve, backend=ours, **memory.options)
    browser = Browser(SessionMiddleware(inner, backend=memory.backend, **memory.options))
    for _ in range(2):
        await browser.visit(fill)
    (warning,) = caplog.records
    assert warning.getMessage().endswith(f"the outer one, {memory.backend!r}. Give each a cookie_name of its own")
    assert (len(await memory.records()), repr(ours)) == (1, "<InMemoryBackend of 0 records>")


async def test_cookie_of_the_same_name(memory: Site) -> None:
    """Where the application sets a cookie of our name itself, ours replaces it, and others stay (R17)."""

    def handler(request: Request) -> Response:
        response = Response()
        response.set_cookie(COOKIE, "mine", secure=True)
        response.set_cookie("other", "kept")
        response.set_cookie("x" + COOKIE, "kept")
        response.raw_headers.append((b"Set-Cookie", COOKIE.encode() + b"=shouted"))
        request.session["n"] = 1
        return response

    browser = memory.browser()
    answer = await browser.visit(handler)
    assert [cookie.name for cookie in answer.set_cookies] == ["other", "x" + COOKIE, COOKIE]
    assert (await browser.visit(read)).json() == {"n": 1}


def test_secrets_in_repr(memory: Site) -> None:
    """With Starlette's Secret no key shows in what frameworks print of an application (R13)."""
    key, previous = "correct-horse-battery-staple-0123456789", "another-horse-battery-staple-0123456789"
    app = fastapi.FastAPI()
    app.add_middleware(SessionMiddleware, secret_key=Secret(key), previous_secret_keys=[Secret(previous)])
    shown = repr(app.user_middleware)
    assert "SessionMiddleware" in shown
    assert not any(part in shown for part in (key, previous))


def test_repr(memory: Site) -> None:
    """A repr of the middleware names the cookie and the backend, and no secret (R13)."""
    shown = repr(memory.app)
    assert shown == f"<SessionMiddleware '__Host-session' on {memory.backend!r}>"
    parts = (memory.app._manager.signer, Credential(new_id(memory.clock()), KEY))
    for shown in map(repr, parts):
        assert KEY.decode("latin-1") not in shown
        assert repr(KEY) not in shown


async def test_plain_http(memory: Site, caplog: pytest.LogCaptureFixture) -> None:
    """A Secure cookie on plain http warns once and names both remedies; it is sent nonetheless, for proxies (R25)."""
    for _ in range(3):
        answer = await memory.browser().visit(fill, scheme="http")
        assert answer.set_cookie
        assert "secure" in answer.set_cookie.attributes
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert "--forwarded-allow-ips" in warning.getMessage()
    assert "cookie_https_only=False" in warning.getMessage()


async def test_no_warning(memory: Site, caplog: pytest.LogCaptureFixture) -> None:
    """There is no warning over https, without Secure, or where no cookie is set (R25)."""
    await memory.browser().visit(fill)
    await memory.browser().visit(read, scheme="http")
    plain = memory.reconfigured(cookie_https_only=False)
    answer = await plain.browser().visit(fill, scheme="http")
    assert answer.set_cookie
    assert "secure" not in answer.set_cookie.attributes
    browser = await memory.visitor()
    await browser.visit(end, scheme="http")
    assert caplog.records == []


async def test_no_backend(caplog: pytest.LogCaptureFixture) -> None:
    """Without a backend sessions are kept in memory, and a warning says once that they will be forgotten."""
    browser = Browser(SessionMiddleware(serve, secret_key=KEY, purge_interval=None))
    await browser.visit(fill)
    assert (await browser.visit(read)).json() == {"n": 1}
    (warning,) = caplog.records
    assert (warning.name, warning.levelno) == ("sqlsessions", logging.WARNING)
    assert "backend=SQLAlchemyBackend(url)" in warning.getMessage()


async def noting(event: Event) -> None:
    """What on_event cannot be: it is not awaited."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"secret_key": ""}, "secret_key has 0 bytes; at least 32 are needed: make one with"),
        ({"secret_key": "x" * 31}, "secret_key has 31 bytes"),
        ({"secret_key": "x" * 64}, "secret_key is a placeholder"),
        ({"secret_key": "please-changeme-before-production-0123"}, "secret_key is a placeholder"),
        ({"secret_key": None}, "secret_key must be str, bytes or Secret, not NoneType"),
        ({"previous_secret_keys": "x" * 40}, "previous_secret_keys must be a list"),
        ({"previous_secret_keys": [OTHER_KEY, "short"]}, r"previous_secret_keys\[1\] has 5 bytes"),
        ({"cookie_name": "a b"}, "cookie_name 'a b' is not a token"),
        ({"cookie_name": "__Host-x", "cookie_https_only": False}, "needs cookie_https_only=True"),
        ({"cookie_same_site": "none", "cookie_https_only": False}, "cookie_same_site='none'"),
        ({"cookie_partitioned": True, "cookie_https_only": False}, "cookie_partitioned"),
        ({"cookie_same_site": "Lax"}, "cookie_same_site must be 'lax', 'strict' or 'none', not 'Lax'"),
        ({"cookie_domain": "https://example.com"}, "cookie_domain 'https://example.com' is not a host name"),
        ({"cookie_path": "x"}, "cookie_path 'x' must begin with /"),
        ({"idle_timeout": timedelta(0)}, "idle_timeout must be a timedelta of at least one second"),
        ({"absolute_timeout": timedelta(seconds=-1)}, "absolute_timeout must be a timedelta of at least one second"),
        ({"idle_timeout": 3600}, "idle_timeout must be a timedelta of at least one second, not 3600"),
        ({"absolute_timeout": None}, "absolute_timeout must be a timedelta of at least one second, not None"),
        ({"anonymous_idle_timeout": 60}, "anonymous_idle_timeout must be a timedelta of at least one second"),
        ({"purge_interval": timedelta(0)}, "purge_interval must be a timedelta of at least one second, or None"),
        ({"purge_interval": 5}, "purge_interval must be a timedelta of at least one second, or None, not 5"),
        ({"backend": "sqlite+aiosqlite:///x.db"}, r"such as SQLAlchemyBackend\(url\); str lacks load, insert, touch"),
        ({"user_key": 3}, "user_key must be a key, a function of the data, or None, not 3"),
        ({"skip": [3]}, "a path must be a str or a compiled pattern, not 3"),
        ({"on_event": 3}, "on_event must be a function that is called and not awaited, not 3"),
        ({"on_event": noting}, "on_event must be a function that is called and not awaited, not <function"),
        ({"on_error": 3}, "on_error must be a function of a request and an error, not 3"),
        ({"max_bytes": 0}, "max_bytes must be at least 1, not 0"),
        ({"max_keys": -1}, "max_keys must be at least 1, not -1"),
        ({"on_gone": "ignore"}, "on_gone must be one of 'drop', 'raise', not 'ignore'"),
        ({"on_unavailable": ""}, "on_unavailable must be one of 'raise', 'anonymous', not ''"),
        ({"skip": "/health"}, "paths must be a list, not the one str '/health'"),
    ],
)
def test_configuration_errors(options: dict[str, Any], message: str) -> None:
    """What is wrong with a setting is said at construction: which one, and what to do about it (R10, R15, R16)."""
    with pytest.raises(ConfigurationError, match=message) as raised:
        SessionMiddleware(serve, **dict[str, Any](secret_key=KEY, backend=InMemoryBackend()) | options)
    for key in ("x" * 31, "changeme"):
        assert key not in str(raised.value)


@pytest.mark.parametrize(
    "key", [bytes(range(32)), KEY.hex(), Secret(KEY.hex()), "0123456789abcdef" * 2, "Zm9vYmFyYmF6cXV4" * 2]
)
def test_good_keys(key: Any) -> None:
    """A key is str, bytes or Secret of at least 32 bytes (R10)."""
    SessionMiddleware(serve, secret_key=key, backend=InMemoryBackend())


# When it is loaded.


async def test_skipped_paths(site: Site) -> None:
    """Paths in skip, and those below them, never load a session; a use of it there is an error that says why."""
    skipping = site.reconfigured(skip=["/static", "/health/", re.compile(r"/v\d+/ping")])
    browser = await skipping.visitor()
    for path in ("/static", "/static/", "/static/x.css", "/health", "/health/db", "/v12/ping"):
        assert (await browser.visit(ignore, path)).status == 200
        with pytest.raises(SessionNotLoaded):
            await browser.visit(read, path)
    assert site.statements == []
    for path in ("/", "/statics", "/x/static", "/healthy", "/v12/ping/x", "/a/v1/ping", "/STATIC"):
        assert (await browser.visit(read, path)).json() == {"n": 1}


@pytest.mark.parametrize("root_path", ["/api", "/"])
async def test_skip_behind_a_prefix(root_path: str, memory: Site) -> None:
    """Paths are those that the application's routes have: what a proxy or a mount puts before them is no part (R66)."""
    skipping = memory.reconfigured(skip=["/static", re.compile(r"/v\d+/ping")])
    browser = await skipping.visitor()
    prefix = root_path.rstrip("/")
    for path in (f"{prefix}/static/x.css", f"{prefix}/v1/ping", "/static/x.css"):  # or the proxy has taken it away
        assert (await browser.visit(ignore, path, root_path=root_path)).status == 200
    assert memory.statements == []
    for path in (f"{prefix}/account", f"{prefix}/x/static", f"{prefix}ary/static", root_path):
        assert (await browser.visit(read, path, root_path=root_path)).json() == {"n": 1}


async def test_skip_in_a_mounted_application(memory: Site) -> None:
    """A mounted application names its own paths; one around mounts, those of all of them (R66)."""

    def route(request: Request) -> JSONResponse:
        return JSONResponse("session" in request.scope)

    def mounting(*skip: str, within: bool) -> Starlette:
        middleware = [Middleware(SessionMiddleware, backend=memory.backend, **memory.options, skip=skip)]
        inner = Starlette(routes=[Route("/health", route)], middleware=middleware if within else [])
        return Starlette(routes=[Mount("/shop", inner)], middleware=[] if within else middleware)

    visitor = await memory.visitor()
    for app, loads in (
        (mounting("/health", within=True), False),
        (mounting("/shop/health", within=True), True),
        (mounting("/shop/health", within=False), False),
        (mounting("/health", within=False), True),
    ):
        browser = Browser(app)
        browser.cookies.update(visitor.cookies)
        memory.statements.clear()
        assert (await browser.visit(path="/shop/health")).json() is True
        assert memory.statements == ["SELECT"] * loads


async def test_skip_is_not_fooled_by_the_host(site: Site) -> None:
    """Paths are those of the request line, not of a URL built with the client's Host header."""
    skipping = site.reconfigured(skip=["/static"])
    browser = await skipping.visitor()
    answer = await browser.visit(read, "/account", headers=[(b"host", b"x/static?")])
    assert answer.json() == {"n": 1}


async def test_loading_on_demand(site: Site) -> None:
    """With autoload_cookie=False nothing is loaded until load_session() is awaited, which loads once and in place."""
    lazy = site.reconfigured(autoload_cookie=False)
    browser = await lazy.visitor(lambda request: load_and_set(request, n=1))
    assert (await browser.visit(ignore)).status == 200
    with pytest.raises(SessionNotLoaded):
        await browser.visit(read)
    assert site.statements == []

    async def handler(request: Request) -> dict[str, Any]:
        session = await load_session(HTTPConnection(dict(request.scope)))
        assert session is request.session is await load_session(request)
        session["m"] = 2
        return dict(request.session)

    answer = await browser.visit(handler)
    assert (answer.json(), answer.header("vary"), site.statements) == ({"n": 1, "m": 2}, "Cookie", ["SELECT", "UPDATE"])


async def load_and_set(request: Request, **data: Any) -> None:
    """Load the session and set these keys."""
    (await load_session(request)).update(data)


async def test_loading_while_unavailable(broken: tuple[Site, Broken]) -> None:
    """load_session() raises while the backend fails, and tries again when it is awaited again."""
    site, backend = broken
    lazy = site.reconfigured(autoload_cookie=False)
    browser = await lazy.visitor(lambda request: load_and_set(request, n=1))

    async def handler(request: Request) -> dict[str, Any]:
        with pytest.raises(BackendReadOnly):
            await load_session(request)
        backend.failing = ""
        return dict(await load_session(request))

    backend.failing = "load"
    assert (await browser.visit(handler)).json() == {"n": 1}
    backend.failing = "load"
    assert (await browser.visit(load_session)).status == 503


async def test_loading_without_middleware() -> None:
    """Loading a session where the middleware is missing says so."""
    with pytest.raises(ConfigurationError, match="SessionMiddleware must be installed around"):
        await ask(serve, handler=load_session)
    with pytest.raises(ConfigurationError, match="SessionMiddleware must be installed around"):
        await ask(SessionAutoloadMiddleware(serve, paths=["/"]), handler=ignore)


async def test_autoload_middleware(site: Site) -> None:
    """SessionAutoloadMiddleware loads the session for its paths, given as beginnings or patterns, and for no others."""
    autoload = SessionAutoloadMiddleware(serve, paths=["/account", re.compile(r"/shop/\d+")])
    app = SessionMiddleware(autoload, backend=site.backend, **site.options, autoload_cookie=False)
    browser = Browser(app)
    await browser.visit(fill, "/account")
    site.forget()
    for path in ("/account", "/account/keys", "/shop/42"):
        assert (await browser.visit(read, path)).json() == {"n": 1}
    assert site.statements == ["SELECT"] * 3
    for path in ("/", "/accounts", "/shop/", "/shop/42/x"):
        with pytest.raises(SessionNotLoaded):
            await browser.visit(read, path)
    assert site.statements == ["SELECT"] * 3
    assert (await browser.visit(read, "/api/account", root_path="/api")).json() == {"n": 1}
    with pytest.raises(ConfigurationError, match="paths must be a list"):
        SessionAutoloadMiddleware(serve, paths="/account")


# In frameworks.


def fastapi_app(site: Site, **options: Any) -> fastapi.FastAPI:
    """Return a FastAPI application with routes of each kind."""
    app = fastapi.FastAPI()
    app.add_middleware(SessionMiddleware, backend=site.backend, **site.options | options)

    @app.post("/login")
    async def login(request: fastapi.Request) -> dict[str, str]:
        request.session["user_id"] = 123
        return {"message": "Logged in"}

    @app.post("/logout")
    async def logout(request: fastapi.Request) -> dict[str, str]:
        request.session.clear()
        return {"message": "Logged out"}

    @app.get("/me")
    async def me(user_id: CurrentUserId) -> str:
        return user_id

    @app.get("/count")
    def count(session: CurrentSession) -> int:
        session["count"] = session.get("count", 0) + 1
        return int(session["count"])

    @app.get("/plain")
    def plain(request: fastapi.Request) -> dict[str, Any]:
        return dict(request.session)

    @app.get("/open")
    def nothing() -> None:
        return None

    return app


@pytest.mark.parametrize("autoload_cookie", [True, False])
async def test_fastapi(site: Site, autoload_cookie: bool) -> None:
    """CurrentSession and CurrentUserId work in async and plain endpoints, loaded before or by them; nobody is a 401."""
    browser = Browser(fastapi_app(site, autoload_cookie=autoload_cookie))
    answer = await browser.visit(path="/me")
    assert (answer.status, answer.json()) == (401, {"detail": "Not logged in"})
    assert (answer.header("www-authenticate"), answer.header("vary")) == ("Session", "Cookie")
    assert (await browser.visit(path="/count")).json() == 1
    assert (await browser.visit(path="/count")).json() == 2
    if autoload_cookie:
        await browser.visit(path="/login", method="POST")
        assert (await browser.visit(path="/me")).json() == "123"
        assert (await browser.visit(path="/plain")).json() == {"count": 2, "user_id": 123}
        await browser.visit(path="/logout", method="POST")
        assert (await browser.visit(path="/me")).status == 401
        assert await site.records() == []
    else:
        await browser.visit(path="/plain", raises=SessionNotLoaded)
    site.forget()
    await site.browser().visit(fill)
    browser.cookies.clear()
    await browser.visit(path="/open")
    assert site.statements == ["INSERT"]


async def test_dependencies_of_a_router(memory: Site) -> None:
    """A router may ask for a user on all of its routes; in a test, somebody may stand in for that (README)."""
    router = fastapi.APIRouter(dependencies=[fastapi.Depends(current_user_id)])

    @router.get("/secret")
    def secret() -> str:
        return "secret"

    app = fastapi_app(memory)
    app.include_router(router)
    browser = Browser(app)
    assert (await browser.visit(path="/secret")).status == 401
    app.dependency_overrides[current_user_id] = lambda: "123"
    assert (await browser.visit(path="/secret")).json() == "secret"
    assert (await browser.visit(path="/me")).json() == "123"


async def test_openapi(memory: Site) -> None:
    """The dependencies show in OpenAPI as one cookie scheme, and only on the routes that use them."""
    answer = await Browser(fastapi_app(memory)).visit(path="/openapi.json")
    document = answer.json()
    assert document["components"]["securitySchemes"] == {
        "session": {"type": "apiKey", "in": "cookie", "name": COOKIE, "description": "Server-side session"}
    }
    secured = {path for path, methods in document["paths"].items() if methods.popitem()[1].get("security")}
    assert secured == {"/me", "/count"}


def test_websocket_dependency(memory: Site) -> None:
    """The dependencies work for WebSockets as well."""
    app = fastapi.FastAPI()
    app.add_middleware(SessionMiddleware, secret_key=KEY, backend=InMemoryBackend())

    @app.websocket("/ws")
    async def socket(websocket: fastapi.WebSocket, session: CurrentSession) -> None:
        session["n"] = 1
        await websocket.accept()
        await websocket.send_json(dict(session))
        await websocket.close()

    with TestClient(app, base_url="https://testserver") as client, client.websocket_connect("/ws") as connection:
        assert connection.receive_json() == {"n": 1}


async def test_plain_starlette(site: Site) -> None:
    """In a Starlette application without FastAPI, plain and async endpoints have the session (README)."""

    def plain(request: Request) -> JSONResponse:
        request.session["n"] = request.session.get("n", 0) + 1
        return JSONResponse(request.session["n"])

    async def asynchronous(request: Request) -> JSONResponse:
        session = await load_session(request)
        return JSONResponse(await session.atomic(lambda data: {"n": data["n"] + 1}))

    app = Starlette(
        routes=[Route("/", plain), Route("/atomic", asynchronous)],
        middleware=[Middleware(SessionMiddleware, backend=site.backend, **site.options)],
    )
    browser = Browser(app)
    assert (await browser.visit()).json() == 1
    assert (await browser.visit()).json() == 2
    assert (await browser.visit(path="/atomic")).json() == {"n": 3}


async def test_other_scopes(memory: Site) -> None:
    """Scopes of kinds unknown to us are passed through as they are (R68)."""
    passed: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope)

    scope = {"type": "future"}
    unused: Any = None
    await SessionMiddleware(app, secret_key=KEY, backend=InMemoryBackend())(scope, unused, unused)
    assert passed[0] is scope
