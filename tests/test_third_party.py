"""What others built on ``request.session`` works with ours: sign-in with another site, and an admin interface."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx2
import pytest
import sqlalchemy as sa
from authlib.integrations.base_client.errors import MismatchingStateError  # type: ignore[import-untyped]
from authlib.integrations.starlette_client import OAuth  # type: ignore[import-untyped]
from sqladmin import Admin, ModelView
from sqladmin.authentication import AuthenticationBackend
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sqlsessions import SessionMiddleware
from tests.asgi import COOKIE, Answer, Browser, Site

pytestmark = pytest.mark.anyio


def provider() -> Starlette:
    """Return a site that says who somebody is: its authorization codes are names."""

    async def token(request: Request) -> Response:
        async with request.form() as form:
            assert form["code_verifier"]
            return JSONResponse(
                {"access_token": f"token of {form['code']}", "token_type": "Bearer", "expires_in": 3600}
            )

    async def userinfo(request: Request) -> Response:
        return JSONResponse({"sub": request.headers["authorization"].removeprefix("Bearer token of ")})

    return Starlette(routes=[Route("/token", token, methods=["POST"]), Route("/userinfo", userinfo)])


def client(site: Site, **options: Any) -> Starlette:
    """Return an application that signs its users in with the provider."""
    oauth = OAuth()
    oauth.register(
        "idp",
        client_id="me",
        client_secret="shared with the provider",
        authorize_url="https://id.example.com/authorize",
        access_token_url="https://id.example.com/token",
        userinfo_endpoint="https://id.example.com/userinfo",
        client_kwargs={
            "scope": "profile",
            "code_challenge_method": "S256",
            "transport": httpx2.ASGITransport(provider()),
        },
    )

    async def login(request: Request) -> Response:
        answer: Response = await oauth.idp.authorize_redirect(request, "https://app.example.com/callback")
        return answer

    async def callback(request: Request) -> Response:
        token = await oauth.idp.authorize_access_token(request)
        user = await oauth.idp.userinfo(token=token)
        assert type(user) is not dict  # so that itself it is refused
        request.session["user"] = dict(user)
        return JSONResponse(dict(request.session))

    return Starlette(
        routes=[Route("/login", login), Route("/callback", callback)],
        middleware=[
            Middleware(SessionMiddleware, backend=site.backend, **site.options | {"user_key": subject} | options)
        ],
    )


def subject(data: Mapping[str, Any]) -> str | None:
    """Return who is logged in, as the README has it."""
    user: str | None = (data.get("user") or {}).get("sub")
    return user


async def sent_to_provider(browser: Browser) -> tuple[Answer, str]:
    """Return the answer that sends *browser* to the provider, and the state it carries there."""
    answer = await browser.visit(path="/login")
    location = urlsplit(answer.header("location") or "")
    assert (answer.status, location.netloc, location.path) == (302, "id.example.com", "/authorize")
    return answer, parse_qs(location.query)["state"][0]


async def test_sign_in_with_another_site(site: Site) -> None:
    """Authlib keeps its state in an anonymous session; the user who comes back is bound to it, and it is renewed."""
    browser = Browser(client(site))
    answer, state = await sent_to_provider(browser)
    # Lax: the cookie comes along when the provider sends the browser back by a link or a redirect.
    assert answer.set_cookie
    assert answer.set_cookie.attributes["samesite"] == "Lax"
    assert (await site.record()).user_id is None
    planted = browser.twin()
    query = urlencode({"code": "ada", "state": state})
    answer = await browser.visit(path=f"/callback?{query}")
    assert (answer.status, answer.json()) == (200, {"user": {"sub": "ada"}})
    assert (await site.record()).user_id == "ada"
    assert browser.cookies[COOKIE] != planted.cookies[COOKIE]
    assert site.kinds == ["created", "renewed", "bound"]


async def test_sign_in_is_bound_to_the_browser(site: Site) -> None:
    """The state of one browser signs no other one in, and none twice (CVE-2025-68158)."""
    attacker, victim = Browser(client(site)), Browser(client(site))
    _, state = await sent_to_provider(attacker)
    await sent_to_provider(victim)
    query = urlencode({"code": "attacker", "state": state})
    await victim.visit(path=f"/callback?{query}", raises=MismatchingStateError)
    assert (await attacker.visit(path=f"/callback?{query}")).json() == {"user": {"sub": "attacker"}}
    await attacker.visit(path=f"/callback?{query}", raises=MismatchingStateError)
    assert sorted(str(record.user_id) for record in await site.records()) == ["None", "attacker"]


async def test_sign_in_with_strict_cookies(site: Site) -> None:
    """With SameSite=Strict the browser comes back without its cookie, so that such a sign-in cannot work."""
    browser = Browser(client(site, cookie_same_site="strict"))
    answer, state = await sent_to_provider(browser)
    assert answer.set_cookie
    assert answer.set_cookie.attributes["samesite"] == "Strict"
    from_other_site = Browser(browser.app)
    query = urlencode({"code": "ada", "state": state})
    await from_other_site.visit(path=f"/callback?{query}", raises=MismatchingStateError)


class Base(DeclarativeBase):
    """The admin interface's own tables."""


class Thing(Base):
    """Something to administrate."""

    __tablename__ = "things"
    id: Mapped[int] = mapped_column(primary_key=True)


class ThingAdmin(ModelView, model=Thing):
    """Its page."""


class Authentication(AuthenticationBackend):
    """Lets in who is in our session, without a middleware of sqladmin's own."""

    def __init__(self) -> None:
        self.middlewares = []

    async def login(self, request: Request) -> bool:
        """Let in who knows the password."""
        form = await request.form()
        if form["password"] != "right":
            return False
        request.session["user_id"] = str(form["username"])
        return True

    async def logout(self, request: Request) -> bool:
        """End the session."""
        request.session.clear()
        return True

    async def authenticate(self, request: Request) -> bool:
        """Tell whether somebody is logged in."""
        return "user_id" in request.session


async def test_sqladmin(site: Site) -> None:
    """The login, pages and logout of sqladmin use our session, with a backend that brings no middleware of its own."""
    app = Starlette(middleware=[Middleware(SessionMiddleware, backend=site.backend, **site.options)])
    engine = sa.create_engine("sqlite://")
    Admin(app, engine, authentication_backend=Authentication()).add_view(ThingAdmin)
    browser = Browser(app)
    form = [(b"content-type", b"application/x-www-form-urlencoded")]
    answer = await browser.visit(path="/admin/")
    assert (answer.status, answer.header("location")) == (302, "https://app.example.com/admin/login")
    answer = await browser.visit(path="/admin/login", method="POST", body=b"username=ada&password=wrong", headers=form)
    assert (answer.status, await site.records()) == (400, [])
    answer = await browser.visit(path="/admin/login", method="POST", body=b"username=ada&password=right", headers=form)
    assert answer.status == 302
    assert (await site.record()).user_id == "ada"
    answer = await browser.visit(path="/admin/")
    assert answer.status == 200
    assert b"Things" in answer.body
    answer = await browser.visit(path="/admin/logout")
    assert (answer.status, await site.records(), browser.cookies) == (302, [], {})
    assert (await browser.visit(path="/admin/")).status == 302
    engine.dispose()
