"""SECURITY.md promises what is tested, and answers every requirement of the chapters it names."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECURITY = (ROOT / "SECURITY.md").read_text()

#: The requirements of OWASP ASVS 5.0 in V3.3 and V7: how many there are in each section.
ASVS = {"3.3": 5, "7.1": 3, "7.2": 4, "7.3": 2, "7.4": 5, "7.5": 3, "7.6": 2}


def rows(heading: str) -> list[list[str]]:
    """Return the rows of the first table below a heading, without its head."""
    text = SECURITY.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.search(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert found
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[0].splitlines()[2:]]


@cache
def functions_of(name: str) -> set[str]:
    """Return the names of the tests in a file."""
    tree = ast.parse((ROOT / "tests" / name).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {function.name for function in functions if function.name.startswith("test_")}


def test_guarantees() -> None:
    """Every guarantee names tests, and every test that is named exists."""
    for guarantee, tests in rows("Guarantees"):
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
        assert named, guarantee
        assert [(file, name) for file, name in named if name not in functions_of(file)] == []
        assert len(named) == tests.count("`") / 2


def test_attacks_are_promised() -> None:
    """Every test that plays an attacker stands behind a guarantee."""
    named = set(re.findall(r"`test_attacks\.py::(\w+)`", SECURITY))
    assert named == functions_of("test_attacks.py")


def test_asvs() -> None:
    """Each requirement of the two chapters is either met, or the application's job, once and in order."""
    table = rows("OWASP ASVS 5.0")
    assert [number for number, *_ in table] == [f"{section}.{n + 1}" for section in ASVS for n in range(ASVS[section])]
    assert {status for _, _, status, _ in table} == {"Met", "The application's job"}
    assert all(how for _, _, status, how in table if status == "Met")


def test_links() -> None:
    """Links lead to files that exist."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", SECURITY):
        assert (ROOT / target).exists(), target
