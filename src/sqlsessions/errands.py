"""Work that is done whole: by the task that asks for it, and once that leaves, by one that takes over.

A client that goes away must leave nothing half-way. A task for every piece of work would see to that as well, and takes
longer to make and to wait for than most work does.
"""

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from contextvars import Context
from typing import Any

Work = Coroutine[Any, Any, None]


@types.coroutine
def _turn(waited: Any) -> Generator[Any, None, None]:
    """Wait as a task does by itself: if that is cancelled, so is what it waits for."""
    if waited is not None:
        waited._asyncio_future_blocking = True  # noqa: SLF001
    with suppress(Exception):  # an error of what it waits for, where the work will find it
        yield waited


class Errand:
    """Does *work* when it is awaited, in the caller's task as long as that stays.

    The caller leaves when it is cancelled, or when somebody calls `leave`; the rest is another task's then. That suits
    work which does not ask what task it is in, as timeouts and task groups do.
    """

    # What an object begins with stands in the class, and costs none of them anything.

    #: What does the rest; whether that has begun, and whether it is to cancel the work then: a task which is cancelled
    #: before it begins never does.
    _task: "asyncio.Task[None] | None" = None
    _begun = False
    _doomed = False
    #: What the work waits for: a future, or None for a turn of the event loop.
    _waited: Any = None
    #: What the caller waits for in its place.
    _wait: "_Wait | None" = None
    #: Whether it has come to its end, whatever that is.
    over = False

    def __init__(self, work: Work, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._work = work
        self._loop = loop or asyncio.get_running_loop()

    def __await__(self) -> Generator[Any, None, None]:
        """Do the work, and raise what it raises; return early if the caller has been made to leave."""
        self._step()
        while not self.over:
            self._wait = _Wait(self._waited) if self._waited is not None else None
            try:
                yield self._wait
            except asyncio.CancelledError:
                if self._wait is None or not self._wait.is_over_itself():
                    self.leave()
                    raise
            except Exception:  # noqa: BLE001, S110 - of what was waited for, where the work will find it
                pass
            except BaseException:  # the end of the caller itself, as of its event loop
                self._work.close()
                self._end(None)
                raise
            if self._task is not None:
                return
            self._step()

    def begin(self) -> None:
        """Do the work from now on, until it waits, and have a task do the rest: for what nobody waits for here."""
        # An error is told at the end, and nobody else's.
        with suppress(Exception, asyncio.CancelledError):
            self._step()
        self.leave()

    def leave(self) -> None:
        """Have another task do what is left."""
        if self.over or self._task is not None:
            return
        self._hand_on()
        if self._wait is not None:
            self._wait.leave()

    def _hand_on(self, before: "asyncio.Task[None] | None" = None) -> None:
        """Have a task do what is left, and another one if that is cancelled before it begins, as all are when an event
        loop ends: it would leave the work where it stands, for ever.
        """
        if before is None or not (self._begun or self.over):
            self._task = self._loop.create_task(self._rest())
            self._task.add_done_callback(self._hand_on)

    def cancel(self) -> None:
        """Cancel the work, though not its caller."""
        self.leave()
        self._doomed = True
        if self._task is not None and self._begun:
            self._task.cancel()

    def _step(self, error: BaseException | None = None) -> None:
        """Go on until the work waits or is over; with *error*, raise that in it."""
        try:
            self._waited = self._work.send(None) if error is None else self._work.throw(error)
        except StopIteration:
            self._end(None)
        except BaseException as raised:
            self._end(raised)
            raise
        else:
            if self._waited is not None:
                # As a task does with a future that it is given to wait for.
                self._waited._asyncio_future_blocking = False  # noqa: SLF001

    async def _rest(self) -> None:
        self._begun = True
        if self._doomed and self._waited is not None:
            self._waited.cancel()
        try:
            if self._doomed:
                self._step(asyncio.CancelledError())
            while not self.over:
                try:
                    await _turn(self._waited)
                except asyncio.CancelledError as error:
                    self._step(error)
                else:
                    self._step()
        except Exception:  # noqa: BLE001 - `_end` has been told, and nobody else is there
            return

    def _end(self, error: BaseException | None) -> None:
        self.over, self._waited, self._wait = True, None, None
        self._tell(error)

    def _tell(self, error: BaseException | None) -> None:
        """Note that the work is over, by *error* or well: for those who want to know."""


class _Wait:
    """Stands before a task for a future, which is not cancelled when the task is: the wait ends, and that is all.

    It has what a task asks of anything that it is given to wait for, and adds no turn of the event loop.
    """

    __slots__ = ("_asyncio_future_blocking", "_cancelled", "_context", "_future", "_wake", "_why")

    def __init__(self, future: Any) -> None:
        self._asyncio_future_blocking = True
        self._future = future
        self._wake: Callable[[Any], object] | None = None
        self._context: Context | None = None
        self._cancelled = False
        #: What was said with the cancellation: by this, cancel scopes know their own.
        self._why: tuple[object, ...] = ()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the future's event loop."""
        loop: asyncio.AbstractEventLoop = self._future.get_loop()
        return loop

    def add_done_callback(self, wake: Callable[[Any], object], *, context: Context | None = None) -> None:
        """Have the one task that waits called when the future is done."""
        self._wake, self._context = wake, context
        self._future.add_done_callback(wake, context=context)

    def remove_done_callback(self, wake: Callable[[Any], object]) -> int:
        """Have it called no more; return 0 if that comes too late."""
        removed: int = self._future.remove_done_callback(wake)
        return removed

    def cancel(self, msg: object = None) -> bool:
        """Wake the task, which is cancelled; tell whether that was still to be done."""
        if not self.leave():
            return False
        self._cancelled, self._why = True, () if msg is None else (msg,)
        return True

    def leave(self) -> bool:
        """Wake the task before the future is done; tell whether it was waiting."""
        if self._wake is None or not self._future.remove_done_callback(self._wake):
            return False
        self.get_loop().call_soon(self._wake, self, context=self._context)
        return True

    def result(self) -> None:
        """Say to the task, when it has been woken by this, whether it is cancelled."""
        if self._cancelled:
            raise asyncio.CancelledError(*self._why)

    def cancelled(self) -> bool:
        """Tell whether what is waited for has been cancelled."""
        found: bool = self._future.cancelled()
        return found

    def is_over_itself(self) -> bool:
        """Tell whether it is not the task that was cancelled, but what it waits for."""
        return not self._cancelled and self.cancelled()


class Commit(Errand):
    """An errand that keeps what it is done to, is known while it runs, and tells of its failure.

    *apart*, it has a task of its own from the start, whatever its work asks of that.
    """

    _ended: "asyncio.Future[None] | None" = None

    def __init__(
        self, work: Work, kept: object, running: "set[Commit]", failed: Callable[[Exception], None], *, apart: bool
    ) -> None:
        Errand.__init__(self, work)  # `super` makes an object, up to Python 3.11
        self._kept = kept
        self._running = running
        self._failed: Callable[[Exception], None] | None = failed
        self._apart = apart
        running.add(self)

    def __await__(self) -> Generator[Any, None, None]:
        """Do the work; raise what it raises."""
        return self._in_a_task().__await__() if self._apart else Errand.__await__(self)

    def ended(self) -> "asyncio.Future[None]":
        """Return what is done when this is over; it is nobody's to cancel."""
        if self._ended is None:
            self._ended = self._loop.create_future()
            if self.over:
                self._ended.set_result(None)
        return self._ended

    @property
    def here(self) -> bool:
        """Whether it belongs to the running event loop."""
        return self._loop is asyncio.get_running_loop()

    async def _in_a_task(self) -> None:
        task = self._task = self._loop.create_task(self._all())
        task.add_done_callback(_looked_at)
        await asyncio.wait({task})
        task.result()

    async def _all(self) -> None:
        try:
            await self._work
        except BaseException as error:
            self._end(error)
            raise
        self._end(None)

    def _tell(self, error: BaseException | None) -> None:
        self._running.discard(self)
        if self._failed is not None and isinstance(error, Exception):
            self._failed(error)
        # Whoever asked for this keeps it: no cycle for the garbage collector.
        self._kept = self._failed = None
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)


async def drain(running: set[Commit]) -> None:
    """Wait for those of *running* that belong to this event loop."""
    while left := {commit.ended() for commit in running if commit.here}:
        await asyncio.wait(left)


def _looked_at(task: "asyncio.Task[None]") -> None:
    if not task.cancelled():
        task.exception()  # the caller may have gone: nobody else will look
