"""The yardsticks: FastAPI without sessions, and Starlette's, which are whole in the cookie."""

from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.types import ASGIApp

from benchmarks.endpoints import KEY, application


def without(url: str) -> ASGIApp:  # noqa: ARG001 - all rows are made alike
    """Return the application without sessions."""
    return application()


def signed(url: str) -> ASGIApp:  # noqa: ARG001
    """Return the application with sessions in signed cookies."""
    return application(Middleware(SessionMiddleware, secret_key=KEY))
