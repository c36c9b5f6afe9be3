"""Operations that belong to the backend and not to the request that asked for them.

A client that disconnects cancels nothing half-way; a server that stops answering holds its caller no longer than the
deadline; and an operation that is abandoned keeps its place until it has really ended, so that a hung database cannot
gather work without bound.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from sqlsessions.errands import Errand, Work
from sqlsessions.errors import BackendTimeout, BackendUnavailable

T = TypeVar("T")

#: Seconds between two looks at what is running: one timer for everything costs a request nothing.
_LOOK = 0.05
#: Seconds until a row that somebody else had locked is tried again.
PAUSE = 0.02


class Held(Exception):
    """Somebody else has locked the row, and the work is to be tried again in a moment. Nothing was done, unless by a
    try before this one of which nobody knows (*lost*): then it may be that one which has the lock.
    """

    def __init__(self, *, lost: bool = False) -> None:
        super().__init__()
        self.lost = lost


class Lease:
    """Held by a running operation; says how to end it from outside once it has a connection."""

    __slots__ = ("abandoned", "asks", "begun", "give_up", "held", "overdue", "pausing", "task", "terminate")

    #: What does the operation, for somebody or by itself.
    task: asyncio.Task[Any] | Errand

    def __init__(
        self,
        begun: float,
        overdue: Callable[[float], None] | None = None,
        give_up: Callable[[], None] | None = None,
    ) -> None:
        #: Whether the deadline has passed: nobody waits any more, and what fails now is not to be tried again.
        self.abandoned = False
        #: Whether the database is asked for anything, so that its end is an answer.
        self.asks = True
        #: Whether a row was met that somebody has locked: then a timeout says nothing about the database.
        self.held = False
        #: Whether it waits for that row just now, in nobody's place.
        self.pausing = False
        #: Cuts the connection without waiting for the server. None while there is none: then the operation is
        #: cancelled instead.
        self.terminate: Callable[[], object] | None = None
        #: The event loop's time when the deadline began to run.
        self.begun = begun
        self.overdue = overdue
        self.give_up = give_up


def _unheard(_: BaseException | None) -> None: ...


class _Errand(Errand):
    """An errand that tells of its end."""

    def __init__(
        self, work: Work, supervisor: "Supervisor", lease: Lease, told: Callable[[BaseException | None], None]
    ) -> None:
        super().__init__(work, supervisor.loop)
        self._supervisor = supervisor
        self._lease = lease
        self._told = told

    def _tell(self, error: BaseException | None) -> None:
        self._supervisor.ended(self._lease)
        # The lease knows this. Left alone, the two of them and all of their load would wait for the garbage collector.
        del self._lease.task
        self._told(error)


class CircuitBreaker:
    """Tells whether it is worth asking: after *threshold* timeouts in a row, one try every *pause* seconds is let
    through.

    Only timeouts count, since they are what costs a request its deadline; a refused connection is answered at once
    anyway.
    """

    def __init__(self, *, threshold: int = 3, pause: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._threshold = threshold
        self._pause = pause
        self._clock = clock
        #: How many there were in a row.
        self.timeouts = 0
        self._next_try = 0.0

    def check(self) -> None:
        """Raise `BackendUnavailable` while the circuit is open; the one call let through per pause is the probe."""
        if self.timeouts < self._threshold:
            return
        now = self._clock()
        if now < self._next_try:
            raise BackendUnavailable(f"the database did not answer {self.timeouts} times in a row; not asked again yet")
        self._next_try = now + self._pause

    def answered(self) -> None:
        """Close the circuit: the database said something, be it an error."""
        self.timeouts = 0

    def timed_out(self) -> None:
        """Count a timeout; the last of *threshold* opens the circuit."""
        self.timeouts += 1
        self._next_try = self._clock() + self._pause


class Supervisor:
    """Runs operations of one event loop: at most *slots* at a time in the order they came, each within *deadline*
    seconds.
    """

    def __init__(self, *, slots: int, deadline: float, breaker: CircuitBreaker) -> None:
        #: Asked for once: up to Python 3.11, each time costs a call of the operating system.
        self.loop = asyncio.get_running_loop()
        self.deadline = deadline
        self.slots = slots
        self._breaker = breaker
        self._free = slots
        #: Those who wait for a place. Fair: SQLAlchemy's own pool lets newcomers overtake those who wait (p99 of 350 ms
        #: measured against 4-12 ms).
        self._queue: deque[asyncio.Future[None]] = deque()
        self._running: set[Lease] = set()
        self._abandoned: set[Lease] = set()
        self._owed = 0
        self._all_settled: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        #: Whether the latest look came late, and judged nobody.
        self._spared = False

    def accept(self) -> None:
        """Take on an operation that will be `settled`; raise `BackendUnavailable` when there is no use in trying."""
        if self._breaker.timeouts or self._abandoned:
            self._check()
        self._owed += 1

    def _check(self) -> None:
        self._breaker.check()
        if len(self._abandoned) >= self.slots:
            raise BackendUnavailable("every connection waits for a database that does not answer")

    def settled(self) -> None:
        """Note that an operation has its outcome, whether or not anybody waits for it."""
        self._owed -= 1
        if not self._owed and self._all_settled is not None:
            self._all_settled.set_result(None)
            self._all_settled = None

    def late(self, *, counted: bool = True) -> BackendTimeout:
        """Return the error of an operation that is given up, and count it for the circuit breaker."""
        if counted:
            self._breaker.timed_out()
        return BackendTimeout(f"the database did not answer within {self.deadline:g} s")

    async def run(self, operation: Callable[[Lease], Awaitable[T]]) -> T:
        """Return what *operation* returns; raise `BackendTimeout` when the deadline passes, whatever the server does.

        One that raises `Held` is tried again in a moment, and keeps no slot meanwhile. Cancelling the caller cancels
        nothing here: the operation goes on, to its own end or its deadline.
        """
        self.accept()
        outcome: asyncio.Future[T] = self.loop.create_future()

        def give_up() -> None:
            self.settled()
            late = self.late(counted=not lease.held)
            if not outcome.done():
                outcome.set_exception(late)

        lease, task = self._started(operation, give_up=give_up)
        task.add_done_callback(partial(self._hand_over, lease, outcome))
        # A future, and not the task: the caller's cancellation ends at it (R71, R72).
        return await outcome

    def errand(
        self,
        operation: Callable[[Lease], Awaitable[None]],
        *,
        overdue: Callable[[float], None],
        ended: Callable[[BaseException | None], None] = _unheard,
    ) -> Errand:
        """Return what does *operation*: in the task that awaits it, as long as that stays, since for what nobody else
        waits for a task costs more than the rest; or, when it is begun, by itself.

        *overdue* is called with the event loop's time at every look at what is running, *ended* with the error or
        None at the end.
        """
        lease = Lease(self.loop.time(), overdue)
        errand = lease.task = _Errand(self._in_turn(operation, lease), self, lease, ended)
        self._watch(lease)
        return errand

    def _started(
        self, operation: Callable[[Lease], Awaitable[T]], *, give_up: Callable[[], None]
    ) -> tuple[Lease, asyncio.Task[T]]:
        lease = Lease(self.loop.time(), give_up=give_up)
        task = lease.task = self.loop.create_task(self._until_free(operation, lease))
        task.add_done_callback(lambda _: self.ended(lease))
        self._watch(lease)
        return lease, task

    def _watch(self, lease: Lease) -> None:
        self._running.add(lease)
        if self._timer is None:
            self._timer = self.loop.call_later(min(_LOOK, self.deadline), self._look)

    async def drain(self) -> None:
        """Wait until all that was accepted has its outcome, which takes the deadline at the longest."""
        while self._owed:
            if self._all_settled is None:
                self._all_settled = self.loop.create_future()
            await asyncio.wait({self._all_settled})

    async def _in_turn(self, operation: Callable[[Lease], Awaitable[T]], lease: Lease) -> T:
        if self._free:
            self._free -= 1
        else:
            await self._place()
        try:
            return await operation(lease)
        finally:
            if lease.asks and not lease.abandoned:
                self._breaker.answered()
            self._pass_on()

    async def _until_free(self, operation: Callable[[Lease], Awaitable[T]], lease: Lease) -> T:
        """Do it in turn, as often as it meets a row that somebody has locked."""
        while True:
            try:
                return await self._in_turn(operation, lease)
            except Held:
                if lease.abandoned:
                    raise
            lease.held = lease.pausing = True
            await asyncio.sleep(PAUSE)
            lease.pausing = False

    async def _place(self) -> None:
        """Wait for a place that somebody leaves."""
        place: asyncio.Future[None] = self.loop.create_future()
        self._queue.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # it was given one at the same moment
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while self._queue:
            place = self._queue.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._free += 1

    def ended(self, lease: Lease) -> None:
        """Note that an operation is no longer under way."""
        self._running.discard(lease)
        if lease.abandoned:
            self._abandoned.discard(lease)

    def _look(self) -> None:
        now = self.loop.time()
        # The event loop stood still, and what has been answered meanwhile is still to be heard. Once: late each time,
        # nobody would ever be given up.
        late = self._timer is not None and now - self._timer.when() > _LOOK
        self._spared = late and not self._spared
        if self._spared:
            self._timer = self.loop.call_later(_LOOK, self._look)
            return
        # Those that were abandoned, too, as long as they last: others may be waiting for what they have taken.
        for lease in [*self._running, *self._abandoned]:
            if not lease.abandoned and now - lease.begun >= self.deadline:
                self._abandon(lease)
            if lease.overdue is not None:
                lease.overdue(now)
        busy = self._running or self._abandoned
        self._timer = self.loop.call_later(min(_LOOK, self.deadline), self._look) if busy else None

    def _abandon(self, lease: Lease) -> None:
        self._running.discard(lease)
        if not lease.pausing:
            self._abandoned.add(lease)
        lease.abandoned = True
        if lease.give_up is not None:
            lease.give_up()
        if lease.terminate is not None:
            lease.terminate()
        else:
            lease.task.cancel()

    def _hand_over(self, lease: Lease, outcome: asyncio.Future[T], task: asyncio.Task[T]) -> None:
        """Give the task's end to its waiter, unless the deadline answered first or the waiter has gone."""
        if not lease.abandoned:
            self.settled()
        error = None if task.cancelled() else task.exception()
        if outcome.done():
            return
        if task.cancelled():
            outcome.cancel()
        elif error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(task.result())
