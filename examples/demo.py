"""The demo: log in as anybody, read your profile, fill a cart, see your sessions and end them.

`python3 dev.py demo` serves it. There are no passwords: whoever you say you are, you are. A form answers a browser
with the page, and curl with JSON.
"""

import logging
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

from fastapi import FastAPI, Form, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from sqlalchemy import make_url

from examples import page
from sqlsessions import CurrentSession, CurrentUserId, Event, SessionMiddleware, SQLAlchemyBackend

ROOT = Path(__file__).resolve().parent.parent
URL = os.environ.get("SQLSESSIONS_URL") or f"sqlite+aiosqlite:///{ROOT / 'demo.db'}"

logger = logging.getLogger("uvicorn.error")  # uvicorn prints this one


def secret_key() -> str:
    """Return the key of the environment; else one that is made once and kept, so that a restart logs nobody out."""
    if key := os.environ.get("SECRET_KEY"):
        return key
    url = make_url(URL)
    place = Path(url.database or "") if url.get_backend_name() == "sqlite" else ROOT / "demo.db"
    path = place.with_suffix(".key")
    with suppress(FileExistsError), os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_urlsafe(32))
    return path.read_text()


def tell(event: Event) -> None:
    """Log what happened to a session. An event holds handles only, so it may be logged as it is."""
    logger.info("session %s: id %s, user %s", event.kind, event.session_id, event.user_id)


backend = SQLAlchemyBackend(URL)
app = FastAPI(title="sqlsessions demo")
app.add_middleware(
    SessionMiddleware,
    secret_key=secret_key(),
    backend=backend,
    # The demo is served over plain http, where browsers do not send Secure cookies back. Yours is not: leave this out,
    # and the cookie is called __Host-session.
    cookie_https_only=False,
    skip=["/favicon.ico"],  # asked for with every page, and not worth a statement
    record_client=True,  # for "your sessions"; off by default, as addresses and browsers are personal data
    on_event=tell,
)


def answer(request: Request, **result: Any) -> Response:
    """Send a browser back to the page, and anybody else the result."""
    if "text/html" in request.headers.get("accept", ""):
        return RedirectResponse("/", status_code=303)
    return JSONResponse(result)


@app.post("/login")
async def login(
    request: Request, session: CurrentSession, user: Annotated[str, Form(min_length=1, max_length=40)]
) -> Response:
    """Bind the session to the user. Its secret changes, so a cookie that somebody planted before is worthless now."""
    session.login(user)
    return answer(request, message="Logged in")


@app.get("/profile")
async def profile(user_id: CurrentUserId, session: CurrentSession) -> dict[str, Any]:
    """Show who is logged in; 401 for nobody."""
    return {"user_id": user_id, "cart": session.get("cart", 0)}


@app.post("/logout")
async def logout(request: Request, session: CurrentSession) -> Response:
    """End the session: its row is deleted before this answer leaves."""
    session.clear()
    return answer(request, message="Logged out")


@app.get("/cart")
async def cart(session: CurrentSession) -> dict[str, int]:
    """Show the cart. Reading creates no session."""
    return {"cart": session.get("cart", 0)}


@app.post("/cart")
async def add_to_cart(request: Request, session: CurrentSession) -> Response:
    """Put one more thing into the cart. Of parallel requests each one counts."""
    data = await session.atomic(lambda data: data | {"cart": data.get("cart", 0) + 1})
    return answer(request, cart=data["cart"])


@app.get("/sessions")
async def sessions(user_id: CurrentUserId, session: CurrentSession) -> list[dict[str, Any]]:
    """List the user's sessions: by their handles, which are no credentials."""
    found = await backend.list_for_user(user_id)
    return [{"id": record.id, "last_seen_at": record.last_seen_at, "this": record.id == session.id} for record in found]


@app.post("/sessions/{session_id}/end")
async def end(request: Request, session_id: UUID, user_id: CurrentUserId) -> Response:
    """End a session of the user's own. Whoever has its cookie is anonymous from now on."""
    if not await backend.revoke(session_id, user_id=user_id):
        raise HTTPException(404, "You have no such session")
    return answer(request, message="Ended")


@app.get("/favicon.ico", status_code=204, include_in_schema=False)
async def favicon() -> None:
    """Have no icon."""


@app.get("/", response_class=HTMLResponse)
async def home(session: CurrentSession) -> Response:
    """Show the page to click through."""
    user = session.user_id
    found = await backend.list_for_user(user) if user else []
    content = page.render(user, session.get("cart", 0), found, this=session.id)
    return HTMLResponse(content, headers={"Content-Security-Policy": page.POLICY})
