"""What the middleware does around a handler: load before it, commit after it.

    cookie values ── open ──▶ Visit      the signature is checked; a forged cookie ends here, before any SQL
    Visit ── load ──▶ Session            one SELECT; what is not there, has expired, was superseded or is corrupt makes
                                         an anonymous session and an event
    handler                              reads and writes the dict, marks login(), renew(), revoke()
    Visit ── commit ──▶ CookieChange     `decide` names the one action owed; a compare-and-swap carries it out

`decide` is the decision table: a pure function of what is known, with a test for every row.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum, auto
from typing import Any, Literal, NamedTuple, assert_never
from uuid import UUID
from weakref import WeakValueDictionary, ref

from sqlsessions.backends.base import Backend, UserSessions, detached
from sqlsessions.credentials import CookieSigner, Credential, new_id, new_secret, proves
from sqlsessions.errands import Commit, Work, drain
from sqlsessions.errors import (
    BackendError,
    BackendTimeout,
    BackendUnavailable,
    ConfigurationError,
    CorruptData,
    DuplicateId,
    HeadersSent,
    InvalidData,
    SessionConflict,
    SessionGone,
    SessionNotLoaded,
)
from sqlsessions.events import Complaints, Event, EventHook, EventKind, emitter
from sqlsessions.payload import Limits, changed_keys, decode, encode, merge
from sqlsessions.record import Expected, Record, Timeouts, principal, utc_now
from sqlsessions.session import UNMARKED, Change, Marks, Session

UserKey = str | Callable[[Mapping[str, Any]], str | int | None] | None
OnUnavailable = Literal["raise", "anonymous"]

#: Tries of one commit. In one process writers of a session queue, so only other processes can make one lose; each
#: loss has a winner.
_TRIES = 30


class Action(Enum):
    """What a commit owes the database and the browser."""

    NOTHING = auto()
    INSERT = auto()
    UPDATE = auto()
    #: An update that also changes the secret.
    RENEW = auto()
    #: Delete by id, whatever has become of the row.
    DELETE = auto()
    DELETE_THEN_INSERT = auto()
    #: Delete if nobody has written meanwhile.
    DELETE_UNCHANGED = auto()
    #: Another user: delete if nobody has written meanwhile, then insert what this request has set.
    SWITCH_USER = auto()
    TOUCH = auto()


class Facts(NamedTuple):
    """What is known when a commit is decided."""

    #: A live row was loaded.
    stored: bool
    #: The row turned out gone or superseded earlier in this request.
    gone: bool = False
    #: The handler called clear() or revoke().
    ended: bool = False
    #: The response is a 5xx, or the application raised.
    failed: bool = False
    #: There is neither data nor a user.
    empty: bool = False
    changed: bool = False
    #: The user is another than the stored one, who was somebody too.
    switched: bool = False
    #: login(), renew(), or the user was bound or unbound.
    renewed: bool = False
    #: set_timeouts() or persistent.
    settings: bool = False
    touch_due: bool = False


def decide(facts: Facts) -> Action:  # noqa: PLR0911 - a row of the table each
    """Return the one action owed. The decision table; pure and total."""
    if facts.failed:
        return Action.DELETE if facts.stored and facts.ended else Action.NOTHING
    if not facts.stored:
        return Action.NOTHING if facts.empty or (facts.gone and not facts.ended) else Action.INSERT
    if facts.ended:
        return Action.DELETE if facts.empty else Action.DELETE_THEN_INSERT
    if facts.empty and facts.changed:
        return Action.DELETE_UNCHANGED
    if facts.switched:
        return Action.SWITCH_USER
    if facts.renewed:
        return Action.RENEW
    if facts.changed or facts.settings:
        return Action.UPDATE
    return Action.TOUCH if facts.touch_due else Action.NOTHING


#: The action for a row that is at most changed, or due for a touch.
_PLAIN = {
    (changed, due): decide(Facts(stored=True, changed=changed, touch_due=due))
    for changed in (False, True)
    for due in (False, True)
}

#: What a backend is asked for.
_OPERATIONS = [name for name in vars(Backend) if not name.startswith("_")]

#: How a row shows that nobody here has written it: by data that does not decode, or a timeout beyond any calendar.
_CORRUPT = (CorruptData, OverflowError)

#: Actions that are worth nothing without a cookie.
_NEED_COOKIE = frozenset({Action.INSERT, Action.RENEW, Action.DELETE_THEN_INSERT, Action.SWITCH_USER})


@dataclass(frozen=True, slots=True)
class CookieChange:
    """What the browser has to be told: a new *value* for *max_age* seconds or until it closes, or with None to forget
    the cookie.
    """

    value: str | None
    max_age: int | None = None

    def __repr__(self) -> str:
        return f"<CookieChange {'expire' if self.value is None else 'set'}>"


class SessionManager:
    """Loads and commits sessions of one cookie against one backend."""

    def __init__(
        self,
        *,
        backend: Backend,
        signer: CookieSigner,
        timeouts: Timeouts,
        limits: Limits,
        user_key: UserKey = "user_id",
        persistent: bool = False,
        max_sessions_per_user: int | None = None,
        on_unavailable: OnUnavailable = "raise",
        on_event: EventHook | None = None,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        if missing := [name for name in _OPERATIONS if not callable(getattr(backend, name, None))]:
            raise ConfigurationError(
                f"backend must be a Backend such as SQLAlchemyBackend(url); {type(backend).__name__} lacks "
                + ", ".join(missing)
            )
        if not (user_key is None or isinstance(user_key, str) or callable(user_key)):
            raise ConfigurationError(f"user_key must be a key, a function of the data, or None, not {user_key!r:.80}")
        if max_sessions_per_user is not None and max_sessions_per_user < 1:
            raise ConfigurationError(f"max_sessions_per_user must be at least 1, not {max_sessions_per_user!r}")
        if max_sessions_per_user is not None and not isinstance(backend, UserSessions):
            raise ConfigurationError(
                f"max_sessions_per_user needs a backend that finds sessions by their user; {type(backend).__name__} "
                "lacks methods of UserSessions"
            )
        self.max_sessions_per_user = max_sessions_per_user
        self.backend = backend
        self.signer = signer
        self.timeouts = timeouts
        self.limits = limits
        self.user_key = user_key
        self.persistent = persistent
        self.on_unavailable = on_unavailable
        self.emit = emitter(on_event)
        self.complaints = Complaints(backend)
        self.clock = clock
        self.turns = _Turns()
        #: Those under way.
        self._commits: set[Commit] = set()
        self._apart = not detached(backend)

    def open(
        self, values: Sequence[bytes] | None, *, client: Callable[[], str | None] = lambda: None
    ) -> tuple["Visit", Session]:
        """Return the visit of a request that sent these cookie *values*, or with None too many, and its session, which
        is the caller's to keep; verifies them and does no I/O.

        Two genuine but different ones are both refused: which of them wins must not depend on their order (RFC
        6265bis §4.2.2).
        """
        if values is None:
            self.emit(Event("too_many_cookies"))
            return self._visit(None, stale_key=False, client=client)
        found = list(filter(None, map(self.signer.unsign, values)))
        if len(found) > 1:
            found = list(dict(found).items())
        if len(found) == 1:
            credential, stale_key = found[0]
            return self._visit(credential, stale_key=stale_key, client=client)
        if values:
            self.emit(Event("duplicate_cookie" if found else "bad_signature"))
        return self._visit(None, stale_key=False, client=client)

    def _visit(
        self, credential: Credential | None, *, stale_key: bool, client: Callable[[], str | None]
    ) -> tuple["Visit", Session]:
        visit = Visit(self, credential, stale_key=stale_key, client=client)
        session = Session(visit)
        visit.attach(session)
        return visit, session

    def commit(self, work: Work, session: Session, *, failed: Callable[[Exception], None]) -> Commit:
        """Return what does *work* on *session* when it is awaited: whole, even if a client disconnects meanwhile."""
        return Commit(work, session, self._commits, failed, apart=self._apart)

    async def drain(self) -> None:
        """Wait for the commits whose callers have gone."""
        await drain(self._commits)


class Visit:
    """One request's dealings with its session: what was loaded, what is owed. The session's `SessionOps`."""

    # What a visit begins with stands in the class, and costs none of them anything.

    _loaded = False
    #: How often the session had been written, and its marks, when a handler was last told that it is gone; else None.
    _gone: tuple[int, Marks] | None = None
    _failure: BackendError | None = None
    #: When a touch was last tried, done or not.
    _touched_at: datetime | None = None
    #: The latest commit, perhaps under way still.
    _commit: Commit | None = None
    #: Whether the row is bound to the user that its data names, by the settings of now.
    _names_its_user = True
    #: The session's items when they were last the row's: the very objects; and how often it had been written then.
    _as_stored: dict[str, Any] | None = None
    _written = 0
    #: The stored row, as last loaded or committed.
    record: Record | None = None
    #: Set by the middleware when a cookie can no longer be sent.
    headers_sent = False
    #: What the handler was last told instead of being served: an outage, a conflict, a session that is gone.
    refusal: BackendError | SessionConflict | SessionGone | None = None
    #: What the response must tell the browser; later commits replace it.
    cookie: CookieChange | None = None
    #: Whether the application has ended, so that whoever calls it again begins anew.
    over = False

    _session: Callable[[], Session | None]

    def __init__(
        self,
        manager: SessionManager,
        credential: Credential | None,
        *,
        stale_key: bool,
        client: Callable[[], str | None],
    ) -> None:
        self._manager = manager
        self._credential = credential
        self._stale_key = stale_key
        self._client = client
        self._presented = credential is not None

    def attach(self, session: Session) -> None:
        """Serve *session*, without keeping it: a cycle of the two would leave the data of every request, a cart of
        twenty objects, to the garbage collector.
        """
        self._session = ref(session)

    @property
    def session(self) -> Session:
        """The session, which the request keeps, or a commit that outlives it."""
        session = self._session()
        assert session is not None  # noqa: S101
        return session

    @property
    def backend(self) -> Backend:
        """Where its record is kept."""
        return self._manager.backend

    @property
    def user_key(self) -> str | None:
        """The top-level key that holds the user, if it is a key."""
        key = self._manager.user_key
        return key if isinstance(key, str) else None

    @property
    def persistent_by_default(self) -> bool:
        """Whether the cookie of a session that does not say so outlives the browser."""
        return self._manager.persistent

    def now(self) -> datetime:
        """Return the instant that the manager's clock shows."""
        return self._manager.clock()

    def check_usable(self) -> None:
        """Raise `SessionNotLoaded`, or again the error with which loading failed."""
        if not self._loaded:
            raise SessionNotLoaded(
                "the session has not been loaded: await load_session(request), or depend on CurrentSession "
                "(autoload_cookie=False, or the path is in skip)"
            )
        if self._failure is not None and self._manager.on_unavailable == "raise":
            self.refusal = self._failure.with_traceback(None)
            raise self.refusal

    def user_of(self, data: Mapping[str, Any]) -> str | None:
        """Return the user *data* is bound to. Raises `InvalidData` for what cannot be a user id."""
        return self._user_of(data, self.session.marks)

    def _user_of(self, data: Mapping[str, Any], marks: Marks) -> str | None:
        login = marks.login
        if self._manager.user_key is None:
            return login or (None if marks.ended or self.record is None else self.record.user_id)
        found = self._user_in(data)
        if login is not None and found != login:
            raise InvalidData(
                "login() was called for one user, but user_key finds another in the data: set both to the same"
            )
        return found

    def _user_in(self, data: Mapping[str, Any]) -> str | None:
        key = self._manager.user_key
        if callable(key):
            return principal(key(dict(data))) if data else None  # who looks for a key there would not find it
        return None if key is None else principal(data.get(key))

    def differs(self, data: Mapping[str, Any]) -> bool:
        """Tell whether *data* is other than what is stored."""
        return bool(changed_keys(decode(self.record.data) if self.record else {}, data))

    async def load(self) -> Session:
        """Return the session, loaded: one SELECT if the cookie was genuine, nothing if it is loaded already.

        Never raises for a sick backend: the error is kept and raised by the first access, so that routes which do not
        use the session work. Asked again, it tries again, unless the first try has cost the request a deadline (R73).
        """
        session = self.session
        if self._loaded and not self._worth_another_try(session):
            return session
        failure: BackendError | None = None
        credential, refusal = self._credential, None
        if credential is not None:
            now = self._manager.clock()
            try:
                record = await self._manager.backend.load(credential.id, now)
                if self._loaded and not self._worth_another_try(session):
                    return session  # by another task of the same request, which may have gone on to change it
                refusal = self._take(record, credential, session, now)
            except _CORRUPT:
                refusal = "corrupt"
            except BackendError as error:
                self._complain(error)
                if self._loaded and not self._worth_another_try(session):
                    return session
                failure = error
        self._failure = failure
        if refusal is not None:
            self._emit(refusal)
            # Not adopted: a client does not choose an id (R2).
            self._credential = None
        self._loaded = True
        return session

    def _worth_another_try(self, session: Session) -> bool:
        """Tell whether a load that failed may be tried again: what was written or asked for since would be lost."""
        failure = self._failure
        if failure is None or isinstance(failure, BackendTimeout):
            return False
        return session.written == self._written and session.marks is UNMARKED

    async def save(self) -> None:
        """Commit now. Raises `SessionGone` if the session has ended."""
        self._check_there()
        await self.commit()
        self._check_there()

    async def reload(self) -> None:
        """Read again and drop what was not committed."""
        await self._previous()
        self._check_there(ended=False)
        session = self.session
        session.marks, session.assigned = UNMARKED, None
        if self.record is None:
            dict.clear(session)
            if self._failure is not None:
                self._loaded = False
                await self.load()
        else:
            # Dropped at once: what is set until the row has come is on top of that.
            self._put(decode(self.record.data))
            await self._whole(self._rebase(), session)

    async def atomic(self, change: Change) -> dict[str, Any]:
        """Apply *change* to what is stored and commit it; see `Session.atomic`."""
        session = self.session
        if session.marks.ended:
            await self.commit()
        await self._previous()
        self._check_writable()
        self._check_there(ended=False)
        if self.record is None and session.marks.ended:  # there was nothing to end
            session.marks = session.marks._replace(ended=0)
        result: dict[str, Any] = {}

        async def apply() -> None:
            result.update(await (self._begin_with(change) if self.record is None else self._swap_in(change)))

        await self._whole(apply(), session)
        return result

    async def commit(self, *, failed: bool = False) -> None:
        """Write what this request owes; see `owed`."""
        commit = self.owed(self.session, failed=failed)
        if commit is not None:
            await commit

    def owed(
        self, session: Session, *, failed: bool = False, may_touch: Callable[[], bool] = lambda: True
    ) -> Commit | None:
        """Return what writes, when it is awaited, what this request owes, and sets `cookie`; None if that is nothing.
        With *failed* (a 5xx, an exception) only a session that was to end is ended.

        It raises `SessionGone` when the session ended meanwhile and a change was dropped, `SessionConflict`,
        `HeadersSent`, `InvalidData` or `BackendError`; nothing was written then, but for what had to be deleted.
        """
        previous = None if self._commit is None or self._commit.over else self._commit
        if not self._loaded or (self._failure is not None and not session.accessed):
            return None
        # A 5xx, too, waits for what is under way: without the cookie that it may make the browser would be nobody.
        if failed and not session.marks.ended and previous is None:
            return None
        work: Work | None
        if previous is not None:
            # As one piece: a logout stays one whose caller is cancelled once more while it waits its turn.
            work = self._follow(previous, session, failed=failed, may_touch=may_touch)
        elif self._nothing_owed(session):
            return None
        else:
            work = self._work(session, failed=failed, may_touch=may_touch)
        return None if work is None else self._whole(work, session)

    async def _follow(self, previous: Commit, session: Session, *, failed: bool, may_touch: Callable[[], bool]) -> None:
        await asyncio.wait({previous.ended()})
        if (work := self._work(session, failed=failed, may_touch=may_touch)) is not None:
            await work

    def _work(self, session: Session, *, failed: bool, may_touch: Callable[[], bool]) -> Work | None:
        """Return the work that is owed now; None if there is none."""
        told = self._gone
        if told and not (failed or session.marks.ended or told == (session.written, session.marks)):
            raise self._lost(session, "gone")  # what was set since
        draft = self._draft(session, failed=failed, may_touch=may_touch)
        # A logout that could not find its session must not look like one that did.
        refused = self._failure is not None and draft.marks.ended and not failed
        if draft.action is Action.NOTHING and not refused:
            return None
        self._check_writable()
        return self._carry_out(draft, session, failed=failed, may_touch=may_touch)

    def _check_there(self, *, ended: bool = True) -> None:
        """Raise `SessionGone` if the session ended while the request ran, unless it was to end here and *ended*."""
        if self._gone and not (ended and self.session.marks.ended):
            raise SessionGone("the session ended while the request ran")

    def _lost(self, session: Session, kind: EventKind) -> SessionGone:
        """Note that the session is gone, and what was set in it with it; return what says so."""
        self._emit(kind)
        self.record = self._credential = self.cookie = None
        self._gone = session.written, session.marks
        return SessionGone("the session ended while the request ran: the change was not stored")

    def _check_writable(self) -> None:
        if self._failure is not None:
            raise BackendUnavailable("the session could not be loaded, so it cannot be written") from self._failure

    async def _previous(self) -> None:
        """Wait for a commit of this very request: one in another task, or one whose caller was cancelled."""
        while self._commit is not None and not self._commit.over:
            await asyncio.wait({self._commit.ended()})

    def _whole(self, work: Work, session: Session) -> Commit:
        """Return what is to be awaited for *work*, which goes on to its end even if the caller is cancelled."""
        self._commit = self._manager.commit(work, session, failed=self._refused)
        return self._commit

    def _nothing_owed(self, session: Session) -> bool:
        """Tell, without encoding anything, whether a commit would do nothing, as most do.

        So it is if no handler has set a key, or had hold of a value that can change.
        """
        if session.written != self._written or session.lent or self._stale_key or session.marks is not UNMARKED:
            return False
        record, stored, manager = self.record, self._as_stored, self._manager
        if record is None or stored is None:
            return record is None and not dict.__len__(session)
        # Past the methods of Session, in case somebody else went past them too.
        if not self._names_its_user or not dict.__eq__(session, stored):
            return False
        if callable(manager.user_key) and session.accessed and self._user_in(stored) != record.user_id:
            return False
        return not (session.accessed and manager.timeouts.touch_due(record, manager.clock()))

    def _passes_on(self, record: Record, data: Mapping[str, Any]) -> bool:
        """Tell whether *data* makes the session of the user of *record* somebody else's."""
        return record.user_id is not None and self.user_of(data) not in (None, record.user_id)

    def _put(self, data: Mapping[str, Any]) -> None:
        """Make *data* the session's, whatever is stored."""
        session = self.session
        dict.clear(session)
        dict.update(session, data)
        session.written += 1

    def _settle(self, draft: "_Draft") -> None:
        """Take what *draft* says for what is stored; a handler may have gone on meanwhile."""
        self._as_stored, self._names_its_user, self._written = draft.data, True, draft.written

    def _fill(self, record: Record, session: Session) -> None:
        """Take *record* for what is stored, and its data for the session's."""
        data = decode(record.data)
        key = self._manager.user_key
        if isinstance(key, str):
            try:
                self._names_its_user = principal(data.get(key)) == record.user_id
            except InvalidData:
                raise CorruptData("stored data holds what cannot be a user id") from None
        self.record, self._as_stored = record, data
        dict.clear(session)
        dict.update(session, data)
        self._written = session.written

    def _take(self, record: Record | None, credential: Credential, session: Session, now: datetime) -> EventKind | None:
        """Take the row as it was loaded for the session; return why it is not this visitor's, if it is not. Raises one
        of `_CORRUPT` for what nobody can read.
        """
        if record is None:
            return "unknown"
        if not proves(credential, record.secret_hash):
            return "superseded"
        if self._manager.timeouts.expired(record, now):
            return "expired"
        self._fill(record, session)
        return None

    def _draft(self, session: Session, *, failed: bool, may_touch: Callable[[], bool]) -> "_Draft":
        """Return what would be written now, and the action owed."""
        record, now, marks = self.record, self._manager.clock(), session.marks
        data = dict(dict.items(session))  # a look that is no access; `dict.copy` would be one
        if record is not None and data and session.accessed and not failed and self._is_plain(data, marks):
            text = encode(data, self._manager.limits, known=record.data, stored=self._as_stored, lent=session.lent)
            other = text != record.data
            action = _PLAIN[other, not other and self._touch_due(session, now) and may_touch()]
            return _Draft(action, text, record.user_id, now, data, session.written, marks)
        quiet = failed or not (session.accessed or self._stale_key)
        user = None if quiet else self._user_of(data, marks)
        empty = user is None and not data
        known = before = None
        if record is not None:
            known, before = record.data, None if marks.ended else record.user_id
        text = ""
        if not quiet and (record is not None or not empty):
            text = encode(data, self._manager.limits, known=known, stored=self._as_stored, lent=session.lent)
        changed = known is not None and not quiet and text != known
        facts = Facts(
            stored=record is not None,
            gone=self._gone is not None,
            ended=bool(marks.ended),
            failed=failed,
            empty=empty,
            changed=changed,
            switched=not quiet and before is not None and user is not None and user != before,
            renewed=not quiet and (user != before or marks.renew or marks.login is not None),
            settings=marks.idle_timeout is not None or marks.persistent is not None,
            # Any change is a sign of use as well.
            touch_due=not changed and self._touch_due(session, now) and may_touch(),
        )
        action = Action.NOTHING if quiet and not failed else decide(facts)
        return _Draft(action, text, user, now, data, session.written, marks)

    def _is_plain(self, data: Mapping[str, Any], marks: Marks) -> bool:
        """Tell whether *data* names the same user as the row, without asking whom, and nothing was asked for."""
        key, stored = self._manager.user_key, self._as_stored
        if marks is not UNMARKED or stored is None or not self._names_its_user:
            return False
        return key is None or (isinstance(key, str) and data.get(key) is stored.get(key))

    def _touch_due(self, session: Session, now: datetime) -> bool:
        """Tell whether the session's use is worth a write. A cookie of an old key is: it is re-issued if the touch
        finds the row. A touch whose cookie can no longer be sent waits for another response, and one that failed for
        another interval.
        """
        record, timeouts = self.record, self._manager.timeouts
        if record is None or (self.headers_sent and (self._stale_key or record.persistent)):
            return False
        if self._touched_at is not None and now - self._touched_at < timeouts.touch_interval(record):
            return False
        return self._stale_key or (session.accessed and timeouts.touch_due(record, now))

    def _refused(self, error: Exception) -> None:
        """Tell of a commit that failed, even if nobody waits for it any more."""
        if isinstance(error, BackendError):
            self._complain(error)
        if isinstance(error, (BackendError, SessionConflict, SessionGone)):
            self.refusal = error

    async def _carry_out(
        self, draft: "_Draft", session: Session, *, failed: bool, may_touch: Callable[[], bool]
    ) -> None:
        """Perform *draft*; whenever another writer was faster, load and merge and decide again."""
        if not await self._performing(draft, session):
            draft = await self._perform_in_turn(session, failed=failed, may_touch=may_touch)
        # The handler may have gone on meanwhile, and asked for more, such as an end: that is still owed.
        if draft.marks is not UNMARKED:
            session.marks = session.marks.since(draft.marks)

    async def _perform_in_turn(self, session: Session, *, failed: bool, may_touch: Callable[[], bool]) -> "_Draft":
        record_id = self.record.id if self.record else None
        async with self._manager.turns.of(record_id):
            for attempt in range(1, _TRIES):
                await self._rebase()
                draft = self._draft(session, failed=failed, may_touch=may_touch)
                if await self._performing(draft, session):
                    return draft
                await _back_off(attempt)
        raise self._conflict()

    def _performing(self, draft: "_Draft", session: Session) -> Coroutine[Any, Any, bool]:  # noqa: PLR0911 - a case for each action
        """Return what carries out the action: with False, if a compare-and-swap found another row than was read."""
        if self.headers_sent and draft.action in _NEED_COOKIE:
            raise HeadersSent(
                "a new session, renew() or login() needs a cookie, but the response headers have been sent"
            )
        match draft.action:
            case Action.UPDATE | Action.RENEW:
                return self._replace(draft)
            case Action.NOTHING:
                return self._do_nothing()
            case Action.TOUCH:
                return self._touch(draft)
            case Action.INSERT:
                return self._insert(draft)
            case Action.DELETE:
                return self._delete()
            case Action.DELETE_THEN_INSERT:
                return self._begin_anew(draft)
            case Action.DELETE_UNCHANGED:
                return self._delete(unchanged_at=draft.now)
            case Action.SWITCH_USER:
                return self._switch_user(draft, session)
        assert_never(draft.action)

    async def _do_nothing(self) -> bool:
        return True

    async def _begin_anew(self, draft: "_Draft") -> bool:
        await self._delete()
        return await self._insert(draft)

    async def _switch_user(self, draft: "_Draft", session: Session) -> bool:
        ours = _assigned(draft.data.items(), session, self.user_key)
        if self._user_of(ours, draft.marks) != draft.user:
            raise InvalidData("user_key finds another user in what this request has set: set all that it looks at")
        text = encode(ours, self._manager.limits)
        if not await self._delete(unchanged_at=draft.now):
            return False
        if session.marks.ended:  # meanwhile: there is nobody to insert
            return True
        self._put(_assigned(dict.items(session), session, self.user_key))
        return await self._insert(draft._replace(data=ours, text=text))

    async def _insert(self, draft: "_Draft") -> bool:
        """Create the row under an id and a secret of our own making; a taken id is not overwritten but left for
        another (R5).
        """
        marks, manager = draft.marks, self._manager
        credential = Credential(new_id(draft.now), new_secret())
        record = Record(
            id=credential.id,
            secret_hash=credential.secret_hash,
            user_id=draft.user,
            data=draft.text,
            version=0,
            created_at=draft.now,
            last_seen_at=draft.now,
            expires_at=draft.now,
            authenticated_at=draft.now if draft.user is not None else None,
            idle_timeout=marks.idle_timeout or None,
            persistent=manager.persistent if marks.persistent is None else marks.persistent,
            client=self._client(),
        )
        record = record._replace(expires_at=manager.timeouts.expires_at(record))
        try:
            await manager.backend.insert(record)
        except DuplicateId:
            credential = Credential(new_id(draft.now), credential.secret)
            record = record._replace(id=credential.id)
            await manager.backend.insert(record)
        self._adopt(record, credential)
        self._settle(draft)
        self._gone = None
        self._emit("created")
        if draft.user is not None:
            self._emit("bound")
            await self._trim(record)
        return True

    async def _replace(self, draft: "_Draft") -> bool:
        """Update the row, with a new secret if that is owed, if it still is the one that was read."""
        before, credential = self._standing()
        renewed = draft.action is Action.RENEW
        fresh = Credential(before.id, new_secret()) if renewed else credential
        record = self._next(before, draft, fresh.secret_hash if renewed else before.secret_hash)
        if not await self._manager.backend.replace(record, _expecting(before, draft.now)):
            return False
        self._adopt(record, fresh, told=renewed or self._to_be_told(before, record))
        self._settle(draft)
        if renewed:
            self._emit("renewed")
        if record.user_id != before.user_id:
            self._emit("unbound" if record.user_id is None else "bound")
            await self._trim(record)
        return True

    async def _trim(self, record: Record) -> None:
        """End the sessions that the user of *record* has too many of. A failure is an event: the login is done, and
        the next one will end them.
        """
        limit, backend = self._manager.max_sessions_per_user, self._manager.backend
        if limit is None or record.user_id is None or not isinstance(backend, UserSessions):
            return
        try:
            ended = await backend.trim_for_user(record.user_id, limit, newest=record.id, now=self._manager.clock())
        except BackendError as error:
            self._complain(error)
            return
        if ended:
            self._manager.emit(Event("revoked", None, record.user_id, count=ended))

    def _next(self, before: Record, draft: "_Draft", secret_hash: bytes) -> Record:
        """Return the row that *draft* makes of *before*.

        ``expires_at`` is indexed: it moves only when a touch is due, so that on PostgreSQL most updates stay heap-only.
        """
        marks, timeouts = draft.marks, self._manager.timeouts
        renewed, timed = draft.action is Action.RENEW, marks.idle_timeout is not None
        record = before.written(draft.text)
        if renewed or marks is not UNMARKED or draft.user != before.user_id:
            record = record._replace(
                secret_hash=secret_hash,
                user_id=draft.user,
                authenticated_at=_authenticated_at(before, draft),
                idle_timeout=marks.idle_timeout or None if timed else before.idle_timeout,
                persistent=before.persistent if marks.persistent is None else marks.persistent,
            )
        if renewed or timed or timeouts.touch_due(before, draft.now):
            record = record._replace(last_seen_at=max(before.last_seen_at, draft.now))
            until = timeouts.expires_at(record)
            # Only an idle timeout of the session's own, or the loss of its user, may shorten what was promised.
            shorter = timed or (draft.user is None and before.user_id is not None)
            record = record._replace(expires_at=until if shorter else max(before.expires_at, until))
        return record

    async def _touch(self, draft: "_Draft") -> bool:
        """Extend the expiry. A failure is an event and nothing more: the response does not depend on it."""
        self._touched_at = draft.now
        before, credential = self._standing()
        until = self._manager.timeouts.expires_at(before._replace(last_seen_at=draft.now))
        try:
            touched = await self._manager.backend.touch(before.id, before.secret_hash, now=draft.now, expires_at=until)
        except BackendError as error:
            self._complain(error)
            return True
        if touched:
            record = before._replace(last_seen_at=draft.now, expires_at=max(before.expires_at, until))
            self._adopt(record, credential, told=self._to_be_told(before, record))
        return True

    async def _delete(self, unchanged_at: datetime | None = None) -> bool:
        """Delete the row; given *unchanged_at*, only if it still is as it was read and had not expired then. There is
        no session any more.
        """
        before, _ = self._standing()
        expected = None if unchanged_at is None else _expecting(before, unchanged_at)
        deleted = await self._manager.backend.delete(before.id, expected)
        if expected is not None and not deleted:
            return False
        if deleted:
            self._emit("revoked")
        self.record = self._credential = None
        # A cookie that this very request would have set is just not sent.
        self.cookie = CookieChange(None) if self._presented else None
        return True

    def _adopt(self, record: Record, credential: Credential, *, told: bool = True) -> None:
        """Take *record* for what is stored now; *told* if the browser must learn of it."""
        if self.record is None or record.data != self.record.data:
            self._as_stored = None
        self.record, self._credential = record, credential
        if told:
            self._stale_key = False
            self.cookie = CookieChange(self._manager.signer.sign(credential), self._max_age(record))

    def _max_age(self, record: Record) -> int | None:
        if not record.persistent:
            return None
        return max(1, -(-(record.expires_at - self._manager.clock()) // timedelta(seconds=1)))

    def _to_be_told(self, before: Record, record: Record) -> bool:
        """Tell whether the browser's copy of the cookie is out of date: its key, or how long it is kept."""
        kept = record.persistent and record.expires_at != before.expires_at
        return self._stale_key or kept or record.persistent != before.persistent

    async def _rebase(self) -> None:
        """Load what is stored now and put this request's changes on top of it, key by key; raise `SessionGone` if it is
        no longer this visitor's, or nobody can read it.
        """
        (before, credential), now, session = self._standing(), self._manager.clock(), self.session
        try:
            record = await self._manager.backend.load(credential.id, now)
            # As they are now: the handler may have gone on while this waited.
            ours = dict(session.items())
            passed_on = self._passes_on(before, ours)
            refusal = self._take(record, credential, session, now)
        except _CORRUPT:
            refusal = "corrupt"
        else:
            if refusal is None:
                if passed_on:
                    self._put(ours)  # and nothing of theirs: it is the former user's (R44)
                else:
                    self._merge(decode(before.data), dict(session.items()), ours)
                return
        raise self._lost(session, refusal if refusal in ("superseded", "corrupt") else "gone")

    def _merge(self, baseline: Mapping[str, Any], theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        """Make *theirs* the session's, with what *ours* changes of the *baseline* on top. Into a session that a handler
        has ended meanwhile, nothing comes back (R28).
        """
        session = self.session
        if session.marks.ended:
            self._put(ours)
            return
        if session.assigned:
            # Of those that theirs takes the place of, the value is not the handler's own any more.
            session.assigned -= changed_keys(baseline, theirs) - changed_keys(baseline, ours)
        self._put(merge(baseline, theirs, ours))

    async def _begin_with(self, change: Change) -> dict[str, Any]:
        """Create the session with what *change* makes of nothing; pending keys follow with the next commit."""
        if self.headers_sent:
            raise HeadersSent("a new session needs a cookie, but the response headers have been sent")
        result = _apply(change, {})
        text = encode(result, self._manager.limits)
        data = decode(text)
        if result:
            now, session = self._manager.clock(), self.session
            user = self._user_in(result)
            await self._insert(_Draft(Action.INSERT, text, user, now, data, session.written, session.marks))
        self._merge({}, data, dict(self.session.items()))
        return result

    async def _swap_in(self, change: Change) -> dict[str, Any]:
        """Commit what *change* makes of the stored data, from the row that was loaded if nobody else is at it."""
        record, _ = self._standing()
        waited = self._manager.turns.taken(record.id)
        async with self._manager.turns.of(record.id):
            for attempt in range(_TRIES):
                if waited or attempt:
                    await self._rebase()
                    await _back_off(attempt)
                result = await self._try_change(change)
                if result is not None:
                    return result
        raise self._conflict()

    async def _try_change(self, change: Change) -> dict[str, Any] | None:
        before, credential = self._standing()
        baseline, now = decode(before.data), self._manager.clock()
        result = _apply(change, decode(before.data))
        if self._user_in(result) != self._user_in(baseline):
            raise InvalidData("atomic() cannot change whose session it is: use login()")
        text = encode(result, self._manager.limits)
        if text != before.data:
            draft = _Draft(Action.UPDATE, text, before.user_id, now, result, self.session.written, UNMARKED)
            record = self._next(before, draft, before.secret_hash)
            if not await self._manager.backend.replace(record, _expecting(before, now)):
                return None
            self._adopt(record, credential, told=self._to_be_told(before, record))
        self._merge(baseline, decode(text), dict(self.session.items()))
        return result

    def _standing(self) -> tuple[Record, Credential]:
        assert self.record is not None  # noqa: S101 - `decide` asks for these only where a row was loaded
        assert self._credential is not None  # noqa: S101
        return self.record, self._credential

    def _conflict(self) -> SessionConflict:
        self._emit("conflict")
        return SessionConflict(f"other writers of this session were faster {_TRIES} times; nothing was stored")

    def _complain(self, error: BackendError) -> None:
        self._manager.complaints.add(error)
        self._emit("unavailable", detail=type(error).__name__)

    def _emit(self, kind: EventKind, *, detail: str | None = None) -> None:
        session_id = self.record.id if self.record else self._credential.id if self._credential else None
        self._manager.emit(Event(kind, session_id, self.record.user_id if self.record else None, detail=detail))


class _Draft(NamedTuple):
    """What a commit is about to write."""

    action: Action
    text: str
    user: str | None
    now: datetime
    #: The items that *text* says, and how often the session had been written then.
    data: dict[str, Any]
    written: int
    #: What the handler had asked for when this was decided.
    marks: Marks


class _Turn:
    """The lock of one session, and how often the database did not answer who held it."""

    __slots__ = ("__weakref__", "lock", "timeouts")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.timeouts = 0


class _Turns:
    """One lock per session of this process: writers that lost a race queue instead of racing on."""

    def __init__(self) -> None:
        self._turns: WeakValueDictionary[tuple[int, UUID | None], _Turn] = WeakValueDictionary()

    def taken(self, session_id: UUID) -> bool:
        """Tell whether somebody has the turn."""
        turn = self._turns.get((id(asyncio.get_running_loop()), session_id))
        return turn is not None and turn.lock.locked()

    @asynccontextmanager
    async def of(self, session_id: UUID | None) -> AsyncIterator[None]:
        """Wait for the turn at *session_id*, in this event loop.

        Raises `BackendTimeout` if the database did not answer somebody who went before: behind a row that is locked,
        each would wait out a deadline of its own, one after the other (R73, R83).
        """
        key = (id(asyncio.get_running_loop()), session_id)
        turn = self._turns.get(key)
        if turn is None:
            turn = self._turns[key] = _Turn()
        before = turn.timeouts
        async with turn.lock:
            if turn.timeouts != before:
                raise BackendTimeout("the database did not answer another request that changes this session")
            try:
                yield
            except BackendTimeout:
                turn.timeouts += 1
                raise


def _assigned(items: Iterable[tuple[str, Any]], session: Session, user_key: str | None) -> dict[str, Any]:
    """Return of *items* what the handler has set itself. What it left as it was, or changed within a value, is the
    former user's (R44).
    """
    keys = {user_key, *(session.assigned or ())}
    return {key: value for key, value in items if key in keys}


def _apply(change: Change, data: dict[str, Any]) -> dict[str, Any]:
    changed = change(data)
    if changed is None:
        return data
    if not isinstance(changed, Mapping):
        raise InvalidData(f"atomic() needs a function that returns a mapping or None, not {type(changed).__name__}")
    return dict(changed)


def _authenticated_at(before: Record, draft: _Draft) -> datetime | None:
    return draft.now if draft.user != before.user_id or draft.marks.login is not None else before.authenticated_at


def _expecting(record: Record, now: datetime) -> Expected:
    return Expected(record.version, record.secret_hash, now, record)


async def _back_off(attempt: int) -> None:
    await asyncio.sleep(random.uniform(0, min(0.001 * 2**attempt, 0.05)))  # noqa: S311 - not a secret
