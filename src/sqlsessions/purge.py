"""Deleting expired records in bulk. Expiry is right without it (every statement compares); the purge keeps the table
small.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import NoReturn

from sqlsessions.backends.base import Backend
from sqlsessions.errors import ConfigurationError
from sqlsessions.events import described
from sqlsessions.record import utc_now

logger = logging.getLogger("sqlsessions")

#: Hosts are assumed to agree on the time within this; a purge waits as long, so that no host deletes what another
#: still serves.
CLOCK_TOLERANCE = timedelta(minutes=1)
#: Some milliseconds of the database's time. Larger ones are done sooner, and felt by whoever reads meanwhile.
BATCH_SIZE = 2_000
MAX_BATCH_SIZE = 10_000


async def purge(
    backend: Backend,
    *,
    batch_size: int = BATCH_SIZE,
    clock: Callable[[], datetime] = utc_now,
    on_batch: Callable[[int], object] | None = None,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> int:
    """Delete all records that had expired a minute ago, in batches, and return how many were deleted.

    Each batch is short and by the expiry index, and is followed by a pause as long as it took, which is the others'
    half of the database; *on_batch* is given the number deleted so far. Many processes may purge at once without harm.
    Raises `BackendError` if a batch fails; the batches before it stay deleted.
    """
    if not 1 <= batch_size <= MAX_BATCH_SIZE:
        raise ConfigurationError(f"batch_size must be from 1 to {MAX_BATCH_SIZE:,}, not {batch_size!r}")
    before = clock() - CLOCK_TOLERANCE
    deleted = 0
    time = asyncio.get_running_loop().time
    while True:
        begun = time()
        count = await backend.purge(before, batch_size)
        # A short batch is not the last one: a purge elsewhere may have taken some of the same ids. An empty one is.
        if not count:
            return deleted
        deleted += count
        if on_batch is not None:
            on_batch(deleted)
        await sleep(time() - begun)


async def purge_forever(
    run: Callable[[], Awaitable[object]],
    interval: timedelta,
    *,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    fatal: type[Exception] | tuple[type[Exception], ...] = (),
) -> NoReturn:
    """Await *run* every *interval*, half to one and a half times of it, until cancelled; an error is logged and the
    loop goes on, unless it is a *fatal* one.

    The jitter keeps workers that started together apart. It begins with a wait, so that a start-up is not a stampede.
    """
    while True:
        await sleep(interval.total_seconds() * random.uniform(0.5, 1.5))  # noqa: S311 - not a secret
        try:
            await run()
        except fatal:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it was, the next interval tries again
            logger.warning("sqlsessions: purge failed (%s); trying again in about %s", described(error), interval)
