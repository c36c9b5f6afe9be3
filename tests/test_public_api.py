"""The names that the package exports are those that the README lists."""

import ast
import inspect
import re
from collections.abc import Sequence

import pytest

import sqlsessions
from sqlsessions import Event, Record
from tests.commands import ROOT


def listed() -> list[str]:
    """Return the names in the README's list."""
    section = (ROOT / "README.md").read_text().partition("\n## Names\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return re.findall(r"`(\w+)`", "\n".join(rows))


def exported() -> list[str]:
    """Return the names that ``__init__`` imports for others."""
    tree = ast.parse(inspect.getsource(sqlsessions))
    return [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]


def test_names() -> None:
    """README and package name the same things, each once."""
    assert sorted(listed()) == sorted(exported())


def test_import_everything() -> None:
    """``from sqlsessions import *`` brings those names and no modules: one is called ``fastapi``."""
    brought: dict[str, object] = {}
    exec("from sqlsessions import *", brought)  # noqa: S102 - in a function it may not stand by itself
    assert sorted(brought.keys() - {"__builtins__"}) == sorted(exported())
    assert sqlsessions.__all__ == sorted(sqlsessions.__all__)


def test_docstrings() -> None:
    """Whatever is exported says what it is."""
    for name in exported():
        value = getattr(sqlsessions, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, name


@pytest.mark.parametrize(("of", "fields"), [(Record, Record._fields), (Event, Event.__slots__)])
def test_fields(of: type, fields: Sequence[str]) -> None:
    """The docstring says what each field is: of a comment beside it neither ``help()`` nor an editor knows."""
    assert re.findall(r"\*(\w+)\*", of.__doc__ or "") == list(fields)
