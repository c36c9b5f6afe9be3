"""The session is a dict: every use is noticed, every change is kept, and what cannot be kept is refused at once."""

import copy
import json
import pickle
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from starlette.background import BackgroundTask
from starlette.responses import JSONResponse, StreamingResponse

from sqlsessions.errors import BackendUnavailable, HeadersSent, InvalidData, SessionNotLoaded
from sqlsessions.record import Record
from sqlsessions.session import Session
from tests.asgi import Request, Site, TellingBackend, ignore, read

pytestmark = pytest.mark.anyio


def match(session: Session) -> object:
    """Look into the session by pattern matching."""
    match session:
        case {"n": n}:
            return n
    return None


#: Every way to look into a session. None goes through ``request.session``, at which Starlette itself makes a note.
USES: dict[str, Callable[[Session], object]] = {
    "getitem": lambda session: session["n"],
    "get": lambda session: session.get("n"),
    "get a default": lambda session: session.get("absent", 1),
    "in": lambda session: "n" in session,
    "not in": lambda session: "absent" not in session,
    "len": len,
    "bool": bool,
    "iter": list,
    "next": lambda session: next(iter(session)),
    "reversed": lambda session: list(reversed(session)),
    "keys": Session.keys,
    "values": Session.values,
    "items": Session.items,
    "==": lambda session: session == {},
    "== from the left": lambda session: {} == session,  # noqa: SIM300
    "!=": lambda session: session != {},
    "|": lambda session: session | {},
    "| from the left": lambda session: {} | session,
    "|= into another": lambda session: dict[str, Any]().__ior__(session),
    "update of another": lambda session: dict[str, Any]().update(session),
    "dict": dict,
    "**": lambda session: {**session},
    "* into a call": lambda session: dict(**session),
    "unpack": lambda session: [*session],
    "copy": Session.copy,
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "json": json.dumps,
    "indented json": lambda session: json.dumps(session, indent=1, sort_keys=True),
    "format": "{n}".format_map,
    "%": lambda session: "%(n)s" % session,  # noqa: UP031 - the point
    "match": match,
    "sorted": sorted,
    "setdefault": lambda session: session.setdefault("n", 1),
    "pop nothing": lambda session: session.pop("absent", None),
    "update with nothing": lambda session: session.update(),
    "mark_accessed": Session.mark_accessed,
    "mark_modified": Session.mark_modified,
    "id": lambda session: session.id,
    "user_id": lambda session: session.user_id,
    "is_new": lambda session: session.is_new,
    "created_at": lambda session: session.created_at,
    "last_seen_at": lambda session: session.last_seen_at,
    "expires_at": lambda session: session.expires_at,
    "authenticated_at": lambda session: session.authenticated_at,
    "authenticated_within": lambda session: session.authenticated_within(timedelta(1)),
    "persistent": lambda session: session.persistent,
}


#: Those that an empty session notices too: json takes a dict for empty without asking it.
NOTICED_WHEN_EMPTY = {name: action for name, action in USES.items() if "json" not in name}


async def use(site: Site, action: Callable[[Session], object]) -> list[Any]:
    """Return whether *action* on a stored session is noted by the session, and by the response."""
    browser = await site.visitor()
    noted: list[bool] = []

    def handler(request: Request) -> None:
        session = request.scope["session"]
        assert not session.accessed
        action(session)
        noted.append(session.accessed)

    answer = await browser.visit(handler)
    return [*noted, answer.header("vary")]


@pytest.fixture
def memory(statements: list[str]) -> Site:
    """A site whose sessions live in memory."""
    return Site(TellingBackend(statements), statements)


@pytest.mark.parametrize("action", USES.values(), ids=USES)
async def test_every_use_is_noticed(memory: Site, action: Callable[[Session], object]) -> None:
    """However a session is looked into, it counts as accessed and the response varies by cookie (R103)."""
    assert await use(memory, action) == [True, "Cookie"]
    assert (await memory.record()).data == '{"n":1}'


@pytest.mark.parametrize("action", [ignore, repr, str, id, type, callable, lambda session: isinstance(session, dict)])
async def test_what_is_no_use(memory: Site, action: Callable[[Any], object]) -> None:
    """What shows nothing of the data is no access: the response stays the same for everybody (R106)."""
    assert await use(memory, action) == [False, None]


#: Every way to change a session that holds {"n": 1, "nested": {"list": [1]}}, and what it holds then.
CHANGES: dict[str, tuple[Callable[[Any], object], dict[str, Any]]] = {
    "setitem": (lambda session: session.__setitem__("m", 2), {"n": 1, "nested": {"list": [1]}, "m": 2}),
    "overwrite": (lambda session: session.__setitem__("n", 2), {"n": 2, "nested": {"list": [1]}}),
    "another type": (lambda session: session.__setitem__("n", True), {"n": True, "nested": {"list": [1]}}),
    "delitem": (lambda session: session.__delitem__("n"), {"nested": {"list": [1]}}),
    "pop": (lambda session: session.pop("n"), {"nested": {"list": [1]}}),
    "popitem": (lambda session: session.popitem(), {"n": 1}),
    "setdefault": (lambda session: session.setdefault("m", 2), {"n": 1, "nested": {"list": [1]}, "m": 2}),
    "update": (lambda session: session.update({"m": 2}, n=3), {"n": 3, "nested": {"list": [1]}, "m": 2}),
    "update by pairs": (lambda session: session.update([("m", 2)]), {"n": 1, "nested": {"list": [1]}, "m": 2}),
    "|=": (lambda session: session.__ior__({"m": 2}), {"n": 1, "nested": {"list": [1]}, "m": 2}),
    "nested append": (lambda session: session["nested"]["list"].append(2), {"n": 1, "nested": {"list": [1, 2]}}),
    "nested set": (lambda session: session["nested"].update(x=None), {"n": 1, "nested": {"list": [1], "x": None}}),
    "nested delete": (lambda session: session["nested"].clear(), {"n": 1, "nested": {}}),
    "through get": (lambda session: session.get("nested")["list"].pop(), {"n": 1, "nested": {"list": []}}),
    "through values": (lambda session: list(session.values())[1].pop("list"), {"n": 1, "nested": {}}),
    "through a copy": (lambda session: session.copy()["nested"].pop("list"), {"n": 1, "nested": {}}),
}


@pytest.mark.parametrize(("change", "after"), CHANGES.values(), ids=CHANGES)
async def test_every_change_is_kept(site: Site, change: Callable[[Any], object], after: dict[str, Any]) -> None:
    """However a session is changed, nested values included, the next request finds it so; one UPDATE keeps it (R55)."""
    browser = await site.visitor(lambda request: request.session.update(n=1, nested={"list": [1]}))
    modified: list[bool] = []

    def handler(request: Request) -> None:
        session = request.scope["session"]
        change(session)
        modified.append(session.modified)

    await browser.visit(handler)
    assert (site.statements, modified) == (["SELECT", "UPDATE"], [True])
    found = (await browser.visit(read)).json()
    assert (found, list(found)) == (after, list(after))


@pytest.mark.parametrize(
    "action",
    [
        lambda session: session.update(n=1),
        lambda session: session.setdefault("n", 2),
        lambda session: session.pop("absent", None),
        lambda session: (session.update(m=1), session.pop("m")),
        lambda session: (session["cart"].append(2), session["cart"].pop()),
        lambda session: session.__setitem__("cart", [1]),
    ],
)
async def test_no_change(site: Site, action: Callable[[Session], object]) -> None:
    """A session that was written as it was, or changed and changed back, is not modified and not written (R54)."""
    browser = await site.visitor(lambda request: request.session.update(n=1, cart=[1]))

    def handler(request: Request) -> None:
        action(request.scope["session"])
        assert not request.session.modified

    await browser.visit(handler)
    assert site.statements == ["SELECT"]


async def inside(site: Site, handler: Callable[[Session], object], **data: Any) -> Any:
    """Return what *handler* makes of a stored session that holds *data*."""
    browser = await site.visitor(lambda request: request.session.update(data))
    return (await browser.visit(lambda request: handler(request.scope["session"]))).json()


@pytest.mark.parametrize(
    "copied",
    [
        dict,
        copy.copy,
        copy.deepcopy,
        Session.copy,
        lambda session: {**session},
        lambda session: session | {},
        lambda session: {} | session,
        lambda session: json.loads(json.dumps(session)),
    ],
)
async def test_copies(memory: Site, copied: Callable[[Session], dict[str, Any]]) -> None:
    """A copy is a plain dict of everything, which changes nothing of the session."""

    def handler(session: Session) -> list[Any]:
        twin = copied(session)
        assert type(twin) is dict
        assert twin == session
        twin["m"] = 2
        return [twin, dict(session)]

    assert await inside(memory, handler, n=1) == [{"n": 1, "m": 2}, {"n": 1}]


async def test_deepcopy(memory: Site) -> None:
    """A deep copy shares nothing with the session (R69)."""

    def handler(session: Session) -> object:
        copy.deepcopy(session)["cart"].append(2)
        return session["cart"]

    assert await inside(memory, handler, cart=[1]) == [1]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
async def test_pickle(memory: Site, protocol: int) -> None:
    """A session is not pickled, as a task queue would try to; its dict is."""

    def handler(session: Session) -> object:
        with pytest.raises(TypeError, match=r"pickle dict\(session\)"):
            pickle.dumps(session, protocol)
        return pickle.loads(pickle.dumps(dict(session), protocol))  # noqa: S301 - made here

    assert await inside(memory, handler, n=1) == {"n": 1}


async def test_repr(memory: Site) -> None:
    """A repr, as logs and tracebacks show it, has the handle and none of the data (R13)."""

    def handler(request: Request) -> list[str]:
        session = request.session
        return [repr(session), str(session), f"{session}", repr(session.marks)]

    browser = memory.browser()
    assert (await browser.visit(handler)).json()[0] == "<Session new>"
    await browser.visit(lambda request: request.session.update(password="hunter2"))
    shown = (await browser.visit(handler)).json()
    assert shown[0] == f"<Session {(await memory.record()).id}>"
    assert "hunter2" not in str(shown)


async def test_mapping_errors(memory: Site) -> None:
    """Absent keys raise KeyError, as a dict's do; the last item set is the first popped; a session has no hash."""

    def handler(session: Session) -> object:
        for absent in (lambda: session["m"], lambda: session.__delitem__("m"), lambda: session.pop("m")):
            with pytest.raises(KeyError, match="m"):
                absent()
        with pytest.raises(TypeError, match="unhashable"):
            hash(session)
        session["m"] = 2
        popped = [session.popitem(), session.popitem()]
        with pytest.raises(KeyError):
            session.popitem()
        return popped

    assert await inside(memory, handler, n=1) == [["m", 2], ["n", 1]]


def properties(request: Request) -> list[Any]:
    """Return everything that a session tells about itself."""
    session = request.session
    instants = (session.created_at, session.last_seen_at, session.expires_at, session.authenticated_at)
    return [
        session.is_new,
        session.id and str(session.id),
        session.user_id,
        session.persistent,
        *(instant and instant.isoformat() for instant in instants),
    ]


async def test_properties_of_a_new_session(site: Site) -> None:
    """A session that is not stored has no handle and no instants, even when it was filled."""
    browser = site.browser()
    assert (await browser.visit(properties)).json() == [True, None, None, False, None, None, None, None]

    def handler(request: Request) -> list[Any]:
        request.session["user_id"] = 7
        return properties(request)

    assert (await browser.visit(handler)).json() == [True, None, "7", False, None, None, None, None]


async def test_properties(site: Site) -> None:
    """A stored session knows its handle, its user and its instants, in UTC."""
    browser = await site.visitor()
    site.clock.advance(days=1)
    await browser.visit(lambda request: request.session.login("ada"))
    site.clock.advance(minutes=1)
    assert (await browser.visit(properties)).json() == [
        False,
        str((await site.record()).id),
        "ada",
        False,
        "2026-01-01T00:00:00+00:00",
        "2026-01-02T00:00:00+00:00",
        "2026-01-16T00:00:00+00:00",
        "2026-01-02T00:00:00+00:00",
    ]


async def test_persistent(memory: Site) -> None:
    """Whether the cookie outlives the browser is what was set, else what is stored, else what is configured."""

    def handler(request: Request) -> bool:
        request.session.persistent = not request.session.persistent
        request.session["n"] = 1
        return request.session.persistent

    for configured in (False, True):
        browser = memory.reconfigured(cookie_persistent=configured).browser()
        assert (await browser.visit(lambda request: request.session.persistent)).json() is configured
        assert (await browser.visit(handler)).json() is not configured
        assert (await browser.visit(lambda request: request.session.persistent)).json() is not configured


@pytest.mark.parametrize(
    "user_id",
    ["", "x" * 256, "a\0b", "\ud800", 1.0, True, False, None, b"ada", [], {}, ("ada",), object()],
    ids=lambda value: repr(value)[:20],
)
async def test_invalid_principal(memory: Site, user_id: Any) -> None:
    """login() takes a str of 1 to 255 characters or an int; anything else is refused at once and nothing is marked."""

    def handler(request: Request) -> dict[str, Any]:
        with pytest.raises(InvalidData, match="user"):
            request.session.login(user_id)
        return dict(request.session)

    browser = await memory.visitor()
    assert (await browser.visit(handler)).json() == {"n": 1}
    assert (await memory.record()).user_id is None


@pytest.mark.parametrize("user_id", ["a", "x" * 255, "Ä\U0001f600", 0, -1, 2**64, "None", "0"])
async def test_valid_principal(site: Site, user_id: str | int) -> None:
    """A user is told apart by the str of the id, whatever its characters are; the data keeps what was given."""
    browser = await site.visitor(lambda request: request.session.login(user_id))
    assert (await site.record()).user_id == str(user_id)
    assert (await browser.visit(read)).json() == {"user_id": user_id}


@pytest.mark.parametrize("end", [Session.revoke, Session.clear])
async def test_ending_undoes_what_was_asked_for(memory: Site, end: Callable[[Session], None]) -> None:
    """revoke() and clear() forget the data and every earlier mark: what follows begins anew."""

    def handler(request: Request) -> None:
        session = request.session
        session.login("ada")
        session.persistent = True
        session.set_timeouts(idle=timedelta(hours=1))
        session.renew()
        end(session)
        assert dict(session) == {}
        assert session.user_id is None
        session["m"] = 2

    browser = await memory.visitor(lambda request: request.session.login("bob"))
    before = await memory.record()
    await browser.visit(handler)
    after = await memory.record()
    assert after.id != before.id
    assert (after.data, after.user_id, after.persistent, after.idle_timeout) == ('{"m":2}', None, False, None)


@pytest.mark.parametrize("idle", [timedelta(0), timedelta(seconds=-1), timedelta(milliseconds=999), timedelta.max])
async def test_invalid_timeouts(memory: Site, idle: timedelta) -> None:
    """An idle timeout of less than a second, or of a lifetime, is refused at once."""

    def handler(request: Request) -> None:
        with pytest.raises(InvalidData, match="idle timeout must be from one second"):
            request.session.set_timeouts(idle=idle)

    browser = await memory.visitor()
    await browser.visit(handler)
    assert memory.statements == ["SELECT"]


def afterwards(before: Callable[[Session], object], action: Callable[[Session], object]) -> Callable[[Request], object]:
    """Return a handler that does *before* and, when the headers have left, *action*."""

    def handler(request: Request) -> JSONResponse:
        before(request.session)
        return JSONResponse(None, background=BackgroundTask(action, request.session))

    return handler


def begin_anew(session: Session) -> None:
    """End the session and fill another."""
    session.clear()
    session["m"] = 2


#: What needs a cookie, whatever is stored.
COOKIE_NEEDED: dict[str, Callable[[Session], object]] = {
    "login": lambda session: session.login("ada"),
    "user key": lambda session: session.__setitem__("user_id", "ada"),
    "user key among others": lambda session: session.update(m=2, user_id="ada"),
    "user key |=": lambda session: session.__ior__({"m": 2, "user_id": "ada"}),
    "user key by default": lambda session: session.setdefault("user_id", "ada"),
    "renew": Session.renew,
    "persistent": lambda session: setattr(session, "persistent", True),
    "new after the end": begin_anew,
}
#: What needs a cookie only if there is none.
ROW_NEEDED: dict[str, Callable[[Session], object]] = {
    "setitem": lambda session: session.__setitem__("m", 2),
    "update": lambda session: session.update(m=2),
    "setdefault": lambda session: session.setdefault("m", 2),
    "|=": lambda session: session.__ior__({"m": 2}),
    "set_timeouts": lambda session: session.set_timeouts(idle=timedelta(hours=1)),
}


@pytest.mark.parametrize("action", [*COOKIE_NEEDED.values(), *ROW_NEEDED.values()], ids=[*COOKIE_NEEDED, *ROW_NEEDED])
async def test_no_new_session_after_the_headers(memory: Site, action: Callable[[Session], object]) -> None:
    """What would need a new session is refused at once when no cookie can be sent, and changes nothing (R58)."""
    refused: list[dict[str, Any]] = []

    def late(session: Session) -> None:
        with pytest.raises(HeadersSent, match="before the response starts"):
            action(session)
        refused.append(dict(session))

    answer = await memory.browser().visit(afterwards(len, late))
    assert (refused, answer.set_cookie, memory.statements) == ([{}], None, [])


async def test_nothing_to_pop_after_the_headers(memory: Site) -> None:
    """An empty session has no last item, then as before."""

    def late(session: Session) -> None:
        with pytest.raises(KeyError):
            session.popitem()
        with pytest.raises(KeyError):
            session.pop("n")

    await memory.browser().visit(afterwards(len, late))


@pytest.mark.parametrize("action", COOKIE_NEEDED.values(), ids=COOKIE_NEEDED)
async def test_no_new_cookie_after_the_headers(site: Site, action: Callable[[Session], object]) -> None:
    """What would need a new cookie is refused at once, and an update is refused as a whole (R58)."""

    def late(session: Session) -> None:
        with pytest.raises(HeadersSent, match="before the response starts"):
            action(session)
        assert "m" not in session

    browser = await site.visitor()
    await browser.visit(afterwards(ignore_session, late))
    ended = action is begin_anew  # heeded as far as it went
    assert [json.loads(record.data) for record in await site.records()] == ([] if ended else [{"n": 1}])
    assert (await browser.visit(read)).json() == ({} if ended else {"n": 1})


def ignore_session(session: Session) -> None:
    """Do nothing."""


@pytest.mark.parametrize("unbind", [lambda session: session.pop("user_id"), lambda session: session.popitem(),
                                    lambda session: session.__delitem__("user_id")])  # fmt: skip
async def test_no_unbinding_after_the_headers(memory: Site, unbind: Callable[[Session], object]) -> None:
    """Unbinding the user renews the secret, so it is refused at once as well."""

    def late(session: Session) -> None:
        with pytest.raises(HeadersSent):
            unbind(session)

    browser = await memory.visitor(lambda request: request.session.update(n=1, user_id="ada"))
    await browser.visit(afterwards(ignore_session, late))
    assert (await memory.record()).user_id == "ada"


@pytest.mark.parametrize("action", ROW_NEEDED.values(), ids=ROW_NEEDED)
async def test_changes_after_the_headers(site: Site, action: Callable[[Session], object]) -> None:
    """Changes to a stored session are committed at the end, when the headers have long left (R58)."""
    browser = await site.visitor()
    answer = await browser.visit(afterwards(ignore_session, action))
    assert site.statements == ["SELECT", "UPDATE"]
    assert answer.set_cookie is None
    record = await site.record()
    timed = action is ROW_NEEDED["set_timeouts"]
    assert (record.idle_timeout, json.loads(record.data)) == ((3600, {"n": 1}) if timed else (None, {"n": 1, "m": 2}))


async def test_streaming(site: Site) -> None:
    """A change made between two chunks of a body is kept, nested ones included (R58)."""

    def handler(request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            request.session["sent"] = [1]
            yield "a"
            request.session["sent"].append(2)
            yield "b"

        return StreamingResponse(body())

    browser = await site.visitor()
    assert (await browser.visit(handler)).body == b"ab"
    assert (await browser.visit(read)).json() == {"n": 1, "sent": [1, 2]}


async def test_revoking_after_the_headers(site: Site) -> None:
    """A session can be ended at any time, even when its cookie can no longer be expired."""
    browser = await site.visitor()
    answer = await browser.visit(afterwards(ignore_session, Session.revoke))
    assert (site.statements, await site.records(), answer.set_cookie) == (["SELECT", "DELETE"], [], None)


@pytest.mark.parametrize("action", NOTICED_WHEN_EMPTY.values(), ids=NOTICED_WHEN_EMPTY)
async def test_not_loaded(memory: Site, action: Callable[[Session], object]) -> None:
    """A session that was not loaded refuses every use rather than look empty, and says what to do."""
    site = memory.reconfigured(autoload_cookie=False)

    def handler(request: Request) -> None:
        with pytest.raises(SessionNotLoaded, match=r"await load_session\(request\)"):
            action(request.scope["session"])

    answer = await site.browser().visit(handler)
    assert (answer.header("vary"), memory.statements) == (None, [])


@pytest.mark.parametrize("action", [*COOKIE_NEEDED.values(), *ROW_NEEDED.values(), Session.revoke, Session.clear])
async def test_no_change_before_loading(memory: Site, action: Callable[[Session], object]) -> None:
    """A session that was not loaded cannot be changed either: the change would be lost."""
    site = memory.reconfigured(autoload_cookie=False)

    def handler(request: Request) -> None:
        with pytest.raises(SessionNotLoaded):
            action(request.scope["session"])

    browser = await memory.visitor()
    browser.app = site.app
    await browser.visit(handler)
    assert memory.statements == []


@pytest.mark.parametrize("action", NOTICED_WHEN_EMPTY.values(), ids=NOTICED_WHEN_EMPTY)
async def test_unavailable(action: Callable[[Session], object], statements: list[str]) -> None:
    """A session that could not be loaded raises the backend's error at every use: an outage is no logout (R76)."""
    site = Site(Unreachable(statements), statements)
    browser = await site.visitor()

    def handler(request: Request) -> None:
        for _ in range(2):
            with pytest.raises(BackendUnavailable, match="no route to host"):
                action(request.scope["session"])

    site.backend.reachable = False  # type: ignore[attr-defined]
    await browser.visit(handler)
    assert site.statements == ["SELECT"]


class Unreachable(TellingBackend):
    """A backend that can be cut off."""

    reachable = True

    async def load(self, id: UUID, now: datetime) -> Record | None:  # noqa: A002
        """Load what it can reach."""
        found = await super().load(id, now)
        if not self.reachable:
            raise BackendUnavailable("no route to host")
        return found
