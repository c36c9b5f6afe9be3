"""The application that the faults happen to, served by uvicorn: it reads, writes, begins and ends sessions, and not."""

import json
import os
from datetime import timedelta
from typing import Any

from fastapi import FastAPI

from sqlsessions import CurrentSession, SessionMiddleware, SQLAlchemyBackend
from sqlsessions.errors import BackendError

backend = SQLAlchemyBackend(
    os.environ["URL"],
    deadline=timedelta(seconds=float(os.environ["DEADLINE"])),
    **json.loads(os.environ["OPTIONS"]),
)
app = FastAPI()
app.add_middleware(
    SessionMiddleware,
    secret_key="an only moderately confidential key of tests",
    backend=backend,
    cookie_https_only=False,
)


@app.get("/public")
async def public() -> str:
    """Say something that has nothing to do with sessions."""
    return "public"


@app.get("/health")
async def health() -> dict[str, str]:
    """Tell whether the database answers, with 200 in any case: what the middleware makes of it is not asked here."""
    try:
        await backend.ping()
    except BackendError as error:
        return {"database": type(error).__name__}
    return {"database": "ok"}


@app.get("/")
async def read(session: CurrentSession) -> dict[str, Any]:
    """Return what the session holds."""
    return dict(session)


@app.post("/login/{user}")
async def login(user: str, session: CurrentSession) -> None:
    """Begin a session, or renew its secret."""
    session["user_id"] = user


@app.post("/count")
async def count(session: CurrentSession) -> int:
    """Change the session."""
    session["n"] = session.get("n", 0) + 1
    return int(session["n"])


@app.post("/logout")
async def logout(session: CurrentSession) -> None:
    """End the session."""
    session.clear()
