"""Every exception this library raises, and when.

None derives from Starlette's ``HTTPException``: the framework would turn such an error into a response *inside* the
middleware, after the session's own answer has been decided.
"""


class SessionError(Exception):
    """Raised when something about a session is wrong; the base of every error here."""


class ConfigurationError(SessionError, ValueError):
    """Raised at construction when a setting is unsafe or contradicts another; the message names the setting and the
    remedy.
    """


class InvalidData(SessionError, ValueError):
    """Raised when session data cannot be stored unchanged on every database; the message names the path of the
    value.
    """


class CorruptData(SessionError):
    """Raised when stored data cannot be decoded; a request sees an anonymous session and an event instead."""


class SessionNotLoaded(SessionError, RuntimeError):
    """Raised when a session is used before it was loaded.

    Happens with ``autoload_cookie=False`` and on paths in ``skip``: await ``load_session(request)`` first, or depend on
    ``CurrentSession``.
    """


class HeadersSent(SessionError, RuntimeError):
    """Raised when a change would need a cookie but the response headers have already left.

    A new session, ``renew()`` and ``login()`` must happen before the first byte of a streaming body, the acceptance
    of a WebSocket, or a background task.
    """


class SessionGone(SessionError):
    """Raised when the session ended while the request ran: revoked, purged, expired, or its secret was renewed
    elsewhere.

    The change was not stored. Answered as 409 with ``on_gone="raise"``; by default the change is dropped and an event
    tells so.
    """


class SessionConflict(SessionError):
    """Raised when parallel writers kept winning; nothing of this request was stored. Answered as 503."""


class BackendError(SessionError):
    """Raised when the backend is sick; absence of a session is never an error. Answered as 503 with ``Retry-After``."""


class DuplicateId(BackendError):
    """Raised by ``insert`` when the id is taken; nothing was overwritten."""


class BackendUnavailable(BackendError):
    """Raised when the database cannot be reached, refuses connections or has no capacity left."""


class BackendTimeout(BackendUnavailable):
    """Raised when the database did not answer within the deadline; the statement may still take effect."""


class BackendReadOnly(BackendError):
    """Raised when the database accepts reads only: a standby, a demoted primary, a read-only file, a full disk."""


class SchemaMissing(BackendError):
    """Raised when the session table is absent or behind: run ``alembic upgrade head`` or ``sqlsessions migrate``."""
