"""What waits at the same moment goes to the database together.

A request puts its work on a lane and awaits the outcome. A lane with nothing in flight sends at once, alone; what
arrives meanwhile is the next load. There are no timers, so a quiet application waits for nothing, and under pressure
the loads grow and share the cost of a round trip and of a commit.

Where many come at a time, the first of them does not go ahead: all go that the next turns of the event loop bring. And
a crowd that moves in step is cut in two: as soon as there is `ENOUGH` the load goes, and the rest is the next one. From
then on one half is served by the application while the database serves the other, and neither waits for the other.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Generic, Protocol, TypeVar
from uuid import UUID

from sqlsessions.backends.supervisor import PAUSE, Held, Lease, Supervisor
from sqlsessions.errands import Errand
from sqlsessions.errors import BackendUnavailable

#: Seconds after which a statement is slow: what comes after it no longer waits for it but takes another connection.
PATIENCE = 0.1
#: Work for so many sessions, or of so many characters, makes a full load.
MAX_LOAD = 128
MAX_SIZE = 512 * 1024
#: What a statement costs by itself is a small part of the cost of so many requests; more would save little, and leave
#: the database idle until the last of them has come.
ENOUGH = 16


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
    """Work, and who waits for it."""

    outcome: R | BaseException
    #: What the waiter waits for: a load of its own, which it takes itself, or a place in somebody's.
    errand: Errand | None = None
    future: "asyncio.Future[R] | None" = None
    met_lock = False
    #: It may have been done already, by a try whose answer was lost.
    lost = False
    #: The outcome is known, whether or not anybody waits for it.
    over = False

    def __init__(self, work: W, key: object, due: float) -> None:
        self.work = work
        #: Which session, for a lane in which each may be on its way only once.
        self.key = key
        self.due = due


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

    Where *enough* has come at the same moment, it goes without waiting for more. A load that takes longer than
    *patience* seconds is not prompt. The work belongs to the lane: cancelling who waits for it cancels nothing. No load
    has the same session twice, unless the lane is *shared*, as that of readers is.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        sender: Sender[W, R],
        *,
        max_load: int = MAX_LOAD,
        enough: int = ENOUGH,
        flights: int = 1,
        patience: float = PATIENCE,
        shared: bool = False,
    ) -> None:
        self._supervisor = supervisor
        self._sender = sender
        self._max_load = max_load
        self._enough = min(enough, max_load)
        self._flights = flights
        self._patience = patience
        self._shared = shared
        self._waiting: deque[_Waiter[W, R]] = deque()
        #: The sessions of all loads on their way, each in one; of a shared lane none.
        self._aloft: set[object] = set()
        #: Who will send all that comes in this turn of the event loop: one who waits, or a load that has landed.
        self._gatherer: object = None
        #: Whether the latest load was one alone, and nobody had come meanwhile: then the next is sent at once.
        self._quiet = True
        #: How many loads are on their way that are not slow; how many are.
        self._prompt = 0
        self._slow = 0
        #: Whether the latest that landed had met a lock, or was slow. Then nothing more is sent that waits for one.
        self._wary = False
        self._departing = False

    async def put(self, work: W) -> R:
        """Return the outcome of *work*; raise `BackendTimeout` when the deadline passes first."""
        supervisor = self._supervisor
        # Of an id its number, hashed at a third of its price.
        key = None if self._shared else work.id.int
        supervisor.accept()
        waiter: _Waiter[W, R] = _Waiter(work, key, supervisor.loop.time() + supervisor.deadline)
        self._waiting.append(waiter)
        if self._prompt < self._flights and key not in self._aloft:
            if self._quiet or len(self._waiting) >= self._enough:
                await self._take_off(waiter)
            elif self._gatherer is None:
                await self._gather(waiter)
        if not waiter.over:
            waiter.future = supervisor.loop.create_future()
            return await waiter.future
        if isinstance(waiter.outcome, BaseException):
            raise waiter.outcome
        return waiter.outcome

    async def _gather(self, waiter: _Waiter[W, R]) -> None:
        """Send what waits once a turn of the event loop brings no more: else the first of a crowd would go ahead, and
        all others wait for it.
        """
        self._gatherer = waiter
        seen = 0
        while self._gatherer is waiter and seen < len(self._waiting) < self._enough:
            seen = len(self._waiting)
            try:
                await asyncio.sleep(0)
            except BaseException as error:
                if self._gatherer is waiter:
                    self._gatherer = None
                    if isinstance(error, asyncio.CancelledError):  # else there is no event loop any more
                        self._depart()
                raise
        if self._gatherer is waiter:
            self._gatherer = None
            if self._prompt < self._flights:
                await self._take_off(waiter)

    def _muster(self, gatherer: object, seen: int) -> None:
        """Do as `_gather` does, for those who wait for somebody else's load to land."""
        if self._gatherer is not gatherer:
            return
        if seen < len(self._waiting) < self._enough:
            self._supervisor.loop.call_soon(self._muster, gatherer, len(self._waiting))
            return
        self._gatherer = None
        self._depart()

    async def _take_off(self, waiter: _Waiter[W, R]) -> None:
        """Send what waits, in the task of *waiter*: for one that meets nobody, a task costs more than all the rest."""
        self._gatherer = None
        waiter.errand = self._new_flight()
        # What fails is told to those on board, of whom the waiter need not be one.
        with suppress(Exception):
            await waiter.errand
        waiter.errand = None

    def _depart(self) -> None:
        """Send what waits, unless as much as may be is on its way."""
        if self._departing:  # whoever is at it goes on
            return
        self._departing = True
        try:
            while self._waiting and self._prompt < self._flights and any(map(self._may_go, self._waiting)):
                self._new_flight().begin()
        finally:
            self._departing = False

    def _new_flight(self) -> Errand:
        """Return what takes a load: all that waits when there is a connection."""
        self._prompt += 1
        flight: _Flight[W, R] = _Flight()
        return self._supervisor.errand(
            partial(self._fly, flight), overdue=partial(self._overdue, flight), ended=partial(self._landed, flight)
        )

    async def _fly(self, flight: _Flight[W, R], lease: Lease) -> None:
        flight.since = lease.begun = self._supervisor.loop.time()
        load = flight.load = self._take()
        if len(load) > 1:
            await self._together(load, lease)
        elif load:
            # In the only connection that there is everybody would wait for the lock.
            await self._alone(load[0], lease, waits=not (self._slow or self._wary or self._supervisor.slots == 1))
        else:
            lease.asks = False

    def _may_go(self, waiter: _Waiter[W, R]) -> bool:
        return waiter.key not in self._aloft

    def _take(self) -> list[_Waiter[W, R]]:
        """Return the next load: what waits, in its order, as far as it goes together."""
        waiting = self._waiting
        if len(waiting) <= self._max_load and sum([waiter.work.size for waiter in waiting]) <= MAX_SIZE:
            keys = [] if self._shared else [waiter.key for waiter in waiting]
            if self._aloft.isdisjoint(keys) and len(set(keys)) == len(keys):
                load = list(waiting)
                waiting.clear()
                self._aloft.update(keys)
                return load
        return self._select()

    def _select(self) -> list[_Waiter[W, R]]:
        """Return a load of what does not all go together: not too much, and no session twice."""
        load: list[_Waiter[W, R]] = []
        left: list[_Waiter[W, R]] = []
        room = MAX_SIZE
        while self._waiting and len(load) < self._max_load:
            waiter = self._waiting.popleft()
            if not self._may_go(waiter):
                left.append(waiter)
                continue
            room -= waiter.work.size
            if load and room < 0:
                left.append(waiter)
                break
            if not self._shared:
                self._aloft.add(waiter.key)
            load.append(waiter)
        self._waiting.extendleft(reversed(left))
        return load

    async def _alone(self, waiter: _Waiter[W, R], lease: Lease, *, waits: bool) -> None:
        waits = waits and not waiter.met_lock
        try:
            outcome = await self._sender.alone(lease, waiter.work, waits=waits, lost=waiter.lost)
        except Held as held:
            waiter.met_lock = self._wary = True
            waiter.lost = waiter.lost or held.lost
            self._supervisor.loop.call_later(PAUSE, self._retry, waiter)
        except Exception as error:  # noqa: BLE001 - its waiter's
            self._settle(waiter, error)
        else:
            self._settle(waiter, outcome)

    async def _together(self, load: list[_Waiter[W, R]], lease: Lease) -> None:
        outcomes = await self._sender.together(lease, [waiter.work for waiter in load])
        for waiter, outcome in zip(load, outcomes, strict=True):
            if isinstance(outcome, Apart):
                waiter.lost = waiter.lost or outcome.lost
                self._part(waiter)
            else:
                self._settle(waiter, outcome)

    def _part(self, waiter: _Waiter[W, R]) -> None:
        """Have work done by itself that its load could not do."""
        if not waiter.over:
            self._supervisor.errand(
                partial(self._alone, waiter, waits=False), overdue=lambda now: self._expire([waiter], now)
            ).begin()

    def _retry(self, waiter: _Waiter[W, R]) -> None:
        self._expire([waiter], self._supervisor.loop.time())
        if not waiter.over:
            self._waiting.append(waiter)
            self._depart()

    def _overdue(self, flight: _Flight[W, R], now: float) -> None:
        """See to a flight that is still on its way: what waits does not wait for one that is slow."""
        self._expire([*flight.load, *self._waiting], now)
        if flight.slow or flight.since is None or now - flight.since < self._patience:
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
        self._quiet = not self._waiting and len(flight.load) == 1
        if not self._shared:
            self._aloft.difference_update([waiter.key for waiter in flight.load])
        if flight.slow:
            self._slow -= 1
        else:
            self._prompt -= 1
            self._wary = self._wary and any(waiter.met_lock for waiter in flight.load)
        if len(self._waiting) >= min(self._enough, len(flight.load)):
            self._depart()
        elif self._waiting and self._gatherer is None:
            # Fewer than were served: the application is busy with those, and more will come before it waits.
            self._gatherer = flight
            self._muster(flight, 0)

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

    def _expire(self, waiters: Iterable[_Waiter[W, R]], now: float) -> None:
        """Answer those whose deadline has passed; what of their work is under way goes on."""
        for waiter in waiters:
            if waiter.over or waiter.due > now:
                continue
            # What waits for one row, which may be locked, says nothing about the database.
            waits = waiter in self._waiting
            if waits:
                self._waiting.remove(waiter)
            for_one_row = waiter.met_lock or (waits and not self._may_go(waiter))
            self._settle(waiter, self._supervisor.late(counted=not for_one_row))
            if waiter.errand is not None:
                waiter.errand.leave()
