"""The four endpoints that every application of the benchmarks has, as FastAPI spells them.

`/none` leaves the session untouched, `/read` reads `user_id`, `/write` counts `n` up, and `/login` begins a session
with a cart of 20 items. All are GET, which is what wrk sends by itself.
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, get_args

from fastapi import APIRouter, FastAPI, Request
from starlette.middleware import Middleware

Endpoint = Literal["/none", "/read", "/write", "/login"]
ENDPOINTS: tuple[Endpoint, ...] = get_args(Endpoint)

#: What runs around an application: connections open before the first request and close after the last.
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

#: Signs and encrypts where a row wants a key.
KEY = "an only moderately confidential key of benchmarks"

USER_ID = 123


def fresh() -> dict[str, Any]:
    """Return what a session holds after `/login`: some 1.1 KB as JSON."""
    cart = [{"sku": f"sku-{number:04}", "title": f"Article {number}", "quantity": 1} for number in range(20)]
    return {"user_id": USER_ID, "n": 0, "cart": cart}


router = APIRouter()


@router.get("/none", response_model=None)
async def none(request: Request) -> dict[str, Any]:  # noqa: ARG001 - every endpoint is given one
    """Leave the session alone."""
    return {"n": None}


@router.get("/read", response_model=None)
async def read(request: Request) -> dict[str, Any]:
    """Read one key."""
    return {"user_id": request.session.get("user_id")}


@router.get("/write", response_model=None)
async def write(request: Request) -> dict[str, Any]:
    """Change one key."""
    request.session["n"] += 1
    return {"n": request.session["n"]}


@router.get("/login", response_model=None)
async def login(request: Request) -> dict[str, Any]:
    """Fill an empty session."""
    request.session.update(fresh())
    return {"n": 0}


def application(*middleware: Middleware, lifespan: Lifespan | None = None) -> FastAPI:
    """Return the FastAPI application with these middlewares, the outermost first."""
    app = FastAPI(middleware=middleware, lifespan=lifespan, openapi_url=None)
    app.include_router(router)
    return app
