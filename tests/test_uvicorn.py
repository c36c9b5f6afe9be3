"""The real thing: uvicorn in a process of its own, a socket, and a file."""

import asyncio
import signal
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import make_url

from tests.serving import Uvicorn

pytestmark = pytest.mark.anyio

APPLICATION = """
    import os
    from fastapi import FastAPI, Request, WebSocket
    from sqlsessions import CurrentSession, CurrentUserId, SessionMiddleware, SQLAlchemyBackend

    app = FastAPI()
    app.add_middleware(
        SessionMiddleware,
        secret_key="an only moderately confidential key of tests",
        backend=SQLAlchemyBackend(os.environ["URL"]),
        cookie_https_only=False,
    )

    @app.post("/login/{user}")
    async def login(user: str, session: CurrentSession) -> None:
        session["user_id"] = user

    @app.get("/me")
    async def me(user_id: CurrentUserId) -> str:
        return user_id

    @app.post("/set/{key}")
    async def set_key(key: str, session: CurrentSession) -> None:
        session[key] = True

    @app.get("/")
    async def index(session: CurrentSession) -> dict[str, object]:
        return dict(session)

    @app.post("/logout")
    async def logout(session: CurrentSession) -> None:
        session.clear()
"""


class Shop(Uvicorn):
    """The application under uvicorn, while the block runs."""

    def __init__(self, folder: Path, url: str) -> None:
        (folder / "shop.py").write_text(textwrap.dedent(APPLICATION))
        super().__init__("shop:app", folder, cwd=folder, variables={"URL": url})
        self.url = url


@pytest.fixture
def uvicorn(tmp_path: Path, sqlite_sessions_url: str) -> Iterator[Shop]:
    """The application on an SQLite file, served."""
    with Shop(tmp_path, sqlite_sessions_url) as server:
        yield server


async def test_a_visit(uvicorn: Shop) -> None:
    """Over a socket: log in, be known, log out, be nobody, and the cookie of before is dead (R26, R28)."""
    async with uvicorn.browser() as browser, uvicorn.browser() as thief:
        assert (await browser.get("/me")).status_code == 401
        assert (await browser.post("/set/cart")).status_code == 200
        planted = browser.cookies["session"]
        login = await browser.post("/login/alice")
        assert login.headers.get_list("set-cookie")[0].endswith("; Path=/; HttpOnly; SameSite=Lax")
        assert browser.cookies["session"] != planted
        assert (await browser.get("/me")).json() == "alice"
        assert (await browser.get("/")).json() == {"cart": True, "user_id": "alice"}
        live = browser.cookies["session"]
        assert (await browser.post("/logout")).status_code == 200
        assert "session" not in browser.cookies
        for cookie in (planted, live):
            thief.cookies.set("session", cookie)
            assert (await thief.get("/me")).status_code == 401
    assert uvicorn.end(signal.SIGTERM) in (0, -signal.SIGTERM)
    assert "Traceback" not in uvicorn.log


async def test_twenty_requests_at_once(uvicorn: Shop) -> None:
    """Twenty parallel requests that set a key each, over twenty connections, lose none (R52)."""
    async with uvicorn.browser() as browser:
        await browser.post("/login/alice")
        replies = await asyncio.gather(*(browser.post(f"/set/{number}") for number in range(20)))
        assert {reply.status_code for reply in replies} == {200}
        assert (await browser.get("/")).json() == {"user_id": "alice"} | {str(number): True for number in range(20)}


async def test_killed_and_restarted(tmp_path: Path, sqlite_sessions_url: str) -> None:
    """A kill -9 loses no session whose cookie was sent, be it under load; a restart knows them all (R84)."""
    cookies: list[str] = []

    async def come_and_stay(server: Uvicorn, number: int) -> None:
        async with server.browser() as browser:
            try:
                for _ in range(1000):
                    browser.cookies.clear()
                    await browser.post(f"/login/user{number}")
                    cookies.append(browser.cookies["session"])
                    if len(cookies) == 100:
                        server.end(signal.SIGKILL)
            except httpx.TransportError:
                return

    with Shop(tmp_path, sqlite_sessions_url) as server:
        await asyncio.gather(*(come_and_stay(server, number) for number in range(8)))
    assert len(cookies) >= 100
    with Shop(tmp_path, sqlite_sessions_url) as server:
        async with server.browser() as browser:
            for cookie in cookies:
                browser.cookies.set("session", cookie)
                reply = await browser.get("/me")
                assert (reply.status_code, reply.json()[:4]) == (200, "user")
            assert (await browser.post("/logout")).status_code == 200


async def test_terminated(uvicorn: Shop) -> None:
    """SIGTERM stops it at once and cleanly: no task destroyed, no connection forgotten, no file left beside (R87)."""
    async with uvicorn.browser() as browser:
        await browser.post("/login/alice")
    begun = time.monotonic()
    assert uvicorn.end(signal.SIGTERM) in (0, -signal.SIGTERM)
    assert time.monotonic() - begun < 5
    assert "Application shutdown complete" in uvicorn.log
    for complaint in ("Traceback", "Warning", "destroyed", "never"):
        assert complaint not in uvicorn.log
    path = Path(str(make_url(uvicorn.url).database))
    assert list(path.parent.glob(f"{path.name}*")) == [path]
