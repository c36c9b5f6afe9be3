"""The demo does over a socket what its README says."""

import asyncio
import hashlib
import importlib
import shutil
from base64 import b64encode, urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator
from pathlib import Path
from stat import S_IMODE
from types import ModuleType
from typing import Any
from uuid import UUID

import httpx
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine
from starlette.testclient import TestClient

from sqlsessions.backends.sqlalchemy import SQLAlchemyBackend
from tests.demo_server import KEY, DemoServer, serving

BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoServer]:
    """The demo, running on each engine in turn, once for all tests: each logs in users of its own."""
    if request.param == "sqlite":
        template = request.getfixturevalue("sqlite_template")
        url = f"sqlite+aiosqlite:///{shutil.copy(template, tmp_path_factory.mktemp('demo') / 'demo.db')}"
    else:
        template = request.getfixturevalue("postgres_template")
        url = request.getfixturevalue("postgres").create_database("demo", template)
    with serving(SQLSESSIONS_URL=url, SECRET_KEY=KEY) as server:
        yield server


@pytest.fixture
def user(request: pytest.FixtureRequest) -> str:
    """A user whom no other test logs in."""
    return f"ada of {request.node.name}"[:40]


@pytest.fixture
def client(server: DemoServer) -> Iterator[httpx.Client]:
    """A client that keeps its cookies."""
    with httpx.Client(base_url=server.url) as client:
        yield client


@pytest.fixture
def demo(sqlite_sessions_url: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The demo's module in this process, imported anew with an environment of its own."""
    monkeypatch.setenv("SQLSESSIONS_URL", sqlite_sessions_url)
    monkeypatch.setenv("SECRET_KEY", KEY)
    return importlib.reload(importlib.import_module("examples.demo"))


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """Every statement that any engine of this process sends from now on."""
    sent: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    sa.event.listen(Engine, "before_cursor_execute", note)
    yield sent
    sa.event.remove(Engine, "before_cursor_execute", note)


def stored(url: str, user: str) -> list[UUID]:
    """Return the handles of the user's sessions, from the table."""

    async def ask() -> list[UUID]:
        return [record.id for record in await SQLAlchemyBackend(url).list_for_user(user)]

    return asyncio.run(ask())


def test_login(client: httpx.Client, user: str) -> None:
    """Login sets one cookie, named session over plain http, that no script can read; profile reads it."""
    response = client.post("/login", data={"user": user})
    (cookie,) = response.headers.get_list("set-cookie")
    value, attributes = cookie.split("; ", 1)
    assert value.startswith("session=")
    assert attributes == "Path=/; HttpOnly; SameSite=Lax"
    assert client.get("/profile").json() == {"user_id": user, "cart": 0}


def test_nobody(client: httpx.Client) -> None:
    """Whoever is not logged in gets a 401, and neither a cookie nor a row (R45)."""
    response = client.get("/profile")
    assert response.status_code == 401
    assert "set-cookie" not in response.headers


def test_logout(server: DemoServer, client: httpx.Client, user: str) -> None:
    """Logout deletes the row and expires the cookie, and the old cookie stays dead (R28)."""
    client.post("/login", data={"user": user})
    old = client.cookies["session"]
    assert len(stored(server.database, user)) == 1
    response = client.post("/logout")
    assert response.headers["set-cookie"] == "session=; Max-Age=0; Path=/; HttpOnly; SameSite=Lax"
    assert stored(server.database, user) == []
    assert httpx.get(client.base_url.join("/profile"), cookies={"session": old}).status_code == 401


def test_kill(server: DemoServer, client: httpx.Client, user: str) -> None:
    """A `kill -9` of the server loses no session, however soon after the answer it comes (R57)."""
    client.post("/login", data={"user": user})
    client.post("/cart")
    server.kill()
    server.start()
    assert client.get("/profile").json() == {"user_id": user, "cart": 1}


def test_renewed(client: httpx.Client, user: str) -> None:
    """The cart comes along at login, and the cookie from before login is worthless (R26)."""
    client.post("/cart")
    before = client.cookies["session"]
    client.post("/login", data={"user": user})
    assert client.get("/profile").json() == {"user_id": user, "cart": 1}
    assert httpx.get(client.base_url.join("/cart"), cookies={"session": before}).json() == {"cart": 0}


def test_another_user(client: httpx.Client, user: str) -> None:
    """Who logs in over somebody else's session finds nothing of theirs (R44)."""
    client.post("/login", data={"user": user})
    client.post("/cart")
    client.post("/login", data={"user": "grace" + user[3:]})
    assert client.get("/profile").json() == {"user_id": "grace" + user[3:], "cart": 0}


def test_sessions(client: httpx.Client, user: str) -> None:
    """A user sees all of their sessions and ends one of them; nobody else's, though its handle be known (R39, R40)."""
    with httpx.Client(base_url=client.base_url) as phone, httpx.Client(base_url=client.base_url) as stranger:
        for visitor, name in [(client, user), (phone, user), (stranger, "mallory")]:
            visitor.post("/login", data={"user": name})
        listed = client.get("/sessions").json()
        assert sorted(entry["this"] for entry in listed) == [False, True]
        (other,) = [entry["id"] for entry in listed if not entry["this"]]
        assert stranger.post(f"/sessions/{other}/end").status_code == 404
        assert phone.get("/profile").status_code == 200
        assert client.post(f"/sessions/{other}/end").json() == {"message": "Ended"}
        assert phone.get("/profile").status_code == 401
        assert client.get("/profile").status_code == 200


def test_browser(client: httpx.Client) -> None:
    """A browser's form leads back to the page, which shows the user's name as text and is in no shared cache."""
    response = client.post("/login", data={"user": "<script>"}, headers=BROWSER)
    assert (response.status_code, response.headers["location"]) == (303, "/")
    response = client.get("/", headers=BROWSER)
    assert "<strong>&lt;script&gt;</strong>" in response.text
    assert "<script>" not in response.text
    assert response.headers["vary"] == "Cookie"


def test_altered_cookie(demo: ModuleType, statements: list[str]) -> None:
    """A cookie altered anywhere is anonymous and costs no statement; the genuine one costs one (R6, R7)."""
    with TestClient(demo.app) as client:
        client.post("/login", data={"user": "ada"})
        genuine = client.cookies["session"]
        client.cookies.clear()
        statements.clear()
        for place, character in enumerate(genuine):
            altered = genuine[:place] + ("B" if character == "A" else "A") + genuine[place + 1 :]
            assert client.get("/profile", headers={"cookie": f"session={altered}"}).status_code == 401
        assert statements == []
        assert client.get("/profile", headers={"cookie": f"session={genuine}"}).status_code == 200
        assert [statement.split()[0] for statement in statements] == ["SELECT"]


def test_nothing_secret_at_rest(demo: ModuleType, sqlite_sessions_url: str) -> None:
    """The database's file holds the secret in no form but its hash, which is no credential (R3, R4)."""
    with TestClient(demo.app) as client:
        client.post("/login", data={"user": "ada"})
        cookie = client.cookies["session"]
        payload, _, signature = cookie.partition(".")
        secret = urlsafe_b64decode(payload + "==")[-32:]
        file = Path(sqlite_sessions_url.partition("///")[2]).read_bytes()
        hashed = hashlib.sha256(secret).digest()
        assert hashed in file
        for form in [secret, secret.hex().encode(), b64encode(secret), urlsafe_b64encode(secret)]:
            assert form.rstrip(b"=") not in file
        assert payload.encode() not in file
        assert signature.encode() not in file
        client.cookies.clear()
        passed_on = urlsafe_b64encode(urlsafe_b64decode(payload + "==")[:-32] + hashed).rstrip(b"=").decode()
        for value in [passed_on, f"{passed_on}.{signature}"]:
            assert client.get("/profile", headers={"cookie": f"session={value}"}).status_code == 401


def test_key(sqlite_sessions_url: str) -> None:
    """Without SECRET_KEY the demo makes a key that only its owner can read, and keeps it over a restart."""
    path = Path(sqlite_sessions_url.partition("///")[2]).with_suffix(".key")
    with serving(SQLSESSIONS_URL=sqlite_sessions_url) as server, httpx.Client(base_url=server.url) as client:
        client.post("/login", data={"user": "ada"})
        assert S_IMODE(path.stat().st_mode) == 0o600
        key = path.read_text()
        server.kill()
        server.start()
        assert path.read_text() == key
        assert client.get("/profile").status_code == 200
