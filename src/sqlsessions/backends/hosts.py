"""Connecting to the first of several PostgreSQL servers that will do, though one before it may hang.

asyncpg's own timeout is for all hosts together: behind one that accepts connections and never answers, as a frozen
primary does, the next is never asked.
"""

from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncpg


def connector(deadline: float) -> "Callable[..., Coroutine[Any, Any, asyncpg.Connection]]":
    """Return a function like `asyncpg.connect` that asks one host after the other, each for a share of *deadline*.

    The shares leave one for the statement. A single host has all the time that its arguments give it.
    """
    import asyncpg  # noqa: PLC0415 - for PostgreSQL only, as SQLAlchemy does: it takes 20 ms

    #: What is wrong with one host and may be right with the next; the same as asyncpg's own, and silence.
    next_one = (OSError, asyncpg.CannotConnectNowError, asyncpg.TargetServerAttributeNotMatched)

    async def connect(*arguments: Any, host: Any = None, port: Any = None, **options: Any) -> asyncpg.Connection:
        # Which of several standbys is preferred, only asyncpg can tell: by asking all of them.
        if _single(host) or options.get("target_session_attrs") == "prefer-standby":
            return await asyncpg.connect(*arguments, host=host, port=port, **options)
        ports = [port] * len(host) if _single(port) else port
        options["timeout"] = min(options.get("timeout") or deadline, deadline / (len(host) + 1))
        for each, its_port in zip(host[:-1], ports, strict=False):
            try:
                return await asyncpg.connect(*arguments, host=each, port=its_port, **options)
            except next_one:
                continue
        return await asyncpg.connect(*arguments, host=host[-1], port=ports[-1], **options)

    return connect


def _single(value: str | int | Sequence[Any] | None) -> bool:
    return not isinstance(value, (list, tuple)) or len(value) == 1
