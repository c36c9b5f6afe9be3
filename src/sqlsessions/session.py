"""What handlers see: a dict of JSON values that knows whose it is. No I/O here: awaited methods go through
`SessionOps`.
"""

from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from copy import deepcopy
from datetime import datetime, timedelta
from typing import Any, NamedTuple, NoReturn, Protocol, Self
from uuid import UUID

from sqlsessions.errors import HeadersSent, InvalidData
from sqlsessions.record import Record, principal

#: Data in, data out: given a fresh copy, it returns the new data, or changes its argument and returns None.
Change = Callable[[dict[str, Any]], Mapping[str, Any] | None]


#: Types of JSON values that cannot change under whoever holds them.
CONSTANT = frozenset({str, int, float, bool, type(None)})


class Marks(NamedTuple):
    """What a handler asked for besides data; carried out at the next commit."""

    #: How often it was to end: once more while a commit is under way is another end.
    ended: int = 0
    renew: bool = False
    #: The user given to ``login()``.
    login: str | None = None
    #: The seconds given to ``set_timeouts()``, 0 for the configured ones; None if it was not called.
    idle_timeout: int | None = None
    persistent: bool | None = None

    def since(self, done: "Marks") -> "Marks":
        """Return what was asked for after *done* had been, which is not asked for any more."""
        defaults = self._field_defaults.items()
        left = self._replace(**{name: none for name, none in defaults if getattr(self, name) == getattr(done, name)})
        return UNMARKED if left == UNMARKED else left


#: Of a session of which nothing was asked.
UNMARKED = Marks()


class SessionOps(Protocol):
    """What a `Session` needs from whoever loads and commits it."""

    @property
    def record(self) -> Record | None:
        """The stored row this session was loaded from or last committed to."""

    @property
    def headers_sent(self) -> bool:
        """Whether it is too late for a cookie."""

    @property
    def user_key(self) -> str | None:
        """The top-level key that holds the user, if it is a key."""

    @property
    def persistent_by_default(self) -> bool:
        """Whether the cookie of a session that does not say so outlives the browser."""

    def now(self) -> datetime:
        """Return the instant that the clock shows."""

    def check_usable(self) -> None:
        """Raise `SessionNotLoaded`, or the error with which loading failed."""

    def user_of(self, data: Mapping[str, Any]) -> str | None:
        """Return the user that *data*, with what was asked for by ``login()``, is bound to."""

    def differs(self, data: Mapping[str, Any]) -> bool:
        """Tell whether *data* is other than what is stored."""

    async def save(self) -> None:
        """Commit now."""

    async def reload(self) -> None:
        """Read again and drop what was not committed."""

    async def atomic(self, change: Change) -> dict[str, Any]:
        """Apply *change* to what is stored."""


class Session(dict[str, Any]):
    """The session of this request: a dict of JSON values, saved when it has changed, nested values included.

    Use it as ``request.session``. Nothing is stored for a session that was never filled.
    """

    __slots__ = ("__weakref__", "_ops", "accessed", "assigned", "lent", "marks", "written")

    def __init__(self, ops: SessionOps) -> None:
        super().__init__()
        self._ops = ops
        #: Whether a handler looked at the session: the response varies by cookie then.
        self.accessed = False
        #: Whether a handler may hold a value that can change without the session noticing: a dict or a list.
        self.lent = False
        #: How often a handler set or deleted keys.
        self.written = 0
        #: The keys that a handler set or deleted, itself and not within their values; None for none.
        self.assigned: set[str] | None = None
        self.marks = UNMARKED

    def __repr__(self) -> str:
        """Show the id only: data stays out of logs."""
        record = self._ops.record
        return f"<Session {record.id if record else 'new'}>"

    @property
    def id(self) -> UUID | None:
        """The public handle of the stored session, safe to log; None until it is stored."""
        record = self._seen()
        return record.id if record else None

    @property
    def user_id(self) -> str | None:
        """The user this session is bound to, as str; None for an anonymous session."""
        self.mark_accessed()
        return self._ops.user_of(self)

    @property
    def is_new(self) -> bool:
        """Whether nothing is stored yet."""
        return self._seen() is None

    @property
    def created_at(self) -> datetime | None:
        """When the session was first stored."""
        record = self._seen()
        return record.created_at if record else None

    @property
    def last_seen_at(self) -> datetime | None:
        """When the session was last used, exact to the touch interval."""
        record = self._seen()
        return record.last_seen_at if record else None

    @property
    def expires_at(self) -> datetime | None:
        """When the session ends if it is not used again."""
        record = self._seen()
        return record.expires_at if record else None

    @property
    def authenticated_at(self) -> datetime | None:
        """When the user was last bound, by ``login()`` or by setting the user key: ask for the password again by
        this.
        """
        record = self._seen()
        return record.authenticated_at if record and record.user_id is not None else None

    def authenticated_within(self, span: timedelta) -> bool:
        """Tell whether the session is bound to a user, and was no longer than *span* ago: ask for the password again
        where it is not (OWASP ASVS 5 §7.5.1, §7.5.3).

        A user bound in this very request was bound just now.
        """
        record, user = self._seen(), self.user_id
        marks = self.marks
        if user is None or record is None or user != record.user_id or marks.login is not None or marks.ended:
            return user is not None
        return record.authenticated_at is not None and self._ops.now() - record.authenticated_at <= span

    @property
    def persistent(self) -> bool:
        """Whether the cookie outlives the browser; set it to True for "remember me"."""
        record = self._seen()
        if self.marks.persistent is not None:
            return self.marks.persistent
        return record.persistent if record and not self.marks.ended else self._ops.persistent_by_default

    @persistent.setter
    def persistent(self, value: bool) -> None:
        self._before_cookie("persistent")
        self.marks = self.marks._replace(persistent=bool(value))

    @property
    def modified(self) -> bool:
        """Whether the data differs from what is stored, nested values included."""
        return self.accessed and self._ops.differs(self)

    def mark_accessed(self) -> None:
        """Note that the session is used; Starlette calls it for every ``request.session``.

        Raises `SessionNotLoaded`, or the `BackendError` with which loading failed.
        """
        if not self.accessed:
            self._ops.check_usable()
            self.accessed = True

    def mark_modified(self) -> None:
        """Do what Starlette's does, which is nothing more here: changes are found by comparing."""
        self.mark_accessed()

    def login(self, user_id: str | int) -> None:
        """Bind the session to *user_id* and renew its secret; the absolute timeout starts anew.

        Like setting the user key, but also stamps ``authenticated_at`` when the user is the same (OWASP ASVS 5
        §7.2.4, §7.5.3). From another user nothing is taken over but what this request has set. Raises `InvalidData`
        for anything but a str or int of 1 to 255 characters.
        """
        user = principal(user_id)
        if user is None:
            raise InvalidData("login() needs a user: clear() ends a session, and deleting the user key unbinds it")
        self._before_cookie("login()")
        self.marks = self.marks._replace(login=user)
        if self._ops.user_key is not None:
            super().__setitem__(self._ops.user_key, user_id)

    def renew(self) -> None:
        """Give the session a new secret and cookie; id and data stay, and the old cookie is dead once this request
        commits.
        """
        self._before_cookie("renew()")
        self.marks = self.marks._replace(renew=True)

    def revoke(self) -> None:
        """End the session: the row is deleted even if the response turns out a failure. Keys set afterwards begin a
        new session.
        """
        self.mark_accessed()
        self.marks = Marks(ended=self.marks.ended + 1)
        super().clear()

    def clear(self) -> None:
        """End the session, as ``revoke()``; to empty one and keep it, delete its keys."""
        self.revoke()

    def set_timeouts(self, *, idle: timedelta | None) -> None:
        """Give this session an idle timeout of its own, in whole seconds, or with None the configured one again."""
        self._before_write()
        if idle is not None and not timedelta(seconds=1) <= idle <= timedelta(days=20_000):
            raise InvalidData(f"the idle timeout must be from one second to 20,000 days, not {idle!r}")
        self.marks = self.marks._replace(idle_timeout=0 if idle is None else int(idle.total_seconds()))

    async def save(self) -> None:
        """Commit now what would otherwise be committed with the response; after the headers the way to commit before
        the end.

        Raises `SessionGone` if the session ended meanwhile, `SessionConflict`, `HeadersSent`, `InvalidData` or
        `BackendError`.
        """
        self.mark_accessed()
        await self._ops.save()

    async def reload(self) -> None:
        """Read the stored data again and drop what was not committed. Raises `SessionGone` if the session has ended."""
        self.mark_accessed()
        await self._ops.reload()

    async def atomic(self, change: Change) -> dict[str, Any]:
        """Apply *change* to the stored data, commit it at once, and return the result: no parallel update is lost.

        *change* gets a fresh copy without this request's uncommitted changes; it may run several times, so it should
        do nothing else. What it committed stays, also on a 5xx; uncommitted changes are kept on top. Raises
        `SessionGone` and `SessionConflict`.
        """
        self.mark_accessed()
        return await self._ops.atomic(change)

    def __getitem__(self, key: str) -> Any:
        self.mark_accessed()
        return self._lend(super().__getitem__(key))

    def __contains__(self, key: object) -> bool:
        self.mark_accessed()
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self.mark_accessed()
        return super().__iter__()

    def __reversed__(self) -> Iterator[str]:
        self.mark_accessed()
        return super().__reversed__()

    def __len__(self) -> int:
        self.mark_accessed()
        return super().__len__()

    def __eq__(self, other: object) -> bool:
        self.mark_accessed()
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        self.mark_accessed()
        return super().__ne__(other)

    __hash__ = None  # as dict's, which defining __eq__ does not inherit

    def __or__(self, other: Mapping[str, Any], /) -> dict[str, Any]:  # type: ignore[override]
        self.mark_accessed()
        return dict(self) | dict(other)

    def __ror__(self, other: Mapping[str, Any], /) -> dict[str, Any]:  # type: ignore[override]
        self.mark_accessed()
        return dict(other) | dict(self)

    def get(self, key: str, default: Any = None, /) -> Any:
        """Return the value of *key*, else *default*."""
        self.mark_accessed()
        return self._lend(super().get(key, default))

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        """Return a view of the keys."""
        self.mark_accessed()
        return super().keys()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        """Return a view of the values."""
        self.mark_accessed()
        self.lent = True
        return super().values()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        """Return a view of the items."""
        self.mark_accessed()
        self.lent = True
        return super().items()

    def copy(self) -> dict[str, Any]:
        """Return a plain dict of the items."""
        return dict(self.items())

    def __copy__(self) -> dict[str, Any]:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return deepcopy(self.copy(), memo)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Session belongs to its request: pickle dict(session) instead")

    def __setitem__(self, key: str, value: Any) -> None:
        self._before_write(key)
        super().__setitem__(key, self._lend(value))

    def __delitem__(self, key: str) -> None:
        self._before_write(key)
        super().__delitem__(key)

    def __ior__(self, other: Any, /) -> Self:  # type: ignore[override,misc]
        self.update(other)
        return self

    def pop(self, key: str, /, *default: Any) -> Any:
        """Remove *key* and return its value, else *default*."""
        if key in self:
            self._before_write(key)
        return super().pop(key, *default)

    def popitem(self) -> tuple[str, Any]:
        """Remove and return the item set last."""
        if self:
            self._before_write(next(reversed(self)))
        return super().popitem()

    def setdefault(self, key: str, default: Any = None, /) -> Any:
        """Return the value of *key*, which is set to *default* if absent."""
        if key not in self:
            self._before_write(key)
        return self._lend(super().setdefault(key, default))

    def update(self, *others: Any, **items: Any) -> None:
        """Set several keys; all or, when it is too late for a cookie that they would need, none."""
        changes: dict[str, Any] = {}
        changes.update(*others, **items)
        self._before_write(*changes)
        self.lent = True
        super().update(changes)

    def _lend(self, value: Any) -> Any:
        if type(value) not in CONSTANT:
            self.lent = True
        return value

    def _seen(self) -> Record | None:
        self.mark_accessed()
        return self._ops.record

    def _before_write(self, *keys: str) -> None:
        """Refuse at once what would need a cookie that can no longer be sent."""
        self.mark_accessed()
        self.written += 1
        if self.assigned is None:
            self.assigned = set()
        self.assigned.update(keys)
        if not self._ops.headers_sent:
            return
        if self._ops.record is None or self.marks.ended:
            raise _too_late("a new session")
        if self._ops.user_key in keys:
            raise _too_late("binding a session to a user")

    def _before_cookie(self, what: str) -> None:
        self.mark_accessed()
        if self._ops.headers_sent:
            raise _too_late(what)


def _too_late(what: str) -> HeadersSent:
    return HeadersSent(
        f"{what} needs a cookie, but the response headers have been sent: do it before the response starts"
    )
