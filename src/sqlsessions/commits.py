"""Work that is done whole: by the task that asks for it, and once that is cancelled, by one that takes over.

A client that goes away must leave nothing half-way. A task for each commit would see to that as well, and costs a
request that writes more than encoding its session does.
"""

import asyncio
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any

Work = Coroutine[Any, Any, None]


class Commit:
    """One piece of *work*, done whole when it is awaited; it keeps what it is done to, and tells of its failure.

    In place, the caller's task drives it as far as it goes; the rest is another task's if the caller is cancelled.
    That only suits work which does not ask what task it is in, as timeouts and task groups do. *apart*, it has a task
    of its own from the start.
    """

    __slots__ = ("_apart", "_ended", "_failed", "_kept", "_loop", "_running", "_task", "_work", "over")

    def __init__(
        self, work: Work, kept: object, running: "set[Commit]", failed: Callable[[Exception], None], *, apart: bool
    ) -> None:
        self._work = work
        self._kept = kept
        self._running = running
        self._failed: Callable[[Exception], None] | None = failed
        self._apart = apart
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[None] | None = None
        #: Whether it has come to its end, whatever that is.
        self.over = False
        running.add(self)

    def __await__(self) -> Generator[Any, None, None]:
        """Do the work; raise what it raises."""
        if self._apart:
            self._task = self._loop.create_task(self._all())
            self._task.add_done_callback(_looked_at)
            yield from asyncio.wait({self._task}).__await__()
            return self._task.result()
        waited = self._step()
        while not self.over:
            try:
                yield from self._pause(waited)
            except asyncio.CancelledError:
                self._task = self._loop.create_task(self._rest(waited))
                raise
            except BaseException:  # the caller's own end, which is that of its event loop
                self._close()
                raise
            waited = self._step()
        return None

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

    def _step(self) -> Any:
        """Go on until the work waits or is over; return what it waits for: a future, or None for one turn of the event
        loop.
        """
        try:
            waited = self._work.send(None)
        except StopIteration:
            self._end()
            return None
        except Exception as error:
            self._fail(error)
            raise
        except BaseException:
            self._end()
            raise
        if waited is not None:
            # What a task does with a future that it is given to wait for.
            waited._asyncio_future_blocking = False  # noqa: SLF001
        return waited

    def _pause(self, waited: Any) -> Generator[Any, None, None]:
        """Wait for *waited* without passing on to it that the caller is cancelled."""
        if waited is None:
            yield
            return
        gate = self._loop.create_future()
        waited.add_done_callback(partial(_opened, gate))
        yield from gate

    async def _rest(self, waited: Any) -> None:
        """Do what is left, in the place of a caller that has gone. Nobody looks at how it ends but *failed*."""
        try:
            while not self.over:
                await (asyncio.sleep(0) if waited is None else asyncio.wait({waited}))
                waited = self._step()
        except Exception:  # noqa: BLE001 - told already
            return
        finally:
            self._close()

    async def _all(self) -> None:
        try:
            await self._work
        except Exception as error:
            self._fail(error)
            raise
        finally:
            self._end()

    def _fail(self, error: Exception) -> None:
        if self._failed is not None:
            self._failed(error)
        self._end()

    def _close(self) -> None:
        if not self.over:
            self._end()
            self._work.close()

    def _end(self) -> None:
        self.over = True
        self._running.discard(self)
        # Whoever asked for this keeps it: no cycle for the garbage collector.
        self._kept = self._failed = None
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)


async def drain(running: set[Commit]) -> None:
    """Wait for those of *running* that belong to this event loop."""
    while left := {commit.ended() for commit in running if commit.here}:
        await asyncio.wait(left)


def _opened(gate: "asyncio.Future[None]", _: object) -> None:
    if not gate.done():
        gate.set_result(None)


def _looked_at(task: "asyncio.Task[None]") -> None:
    if not task.cancelled():
        task.exception()  # the caller may have gone: nobody else will look
