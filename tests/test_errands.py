"""Errands are done whole, by whoever asks for them as long as that stays; who leaves loses nothing but its place."""

import asyncio
import gc
import weakref
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from sqlsessions.backends.base import detached
from sqlsessions.backends.memory import InMemoryBackend
from sqlsessions.errands import Commit, Errand, drain
from sqlsessions.errors import BackendTimeout
from tests.looking import PATIENCE, counted_tasks

pytestmark = pytest.mark.anyio


class Log(list[object]):
    """What happened, in order."""

    async def wait(self, *waits: "asyncio.Future[object] | None") -> None:
        """Wait for each: a future, or with None for a turn of the event loop; note what came of it."""
        for wait in waits:
            try:
                if wait is None:
                    await asyncio.sleep(0)
                self.append(wait and await wait)
            except ValueError as error:
                self.append(error.args[0])
            except BaseException as error:
                self.append(type(error))
                raise
        self.append("end")


async def turns() -> None:
    """Let everything go on that can."""
    for _ in range(20):
        await checkpoint()


def futures(count: int) -> list["asyncio.Future[object]"]:
    """Return so many."""
    return [asyncio.get_running_loop().create_future() for _ in range(count)]


async def wait(errand: Errand) -> None:
    """Wait for it, in a task of the test's own."""
    await errand


async def called(errand: Errand) -> "asyncio.Task[None]":
    """Return a task that waits for it, and has gone as far as it goes by itself."""
    caller = asyncio.create_task(wait(errand))
    await turns()
    return caller


async def test_in_place() -> None:
    """Work is done in the task that awaits it, whatever it waits for."""
    log, (one, two) = Log(), futures(2)
    asyncio.get_running_loop().call_soon(one.set_result, 1)
    asyncio.get_running_loop().call_later(0.001, two.set_exception, ValueError(2))
    errand = Errand(log.wait(one, None, two))
    with counted_tasks() as made:
        await errand
        errand.leave()
        errand.cancel()
    assert (log, made, errand.over) == ([1, None, 2, "end"], [], True)


async def test_an_error_in_place() -> None:
    """Its error is the caller's."""

    async def fail() -> None:
        await asyncio.sleep(0)
        raise KeyError(1)

    errand = Errand(fail())
    with pytest.raises(KeyError):
        await errand
    assert errand.over


async def test_what_a_cancellation_says() -> None:
    """A cancellation arrives with what was said with it: by that, a cancel scope knows its own and ends there."""
    (future,) = futures(1)
    errand = Errand(Log().wait(future))
    with anyio.move_on_after(0.001) as scope:
        await errand
    assert scope.cancelled_caught
    future.set_result(None)
    await turns()
    assert errand.over


async def test_a_task_that_is_cancelled_before_it_begins() -> None:
    """So does work whose own task is, as every task is when asyncio.run ends."""
    log, (future,) = Log(), futures(1)
    errand = Errand(log.wait(future))
    errand.begin()
    for _ in range(2):
        assert errand._task is not None
        errand._task.cancel()
        await checkpoint()
        await checkpoint()
    future.set_result(0)
    await turns()
    assert (log, errand.over) == ([0, "end"], True)


@pytest.mark.parametrize("at", [0, 1, 2])
async def test_a_caller_that_is_cancelled(at: int) -> None:
    """Wherever it is cancelled, it goes at once; what the work waits for is not cancelled, and the rest is done."""
    log, (one, two, three) = Log(), futures(3)
    errand = Errand(log.wait(one, two, three))
    caller = await called(errand)
    for number, future in enumerate((one, two, three)):
        if number == at:
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
            assert (errand.over, future.cancelled()) == (False, False)
        future.set_result(number)
        await turns()
    assert (log, errand.over) == ([0, 1, 2, "end"], True)


async def test_a_caller_that_is_cancelled_between_turns() -> None:
    """So it is where the work gives way to others without waiting for anything."""
    log = Log()
    errand = Errand(log.wait(None, None, None))
    caller = asyncio.create_task(wait(errand))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await turns()
    assert log == [None, None, None, "end"]


async def test_what_fails_after_the_caller_has_gone() -> None:
    """The work sees what became of what it waited for; an error of its own troubles nobody."""
    log, (one, two), complaints = Log(), futures(2), []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    errand = Errand(log.wait(one, two))
    caller = await called(errand)
    caller.cancel()
    await turns()
    one.set_exception(ValueError("broken"))
    await turns()
    two.set_exception(KeyError())
    await turns()
    gc.collect()
    assert (log, errand.over, complaints) == (["broken", KeyError], True, [])


async def test_a_caller_that_is_cancelled_too_late() -> None:
    """Cancelled when what it waited for is there but it has not gone on yet, it goes, and the rest is done."""
    log, (one,) = Log(), futures(1)
    caller = await called(Errand(log.wait(one)))
    one.set_result(1)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await turns()
    assert log == [1, "end"]


async def test_what_is_cancelled_itself() -> None:
    """What the work waits for may be cancelled by others: that is the work's to see, and then the caller's."""
    log, (one,) = Log(), futures(1)
    errand = Errand(log.wait(one))
    caller = await called(errand)
    one.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert (log, errand.over) == ([asyncio.CancelledError], True)


@pytest.mark.parametrize("inner_first", [False, True])
async def test_an_errand_within_an_errand(*, inner_first: bool) -> None:
    """Each has its own end: leaving the inner lets the outer go on, and cancelling the outer's caller neither."""
    log, outer_log, (one, two) = Log(), Log(), futures(2)
    inner = Errand(log.wait(one))

    async def work() -> None:
        await inner
        await outer_log.wait(two)

    outer = Errand(work())
    caller = await called(outer)
    if inner_first:
        inner.leave()
        await turns()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    if not inner_first:
        inner.leave()
    await turns()
    assert (log, outer_log, inner.over, outer.over) == ([], [], False, False)
    two.set_result(2)
    await turns()
    assert (log, outer_log, inner.over, outer.over) == ([], [2, "end"], False, True)
    one.set_result(1)
    await turns()
    assert log == [1, "end"]


async def test_leaving() -> None:
    """Made to leave, the caller goes on without an error while the work does."""
    log, (one,) = Log(), futures(1)
    errand = Errand(log.wait(one))
    caller = await called(errand)
    errand.leave()
    errand.leave()
    await caller
    assert log == []
    one.set_result(1)
    await turns()
    assert log == [1, "end"]


@pytest.mark.parametrize("left", [False, True])
async def test_cancelling(*, left: bool) -> None:
    """Cancelling the work cancels what it waits for and lets it clean up, which may take time; its caller goes on."""
    log, (one, two) = Log(), futures(2)

    async def clean_up() -> None:
        try:
            await log.wait(one)
        finally:
            await log.wait(two)

    errand = Errand(clean_up())
    caller = await called(errand)
    if left:
        errand.leave()
    errand.cancel()
    await caller
    await turns()
    assert (one.cancelled(), log) == (True, [asyncio.CancelledError])
    two.set_result(2)
    await turns()
    assert (log, errand.over) == ([asyncio.CancelledError, 2, "end"], True)


async def test_beginning() -> None:
    """Begun, the work is done at once until it waits, and then by a task of its own; nobody hears of its error."""
    log, (one,) = Log(), futures(1)
    errand = Errand(log.wait(one))
    errand.begin()
    one.set_exception(KeyError(7))
    await turns()
    assert (log, errand.over) == ([KeyError], True)

    async def fail() -> None:
        log.append("failed")
        raise KeyError(7)

    at_once = Errand(fail())
    at_once.begin()
    assert (log.pop(), at_once.over) == ("failed", True)


async def test_a_caller_that_is_closed() -> None:
    """The work of a coroutine that nobody drives any more, as after the end of its event loop, is closed with it."""
    log, (one,) = Log(), futures(1)
    errand = Errand(log.wait(one))
    caller = wait(errand)
    caller.send(None)
    caller.close()
    assert (log, errand.over) == ([GeneratorExit], True)


# commits


class Kept:
    """What a commit is done to."""


def commit(
    work: Coroutine[Any, Any, None], running: set[Commit], kept: object = None, *, apart: bool = False
) -> tuple[Commit, list[Exception]]:
    """Return a commit, and where it tells of its failure."""
    failures: list[Exception] = []
    return Commit(work, kept, running, failures.append, apart=apart), failures


@pytest.mark.parametrize("apart", [False, True])
async def test_commit(*, apart: bool) -> None:
    """A commit is known while it runs, and keeps what it is done to no longer than that."""
    running: set[Commit] = set()
    (one,), log = futures(1), Log()
    kept = Kept()
    found, done = weakref.ref(kept), weakref.ref(one)
    caller = asyncio.create_task(wait(commit(log.wait(one), running, kept, apart=apart)[0]))
    del kept
    await turns()
    assert found() is not None
    (running_commit,) = running
    one.set_result(1)
    await caller
    assert (log, running, found(), running_commit.over) == ([1, "end"], set(), None, True)
    assert running_commit.ended().done()
    del one
    assert done() is None


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("apart", [False, True])
async def test_a_commit_that_fails(*, apart: bool, gone: bool) -> None:
    """Its failure is told once, to the caller as well if that is still there."""
    running: set[Commit] = set()
    (one,) = futures(1)
    found, failures = commit(Log().wait(one), running, apart=apart)
    caller = await called(found)
    if gone:
        caller.cancel()
    await turns()
    one.set_exception(KeyError(7))
    with pytest.raises(asyncio.CancelledError if gone else KeyError):
        await caller
    await turns()
    assert (list(map(type, failures)), running) == ([KeyError], set())


@pytest.mark.parametrize("apart", [False, True])
async def test_drain(*, apart: bool) -> None:
    """Draining waits for those whose callers have gone, and cancels none if it is cancelled itself."""
    running: set[Commit] = set()
    (one,), log = futures(1), Log()
    caller = await called(commit(log.wait(one), running, apart=apart)[0])
    caller.cancel()
    draining, impatient = (asyncio.create_task(drain(running)) for _ in range(2))
    await turns()
    impatient.cancel()
    await turns()
    assert (draining.done(), log) == (False, [])
    one.set_result(1)
    async with asyncio.timeout(PATIENCE):
        await draining
    assert log == [1, "end"]
    with suppress(asyncio.CancelledError):
        await caller


async def test_apart() -> None:
    """Work that has a task of its own may set limits of time, which hold after its caller has gone."""
    running: set[Commit] = set()

    async def limited() -> None:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        except TimeoutError:
            raise BackendTimeout("late") from None

    found, failures = commit(limited(), running, apart=True)
    caller = await called(found)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    async with asyncio.timeout(PATIENCE):
        await found.ended()
    assert list(map(type, failures)) == [BackendTimeout]


def test_detached() -> None:
    """Whether operations belong to no task is said by each class for itself: what a subclass adds may belong to one."""

    class Limited(InMemoryBackend):
        pass

    class Bold(InMemoryBackend):
        detached = True

    assert [detached(backend) for backend in (InMemoryBackend(), Limited(), Bold(), object())] == [
        True, False, True, False,
    ]  # fmt: skip
