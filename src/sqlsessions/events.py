"""What happened to a session, told to the application's ``on_event``: for audit logs and metrics (OWASP, logging
session life cycles). And what ails a backend, told to the log.
"""

import inspect
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

from sqlsessions.errors import ConfigurationError, SessionError

logger = logging.getLogger("sqlsessions")

EventKind = Literal[
    "created",
    "bound",
    "unbound",
    "renewed",
    "revoked",
    "expired",
    "unknown",
    "gone",
    "superseded",
    "conflict",
    "corrupt",
    "bad_signature",
    "duplicate_cookie",
    "too_many_cookies",
    "unavailable",
    "purged",
]


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. Carries handles only: never a secret, a cookie value or data.

    *kind*: what it was. ``unknown``: a genuine cookie whose session is not there: revoked, expired or purged.
    ``expired``: it is there, but the timeouts have been shortened since. ``gone``: it ended while the request ran, and
    a change was dropped. ``superseded``: the secret has been renewed since. ``unavailable``: the backend failed. The
    README explains all of them.

    *session_id*: the handle of the session, if there is one. *user_id*: its user, or None. *count*: how many records,
    for ``purged``, and for ``revoked`` where a user had more than ``max_sessions_per_user``. *detail*: the class of the
    error, for ``unavailable``.
    """

    kind: EventKind
    session_id: UUID | None = None
    user_id: str | None = None
    count: int | None = None
    detail: str | None = None


#: Called with each event, synchronously and within the request: be quick, or hand over to a queue.
EventHook = Callable[[Event], object]


def emitter(hook: EventHook | None) -> EventHook:
    """Return a function that calls *hook*; an error of the hook is logged and never becomes the request's.

    Raises `ConfigurationError` for what cannot be called, or would have to be awaited.
    """
    if hook is None:
        return _nobody
    given: object = hook
    if not callable(given) or inspect.iscoroutinefunction(given):
        raise ConfigurationError(f"on_event must be a function that is called and not awaited, not {hook!r:.80}")

    def emit(event: Event) -> None:
        try:
            hook(event)
        except Exception:
            logger.exception("sqlsessions: on_event failed for %r", event.kind)

    return emit


def _nobody(_: Event) -> None: ...


#: Seconds between two lines of the log about the same kind of error.
_AGAIN = 60


class Complaints:
    """Tells the log what ails a backend: whoever runs the application learns it, whatever the browser is told.

    An outage meets every request, so that of each kind of error the first is told at once, and then one a minute.
    """

    def __init__(self, backend: object, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._backend = backend
        self._clock = clock
        #: When each kind was last told, and how many have come since.
        self._told: dict[type[Exception], tuple[float, int]] = {}

    def add(self, error: Exception) -> None:
        """Tell of *error*, unless its like has been told of within the minute."""
        now = self._clock()
        told, untold = self._told.get(type(error), (now - _AGAIN, 0))
        if now - told < _AGAIN:
            self._told[type(error)] = told, untold + 1
            return
        self._told[type(error)] = now, 0
        more = f" (and {untold:,} times more since the last line about it)" if untold else ""
        logger.error("sqlsessions: %r failed: %s%s", self._backend, described(error), more)


def described(error: Exception) -> str:
    """Return what the log may say of *error*: its class, and the words if they are ours, or by `Backend`'s contract as
    harmless. A driver's message may quote parameters (R107).
    """
    said = str(error) if isinstance(error, SessionError) else ""
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
