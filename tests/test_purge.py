"""The purge: in batches, a minute late, at intervals that vary, and never ending at an error."""

import asyncio
import logging
from datetime import datetime, timedelta

import pytest

from sqlsessions import BackendUnavailable, ConfigurationError, InMemoryBackend, SQLAlchemyBackend, purge
from sqlsessions.purge import MAX_BATCH_SIZE, purge_forever
from sqlsessions.testing import MINUTE, START, make_record

pytestmark = pytest.mark.anyio


class EnoughError(Exception):
    """Ends a loop that has no end."""


@pytest.mark.parametrize("batch_size", [0, -1, MAX_BATCH_SIZE + 1])
async def test_batch_size(batch_size: int) -> None:
    """A batch size that would do nothing, or hold a lock for long, is refused with the bounds (R51)."""
    with pytest.raises(ConfigurationError, match="from 1 to 10,000"):
        await purge(InMemoryBackend(), batch_size=batch_size)


async def test_batches(backend: InMemoryBackend | SQLAlchemyBackend) -> None:
    """All that has expired goes, a batch at a time, and each is told of (R85)."""
    for _ in range(5):
        await backend.insert(make_record(expires_at=START - MINUTE))
    kept = make_record(expires_at=START - MINUTE + timedelta(microseconds=1))
    await backend.insert(kept)
    told: list[int] = []
    assert await purge(backend, batch_size=2, clock=lambda: START, on_batch=told.append) == 5
    assert told == [2, 4, 5]
    # A minute is left for hosts whose clocks are behind.
    assert await purge(backend, clock=lambda: START + timedelta(microseconds=1)) == 1


async def test_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each batch the database is left to others for as long as that took."""
    now = 0.0
    pauses: list[float] = []

    class Slow(InMemoryBackend):
        async def purge(self, before: datetime, limit: int) -> int:
            nonlocal now
            count = await super().purge(before, limit)
            now += count
            return count

    async def sleep(seconds: float) -> None:
        nonlocal now
        pauses.append(seconds)
        now += seconds

    backend = Slow()
    for _ in range(5):
        await backend.insert(make_record(expires_at=START - MINUTE))
    with monkeypatch.context() as patch:
        patch.setattr(asyncio.get_running_loop(), "time", lambda: now)
        assert await purge(backend, batch_size=2, clock=lambda: START, sleep=sleep) == 5
    assert pauses == [2, 2, 1]


async def test_intervals(caplog: pytest.LogCaptureFixture) -> None:
    """It waits first, half to one and a half times the interval, differently each time; errors are survived (R85)."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) > 50:
            raise EnoughError

    async def fail() -> None:
        if len(waits) % 2:
            raise BackendUnavailable("no connection to the database")
        raise RuntimeError("password=geheim")

    with caplog.at_level(logging.WARNING), pytest.raises(EnoughError):
        await purge_forever(fail, timedelta(minutes=10), sleep=sleep)
    assert all(300 <= wait <= 900 for wait in waits)
    assert len(set(waits)) == len(waits)
    assert len(caplog.records) == 50
    assert "failed (BackendUnavailable: no connection to the database)" in caplog.text
    assert "failed (RuntimeError);" in caplog.text
    assert "geheim" not in caplog.text


async def test_an_error_that_ends_it() -> None:
    """What no other time will mend ends the loop, if whoever runs it says so."""

    async def sleep(seconds: float) -> None:
        pass

    async def fail() -> None:
        raise ConfigurationError("the driver does not take an option of the URL")

    with pytest.raises(ConfigurationError):
        await purge_forever(fail, timedelta(minutes=10), sleep=sleep, fatal=ConfigurationError)
