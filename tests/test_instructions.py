"""The middleware takes no more instructions than it did."""

import os

import pytest

from benchmarks.endpoints import Endpoint
from benchmarks.instructions import LIMITS, count, ratios
from tests.servers import Unavailable


def test_instructions() -> None:
    """A request takes at most the instructions that are committed, as a multiple of the cookie middleware's."""
    try:
        counts = count()
    except Unavailable as error:
        if os.environ.get("CI"):
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
    found = ratios(counts)
    assert {endpoint: ratio for endpoint, ratio in found.items() if ratio > LIMITS[endpoint]} == {}, counts


def test_ratios() -> None:
    """What counts is what is added to the bare application."""
    counts: dict[tuple[str, Endpoint], float] = {
        ("bare", "/none"): 100.0,
        ("cookie", "/read"): 110.0,
        ("cookie", "/write"): 120.0,
        ("sqlsessions", "/read"): 130.0,
        ("sqlsessions", "/write"): 130.0,
    }
    assert ratios(counts) == {"/read": 3.0, "/write": 1.5}
