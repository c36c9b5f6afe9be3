"""The supervisor keeps its deadline whatever an operation does, and the circuit breaker its temper."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import count

import pytest
from anyio.lowlevel import checkpoint

from sqlsessions.backends.supervisor import CircuitBreaker, Held, Lease, Supervisor
from sqlsessions.errors import BackendTimeout, BackendUnavailable, DuplicateId

pytestmark = pytest.mark.anyio

#: So short that it has passed by the time anybody looks.
AT_ONCE = 0.0
NEVER = 3600.0


class Clock:
    """Seconds, as a monotonic clock counts them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return what it shows."""
        return self.now


def supervisor(*, slots: int = 2, deadline: float = NEVER, threshold: int = 100) -> Supervisor:
    """Return a supervisor that is patient unless told otherwise."""
    return Supervisor(slots=slots, deadline=deadline, breaker=CircuitBreaker(threshold=threshold, clock=Clock()))


async def answer(lease: Lease) -> int:
    """Succeed."""
    return 42


async def refuse(lease: Lease) -> None:
    """Fail."""
    raise DuplicateId


class Stubborn:
    """An operation that a deadline cannot end, until it is let go."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()
        self.terminated = 0
        self.cancelled = False
        self.ended = asyncio.Event()

    def terminate(self) -> None:
        """Count, and take no notice."""
        self.terminated += 1

    async def __call__(self, lease: Lease) -> None:
        """Wait to be let go."""
        lease.terminate = self.terminate
        try:
            await self.let_go.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        finally:
            self.ended.set()


async def test_result() -> None:
    """What an operation returns is returned, and what it raises is raised."""
    runs = supervisor()
    assert await runs.run(answer) == 42
    with pytest.raises(DuplicateId):
        await runs.run(refuse)


async def test_deadline_terminates() -> None:
    """When the deadline passes the caller is answered at once, and the operation's connection is cut."""
    stubborn = Stubborn()
    with pytest.raises(BackendTimeout, match="within 0 s"):
        await supervisor(deadline=AT_ONCE).run(stubborn)
    assert (stubborn.terminated, stubborn.cancelled) == (1, False)
    stubborn.let_go.set()
    await stubborn.ended.wait()


async def test_deadline_cancels() -> None:
    """An operation that has no connection yet is cancelled instead."""
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def connect(lease: Lease) -> None:
        begun.set()
        try:
            await asyncio.Future()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(BackendTimeout):
        await supervisor(deadline=0.01).run(connect)
    await cancelled.wait()


async def test_deadline_says_so_to_the_operation() -> None:
    """An operation can see that nobody waits for it any more, and not try again."""
    leases: list[Lease] = []
    seen = asyncio.Event()

    async def look(lease: Lease) -> None:
        leases.append(lease)
        try:
            await asyncio.Future()
        finally:
            seen.set()

    with pytest.raises(BackendTimeout):
        await supervisor(deadline=0.01).run(look)
    await seen.wait()
    assert [lease.abandoned for lease in leases] == [True]


async def test_deadline_includes_the_wait() -> None:
    """The time an operation waits for its turn counts."""
    runs = supervisor(slots=1, deadline=0.01)
    first, second = Stubborn(), Stubborn()
    outcomes = await asyncio.gather(runs.run(first), runs.run(second), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [BackendTimeout, BackendTimeout]
    assert not second.ended.is_set()
    first.let_go.set()
    await first.ended.wait()


async def test_an_event_loop_that_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was answered while the event loop stood still is heard before anything is given up; what was not is given
    up then.
    """
    runs = supervisor(deadline=1.0, threshold=1)
    stubborn, answered = Stubborn(), Stubborn()

    async def be_read(lease: Lease) -> int:
        await answered(lease)
        for _ in range(5):
            await checkpoint()
        return 42

    silent, heard = asyncio.ensure_future(runs.run(stubborn)), asyncio.ensure_future(runs.run(be_read))
    while len(runs._running) < 2:
        await checkpoint()
    time = runs.loop.time
    monkeypatch.setattr(runs.loop, "time", lambda: time() + 60)
    answered.let_go.set()
    assert await heard == 42
    with pytest.raises(BackendTimeout):
        await silent
    stubborn.let_go.set()


async def test_an_event_loop_that_is_always_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every look comes late the deadline is kept all the same."""
    runs = supervisor(deadline=3.0)
    stubborn = Stubborn()
    task = asyncio.ensure_future(runs.run(stubborn))
    monkeypatch.setattr(runs.loop, "time", count(runs.loop.time()).__next__)
    for _ in range(1000):
        await checkpoint()
    with pytest.raises(BackendTimeout):
        await task
    stubborn.let_go.set()


async def test_a_lock_is_waited_for_without_a_slot() -> None:
    """An operation that meets a lock is tried again until it is done, and lets others have their turn meanwhile; if it
    never is, the circuit breaker does not hear of it.
    """
    runs = supervisor(slots=1, threshold=1)
    met: list[Exception] = [Held(), Held()]

    async def meet(lease: Lease) -> int:
        if met:
            raise met.pop()
        return 1

    done, other = await asyncio.gather(runs.run(meet), runs.run(answer))
    assert (done, other, met) == (1, 42, [])
    runs.deadline = 0.05
    met = [Held() for _ in range(99)]
    with pytest.raises(BackendTimeout):
        await runs.run(meet)
    assert await runs.run(answer) == 42


async def test_nobody_is_taken_on_while_all_slots_are_lost() -> None:
    """Where every slot is kept by what cannot be ended, there is no use in waiting for one, whatever it waits for."""
    runs, stubborn = supervisor(slots=1, deadline=0.05), Stubborn()

    async def meet(lease: Lease) -> None:
        lease.held = True
        await stubborn(lease)

    with pytest.raises(BackendTimeout):
        await runs.run(meet)
    with pytest.raises(BackendUnavailable, match="every connection"):
        await runs.run(answer)
    stubborn.let_go.set()
    await stubborn.ended.wait()
    await checkpoint()
    assert await runs.run(answer) == 42


async def test_error_after_the_deadline() -> None:
    """What an abandoned operation raises in the end is nobody's concern."""
    stubborn = Stubborn()

    async def fail(lease: Lease) -> None:
        await stubborn(lease)
        raise RuntimeError

    runs = supervisor(slots=1, deadline=AT_ONCE)
    with pytest.raises(BackendTimeout):
        await runs.run(fail)
    stubborn.let_go.set()
    await stubborn.ended.wait()
    await checkpoint()
    await checkpoint()
    with pytest.raises(BackendTimeout):  # and not BackendUnavailable: the slot is free again
        await runs.run(Stubborn())


async def test_abandoned_keep_their_slots() -> None:
    """Abandoned operations keep their slots until they have ended; without a slot left the answer comes at once."""
    runs = supervisor(slots=2, deadline=AT_ONCE)
    stubborn = [Stubborn(), Stubborn()]
    for each in stubborn:
        with pytest.raises(BackendTimeout):
            await runs.run(each)
    with pytest.raises(BackendUnavailable, match="every connection waits") as caught:
        await runs.run(answer)
    assert type(caught.value) is BackendUnavailable
    stubborn[0].let_go.set()
    await stubborn[0].ended.wait()
    await checkpoint()
    with pytest.raises(BackendTimeout):
        await runs.run(Stubborn())
    stubborn[1].let_go.set()


async def test_order() -> None:
    """Operations take their turn in the order they came, no more at a time than there are slots."""
    runs = supervisor(slots=2)
    begun: list[int] = []
    doors = [asyncio.Event() for _ in range(5)]

    def enter(place: int) -> Callable[[Lease], Awaitable[None]]:
        async def operation(lease: Lease) -> None:
            begun.append(place)
            await doors[place].wait()

        return operation

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(runs.run(enter(place))) for place in range(5)]
        for place in range(5):
            for _ in range(5):
                await checkpoint()
            assert begun == list(range(min(place + 2, 5)))
            doors[place].set()
            await tasks[place]


async def test_cancelled_caller() -> None:
    """Cancelling the caller cancels the caller only: the operation goes on to its end."""
    runs = supervisor()
    stubborn = Stubborn()
    task = asyncio.ensure_future(runs.run(stubborn))
    await checkpoint()
    await checkpoint()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not stubborn.ended.is_set()
    draining = asyncio.ensure_future(runs.drain())
    await checkpoint()
    assert not draining.done()
    stubborn.let_go.set()
    await draining
    assert stubborn.ended.is_set()
    assert not stubborn.cancelled


async def test_cancelled_caller_of_a_failure() -> None:
    """The error of an operation whose caller has gone is dropped in silence."""
    runs = supervisor()
    task = asyncio.ensure_future(runs.run(refuse))
    await checkpoint()
    task.cancel()
    await asyncio.wait({task})
    await runs.drain()
    assert task.cancelled()


async def test_drain_keeps_the_deadline() -> None:
    """Draining waits for outcomes, and an abandoned operation has had its."""
    runs = supervisor(deadline=0.01)
    stubborn = Stubborn()
    task = asyncio.ensure_future(runs.run(stubborn))
    await checkpoint()
    await runs.drain()
    with pytest.raises(BackendTimeout):
        await task
    stubborn.let_go.set()
    await stubborn.ended.wait()


# the circuit breaker


def test_closed_circuit() -> None:
    """Below the threshold every call is let through, and an answer forgets the timeouts before it."""
    breaker = CircuitBreaker(threshold=3, clock=Clock())
    for _ in range(5):
        breaker.check()
        breaker.timed_out()
        breaker.check()
        breaker.timed_out()
        breaker.check()
        breaker.answered()


def test_open_circuit() -> None:
    """At the threshold calls are refused, but for one probe in each pause; its answer lets all through again."""
    clock = Clock()
    breaker = CircuitBreaker(threshold=3, pause=1.0, clock=clock)
    for _ in range(3):
        breaker.check()
        breaker.timed_out()
    for clock.now in (0.0, 0.999):
        with pytest.raises(BackendUnavailable, match="3 times in a row"):
            breaker.check()
    clock.now = 1.0
    breaker.check()
    for clock.now in (1.0, 1.999):
        with pytest.raises(BackendUnavailable):
            breaker.check()
    clock.now = 2.0
    breaker.check()
    breaker.timed_out()
    with pytest.raises(BackendUnavailable, match="4 times in a row"):
        breaker.check()
    clock.now = 3.0
    breaker.check()
    breaker.answered()
    breaker.check()
    breaker.check()


async def test_breaker_counts_timeouts() -> None:
    """Timeouts in a row open the circuit: the next caller is refused without waiting, and nothing is begun."""
    runs = supervisor(slots=9, deadline=AT_ONCE, threshold=2)
    stubborn = [Stubborn(), Stubborn()]
    for each in stubborn:
        with pytest.raises(BackendTimeout):
            await runs.run(each)
    with pytest.raises(BackendUnavailable, match="2 times in a row") as caught:
        await runs.run(answer)
    assert type(caught.value) is BackendUnavailable
    for each in stubborn:
        each.let_go.set()


async def test_breaker_hears_errors_as_answers() -> None:
    """An error is an answer: the database is there."""
    breaker = CircuitBreaker(threshold=2, clock=Clock())
    short = Supervisor(slots=9, deadline=AT_ONCE, breaker=breaker)
    long = Supervisor(slots=9, deadline=NEVER, breaker=breaker)
    stubborn = Stubborn()
    for _ in range(3):
        with pytest.raises(BackendTimeout):
            await short.run(stubborn)
        with pytest.raises(DuplicateId):
            await long.run(refuse)
    stubborn.let_go.set()


async def test_breaker_hears_no_answer_in_the_end_of_the_abandoned() -> None:
    """That an abandoned operation ends is no answer: its connection was cut."""
    runs = supervisor(slots=9, deadline=AT_ONCE, threshold=2)
    for _ in range(2):
        stubborn = Stubborn()
        with pytest.raises(BackendTimeout):
            await runs.run(stubborn)
        stubborn.let_go.set()
        await stubborn.ended.wait()
        while runs._timer is not None:  # a look that is due would end the next one before it begins
            await checkpoint()
    with pytest.raises(BackendUnavailable, match="in a row"):
        await runs.run(answer)


@pytest.mark.parametrize("given", [False, True])
async def test_who_leaves_the_queue(*, given: bool) -> None:
    """Places go to those who wait in the order they came; one who leaves, with the place just given, passes it on."""
    runs = supervisor(slots=1)
    gate, begun = asyncio.Event(), list[int]()

    async def operation(number: int, lease: Lease) -> None:
        begun.append(number)
        await gate.wait()

    for number in range(4):
        runs.errand(partial(operation, number), overdue=lambda _: None).begin()
    (second,) = (lease for lease in runs._running if lease.begun == sorted(each.begun for each in runs._running)[1])
    gate.set()
    while given and len(runs._queue) == 3:
        await checkpoint()
    assert begun == [0]
    second.task.cancel()
    for _ in range(10):
        await checkpoint()
    assert begun == [0, 2, 3]
    assert await runs.run(answer) == 42
