"""No cache between the application and its users ever gives one user's session to another, and public pages stay so."""

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response, StreamingResponse

from sqlsessions import SessionMiddleware
from sqlsessions.session import Session
from tests.asgi import (
    COOKIE,
    KEY,
    OTHER_KEY,
    Answer,
    Browser,
    Handler,
    Request,
    Site,
    TellingBackend,
    ask,
    fill,
    headed,
    serve,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def memory(statements: list[str]) -> Site:
    """A site whose sessions live in memory: no database has a part in headers."""
    return Site(TellingBackend(statements), statements)


ACCESSES: dict[str, Callable[[Session], object]] = {
    "in": lambda session: "n" in session,
    "len": len,
    "bool": bool,
    "iter": list,
    "get": lambda session: session.get("n"),
    "==": lambda session: session == {},
    "dict": dict,
    "user_id": lambda session: session.user_id,
}
RESPONSES: dict[str, tuple[str, Callable[[], Response]]] = {
    "200": ("GET", lambda: JSONResponse({})),
    "204": ("GET", lambda: Response(status_code=204)),
    "206": ("GET", lambda: Response(b"x", 206, {"content-range": "bytes 0-0/2"})),
    "304": ("GET", lambda: Response(status_code=304, headers={"etag": '"x"'})),
    "HEAD": ("HEAD", lambda: Response(headers={"content-length": "9"})),
    "OPTIONS": ("OPTIONS", Response),
    "POST": ("POST", lambda: Response(status_code=201)),
    "redirect": ("GET", lambda: RedirectResponse("/other", 301)),
    "404": ("GET", lambda: Response(status_code=404)),
    "410": ("GET", lambda: Response(status_code=410)),
    "500": ("GET", lambda: Response(status_code=500)),
    "stream": ("GET", lambda: StreamingResponse(iter(["a", "b"]))),
    "file": ("GET", lambda: FileResponse(Path(__file__))),
}


@pytest.mark.parametrize(("method", "respond"), RESPONSES.values(), ids=RESPONSES)
@pytest.mark.parametrize("access", ACCESSES.values(), ids=ACCESSES)
async def test_vary(
    memory: Site, access: Callable[[Session], object], method: str, respond: Callable[[], Response]
) -> None:
    """Every response for which the session was looked into varies by cookie, whatever its kind (R103, R105)."""

    def handler(request: Request) -> Response:
        access(request.scope["session"])
        return respond()

    for browser in (memory.browser(), await memory.visitor()):
        answer = await browser.visit(handler, method=method)
        assert (answer.all("vary"), answer.set_cookies, answer.all("cache-control")) == (["Cookie"], [], [])


#: Every way to owe the browser a cookie.
OWED: dict[str, Handler] = {
    "new": lambda request: request.session.update(n=2),
    "renewed": lambda request: request.session.renew(),
    "bound": lambda request: request.session.login("ada"),
    "ended": lambda request: request.session.clear(),
    "emptied": lambda request: request.session.pop("n"),
    "persistent": lambda request: setattr(request.session, "persistent", True),
}


async def owing(memory: Site, owed: str, respond: Callable[[], Response], method: str = "GET") -> Answer:
    """Return a response by which a cookie is sent."""

    def handler(request: Request) -> Response:
        OWED[owed](request)
        return respond()

    browser = memory.browser() if owed == "new" else await memory.visitor()
    answer = await browser.visit(handler, method=method)
    assert answer.set_cookie
    return answer


@pytest.mark.parametrize("kind", [kind for kind in RESPONSES if kind != "500"])
@pytest.mark.parametrize("owed", OWED)
async def test_no_store(memory: Site, owed: str, kind: str) -> None:
    """Every response with our cookie is not to be stored, and varies by cookie, whatever its kind (R104, R105)."""
    method, respond = RESPONSES[kind]
    answer = await owing(memory, owed, respond, method)
    assert (answer.all("cache-control"), answer.all("vary")) == (["no-store"], ["Cookie"])


@pytest.mark.parametrize(
    ("vary", "merged"),
    [
        ([], ["Cookie"]),
        (["Accept-Encoding"], ["Accept-Encoding, Cookie"]),
        (["Accept-Encoding, Accept"], ["Accept-Encoding, Accept, Cookie"]),
        (["Accept-Encoding", "Origin"], ["Accept-Encoding, Origin, Cookie"]),
        ([" Accept ,, Origin ,"], ["Accept, Origin, Cookie"]),
        ([""], ["Cookie"]),
        (["*"], ["*"]),
        (["Accept, *"], ["Accept, *"]),
        (["Accept", " * "], ["Accept", " * "]),
        (["Cookie"], ["Cookie"]),
        (["cookie"], ["cookie"]),
        (["Accept,COOKIE"], ["Accept,COOKIE"]),
        (["Accept", "Cookie"], ["Accept", "Cookie"]),
        (["Cookie2"], ["Cookie2, Cookie"]),
        (["Set-Cookie"], ["Set-Cookie, Cookie"]),
    ],
)
@pytest.mark.parametrize("spelling", ["vary", "Vary"])
async def test_merged_vary(memory: Site, spelling: str, vary: list[str], merged: list[str]) -> None:
    """Cookie joins what the application's responses vary by, once; "*" or what has it already stays as it is (R103)."""

    def handler(request: Request) -> Response:
        request.session.get("n")
        return headed(("x-a", "1"), *((spelling, value) for value in vary), ("x-b", "2"))

    answer = await memory.browser().visit(handler)
    assert answer.all("vary") == merged
    assert [name for name, _ in answer.headers if name.startswith(b"x-")] == [b"x-a", b"x-b"]


async def test_vary_with_other_middleware(memory: Site) -> None:
    """Middleware around ours, which adds to Vary itself, finds one header to add to."""

    def handler(request: Request) -> Response:
        return JSONResponse(dict(request.session))

    browser = Browser(GZipMiddleware(memory.app, minimum_size=1))
    answer = await browser.visit(handler, headers=[(b"accept-encoding", b"gzip")])
    assert answer.all("vary") == ["Cookie, Accept-Encoding"]


#: What an application may say about caching, what is said instead when our cookie is sent, and whether we warn.
CACHE_CONTROL: dict[str, tuple[list[str], list[str], bool]] = {
    "nothing": ([], ["no-store"], False),
    "an empty line": ([""], ["", "no-store"], False),
    "private": (["private"], ["private"], False),
    "private for a while": (["private, max-age=60"], ["private, max-age=60"], False),
    "PRIVATE": (["PRIVATE"], ["PRIVATE"], False),
    "no-store": (["no-store"], ["no-store"], False),
    "no-store on its own line": (["max-age=60", "no-store"], ["max-age=60", "no-store"], False),
    "public": (["public"], ["private, no-store"], True),
    "Public": (["Public"], ["private, no-store"], True),
    "public for a while": (["public, max-age=60"], ["private, no-store"], True),
    "s-maxage": (["s-maxage=60"], ["private, no-store"], True),
    "max-age": (["max-age=60"], ["private, no-store"], True),
    "quoted": (['max-age="60"'], ["private, no-store"], True),
    "immutable": (["max-age=60, immutable"], ["private, no-store"], True),
    "two lines": (["max-age=60", "public"], ["private, no-store"], True),
    "private for some fields": (['public, private="x-name"'], ["private, no-store"], True),
    "only some fields": (['private="x-name, x-other"'], ["private, no-store"], False),
    "no-cache": (["no-cache"], ["private, no-store"], False),
    "no-cache, stale": (["no-cache, max-age=0, must-revalidate"], ["private, no-store"], False),
    "public, no-cache": (["public, no-cache"], ["private, no-store"], False),
    "stale": (["max-age=0, must-revalidate"], ["private, no-store"], False),
    "stale for others": (["max-age=60, s-maxage=0"], ["private, no-store"], False),
    "no-transform": (["no-transform"], ["private, no-store"], False),
}


@pytest.mark.parametrize("case", CACHE_CONTROL.values(), ids=CACHE_CONTROL)
@pytest.mark.parametrize("owed", OWED)
async def test_cache_control(
    memory: Site, owed: str, case: tuple[list[str], list[str], bool], caplog: pytest.LogCaptureFixture
) -> None:
    """With our cookie no shared cache may keep a response; where one would have, a warning says so too (R104)."""
    said, sent, warned = case
    answer = await owing(memory, owed, lambda: headed(*(("Cache-Control", value) for value in said)))
    assert answer.all("cache-control") == sent
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * warned
    assert all("sets a session cookie" in record.getMessage() for record in caplog.records)


async def test_expires(memory: Site) -> None:
    """An Expires header alone does not make a response with our cookie cacheable."""
    answer = await owing(memory, "new", lambda: headed(("expires", "Thu, 31 Dec 2099 00:00:00 GMT")))
    assert answer.all("cache-control") == ["no-store"]


@pytest.mark.parametrize(("said", "sent", "warned"), CACHE_CONTROL.values(), ids=CACHE_CONTROL)
async def test_touch_waits(
    memory: Site, said: list[str], sent: list[str], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A touch that would set a cookie on a page for shared caches waits for another response; it never warns (R104)."""
    site = memory.reconfigured(cookie_persistent=True)
    browser = await site.visitor()
    memory.clock.advance(hours=1)

    def handler(request: Request) -> Response:
        request.session.get("n")
        return headed(*(("cache-control", value) for value in said))

    answer = await browser.visit(handler)
    assert (answer.set_cookie is None) is warned
    assert answer.all("cache-control") == (said if warned else sent)
    assert answer.all("vary") == ["Cookie"]
    assert memory.statements == (["SELECT"] if warned else ["SELECT", "UPDATE"])
    answer = await browser.visit(lambda request: request.session.get("n"))
    assert (answer.set_cookie is not None) is warned
    assert caplog.records == []


async def test_touch_without_cookie(site: Site) -> None:
    """A touch that sets no cookie is done for a public page, too, and leaves its headers alone."""
    browser = await site.visitor()
    site.clock.advance(hours=1)

    def handler(request: Request) -> Response:
        request.session.get("n")
        return headed(("cache-control", "public, max-age=60"))

    answer = await browser.visit(handler)
    assert (answer.headers, site.statements) == (
        [(b"cache-control", b"public, max-age=60"), (b"vary", b"Cookie")],
        ["SELECT", "UPDATE"],
    )
    assert (await site.record()).last_seen_at == site.clock()


async def test_reissue_waits(site: Site) -> None:
    """A cookie of a previous key is not re-issued on a page for shared caches, but on the next other one (R9, R104)."""
    browser = await site.visitor()
    site.clock.advance(seconds=1)
    browser.app = site.reconfigured(secret_key=OTHER_KEY, previous_secret_keys=[KEY]).app
    answer = await browser.visit(lambda request: headed(("cache-control", "public")))
    assert (answer.headers, site.statements) == ([(b"cache-control", b"public")], ["SELECT"])
    assert (await browser.visit(lambda request: None)).set_cookie


UNTOUCHED: dict[str, list[tuple[str, str]]] = {
    "nothing": [],
    "public": [("Cache-Control", "public, max-age=60"), ("ETag", '"x"')],
    "odd": [("X-B", "2"), ("x-a", "1"), ("X-B", "3"), ("Vary", ""), ("vary", "Accept"), ("CACHE-CONTROL", " ,")],
    "cookies": [("set-cookie", "a=1"), ("Set-Cookie", f"{COOKIE}=mine"), ("set-cookie", "a=2")],
}


@pytest.mark.parametrize("headers", UNTOUCHED.values(), ids=UNTOUCHED)
@pytest.mark.parametrize("status", [200, 204, 304, 302, 404, 500])
async def test_untouched(memory: Site, headers: list[tuple[str, str]], status: int) -> None:
    """A response for which nobody used the session is the application's, byte for byte (R106)."""

    def handler(request: Request) -> Response:
        return headed(*headers, status=status)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["handler"] = handler
        await serve(scope, receive, send)

    plain = await ask(app)
    site = memory.reconfigured(cookie_persistent=True)
    live, dead, ended = await site.visitor(), site.browser(), await site.visitor()
    await ended.twin().visit(lambda request: request.session.clear())
    dead.cookies[COOKIE] = "junk"
    memory.clock.advance(hours=1)
    for browser in (site.browser(), live, dead, ended):
        answer = await ask(
            site.app,
            handler=handler,
            headers=[(b"cookie", f"{COOKIE}={value}".encode()) for value in browser.cookies.values()],
        )
        assert (answer.status, answer.headers, answer.body) == (plain.status, plain.headers, plain.body)


class SharedCache:
    """A cache that keeps and reuses all that RFC 9111 lets a shared cache, for everybody, and for ever."""

    #: RFC 9110 §15.1: what may be kept without a word about it.
    HEURISTIC = frozenset({200, 203, 204, 206, 300, 301, 308, 404, 405, 410, 414, 501})

    def __init__(self, app: SessionMiddleware) -> None:
        self.app = app
        self.kept: list[tuple[str, dict[str, str], Answer]] = []
        self.hits = 0

    async def visit(self, browser: Browser, handler: Handler, path: str) -> Answer:
        """Answer from the cache where it may be, else from the application."""
        cookie = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
        headers = {"cookie": cookie} if cookie else {}
        answer = self._kept(path, headers)
        if answer is None:
            sent = [(name.encode(), value.encode()) for name, value in headers.items()]
            answer = await ask(self.app, path, handler=handler, headers=sent)
            self._keep(path, headers, answer)
        for set_cookie in answer.set_cookies:
            browser.cookies[set_cookie.name] = set_cookie.value
        return answer

    def _kept(self, path: str, headers: dict[str, str]) -> Answer | None:
        for kept_path, varied, answer in self.kept:
            if kept_path == path and all(headers.get(field, "") == value for field, value in varied.items()):
                self.hits += 1
                return answer
        return None

    def _keep(self, path: str, headers: dict[str, str], answer: Answer) -> None:
        said = [part.strip().lower() for part in (answer.header("cache-control") or "").split(",")]
        names = {part.partition("=")[0] for part in said}
        if {"private", "no-store", "no-cache"} & set(said):
            return
        explicit = names & {"public", "max-age", "s-maxage"} or answer.all("expires")
        vary = [field.strip().lower() for field in (answer.header("vary") or "").split(",")]
        if "*" in vary or not (explicit or answer.status in self.HEURISTIC):
            return
        self.kept.append((path, {field: headers.get(field, "") for field in vary if field}, answer))


POLICIES = [
    (),
    *(
        (said,)
        for said in ("public", "public, max-age=60", "s-maxage=60", "max-age=60", "max-age=0", "must-revalidate")
    ),
    *((said,) for said in ("private", "no-store", "no-cache", 'private="x-name"', 'public, private="x-name"')),
]
STATUSES = (200, 204, 301, 404)


@pytest.mark.parametrize(
    ("said", "expires", "vary", "status"),
    list(itertools.product(POLICIES, (False, True), ((), ("Accept",), ("*",)), STATUSES)),
)
async def test_shared_cache(
    memory: Site, said: tuple[str, ...], expires: bool, vary: tuple[str, ...], status: int
) -> None:
    """Behind a cache that keeps all it may, nobody is given another's page or cookie (R103, R104)."""
    site = memory.reconfigured(cookie_persistent=True)
    cache = SharedCache(site.app)
    headers = [
        *(("cache-control", value) for value in said),
        *(("vary", value) for value in vary),
        *([("expires", "Thu, 31 Dec 2099 00:00:00 GMT")] if expires else []),
    ]

    def page(action: Handler) -> Handler:
        def handler(request: Request) -> Response:
            name = action(request)
            response = headed(*headers, status=status)
            response.body = str(name).encode()
            return response

        return handler

    def log_in(name: str) -> Handler:
        def bind(request: Request) -> str:
            request.session["user_id"] = name
            return name

        return page(bind)

    show = page(lambda request: request.session.user_id)
    visitors = {name: site.browser() for name in ("ada", "bob", "eve")}
    for name, browser in visitors.items():
        answer = await cache.visit(browser, log_in(name), "/login")
        assert answer.body.decode() == name
    assert len({browser.cookies[COOKIE] for browser in visitors.values()}) == 3
    for _ in range(3):
        memory.clock.advance(hours=1)
        for name, browser in visitors.items():
            before = browser.cookies[COOKIE]
            assert (await cache.visit(browser, show, "/")).body.decode() == name
            assert browser.cookies[COOKIE] == before
    assert (await cache.visit(site.browser(), show, "/")).body == b"None"
    for name, browser in visitors.items():
        memory.clock.advance(hours=1)
        await cache.visit(browser, page(lambda request: request.session.renew()), "/renew")
        assert (await cache.visit(browser, show, "/")).body.decode() == name
    assert len({browser.cookies[COOKIE] for browser in visitors.values()}) == 3


async def test_shared_cache_keeps_public_pages(memory: Site) -> None:
    """A page that uses no session is answered from the cache for everybody, with and without cookies (R106)."""
    cache = SharedCache(memory.app)
    for browser in (memory.browser(), await memory.visitor(), await memory.visitor()):
        await cache.visit(browser, lambda request: headed(("cache-control", "public")), "/")
    assert cache.hits == 2
    for browser in (memory.browser(), await memory.visitor()):
        await cache.visit(browser, fill, "/new")
    assert cache.hits == 2
