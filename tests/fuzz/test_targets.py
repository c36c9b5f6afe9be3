"""The fuzz targets hold for what was saved of earlier fuzzing, and for random bytes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.targets import GENUINE, LARGE, NAME, TARGETS

CORPUS = Path(__file__).with_name("corpus")
SAVED = sorted(CORPUS.glob("*/*"))


@pytest.mark.parametrize("saved", SAVED, ids=[f"{path.parent.name}/{path.name}" for path in SAVED])
def test_corpus(saved: Path) -> None:
    """What was saved breaks nothing, nor does it repeated to 64 KiB, which takes less than 20 ms of CPU time (R22)."""
    data = saved.read_bytes()
    TARGETS[saved.parent.name](data)
    TARGETS[saved.parent.name]((data * (LARGE // len(data) + 1))[:LARGE])


def test_corpus_is_small() -> None:
    """Each target has seeds, and all of them together are no burden on a checkout."""
    assert {path.parent.name for path in SAVED} == set(TARGETS)
    assert sum(path.stat().st_size for path in SAVED) < LARGE


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.binary(max_size=300) | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_random_bytes(name: str, data: bytes) -> None:
    """Nor do random bytes break anything (R7, R21, R99)."""
    TARGETS[name](data)


#: What Cookie headers are made of, ours and what looks like it.
PARTS = st.sampled_from(
    [
        NAME.encode(),
        b"=",
        b";",
        b" ",
        b"\t",
        b"\n",
        b"\xa0",
        b'"',
        b"\\",
        b"$Version",
        b",",
        NAME.lower().encode(),
        *GENUINE,
    ]
)


@given(parts=st.lists(PARTS, max_size=60))
def test_random_cookies(parts: list[bytes]) -> None:
    """Nor do headers put together from what cookies are made of: look-alikes, sandwiches, duplicates (R21)."""
    TARGETS["cookie"](b"".join(parts))
