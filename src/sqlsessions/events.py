"""What happened to a session, told to the application's ``on_event``: for audit logs and metrics (OWASP, logging
session life cycles).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

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
    """One thing that happened. Carries handles only: never a secret, a cookie value or data."""

    #: ``unknown``: a genuine cookie whose session is not there: revoked, expired or purged. ``expired``: it is there,
    #: but the timeouts have been shortened since. ``gone``: it ended while the request ran, and a change was dropped.
    #: ``superseded``: the secret has been renewed since. ``unavailable``: the backend failed; see ``detail``.
    kind: EventKind
    session_id: UUID | None = None
    user_id: str | None = None
    #: How many records, for ``purged``, and for ``revoked`` where a user had more than ``max_sessions_per_user``.
    count: int | None = None
    #: The class of the error, for ``unavailable``.
    detail: str | None = None


#: Called with each event, synchronously and within the request: be quick, or hand over to a queue.
EventHook = Callable[[Event], object]


def emitter(hook: EventHook | None) -> EventHook:
    """Return a function that calls *hook*; an error of the hook is logged and never becomes the request's."""
    if hook is None:
        return _nobody

    def emit(event: Event) -> None:
        try:
            hook(event)
        except Exception:
            logger.exception("sqlsessions: on_event failed for %r", event.kind)

    return emit


def _nobody(_: Event) -> None: ...
