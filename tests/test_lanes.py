"""Lanes: a sender in memory shows what goes together and in which order, real databases that it works."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from anyio.lowlevel import checkpoint
from sqlalchemy.ext.asyncio import create_async_engine

from sqlsessions.backends.connections import Aiosqlite, Asyncpg
from sqlsessions.backends.lanes import ENOUGH, MAX_LOAD, MAX_SIZE, Apart, Lane
from sqlsessions.backends.sqlalchemy import SQLAlchemyBackend
from sqlsessions.backends.supervisor import CircuitBreaker, Held, Lease, Supervisor
from sqlsessions.errors import BackendError, BackendTimeout, BackendUnavailable, CorruptData, DuplicateId
from sqlsessions.record import Expected, Record
from sqlsessions.testing import EVER, MINUTE, START, expecting, following, make_record
from tests.looking import PATIENCE, closing, counted_tasks, left_as_garbage, pids, sql, threads_ended
from tests.staging import Site, Staged

pytestmark = pytest.mark.anyio


@dataclass(frozen=True)
class Job:
    """Work on one session; what it is worth is its outcome."""

    number: int
    worth: object = None
    size: int = 1

    @property
    def id(self) -> UUID:
        """Which session."""
        return UUID(int=self.number)


@dataclass
class Sender:
    """Answers when told to, and notes what it was sent."""

    #: The numbers of each load; negative for one sent alone that must not wait for a lock.
    loads: list[list[int]] = field(default_factory=list)
    #: Loads that wait here for their outcome, if `held`.
    gates: list[asyncio.Event] = field(default_factory=list)
    held: bool = False
    lost: list[int] = field(default_factory=list)

    async def alone(self, lease: Lease, work: Job, *, waits: bool, lost: bool) -> object:
        """Do one."""
        self.loads.append([work.number if waits else -work.number])
        if lost:
            self.lost.append(work.number)
        await self._wait(lease)
        if isinstance(work.worth, list):  # one outcome after the other
            return self._outcome(work.worth.pop(0))
        return self._outcome(work.worth)

    async def together(self, lease: Lease, load: Sequence[Job]) -> Sequence[object]:
        """Do several."""
        self.loads.append([work.number for work in load])
        await self._wait(lease)
        return [work.worth.pop(0) if isinstance(work.worth, list) else work.worth for work in load]

    def open(self) -> None:
        """Let all go on, and those to come."""
        self.held = False
        for gate in self.gates:
            gate.set()

    async def _wait(self, lease: Lease) -> None:
        lease.terminate = lambda: None
        if self.held:
            self.gates.append(asyncio.Event())
            await self.gates[-1].wait()

    def _outcome(self, worth: object) -> object:
        if isinstance(worth, Exception):
            raise worth
        return worth


def supervisor(*, slots: int = 2, deadline: float = 3600.0) -> Supervisor:
    """Return a supervisor that is patient unless told otherwise."""
    return Supervisor(slots=slots, deadline=deadline, breaker=CircuitBreaker())


async def settle() -> None:
    """Let everything go on that can."""
    for _ in range(20):
        await checkpoint()


async def loaded(sender: Sender, count: int) -> None:
    """Return when so many loads have been sent."""
    async with asyncio.timeout(PATIENCE):
        while len(sender.loads) < count:
            await checkpoint()


def put(lane: Lane[Job, Any], *jobs: Job) -> list["asyncio.Task[Any]"]:
    """Return these jobs under way."""
    return [asyncio.create_task(lane.put(job)) for job in jobs]


async def put_behind(lane: Lane[Job, Any], first: Job, *jobs: Job) -> list["asyncio.Task[Any]"]:
    """Return these jobs under way, all but the first of which have come too late to go with it."""
    ahead = put(lane, first)
    await settle()
    behind = put(lane, *jobs)
    await settle()
    return ahead + behind


# what goes together


async def test_an_idle_lane_sends_at_once_and_alone() -> None:
    """Work that meets nothing on its way waits for nothing, and is sent by itself."""
    sender = Sender()
    lane = Lane[Job, Any](supervisor(), sender)
    assert [await lane.put(Job(number, number)) for number in (1, 2)] == [1, 2]
    assert sender.loads == [[1], [2]]


async def test_what_waits_goes_together() -> None:
    """What arrives while a load is on its way is the next load, in its order; each gets its own outcome."""
    sender = Sender(held=True)
    lane = Lane[Job, Any](supervisor(), sender)
    tasks = await put_behind(lane, *(Job(number, number * 10) for number in range(1, 9)))
    assert sender.loads == [[1]]
    sender.open()
    assert await asyncio.gather(*tasks) == [10, 20, 30, 40, 50, 60, 70, 80]
    assert sender.loads == [[1], [2, 3, 4, 5, 6, 7, 8]]


async def crowded(sender: Sender, lane: Lane[Job, Any]) -> None:
    """Have the lane carry a load of several, after which it expects more of them."""
    sender.held = True
    tasks = await put_behind(lane, Job(1), Job(2), Job(3))
    sender.open()
    await asyncio.gather(*tasks)
    assert sender.loads == [[1], [2, 3]]
    sender.loads.clear()
    sender.gates.clear()


async def test_a_crowd_goes_together() -> None:
    """Where many come at a time, what comes at the same moment goes together, in the task of the first, and nobody goes
    ahead.
    """
    sender = Sender()
    lane = Lane[Job, Any](supervisor(), sender)
    await crowded(sender, lane)
    with counted_tasks() as made:
        assert await asyncio.gather(*put(lane, *(Job(number, number) for number in range(10)))) == list(range(10))
    assert (sender.loads, len(made)) == ([[*range(10)]], 10)


async def test_a_crowd_is_quiet_again() -> None:
    """After one alone that met nobody, the next is sent in the turn in which it comes."""
    sender = Sender()
    lane = Lane[Job, Any](supervisor(), sender)
    await crowded(sender, lane)
    await lane.put(Job(4))
    sender.held = True
    putting = lane.put(Job(5))
    putting.send(None)
    assert sender.loads == [[4], [5]]
    putting.close()


async def test_a_crowd_is_cut_in_two() -> None:
    """As soon as there are enough they go, in the task of the last of them, and the rest follows: while the database
    serves one half, the application serves the other.
    """
    sender = Sender()
    lane = Lane[Job, Any](supervisor(), sender)
    await crowded(sender, lane)
    sender.held = True
    tasks = put(lane, *(Job(number, number) for number in range(ENOUGH + 3)))
    await loaded(sender, 1)
    await settle()
    assert sender.loads == [[*range(ENOUGH)]]
    sender.open()
    assert await asyncio.gather(*tasks) == list(range(ENOUGH + 3))
    assert sender.loads == [[*range(ENOUGH)], [*range(ENOUGH, ENOUGH + 3)]]


async def test_the_first_of_a_crowd_is_closed() -> None:
    """Who would have taken the load of all ends with its event loop, and the lane goes on in another."""
    sender = Sender()
    lane = Lane[Job, Any](supervisor(), sender)
    await crowded(sender, lane)
    putting = lane.put(Job(4))
    putting.send(None)
    putting.close()
    assert await lane.put(Job(5, 5)) == 5
    assert sender.loads == [[4, 5]]


@pytest.mark.parametrize("landing", [False, True])
async def test_no_end_of_those_who_may_not_go(*, landing: bool) -> None:
    """What may go does not wait for ever while more and more come that may not, since their session is on its way."""
    sender = Sender()
    lane = Lane[Job, Any](supervisor(), sender)
    await crowded(sender, lane)
    sender.held = True
    tasks: list[asyncio.Task[Any]] = []
    if landing:
        tasks += put(lane, Job(3), Job(4), Job(5))
        await loaded(sender, 1)
    lane._aloft.add(1)
    tasks += put(lane, Job(2))
    if landing:
        await settle()
        sender.gates[0].set()
    for _ in range(4 * ENOUGH):
        if [2] in sender.loads:
            break
        tasks += put(lane, Job(1))
        await checkpoint()
    assert sender.loads[-1] == [2]
    lane._aloft.discard(1)
    sender.open()
    await asyncio.gather(*tasks)


async def test_the_next_load_goes_first() -> None:
    """When a load lands, the next is sent before those are woken up whom it was for."""
    sender = Sender(held=True)
    lane = Lane[Job, Any](supervisor(), sender)
    seen: list[int] = []

    async def ask(job: Job) -> None:
        await lane.put(job)
        seen.append(len(sender.loads))

    first = asyncio.create_task(ask(Job(0)))
    await loaded(sender, 1)
    others = [asyncio.create_task(ask(Job(number))) for number in (1, 2)]
    await settle()
    sender.gates[0].set()
    await first
    assert seen == [2]
    sender.open()
    await asyncio.gather(*others)


async def test_a_load_that_lands_waits_for_more() -> None:
    """Where fewer wait than were served, a load is sent when the event loop brings no more; none is left behind."""
    sender = Sender(held=True)
    lane = Lane[Job, Any](supervisor(), sender)
    tasks = await put_behind(lane, *map(Job, range(5)))
    sender.gates[0].set()
    await loaded(sender, 2)
    tasks += put(lane, Job(5))
    await settle()
    sender.gates[1].set()
    tasks += put(lane, Job(6), Job(7))
    await loaded(sender, 3)
    assert sender.loads == [[0], [1, 2, 3, 4], [5, 6, 7]]
    sender.open()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("when", [0, 1, 20])
async def test_the_first_of_a_crowd_may_go(when: int) -> None:
    """Who came first takes the load of all; when it is cancelled, before or after it was sent, the others are served
    none the worse.
    """
    sender = Sender()
    lane = Lane[Job, Any](supervisor(), sender)
    await crowded(sender, lane)
    sender.held = True
    tasks = put(lane, *(Job(number, number) for number in range(4)))
    for _ in range(when):
        await checkpoint()
    tasks[0].cancel()
    await settle()
    sender.open()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcomes[0]), *outcomes[1:]] == [asyncio.CancelledError, 1, 2, 3]
    assert sender.loads == ([[0, 1, 2, 3]] if when else [[1, 2, 3]])


@pytest.mark.parametrize("shared", [False, True])
async def test_a_session_twice(*, shared: bool) -> None:
    """Two writes of one session are never on their way at once, nor overtake each other; reads may be."""
    sender = Sender(held=True)
    lane = Lane[Job, Any](supervisor(), sender, shared=shared)
    tasks = await put_behind(lane, Job(1, "a"), Job(2, "b"), Job(1, "c"), Job(2, "d"), Job(3, "e"))
    sender.open()
    assert await asyncio.gather(*tasks) == ["a", "b", "c", "d", "e"]
    assert sender.loads == ([[1], [2, 1, 2, 3]] if shared else [[1], [2, 1, 3], [2]])


async def test_loads_have_limits() -> None:
    """A load has so many pieces of work and so many characters, but for one piece that alone has more."""
    sender = Sender(held=True)
    lane = Lane[Job, Any](supervisor(), sender)
    big = [Job(1000, size=2 * MAX_SIZE), Job(1001, size=MAX_SIZE), Job(1002, size=1)]
    tasks = await put_behind(lane, *(Job(number) for number in range(1, MAX_LOAD + 3)), *big)
    sender.open()
    await asyncio.gather(*tasks)
    sizes = [len(load) for load in sender.loads]
    assert sizes == [1, MAX_LOAD, 1, 1, 1, 1]
    assert sender.loads[2:] == [[MAX_LOAD + 2], [1000], [1001], [1002]]


async def test_no_batches() -> None:
    """Without batches work goes by itself, as much at a time as there are flights."""
    sender = Sender(held=True)
    lane = Lane[Job, Any](supervisor(), sender, max_load=1, flights=2)
    tasks = put(lane, *(Job(number, number) for number in (1, 2, 3, 4)))
    await settle()
    assert sender.loads == [[1], [2]]
    sender.open()
    assert await asyncio.gather(*tasks) == [1, 2, 3, 4]
    assert sender.loads == [[1], [2], [3], [4]]


# what fails


async def test_each_has_its_own_error() -> None:
    """An error of one piece of work is its waiter's alone."""
    sender = Sender(held=True)
    lane = Lane[Job, Any](supervisor(), sender)
    tasks = await put_behind(lane, Job(1, 1), Job(2, DuplicateId("two")), Job(3, 3))
    sender.open()
    first, second, third = await asyncio.gather(*tasks, return_exceptions=True)
    assert (first, type(second), third) == (1, DuplicateId, 3)


async def test_a_load_that_fails_is_parted() -> None:
    """What its load could not do is done by itself; of what may have been done, that is said."""
    sender = Sender(held=True)
    lane = Lane[Job, Any](supervisor(), sender)
    parted = Job(2, [Apart(), 2]), Job(3, 3), Job(4, [Apart(lost=True), DuplicateId("four")])
    tasks = await put_behind(lane, Job(1, 1), *parted)
    sender.open()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [*outcomes[:3], type(outcomes[3])] == [1, 2, 3, DuplicateId]
    assert sorted(sender.loads[2:]) == [[-4], [-2]]
    assert sender.lost == [4]


async def test_a_sender_that_breaks() -> None:
    """An error that is nobody's own is everybody's on board; the lane goes on."""
    sender = Sender(held=True)
    lane = Lane[Job, Any](supervisor(), sender)

    async def broken(*_: object, **__: object) -> object:
        raise BackendUnavailable("broken")

    sender.together = broken  # type: ignore[method-assign,assignment]
    tasks = await put_behind(lane, Job(1, 1), Job(2), Job(3))
    sender.open()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [outcomes[0], *map(type, outcomes[1:])] == [1, BackendUnavailable, BackendUnavailable]
    assert await lane.put(Job(4, 4)) == 4
    await settle()
    # One that takes its own load is told by it.
    lane._sender.alone = broken  # type: ignore[method-assign]
    with pytest.raises(BackendUnavailable, match="broken"):
        await lane.put(Job(5))
    assert not lane._prompt


async def test_a_lock_is_not_waited_for() -> None:
    """Work that met a lock is tried again, without waiting for the lock, until it is done."""
    sender = Sender()
    lane = Lane[Job, Any](supervisor(), sender)
    assert await lane.put(Job(1, [Held(), Held(), "done"])) == "done"
    assert sender.loads == [[1], [-1], [-1]]
    assert await lane.put(Job(2, "done")) == "done"
    assert await lane.put(Job(3, "done")) == "done"
    assert sender.loads[3:] == [[-2], [3]]


async def test_a_lock_that_stays_is_no_outage() -> None:
    """Work that meets a lock until its deadline is given up, and the circuit breaker does not hear of it."""
    runs = supervisor(deadline=0.05)
    lane = Lane[Job, Any](runs, Sender())
    for number in range(5):
        with pytest.raises(BackendTimeout):
            await lane.put(Job(number, [Held() for _ in range(99)]))
    assert await lane.put(Job(9, "done")) == "done"


# what takes long


async def test_a_lock_of_a_try_whose_answer_was_lost() -> None:
    """Work that may have been done, and then meets a lock, which may be its own, is not taken for undone after that."""
    sender = Sender(held=True)
    lane = Lane[Job, Any](supervisor(), sender)
    tasks = await put_behind(lane, Job(9, 9), Job(1, [Apart(lost=True), Held(), 1]), Job(2, 2))
    sender.open()
    assert await asyncio.gather(*tasks) == [9, 1, 2]
    assert (sender.loads, sender.lost) == ([[9], [1, 2], [-1], [-1]], [1, 1])
    assert await lane.put(Job(3, [Held(lost=True), 3])) == 3
    assert (sender.loads[4:], sender.lost) == ([[-3], [-3]], [1, 1, 3])


async def test_a_load_that_fails_without_who_sends_it() -> None:
    """Who sends a load in which there was no room for its own work is not told of that load's error."""
    sender = Sender()
    lane = Lane[Job, Any](supervisor(), sender)
    big = [Job(number, BackendUnavailable(), size=MAX_SIZE // 2) for number in (1, 2)]
    lane._quiet = False
    tasks = put(lane, *big, *(Job(number, number) for number in range(3, ENOUGH + 3)))
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes[:2]] == [BackendUnavailable] * 2
    assert outcomes[2:] == list(range(3, ENOUGH + 3))


async def test_the_deadline_behind_what_does_not_end() -> None:
    """Work for a session on which an operation has been given up that cannot be ended keeps its deadline, too."""
    sender = Sender(held=True)
    runs = supervisor(deadline=0.05)
    lane = Lane[Job, Any](runs, sender)
    first = put(lane, Job(1))
    await loaded(sender, 1)
    while not runs._abandoned:
        await checkpoint()
    second = put(lane, Job(1))
    async with asyncio.timeout(PATIENCE):
        outcomes = await asyncio.gather(*first, *second, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [BackendTimeout, BackendTimeout]
    sender.open()
    await settle()


async def test_a_slow_load_holds_up_nobody() -> None:
    """While a load is slow the next goes by another connection, and waits for no lock on it."""
    sender = Sender(held=True)
    lane = Lane[Job, Any](supervisor(), sender)
    slow = put(lane, Job(1, "slow"))
    await loaded(sender, 1)
    others = put(lane, Job(2, "other"))
    await loaded(sender, 2)
    assert sender.loads == [[1], [-2]]
    sender.gates[1].set()
    assert await others[0] == "other"
    again = put(lane, Job(1, "again"), Job(3, "more"))
    await loaded(sender, 3)
    assert sender.loads[2:] == [[-3]]
    sender.open()
    assert await asyncio.gather(*slow, *again) == ["slow", "again", "more"]


async def test_two_connections_at_most() -> None:
    """However many lanes and slow loads there are, no more than *slots* are on their way."""
    runs = supervisor()
    senders = [Sender(held=True) for _ in range(3)]
    lanes = [Lane[Job, Any](runs, sender) for sender in senders]
    tasks = [task for lane in lanes for task in put(lane, Job(1, 1), Job(2, 2))]
    await loaded(senders[0], 1)
    await loaded(senders[1], 1)
    await asyncio.sleep(0.3)  # past the patience of the first, which has nowhere to go
    assert [len(sender.loads) for sender in senders] == [1, 1, 0]
    for sender in senders:
        sender.open()
    assert await asyncio.gather(*tasks) == [1, 2] * 3


async def test_the_deadline_is_the_waiters() -> None:
    """A waiter leaves at its deadline, the work goes on; what was not sent by then never is."""
    sender = Sender(held=True)
    lane = Lane[Job, Any](supervisor(slots=1, deadline=0.05), sender)
    outcomes = await asyncio.gather(*await put_behind(lane, Job(1), Job(2)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [BackendTimeout, BackendTimeout]
    sender.open()
    await settle()
    assert sender.loads == [[-1]]
    assert await lane.put(Job(3, 3)) == 3


async def test_timeouts_open_the_circuit() -> None:
    """A database that does not answer costs a few callers their deadline, and then nobody."""
    sender = Sender(held=True)
    lane = Lane[Job, Any](supervisor(slots=9, deadline=0.05), sender)
    outcomes = await asyncio.gather(*put(lane, *(Job(number) for number in range(4))), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {BackendTimeout}
    with pytest.raises(BackendUnavailable, match="in a row"):
        await lane.put(Job(9))
    sender.open()


# who leaves


async def test_a_waiter_that_leaves() -> None:
    """Cancelling a waiter cancels neither its work nor anybody else's, sent or not."""
    runs = supervisor()
    sender = Sender(held=True)
    lane = Lane[Job, Any](runs, sender)
    tasks = await put_behind(lane, *(Job(number, number) for number in (1, 2, 3)))
    for task in tasks[:2]:
        task.cancel()
    await settle()
    assert all(task.cancelled() for task in tasks[:2])
    sender.open()
    assert await tasks[2] == 3
    await runs.drain()
    assert sender.loads == [[1], [2, 3]]


async def test_draining() -> None:
    """Draining waits for what is on its way, for what waits, and for what met a lock."""
    runs = supervisor()
    sender = Sender(held=True)
    lane = Lane[Job, Any](runs, sender)
    tasks = await put_behind(lane, Job(1, [Held(), 1]), Job(2, 2))
    draining = asyncio.create_task(runs.drain())
    await settle()
    assert not draining.done()
    sender.open()
    await draining
    assert [task.result() for task in tasks] == [1, 2]


# on real databases


@asynccontextmanager
async def listening(listens: bool) -> AsyncIterator[None]:
    """Listen to SQLAlchemy's events or not: then its statements go through it."""

    def heard(*_: object) -> None: ...

    if listens:
        sa.event.listen(sa.engine.Engine, "before_cursor_execute", heard)
    try:
        yield
    finally:
        if listens:
            sa.event.remove(sa.engine.Engine, "before_cursor_execute", heard)


@pytest.fixture(params=["direct", "through SQLAlchemy"])
async def together(request: pytest.FixtureRequest, sessions_url: str, anyio_backend: str) -> AsyncIterator[Any]:
    """A backend that speaks to the driver, or through SQLAlchemy."""
    async with listening(request.param != "direct"), closing(SQLAlchemyBackend(sessions_url)) as backend:
        yield backend


async def test_everything_together(together: SQLAlchemyBackend) -> None:
    """Each of many operations at once has the outcome that it would have alone."""
    records = [make_record() for _ in range(40)]
    assert await asyncio.gather(*map(together.insert, records)) == [None] * 40
    missing = [make_record().id for _ in range(5)]
    loads = await asyncio.gather(*(together.load(id_, START) for id_ in [*(r.id for r in records), *missing]))
    assert loads == [*records, *[None] * 5]
    stale = [following(record) for record in records[:5]]
    done = await asyncio.gather(
        *(together.replace(following(record), expecting(record)) for record in records[:20]),
        *(together.replace(following(record), expecting(other)) for record, other in zip(records, stale, strict=False)),
        *(together.touch(r.id, r.secret_hash, now=START + MINUTE, expires_at=r.expires_at) for r in records[20:25]),
        *(together.touch(r.id, b"x" * 32, now=START + MINUTE, expires_at=r.expires_at) for r in records[25:30]),
        *(together.delete(record.id) for record in [*records[30:35], make_record()]),
        *(together.delete(record.id, expecting(record)) for record in records[35:40]),
    )
    assert done == [True] * 20 + [False] * 5 + [True] * 5 + [False] * 5 + [True] * 5 + [False] + [True] * 5
    after = await asyncio.gather(*(together.load(record.id, START) for record in records))
    assert [record is None for record in after] == [False] * 30 + [True] * 10
    assert [record.version for record in after[:20] if record] != [record.version for record in records[:20]]


async def test_expiry_is_each_ones_own(together: SQLAlchemyBackend) -> None:
    """Loaded together, each record is judged by the instant it was asked for at."""
    record = make_record(expires_at=START + MINUTE)
    await together.insert(record)
    instants = [START, START + MINUTE, START, EVER, START + 2 * MINUTE]
    found = await asyncio.gather(*(together.load(record.id, instant) for instant in instants))
    assert [each is None for each in found] == [False, True, False, False, True]


async def test_writers_of_one_session_at_once(together: SQLAlchemyBackend) -> None:
    """Of writers that expect the same one wins, though all are sent at once."""
    record = make_record()
    await together.insert(record)
    wins = await asyncio.gather(*(together.replace(following(record), expecting(record)) for _ in range(20)))
    assert wins.count(True) == 1


async def test_one_bad_row_fails_alone(together: SQLAlchemyBackend) -> None:
    """A row that the database refuses, or that cannot be said at all, fails alone among those that are stored."""
    taken = make_record()
    await together.insert(taken)
    rows = [make_record() for _ in range(12)]
    bad = {3: rows[3]._replace(id=taken.id), 6: rows[6]._replace(version=2**70), 9: rows[9]._replace(data="{")}
    outcomes = await asyncio.gather(
        *(together.insert(bad.get(place, row)) for place, row in enumerate(rows)), return_exceptions=True
    )
    assert isinstance(outcomes[3], DuplicateId)
    assert isinstance(outcomes[6], BackendError)
    good = [place for place in range(12) if place not in bad]
    assert [outcomes[place] for place in good] == [None] * len(good)
    assert await asyncio.gather(*(together.load(rows[place].id, START) for place in good)) == [rows[p] for p in good]
    assert await together.load(taken.id, START) == taken


def swap(record: Record, data: str = '{"n":1}', **unexpected: Any) -> tuple[Record, Expected]:
    """Return what a request that has changed nothing but the data asks for."""
    return record.written(data), Expected(record.version, record.secret_hash, START, record)._replace(**unexpected)


async def test_many_changes_of_data(together: SQLAlchemyBackend) -> None:
    """Of many changes of nothing but the data each is made if its row is as it was read, and else leaves it alone."""
    records = [make_record() for _ in range(7)]
    records[3] = records[3]._replace(expires_at=START + MINUTE)
    await asyncio.gather(*map(together.insert, records))
    done = await asyncio.gather(
        together.replace(*swap(records[0])),
        together.replace(*swap(records[1], version=records[1].version + 1)),
        together.replace(*swap(records[2], secret_hash=b"x" * 32)),
        together.replace(*swap(records[3], now=START + MINUTE)),
        together.replace(*swap(make_record())),
        together.replace(*swap(records[4], records[4].data)),
        together.replace(*swap(records[5], '{"n":2}')),
    )
    assert done == [True, False, False, False, False, True, True]
    after = [await together.load(record.id, START) for record in records]
    assert [record and record.data for record in after] == [
        '{"n":1}', *(record.data for record in records[1:5]), '{"n":2}', records[6].data,
    ]  # fmt: skip
    for found, record in zip(after, records, strict=True):
        assert found is not None
        assert found._replace(data="", version=0) == record._replace(data="", version=0)
        assert (found.version != record.version) is (record in (records[0], records[4], records[5]))


async def test_data_of_many_changes(together: SQLAlchemyBackend) -> None:
    """What stands in the data neither ends a column nor strays into another row."""
    texts = [
        "{}",
        '{"a":","}',
        '{"a":"\\\\,\\"{}"}',
        '{"a":"\\u0000"}',
        '{"NULL":null}',
        '{"é":"\U0001f36a\u2028"}',
        '{ "spaced" : [ 1 , 2 ] }\n',
        '{"long":"%s"}' % ("x" * 50_000),
    ]
    records = [make_record() for _ in texts]
    await asyncio.gather(*map(together.insert, records))
    changes = [swap(record, text) for record, text in zip(records, texts, strict=True)]
    assert all(await asyncio.gather(*(together.replace(*change) for change in changes)))
    loaded = await asyncio.gather(*(together.load(record.id, START) for record in records))
    assert loaded == [record for record, _ in changes]


async def test_one_bad_change_fails_alone(together: SQLAlchemyBackend) -> None:
    """A change that the database refuses, or that cannot be said at all, fails alone among those that are made."""
    records = [make_record() for _ in range(9)]
    await asyncio.gather(*map(together.insert, records))
    changes = [swap(record) for record in records]
    changes[2] = changes[2][0]._replace(version=2**70), changes[2][1]
    changes[4] = swap(records[4], '{"a":"\ud800"}')
    changes[6] = swap(records[6], now=START.replace(tzinfo=None))
    outcomes = await asyncio.gather(*(together.replace(*change) for change in changes), return_exceptions=True)
    assert [place for place, outcome in enumerate(outcomes) if isinstance(outcome, BackendError)] == [2, 4, 6]
    assert [outcome for outcome in outcomes if not isinstance(outcome, BackendError)] == [True] * 6


@pytest.mark.parametrize("id_", ["0192f0c1-2233-7abc-8def-001122334455", ["x"], None])
async def test_what_is_no_id(together: SQLAlchemyBackend, id_: Any) -> None:
    """What is no UUID is refused before it is among others, and leaves nothing behind."""
    records = [make_record() for _ in range(4)]
    for record in records:
        await together.insert(record)
    for operation in (together.delete(record.id) for record in records[:2]):
        assert await operation
    for refused in (lambda: together.delete(id_), lambda: together.load(id_, START)):
        with pytest.raises(BackendError, match="a session's id is a UUID"):
            await refused()
    assert await asyncio.gather(*(together.delete(record.id) for record in records[2:])) == [True, True]
    await together.aclose()


async def test_one_statement_for_many_changes(postgres_sessions_url: str) -> None:
    """Changes of nothing but the data are one statement to PostgreSQL, and it is planned for once and for all."""
    async with closing(SQLAlchemyBackend(postgres_sessions_url)) as backend:
        records = [make_record() for _ in range(12)]
        await asyncio.gather(*map(backend.insert, records))
        for turn in range(12):
            changes = [swap(record, f'{{"n":{turn}}}') for record in records]
            # The first goes ahead, as long as nobody was expected.
            assert all(await asyncio.gather(*(backend.replace(*change) for change in changes)))
            await asyncio.gather(*(backend.load(record.id, START) for record in records))
            records = [record for record, _ in changes]
        rows = await sql(postgres_sessions_url, "SELECT DISTINCT xmin::text, cmin::text FROM web_sessions")
        assert len(rows) == 1
        (room,) = backend._rooms.values()
        connections = [await room.connections.take() for _ in range(2)]
        kept = [await connection._driver.fetch(_KEPT_PLANS) for connection in connections]
        planned = [(row["name"], row["custom"], row["generic"]) for rows in kept for row in rows]
        assert {name for name, _, _ in planned} == {"load", "change"}
        assert all(custom <= 5 for _, custom, _ in planned), planned
        assert sum(generic for _, _, generic in planned) >= 12
        for connection in connections:
            await room.connections.give(connection)


#: How often a connection's statements for many rows were run by a plan of that moment, and how often by one kept.
_KEPT_PLANS = """
    SELECT CASE WHEN statement LIKE 'WITH%' THEN 'change' ELSE 'load' END AS name,
        custom_plans AS custom, generic_plans AS generic
    FROM pg_prepared_statements WHERE statement LIKE '%string_to_array%' AND statement LIKE '%secret_hash%'
"""


async def test_one_corrupt_row_fails_alone(together: SQLAlchemyBackend, sessions_url: str) -> None:
    """A row that nobody can read is an error for who asked for it, and for nobody else."""
    records = [make_record() for _ in range(8)]
    await asyncio.gather(*map(together.insert, records))
    broken = "'never'" if sessions_url.startswith("sqlite") else "'294276-01-01'"
    row = literal(sessions_url, records[4].id)
    await sql(sessions_url, f"UPDATE web_sessions SET expires_at = {broken} WHERE id = {row}")  # noqa: S608
    found = await asyncio.gather(*(together.load(record.id, START) for record in records), return_exceptions=True)
    assert isinstance(found.pop(4), CorruptData)
    assert found == [*records[:4], *records[5:]]


def literal(url: str, id_: UUID) -> str:
    """Return an id as it is written in SQL."""
    return f"'{id_.hex}'" if url.startswith("sqlite") else f"'{id_}'"


async def test_one_commit_for_all(postgres_sessions_url: str) -> None:
    """Writes that go together are committed together: as many transactions as loads, and no acknowledgement before."""
    async with closing(SQLAlchemyBackend(postgres_sessions_url)) as backend:
        records = [make_record() for _ in range(60)]
        await asyncio.gather(*map(backend.insert, records))
        await asyncio.gather(*(backend.replace(following(record), expecting(record)) for record in records))
        rows = await sql(
            postgres_sessions_url, "SELECT xmin::text AS writer, count(*) AS n FROM web_sessions GROUP BY 1"
        )
        assert sorted(row.n for row in rows) == [ENOUGH, 60 - ENOUGH]


async def test_halves(sessions_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crowd is cut in two for a server, and not for SQLite, which works in a thread of the application's own."""
    sizes: list[int] = []
    way = Aiosqlite if sessions_url.startswith("sqlite") else Asyncpg
    send = way.changed_each

    async def noting(self: Any, several: Sequence[Any]) -> Any:
        sizes.append(len(several))
        return await send(self, several)

    monkeypatch.setattr(way, "changed_each", noting)
    async with closing(SQLAlchemyBackend(sessions_url)) as backend:
        for _ in range(2):
            await asyncio.gather(*(backend.insert(make_record()) for _ in range(40)))
    # Of the first, one has gone ahead, as nobody was expected.
    assert sizes == ([39, 40] if way is Aiosqlite else [39, ENOUGH, 40 - ENOUGH])


async def test_one_at_a_time_there_are_no_tasks(sessions_url: str) -> None:
    """An operation that meets no other is done in the task that asks for it; of many at once, a task does each load."""
    async with closing(SQLAlchemyBackend(sessions_url)) as backend:
        records = [make_record() for _ in range(8)]
        for record in records:
            await backend.insert(record)
        await settle()
        with counted_tasks() as made:
            assert await backend.load(records[0].id, START) == records[0]
            assert await backend.replace(following(records[1]), expecting(records[1]))
            assert await backend.delete(records[1].id)
        assert made == []
        await settle()
        with counted_tasks() as made:
            await asyncio.gather(*(backend.load(record.id, START) for record in records))
        assert len(made) - len(records) <= 1


@pytest.mark.parametrize("browsers", [1, 8])
async def test_nothing_is_left_to_the_garbage_collector(sessions_url: str, browsers: int) -> None:
    """What a request, alone or in a crowd, needed of us is free when it ends: sessions are large, collections slow."""
    site = Site(Staged(SQLAlchemyBackend(sessions_url)))
    guests = [await site.filled(n=0, cart=[{}]) for _ in range(browsers)]
    for do in (lambda session: session["n"], lambda session: session.update(n=1), lambda session: session["cart"]):
        await asyncio.gather(*(guest.do(do) for guest in guests))
        with left_as_garbage() as found:
            await asyncio.gather(*(guest.do(do) for guest in guests))
            await settle()
        assert found == []
    await site.backend.aclose()


async def test_connections_under_load(postgres_sessions_url: str) -> None:
    """Any number of operations at once has two connections, and leaves them behind, in no transaction."""
    async with closing(SQLAlchemyBackend(postgres_sessions_url)) as backend:
        records = [make_record() for _ in range(300)]
        await asyncio.gather(*map(backend.insert, records))
        operations: list[Coroutine[Any, Any, object]] = []
        for record in records:
            operations += [backend.load(record.id, START), backend.list_for_user("x"), backend.delete(record.id)]
        await asyncio.gather(*operations)
        assert len(await pids(postgres_sessions_url)) == 2
        (row,) = await sql(
            postgres_sessions_url,
            "SELECT count(*) AS n FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'",
        )
        assert row.n == 0
    assert await pids(postgres_sessions_url) == set()


@asynccontextmanager
async def locking(url: str, record: Record) -> AsyncIterator[None]:
    """Hold the lock of a row."""
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.execute(sa.text(f"SELECT 1 FROM web_sessions WHERE id = '{record.id}' FOR UPDATE"))  # noqa: S608
        yield
    await engine.dispose()


@pytest.mark.parametrize("listens", [False, True])
async def test_a_stuck_row_blocks_no_load(postgres_sessions_url: str, *, listens: bool) -> None:
    """A load passes over a row that somebody has locked; its writer waits by itself, and is served when it is free."""
    async with listening(listens), closing(SQLAlchemyBackend(postgres_sessions_url)) as backend:
        records = [make_record() for _ in range(20)]
        await asyncio.gather(*map(backend.insert, records))
        async with locking(postgres_sessions_url, records[7]):
            tasks = [asyncio.create_task(backend.replace(following(record), expecting(record))) for record in records]
            async with asyncio.timeout(PATIENCE):
                assert all(await asyncio.gather(*(task for place, task in enumerate(tasks) if place != 7)))
            assert not tasks[7].done()
            assert await backend.load(records[7].id, START) == records[7]
        assert await tasks[7]


async def test_a_stuck_row_and_one_connection(postgres_sessions_url: str) -> None:
    """Where there is one connection in all, a writer does not wait in it for a row that somebody has locked."""
    async with closing(SQLAlchemyBackend(postgres_sessions_url, pool_size=1)) as backend:
        record, other = make_record(), make_record()
        await backend.insert(record)
        await backend.insert(other)
        async with locking(postgres_sessions_url, record):
            writing = asyncio.create_task(backend.replace(following(record), expecting(record)))
            await checkpoint()
            assert await backend.load(other.id, START) == other
            assert not writing.done()
        assert await writing


async def test_a_database_that_locks_nothing(postgres_sessions_url: str) -> None:
    """Where statements with FOR UPDATE SKIP LOCKED are refused (0A000), as Citus does, the plain ones are sent.

    A view of distinct rows refuses them as well.
    """
    async with closing(SQLAlchemyBackend(postgres_sessions_url)) as backend:
        records = [make_record(user_id=user) for user in "ab" * 10]
        await asyncio.gather(*map(backend.insert, records))
        await sql(
            postgres_sessions_url,
            "ALTER TABLE web_sessions RENAME TO stored",
            "CREATE VIEW web_sessions AS SELECT DISTINCT ON (id) * FROM stored",
            "CREATE FUNCTION change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "DELETE FROM stored WHERE id = OLD.id; INSERT INTO stored SELECT NEW.*; RETURN NEW; END $$",
            "CREATE TRIGGER change INSTEAD OF UPDATE ON web_sessions FOR EACH ROW EXECUTE FUNCTION change()",
            "CREATE FUNCTION remove() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "DELETE FROM stored WHERE id = OLD.id; RETURN OLD; END $$",
            "CREATE TRIGGER remove INSTEAD OF DELETE ON web_sessions FOR EACH ROW EXECUTE FUNCTION remove()",
        )
        for _ in range(2):
            changed = [following(record) for record in records]
            outcomes = await asyncio.gather(
                *(backend.replace(new, expecting(old)) for old, new in zip(records, changed, strict=True))
            )
            assert all(outcomes)
            records = changed
        assert await asyncio.gather(*(backend.load(record.id, START) for record in records)) == records
        assert await backend.trim_for_user("a", 3, newest=records[0].id, now=START) == 7
        assert await backend.delete_for_user("b", keep=records[1].id) == 9
        assert await backend.purge(records[0].expires_at, 2) == 2
        assert await backend.delete_all() == 2


async def test_several_event_loops(sessions_url: str) -> None:
    """Each event loop has lanes of its own, also in several threads at once."""
    backend = SQLAlchemyBackend(sessions_url, deadline=timedelta(seconds=PATIENCE))

    def use() -> list[Record | None]:
        async def everything() -> list[Record | None]:
            records = [make_record() for _ in range(10)]
            await asyncio.gather(*map(backend.insert, records))
            found = await asyncio.gather(*(backend.load(record.id, START) for record in records))
            assert found == records
            return found

        return asyncio.run(everything())

    loops = await asyncio.gather(*(asyncio.to_thread(use) for _ in range(4)))
    assert len({record.id for found in loops for record in found if record}) == 40
    await threads_ended()
    await backend.aclose()


async def test_shutdown_drains(sessions_url: str) -> None:
    """Closing a backend waits for what has been put on its lanes, whoever still waits for it."""
    backend = SQLAlchemyBackend(sessions_url)
    records = [make_record() for _ in range(50)]
    tasks = [asyncio.create_task(backend.insert(record)) for record in records]
    await checkpoint()
    await checkpoint()
    for task in tasks[::2]:
        task.cancel()
    await backend.aclose()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(await sql(sessions_url, "SELECT 1 FROM web_sessions")) == 50
    await threads_ended()


async def test_a_table_that_changes_below(postgres_sessions_url: str) -> None:
    """A migration that alters the table while statements are prepared for it costs nobody an error."""
    async with closing(SQLAlchemyBackend(postgres_sessions_url)) as backend:
        records = [make_record() for _ in range(10)]
        await asyncio.gather(*map(backend.insert, records))
        await asyncio.gather(*(backend.load(record.id, START) for record in records))
        await sql(
            postgres_sessions_url,
            "ALTER TABLE web_sessions ADD COLUMN extra integer",
            "ALTER TABLE web_sessions ALTER COLUMN user_id TYPE varchar(300)",
        )
        assert await asyncio.gather(*(backend.load(record.id, START) for record in records)) == records
        assert await backend.load(records[0].id, START) == records[0]
        assert all(await asyncio.gather(*(backend.replace(following(record), expecting(record)) for record in records)))
