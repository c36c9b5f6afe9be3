"""Django, without sessions and with those that it keeps in a database."""

import asyncio

import django
import sqlalchemy as sa
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.management import call_command
from django.db import connection, connections
from django.http import HttpRequest, JsonResponse
from django.urls import path
from starlette.types import ASGIApp, Receive, Scope, Send

from benchmarks.endpoints import KEY, fresh


async def none(request: HttpRequest) -> JsonResponse:  # noqa: ARG001 - every endpoint is given one
    """Leave the session alone."""
    return JsonResponse({"n": None})


async def read(request: HttpRequest) -> JsonResponse:
    """Read one key."""
    return JsonResponse({"user_id": await request.session.aget("user_id")})


async def write(request: HttpRequest) -> JsonResponse:
    """Change one key."""
    n = await request.session.aget("n") + 1
    await request.session.aset("n", n)
    return JsonResponse({"n": n})


async def login(request: HttpRequest) -> JsonResponse:
    """Fill an empty session."""
    await request.session.aupdate(fresh())
    return JsonResponse({"n": 0})


urlpatterns = [path("none", none), path("read", read), path("write", write), path("login", login)]


def without(url: str) -> ASGIApp:  # noqa: ARG001 - all rows are made alike
    """Return the application without sessions."""
    return _application()


def in_database(url: str) -> ASGIApp:
    """Return the application with sessions in the database at *url*, on connections of psycopg's pool."""
    database = sa.make_url(url)
    handle = _application("django.contrib.sessions.middleware.SessionMiddleware")
    default = {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": database.host,
        "PORT": database.port,
        "USER": database.username,
        "NAME": database.database,
        "OPTIONS": {"pool": {"min_size": 10, "max_size": 10}},
    }
    # What `settings.DATABASES` would set, had the application without sessions not been configured before.
    connections.settings = connections.configure_settings({"default": default})

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await handle(scope, receive, send)
            return
        await receive()
        await asyncio.to_thread(_migrate)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await asyncio.to_thread(connection.close_pool)
        await send({"type": "lifespan.shutdown.complete"})

    return app


def _migrate() -> None:
    call_command("migrate", verbosity=0)
    connection.close()


def _application(*middleware: str) -> ASGIApp:
    if not settings.configured:
        settings.configure(
            SECRET_KEY=KEY, ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, INSTALLED_APPS=["django.contrib.sessions"]
        )
        django.setup()
    # Read once, when a handler is made.
    settings.MIDDLEWARE = list(middleware)
    handler: ASGIApp = get_asgi_application()
    return handler
