"""The ways in which a backend sends its statements, and what all of them promise.

The tests of this folder run on each of `WAYS`, and ask nothing but what a user can: answers, methods of the backend,
and what the server sees of it.
"""

import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from sqlsessions.backends.sqlalchemy import SQLAlchemyBackend
from tests.faults.worker import Worker

#: A deadline short enough to wait for, and how much later an answer may come (R73).
DEADLINE = timedelta(seconds=0.5)
SLACK = timedelta(seconds=0.5)

#: For tests that freeze a server.
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the processes of a server are found in /proc")


@dataclass(frozen=True)
class Way:
    """A way in which a backend sends its statements."""

    #: The arguments of `SQLAlchemyBackend` that make it do so.
    options: dict[str, Any] = field(default_factory=dict)
    #: The most connections that one process may have then.
    connections: int = 2

    def backend(self, engine: str | sa.URL | AsyncEngine, deadline: timedelta = DEADLINE) -> SQLAlchemyBackend:
        """Return a backend that works in this way."""
        return SQLAlchemyBackend(engine, deadline=deadline, **self.options)

    def worker(self, folder: Path, url: str | sa.URL, deadline: timedelta = DEADLINE) -> Worker:
        """Return an application whose backend works in this way."""
        return Worker(folder, url, deadline=deadline, options=self.options)


WAYS = {"batched": Way(), "single": Way({"batch": False})}
