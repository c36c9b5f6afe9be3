"""Visitors who change their sessions without pause, and know what they were told."""

import asyncio
import time
from collections.abc import Sequence

from tests.faults.worker import Worker
from tests.looking import PATIENCE

#: How many visitors there are, how often each is served before and after a fault, and how many of them all notice it.
VISITORS, SERVED, NOTICED = 8, 10, 40


class Crowd:
    """Each visitor counts in a session of their own, and finds at the end whether all that was acknowledged is there.

    A write that was answered with 503 may have been carried out: its answer may be what was lost.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers
        self.acknowledged = [0] * VISITORS
        self.refused = [0] * VISITORS
        #: Seconds between two acknowledged writes of one visitor, at most.
        self.longest = 0.0
        #: Everybody has been served a few times.
        self.busy = asyncio.Event()
        #: Many have been refused since.
        self.noticed = asyncio.Event()
        #: To be set when everything should be well again.
        self.over = asyncio.Event()

    def __str__(self) -> str:
        return (
            f"{sum(self.acknowledged)} writes acknowledged, 0 lost, {sum(self.refused)} refused;"
            f" longest gap {self.longest:.2f} s"
        )

    async def come_and_go(self) -> None:
        """Begin; return when all is over, and everybody has been served a few times more."""
        async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
            for number in range(VISITORS):
                group.create_task(self._visit(number))

    async def _visit(self, number: int) -> None:
        async with self._workers[number % len(self._workers)].browser() as browser:
            await browser.post(f"/login/user{number}")
            cookies = dict(browser.cookies)
            assert cookies
            last, left = time.monotonic(), SERVED
            while left:
                answer = await browser.post("/count")
                if answer.status_code == 200:
                    self.acknowledged[number] += 1
                    self.longest, last = max(self.longest, time.monotonic() - last), time.monotonic()
                    left -= self.over.is_set()
                else:
                    assert answer.status_code == 503
                    self.refused[number] += 1
                if min(self.acknowledged) >= SERVED:
                    self.busy.set()
                if sum(self.refused) >= NOTICED:
                    self.noticed.set()
            count = (await browser.get("/")).json()["n"]
            assert self.acknowledged[number] <= count <= self.acknowledged[number] + self.refused[number]
            assert dict(browser.cookies) == cookies
