"""dev.py installs what is missing, once, and then gets out of the way."""

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import dev

SOURCE = Path(dev.__file__)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The extras of each installation, which takes no time and succeeds."""
    installations: list[list[str]] = []

    def install(self: dev.Environment, extras: list[str]) -> None:
        installations.append(extras)

    monkeypatch.setattr(dev.Environment, "_install", install)
    return installations


@pytest.fixture
def environment(tmp_path: Path) -> dev.Environment:
    """The environment of a checkout that nobody has used yet."""
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    return dev.Environment(tmp_path)


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that dev.py would turn into, with "python" for the environment's interpreter."""
    commands: list[list[str]] = []
    monkeypatch.setattr(dev, "_become", commands.append)
    monkeypatch.setattr(dev, "_python", lambda extra: "python")
    return commands


def test_cold_start(environment: dev.Environment, installed: list[list[str]]) -> None:
    """The first start makes an environment whose interpreter runs, and installs the project into it."""
    environment.provide("test")
    assert installed == [["test"]]
    prefix = subprocess.check_output([environment.python, "-c", "import sys; print(sys.prefix)"], text=True)
    assert Path(prefix.strip()).samefile(environment.folder)


def test_warm_start(environment: dev.Environment, installed: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm start runs no program at all, pip included."""
    environment.provide("test")

    def run(*arguments: object, **options: object) -> None:
        pytest.fail(f"a warm start ran {arguments}")

    monkeypatch.setattr(subprocess, "Popen", run)
    environment.provide("test")
    assert installed == [["test"]]


def test_extras_accumulate(environment: dev.Environment, installed: list[list[str]]) -> None:
    """Going back and forth between demo and test installs each of them once."""
    for extra in ["test", "demo", "test", "demo"]:
        environment.provide(extra)
    assert installed == [["test"], ["demo", "test"]]


def test_changed_metadata(environment: dev.Environment, installed: list[list[str]]) -> None:
    """A pyproject.toml that has changed is installed again, with every extra so far."""
    environment.provide("test")
    environment.provide("demo")
    (environment.root / "pyproject.toml").write_text("[project]\ndependencies = []\n")
    environment.provide("test")
    assert installed[2:] == [["demo", "test"]]


def test_moved_checkout(environment: dev.Environment, installed: list[list[str]], tmp_path: Path) -> None:
    """A checkout that was moved or copied is installed again: it would run the code of the old place."""
    environment.provide("test")
    place = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(place)
    dev.Environment(place).provide("test")
    assert len(installed) == 2


def test_interrupted_installation(
    environment: dev.Environment, installed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an installation that did not end, the next start begins with an empty environment."""

    def interrupt(self: dev.Environment, extras: list[str]) -> None:
        (self.folder / "half-done").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(dev.Environment, "_install", interrupt)
        with pytest.raises(KeyboardInterrupt):
            environment.provide("test")
    environment.provide("test")
    assert installed == [["test"]]
    assert not (environment.folder / "half-done").exists()


def test_interpreter_gone(environment: dev.Environment, installed: list[list[str]]) -> None:
    """An environment whose Python has been uninstalled is made anew."""
    environment.provide("test")
    environment.python.unlink()
    environment.python.symlink_to("/nonexistent")
    environment.provide("test")
    assert len(installed) == 2
    assert environment.python.exists()


def test_other_version(
    environment: dev.Environment, installed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of Python gets an environment of its own and leaves the first one valid."""
    environment.provide("test")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "version_info", (3, 99, 0))
        environment.provide("test")
    environment.provide("test")
    assert installed == [["test"], ["test"]]


def test_failed_installation(environment: dev.Environment, capfd: pytest.CaptureFixture[str]) -> None:
    """A pip that fails is heard, and what it left behind does not count as installed."""
    (environment.root / "pyproject.toml").write_text("not TOML")
    with pytest.raises(SystemExit, match="installation failed"):
        environment.provide("test")
    assert "TOMLDecodeError" in capfd.readouterr().err
    assert not environment.stamp.exists()


def test_no_pip(environment: dev.Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python with neither pip nor ensurepip is told what to install."""
    monkeypatch.setattr(dev, "_succeeds", lambda command: False)
    with pytest.raises(SystemExit, match="apt-get install python3-pip"):
        environment.provide("test")


def test_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older Python understands the file far enough to say which one is needed."""
    ast.parse(SOURCE.read_text(), feature_version=(3, 7))
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or later; this is 3\.9\."):
        runpy.run_path(str(SOURCE))


def test_pytest_options(become: list[list[str]]) -> None:
    """Everything after `test` reaches pytest as it was written."""
    dev.main(["test", "-k", "cookie", "--help", "--", "-x"])
    assert become == [["python", "-m", "pytest", "-k", "cookie", "--help", "--", "-x"]]


def test_bench_options(become: list[list[str]]) -> None:
    """Everything after `bench` reaches the benchmarks as it was written."""
    dev.main(["bench", "--only", "sqlite", "--help"])
    assert become == [["python", "-m", "benchmarks", "--only", "sqlite", "--help"]]


def test_fuzz_options(become: list[list[str]]) -> None:
    """So does everything after `fuzz` reach the fuzzer."""
    dev.main(["fuzz", "--seconds", "3", "row"])
    assert become == [["python", "-m", "tests.fuzz", "--seconds", "3", "row"]]


@pytest.mark.parametrize("url", [None, "postgresql+asyncpg://localhost/app"])
def test_demo(become: list[list[str]], monkeypatch: pytest.MonkeyPatch, url: str | None) -> None:
    """The demo migrates the database of the environment, or else a file beside it, and then serves."""
    migrated: list[tuple[list[str], str]] = []

    def run(command: list[str]) -> int:
        migrated.append((command[1:3], os.environ["SQLSESSIONS_URL"]))
        return 0

    monkeypatch.setattr(dev, "_run", run)
    # Set even where it is to be missing, so that it is missing again afterwards.
    monkeypatch.setenv("SQLSESSIONS_URL", url or "")
    if not url:
        del os.environ["SQLSESSIONS_URL"]
    dev.main(["demo", "--port", "8123"])
    assert migrated == [(["-m", "alembic"], url or f"sqlite+aiosqlite:///{SOURCE.with_name('demo.db')}")]
    assert [command[2:4] + command[-2:] for command in become] == [["uvicorn", "examples.demo:app", "--port", "8123"]]


def test_demo_without_tables(become: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo whose migration fails does not start; its exit code is the migration's."""
    monkeypatch.setenv("SQLSESSIONS_URL", "sqlite+aiosqlite://")
    monkeypatch.setattr(dev, "_run", lambda command: 3)
    with pytest.raises(SystemExit) as exit_:
        dev.main(["demo"])
    assert exit_.value.code == 3
    assert become == []


def test_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Every gate runs, also after one that failed and said why, and has a line in the end."""
    for name in ["python", "lint-imports"]:
        (tmp_path / name).write_text('#!/bin/sh\n[ "$2" != mypy ] || { echo "error: no"; exit 2; }\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(dev, "_python", lambda extra: str(tmp_path / "python"))
    with pytest.raises(SystemExit) as exit_:
        dev.main(["check"])
    assert exit_.value.code
    lines = capfd.readouterr().out.splitlines()
    assert lines == ["ruff check: ok", "ruff format: ok", "error: no", "mypy: FAILED", "import-linter: ok"]
