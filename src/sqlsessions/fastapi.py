"""Dependencies for FastAPI: the session, and the user it is bound to, both shown in OpenAPI as a cookie scheme."""

from typing import Annotated

from fastapi import Depends, HTTPException, Security
from fastapi.security import APIKeyCookie
from starlette.requests import HTTPConnection

from sqlsessions.middleware import load_session
from sqlsessions.session import Session


class SessionCookie(APIKeyCookie):
    """The security scheme in OpenAPI, for a session cookie named *name*. It reads nothing: the middleware has, with a
    bounded parser.
    """

    def __init__(self, name: str = "__Host-session") -> None:
        super().__init__(name=name, scheme_name="session", description="Server-side session", auto_error=False)

    async def __call__(self, connection: HTTPConnection) -> None:
        """Do nothing."""


_scheme = SessionCookie()


async def current_session(connection: HTTPConnection, _: Annotated[None, Security(_scheme)]) -> Session:
    """Return the request's session, loading it first if need be."""
    return await load_session(connection)


async def current_user_id(session: Annotated[Session, Depends(current_session)]) -> str:
    """Return the user the session is bound to; 401 for an anonymous one."""
    if session.user_id is None:
        raise HTTPException(status_code=401, detail="Not logged in", headers={"WWW-Authenticate": "Session"})
    return session.user_id


#: ``session: CurrentSession`` in a route: the loaded session, also with ``autoload_cookie=False``.
CurrentSession = Annotated[Session, Depends(current_session)]

#: ``user_id: CurrentUserId`` in a route: the user's id as str, or the request is answered with 401.
CurrentUserId = Annotated[str, Depends(current_user_id)]
