"""Each test plays an attacker, who gets nowhere: what `SECURITY.md` promises, from the other side."""

import hashlib
import secrets
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from decimal import Decimal
from enum import IntEnum
from itertools import product
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from starlette.responses import Response

from sqlsessions import InvalidData, SQLAlchemyBackend
from sqlsessions.credentials import CookieSigner, Credential, new_id
from tests.asgi import COOKIE, KEY, OTHER_KEY, Browser, Request, Site, TellingBackend, ask, cookie_header, read
from tests.looking import closing

pytestmark = pytest.mark.anyio

FLOOD = 10_000


@pytest.fixture
def memory(statements: list[str]) -> Site:
    """A site whose sessions live in memory, for what no database has a part in."""
    return Site(TellingBackend(statements), statements)


def write(request: Request) -> None:
    """Write into the session, as an attacker would like to into somebody else's."""
    request.session["planted"] = True


def log_in(user: str) -> Callable[[Request], None]:
    """Return a handler that logs *user* in as code does that never heard of fixation."""

    def handler(request: Request) -> None:
        request.session["user_id"] = user

    return handler


async def opens(site: Site, *values: str) -> bool:
    """Tell whether a request with these cookies finds anything, having made sure that it changes nothing."""
    before = await site.records()
    answer = await ask(site.app, handler=read, headers=cookie_header(*values))
    assert (answer.status, answer.set_cookie) == (200, None)
    assert await site.records() == before
    return bool(answer.json())


async def test_planted_session(site: Site) -> None:
    """Fixation: a session planted in the victim's browser is worthless once the victim has logged in (R26, R29)."""
    attacker = await site.visitor()
    victim = attacker.twin()
    await victim.visit(log_in("victim"))
    await victim.visit(lambda request: request.session.update(secret="of the victim"))
    before = await site.records()
    assert not await opens(site, attacker.cookies[COOKIE])
    await attacker.visit(write)
    assert [record for record in await site.records() if record.user_id == "victim"] == before
    assert (await victim.visit(read)).json() == {"n": 1, "user_id": "victim", "secret": "of the victim"}


@pytest.mark.parametrize("attackers_first", [True, False])
async def test_tossed_cookie(site: Site, attackers_first: bool) -> None:
    """Tossing: an attacker's own session, set beside the victim's from a sub-domain, does not take its place (R21)."""
    attacker, victim = await site.visitor(log_in("attacker")), await site.visitor(log_in("victim"))
    values = [attacker.cookies[COOKIE], victim.cookies[COOKIE]]
    assert not await opens(site, *(values if attackers_first else reversed(values)))
    assert site.kinds == ["duplicate_cookie"]


LOOKALIKES = [
    b"\xa0" + COOKIE.encode(), b"\x85" + COOKIE.encode(), b"\x0b" + COOKIE.encode(), b"\x1c" + COOKIE.encode(),
    COOKIE.lower().encode(), COOKIE.upper().encode(), b"_Host-session", b"Host-session", COOKIE.encode() + b"\0",
    COOKIE.encode() + b"[]", b"__Host-session.", b"__Secure-session", b"session", b'"' + COOKIE.encode() + b'"',
]  # fmt: skip


@pytest.mark.parametrize("name", LOOKALIKES)
async def test_spoofed_prefix(memory: Site, name: bytes) -> None:
    """Spoofing: a name that browsers let a sub-domain set, and parsers take for ours, is another cookie (R15, R21)."""
    attacker, victim = await memory.visitor(log_in("attacker")), await memory.visitor(log_in("victim"))
    spoofed = name + b"=" + attacker.cookies[COOKIE].encode()
    genuine = f"{COOKIE}={victim.cookies[COOKIE]}".encode()
    for pairs in ([spoofed, genuine], [genuine, spoofed]):
        answer = await ask(memory.app, handler=read, headers=[(b"cookie", b"; ".join(pairs))])
        assert answer.json() == {"user_id": "victim"}
    assert (await ask(memory.app, handler=read, headers=[(b"cookie", spoofed)])).json() == {}


async def test_sandwiched_cookie(memory: Site) -> None:
    """Sandwiching: quotes opened before our cookie and closed behind it do not make it another's value (R21)."""
    victim = await memory.visitor(log_in("victim"))
    for version, opening, closing_quote in product(
        (b"$Version=1; ", b""), (b'param="', b"param='"), (b'"', b'\\"', b"")
    ):
        header = version + opening + f"x; {COOKIE}={victim.cookies[COOKIE]}; other=y".encode() + closing_quote
        answer = await ask(memory.app, handler=read, headers=[(b"cookie", header)])
        assert answer.json() == {"user_id": "victim"}


async def renewed(site: Site, victim: Browser) -> None:
    """The secret is renewed."""
    await victim.visit(lambda request: request.session.renew())


async def logged_out(site: Site, victim: Browser) -> None:
    """The victim logs out."""
    await victim.visit(lambda request: request.session.clear())


async def logged_in_again(site: Site, victim: Browser) -> None:
    """Somebody else logs in at the victim's browser."""
    await victim.visit(log_in("somebody else"))


async def revoked(site: Site, victim: Browser) -> None:
    """The victim has every session ended."""
    await site.backend.revoke_all("victim")  # type: ignore[attr-defined]


async def timed_out(site: Site, victim: Browser) -> None:
    """The victim leaves, and nothing is purged."""
    site.clock.advance(days=14)


async def key_removed(site: Site, victim: Browser) -> None:
    """The key is exchanged for another, and not kept."""
    site.app = site.reconfigured(secret_key=OTHER_KEY).app


@pytest.mark.parametrize(
    "end",
    [renewed, logged_out, logged_in_again, revoked, timed_out, key_removed],
    ids=lambda end: end.__name__,
)
async def test_replay(site: Site, end: Callable[[Site, Browser], Any]) -> None:
    """Replay: a cookie copied in time opens nothing later, revives nothing, costs a SELECT at most (R28, R29)."""
    victim = await site.visitor(log_in("victim"))
    thief = victim.twin()
    assert (await thief.visit(read)).json() == {"user_id": "victim"}
    await end(site, victim)
    thief.app = site.app
    before = await site.records()
    site.forget()
    assert not await opens(site, thief.cookies[COOKIE])
    assert site.statements in ([], ["SELECT"])
    await thief.visit(write)
    assert [record for record in await site.records() if record in before] == before


def forgeries(site: Site, stolen: list[Any], key: bytes | None) -> list[str]:
    """Return every cookie that can be made of what was stolen: each id with each value, and with its hashes."""
    ids = [value for row in stolen for value in row if isinstance(value, UUID)]
    proofs = [value for row in stolen for value in row if isinstance(value, bytes)]
    proofs += [hashlib.sha256(proof).digest() for proof in proofs]
    signer = CookieSigner(secrets.token_bytes(32) if key is None else key, cookie_name=COOKIE)
    signed = [signer.sign(Credential(id_, proof)) for id_, proof in product(ids, proofs)]
    return [*signed, *(value.split(".")[0] for value in signed), *map(str, ids), *(proof.hex() for proof in proofs)]


@pytest.mark.parametrize("key", [None, KEY], ids=["table", "table and key"])
async def test_stolen_table(site: Site, key: bytes | None) -> None:
    """Theft: of all rows no cookie can be made that opens a session; without the key none costs a SELECT (R3, R4)."""
    for user in ("victim", "another"):
        await site.visitor(log_in(user))
    stolen = await site.records()
    made = forgeries(site, stolen, key)
    assert len(made) > 20
    site.forget()
    for value in made:
        assert not await opens(site, value)
    assert set(site.statements) == (set() if key is None else {"SELECT"})
    assert set(site.kinds) == ({"bad_signature"} | (set() if key is None else {"superseded"}))


async def test_stolen_file(sqlite_sessions_url: str) -> None:
    """Theft: no secret is anywhere in the database's files, deleted rows and its log included (R3)."""
    async with closing(SQLAlchemyBackend(sqlite_sessions_url)) as backend:
        site = Site(backend, [])
        victim = await site.visitor(log_in("victim"))
        values = [victim.cookies[COOKIE]]
        for _ in range(3):
            await victim.visit(lambda request: request.session.renew())
            values.append(victim.cookies[COOKIE])
    signer = CookieSigner(KEY, cookie_name=COOKIE)
    path = Path(sqlite_sessions_url.partition("///")[2])
    stored = b"".join(file.read_bytes() for file in path.parent.glob(path.name + "*"))
    for value in values:
        found = signer.unsign(value.encode())
        assert found
        assert found[0].secret not in stored
        assert found[0].secret.hex().encode() not in stored.lower()
        assert value.split(".")[0].encode() not in stored


async def test_stolen_key(site: Site) -> None:
    """Theft: the key alone opens nothing, though a handle be known, and no id of the attacker's is adopted (R2, R4)."""
    victim = await site.visitor(log_in("victim"))
    before = await site.record()
    signer = CookieSigner(KEY, cookie_name=COOKIE)
    for id_ in (before.id, new_id(site.clock()), UUID(int=0)):
        value = signer.sign(Credential(id_, secrets.token_bytes(32)))
        assert not await opens(site, value)
        attacker = site.browser()
        attacker.cookies[COOKIE] = value
        await attacker.visit(write)
        assert attacker.cookies[COOKIE] != value
    records = {record.id: record for record in await site.records()}
    assert records.pop(before.id) == before
    assert all(record.user_id is None and record.data == '{"planted":true}' for record in records.values())
    assert not records.keys() & {UUID(int=0)}
    assert (await victim.visit(read)).json() == {"user_id": "victim"}


@pytest.fixture
async def flooded(sqlite_sessions_url: str, statements: list[str]) -> AsyncIterator[Site]:
    """A site on a database, of which every statement is noted."""
    async with closing(SQLAlchemyBackend(sqlite_sessions_url)) as backend:
        yield Site(backend, statements)


async def test_flood_of_forged_cookies(flooded: Site) -> None:
    """Ten thousand forged cookies cost not one statement, and every one of them is told of (R6)."""
    genuine = (await flooded.visitor()).cookies[COOKIE]
    for number in range(FLOOD):
        forged = genuine[:-6] + f"{number:05}!"
        answer = await ask(flooded.app, handler=read, headers=cookie_header(forged))
        assert (answer.status, answer.body, answer.set_cookie) == (200, b"{}", None)
    assert flooded.statements == []
    assert flooded.kinds == ["bad_signature"] * FLOOD


async def test_flood_of_bots(flooded: Site) -> None:
    """Ten thousand bots that keep no cookies, look for things and log out leave no row and cost no statement (R45)."""

    def wander(request: Request) -> Response:
        assert not request.session.get("user_id")
        request.session["found"] = "something"
        del request.session["found"]
        request.session.clear()
        return Response()

    for _ in range(FLOOD):
        answer = await ask(flooded.app, handler=wander)
        assert answer.set_cookie is None
    assert (flooded.statements, flooded.kinds) == ([], [])
    assert await flooded.records() == []


class Number(IntEnum):
    """A number that JSON would make an int of."""

    ONE = 1


#: A value of each kind, and what becomes of it: itself, or a word of the refusal.
KINDS: dict[str, tuple[Any, str | None]] = {
    "null": (None, None),
    "booleans": ([True, False], None),
    "integers": ([0, -1, 2**53 + 1, -(10**400), 10**4299], None),
    "floats": ([-0.0, 1e22, 5e-324, 1.7976931348623157e308], None),
    "texts": (["", "\0", "\\u0000", "é\u0301", "\N{GRINNING FACE}\U0010ffff", "'; DROP TABLE web_sessions; --"], None),
    "arrays": ([[], [[]], [None, [1, "a"]]], None),
    "objects": ({"": {}, "zz": 1, "a": {"Z": None}, "\0": 2, "__metadata__": 3}, None),
    "an integer of too many digits": (10**5000, "digits"),
    "NaN": (float("nan"), "nan"),
    "infinity": (float("-inf"), "inf"),
    "a lone surrogate": ("\ud800", "surrogate"),
    "a tuple": ((1,), "tuple"),
    "a set": ({1}, "set"),
    "bytes": (b"x", "bytes"),
    "a datetime": (datetime(2026, 1, 1), "datetime"),  # noqa: DTZ001 - refused in any case
    "a Decimal": (Decimal("1.1"), "Decimal"),
    "a UUID": (UUID(int=1), "UUID"),
    "an enum": (Number.ONE, "Number"),
    "a key that is no text": ({1: 2}, "key"),
    "too deep": ([[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]], "nested"),
    "too large": ("x" * 65_536, "limit"),
}


@pytest.mark.parametrize(("value", "refusal"), KINDS.values(), ids=KINDS)
async def test_kinds_of_value(site: Site, value: Any, refusal: str | None) -> None:
    """A value of any kind is kept as it is or refused before any SQL, on each database alike (R48, R89)."""
    browser = await site.visitor()

    def put(request: Request) -> None:
        request.session["value"] = value

    seen: list[Any] = []

    def get(request: Request) -> None:
        seen.append(dict(request.session))

    if refusal is None:
        await browser.visit(put)
        await browser.visit(get)
        assert repr(seen) == repr([{"n": 1, "value": value}])
        assert site.statements == ["SELECT", "UPDATE", "SELECT"]
        return
    before = await site.record()
    with pytest.raises(InvalidData, match=refusal):
        await browser.visit(put)
    assert (site.statements, await site.record()) == (["SELECT"], before)
