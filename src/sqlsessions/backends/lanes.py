"""What waits at the same moment goes to the database together.

A request puts its work on a lane and awaits the outcome. A lane with nothing in flight sends what comes in one turn of
the event loop, most often one alone, in the task of the first; what arrives meanwhile is the next load, taken by a task
of the lane's. There are no timers, so a quiet application waits for nothing, and under pressure the loads grow and
share the cost of a round trip and of a commit.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar
from uuid import UUID

from sqlsessions.backends.supervisor import Lease, Supervisor
from sqlsessions.errands import Errand
from sqlsessions.errors import BackendUnavailable

#: Seconds after which a statement is slow: what comes after it no longer waits for it but takes another connection.
PATIENCE = 0.1
#: Work for so many sessions, or of so many characters, makes a full load.
MAX_LOAD = 128
MAX_SIZE = 512 * 1024
#: Seconds until a row that somebody else had locked is tried again.
PAUSE = 0.02


class Work(Protocol):
    """Something to be done to one session."""

    @property
    def id(self) -> UUID:
        """Which session."""

    @property
    def size(self) -> int:
        """How many characters it takes to say, roughly."""


W = TypeVar("W", bound=Work)
W_contra = TypeVar("W_contra", bound=Work, contravariant=True)
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Held(Exception):
    """Somebody else has locked the row: nothing was done, and the work is to be tried again in a moment."""


class Apart(Exception):
    """The load could not do this work, or nobody knows whether it has (*lost*): it is to be done by itself."""

    def __init__(self, *, lost: bool = False) -> None:
        super().__init__()
        self.lost = lost


class Sender(Protocol[W_contra, R_co]):
    """Who does the work of a lane."""

    async def alone(self, lease: Lease, work: W_contra, *, waits: bool, lost: bool) -> R_co:
        """Return the outcome of one piece of work.

        Without *waits* a lock is not waited for but raises `Held`. *lost*: it may have been done already.
        """

    async def together(self, lease: Lease, load: Sequence[W_contra]) -> Sequence[R_co | Exception]:
        """Return the outcome of each, or its error; `Apart` for what has none. Never waits for a lock on a row."""


class _Waiter(Generic[W, R]):
    __slots__ = ("due", "errand", "future", "key", "met_lock", "outcome", "over", "sent", "work")

    outcome: R | BaseException

    def __init__(self, work: W, due: float) -> None:
        self.work = work
        #: Which session: the number of its id, hashed at a third of the price of that. What has none is no UUID, and
        #: the database will say so.
        self.key: object = getattr(work.id, "int", work.id)
        self.due = due
        #: What the waiter waits for: a load of its own, which it takes itself, or a place in somebody's.
        self.errand: Errand | None = None
        self.future: asyncio.Future[R] | None = None
        self.sent = False
        self.met_lock = False
        #: The outcome is known, whether or not anybody waits for it.
        self.over = False


class _Flight(Generic[W, R]):
    """The way of one load, from the wait for a connection to the last outcome."""

    __slots__ = ("load", "since", "slow")

    def __init__(self) -> None:
        #: Taken when there is a connection, so that all that comes until then goes along.
        self.load: list[_Waiter[W, R]] = []
        self.since: float | None = None
        self.slow = False


class Lane(Generic[W, R]):
    """Takes work to its *sender*, no more than *flights* loads of *max_load* at a time, of those that are prompt.

    The work belongs to the lane: cancelling who waits for it cancels nothing. No load has the same session twice,
    unless the lane is *shared*, as that of readers is.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        sender: Sender[W, R],
        *,
        max_load: int = MAX_LOAD,
        flights: int = 1,
        shared: bool = False,
    ) -> None:
        self._supervisor = supervisor
        self._sender = sender
        self._max_load = max_load
        self._flights = flights
        self._shared = shared
        self._waiting: deque[_Waiter[W, R]] = deque()
        #: All whose outcome is not known, in the order they came, which is that of their deadlines.
        self._open: deque[_Waiter[W, R]] = deque()
        #: The sessions of all loads on their way, each in one.
        self._aloft: set[object] = set()
        #: How many loads are on their way that are not slow; how many are.
        self._prompt = 0
        self._slow = 0
        #: Whether the latest that landed had met a lock, or was slow. Then nothing more is sent that waits for one.
        self._wary = False

    async def put(self, work: W) -> R:
        """Return the outcome of *work*; raise `BackendTimeout` when the deadline passes first."""
        supervisor = self._supervisor
        supervisor.accept()
        waiter: _Waiter[W, R] = _Waiter(work, supervisor.loop.time() + supervisor.deadline)
        self._open.append(waiter)
        self._waiting.append(waiter)
        if self._prompt < self._flights:
            if len(self._waiting) == 1 and self._may_go(waiter):
                waiter.errand = self._flight_of_its_own()
                await waiter.errand
                waiter.errand = None
            else:
                self._depart()
        if not waiter.over:
            waiter.future = supervisor.loop.create_future()
            return await waiter.future
        if isinstance(waiter.outcome, BaseException):
            raise waiter.outcome
        return waiter.outcome

    def _flight_of_its_own(self) -> Errand:
        """Return what takes the only one that waits, and all that come at the same moment, in that one's task until it
        leaves.
        """
        self._prompt += 1
        flight: _Flight[W, R] = _Flight()
        return self._supervisor.errand(
            partial(self._fly_last, flight), overdue=partial(self._overdue, flight), ended=partial(self._landed, flight)
        )

    def _depart(self) -> None:
        """Send what waits, unless as much as may be is on its way."""
        if not self._waiting or self._prompt >= self._flights or not any(map(self._may_go, self._waiting)):
            return
        self._prompt += 1
        flight: _Flight[W, R] = _Flight()
        self._supervisor.begin(
            partial(self._fly, flight), overdue=partial(self._overdue, flight), ended=partial(self._landed, flight)
        )

    async def _fly_last(self, flight: _Flight[W, R], lease: Lease) -> None:
        # After those whose turn it is now: else the first of them would go ahead, and all others wait for it.
        await asyncio.sleep(0)
        await self._fly(flight, lease)

    async def _fly(self, flight: _Flight[W, R], lease: Lease) -> None:
        flight.since = lease.begun = self._supervisor.loop.time()
        flight.load = self._take()
        lease.asks = bool(flight.load)
        if len(flight.load) > 1:
            await self._together(lease, flight.load)
        elif flight.load:
            await self._alone(flight.load[0], lease, waits=not (self._slow or self._wary))

    def _may_go(self, waiter: _Waiter[W, R]) -> bool:
        return self._shared or waiter.key not in self._aloft

    def _take(self) -> list[_Waiter[W, R]]:
        """Return the next load: what waits, in its order, as far as it goes together."""
        load: list[_Waiter[W, R]] = []
        left: list[_Waiter[W, R]] = []
        room = MAX_SIZE
        while self._waiting and len(load) < self._max_load:
            waiter = self._waiting.popleft()
            if waiter.over:  # its deadline passed before it was sent
                continue
            if not self._may_go(waiter):
                left.append(waiter)
                continue
            room -= waiter.work.size
            if load and room < 0:
                left.append(waiter)
                break
            if not self._shared:
                self._aloft.add(waiter.key)
            waiter.sent = True
            load.append(waiter)
        self._waiting.extendleft(reversed(left))
        return load

    async def _together(self, lease: Lease, load: list[_Waiter[W, R]]) -> None:
        outcomes = await self._sender.together(lease, [waiter.work for waiter in load])
        for waiter, outcome in zip(load, outcomes, strict=True):
            if isinstance(outcome, Apart):
                self._part(waiter, lost=outcome.lost)
            else:
                self._settle(waiter, outcome)

    async def _alone(self, waiter: _Waiter[W, R], lease: Lease, *, waits: bool, lost: bool = False) -> None:
        try:
            outcome = await self._sender.alone(lease, waiter.work, waits=waits and not waiter.met_lock, lost=lost)
        except Held:
            waiter.met_lock = self._wary = True
            self._supervisor.loop.call_later(PAUSE, self._retry, waiter)
        except Exception as error:  # noqa: BLE001 - its waiter's
            self._settle(waiter, error)
        else:
            self._settle(waiter, outcome)

    def _part(self, waiter: _Waiter[W, R], *, lost: bool) -> None:
        """Have work done by itself that its load could not do."""
        if not waiter.over:
            self._supervisor.begin(
                partial(self._alone, waiter, waits=False, lost=lost), overdue=lambda _: self._expire()
            )

    def _retry(self, waiter: _Waiter[W, R]) -> None:
        self._expire()
        if not waiter.over:
            self._waiting.append(waiter)
            self._depart()

    def _overdue(self, flight: _Flight[W, R], now: float) -> None:
        """See to a flight that is still on its way: what waits does not wait for one that is slow."""
        self._expire()
        if flight.slow or flight.since is None or now - flight.since < PATIENCE:
            return
        flight.slow = self._wary = True
        self._slow += 1
        self._prompt -= 1
        self._depart()

    def _landed(self, flight: _Flight[W, R], error: BaseException | None) -> None:
        if isinstance(error, asyncio.CancelledError):
            error = BackendUnavailable("the event loop is closing")
        if error is not None:
            for waiter in flight.load:
                self._settle(waiter, error)
        while self._open and self._open[0].over:
            self._open.popleft()
        if not self._shared:
            self._aloft.difference_update([waiter.key for waiter in flight.load])
        if flight.slow:
            self._slow -= 1
        else:
            self._prompt -= 1
            self._wary = self._wary and any(waiter.met_lock for waiter in flight.load)
        self._depart()

    def _settle(self, waiter: _Waiter[W, R], outcome: R | BaseException) -> None:
        if waiter.over:
            return
        waiter.over, waiter.outcome = True, outcome
        self._supervisor.settled()
        if waiter.future is None or waiter.future.done():  # not waited for, or no more
            return
        if isinstance(outcome, BaseException):
            waiter.future.set_exception(outcome)
        else:
            waiter.future.set_result(outcome)

    def _expire(self) -> None:
        """Answer those whose deadline has passed; what of their work is under way goes on."""
        now = self._supervisor.loop.time()
        while self._open and (self._open[0].over or self._open[0].due <= now):
            waiter = self._open.popleft()
            if not waiter.over:
                # What waits for one row, which may be locked, says nothing about the database.
                for_one_row = waiter.met_lock or not (waiter.sent or self._may_go(waiter))
                self._settle(waiter, self._supervisor.late(counted=not for_one_row))
                if waiter.errand is not None:
                    waiter.errand.leave()
