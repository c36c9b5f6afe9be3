#!/usr/bin/env python3
"""Run the demo, tests, checks or benchmarks in a virtual environment that this file makes and keeps up to date.

    python3 dev.py demo [--port N]         the demo application, on an embedded SQLite database
    python3 dev.py test [pytest options]   the test suite
    python3 dev.py check                   lint, format, types and import rules
    python3 dev.py bench [options]         the comparison with other libraries; --help names the options
    python3 dev.py fuzz [--seconds N]      hostile input, by atheris, for so long at each of its targets

Any Python from 3.11 on will do, with or without ensurepip, also one whose pip refuses to install ("externally
managed"): nothing outside `.venv` is touched.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - an older Python is exactly who has to read this
    sys.exit("dev.py needs Python 3.11 or later; this is {}.{}.".format(*sys.version_info))

import argparse
import contextlib
import hashlib
import os
import subprocess
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Environment:
    """The virtual environment of one checkout and one version of Python."""

    root: Path

    @property
    def folder(self) -> Path:
        """Where it lies: `.venv/3.11.7`, so that two versions in turn do not undo each other's work."""
        return self.root / ".venv" / ".".join(map(str, sys.version_info[:3]))

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def stamp(self) -> Path:
        """The file that says what is installed; it exists only when the last installation came to its end."""
        return self.folder / "installed"

    def fingerprint(self) -> str:
        """Return what an installation depends on: the metadata, and the place that it points at."""
        return hashlib.sha256(bytes(self.root) + (self.root / "pyproject.toml").read_bytes()).hexdigest()

    def provide(self, extra: str) -> None:
        """Install the project with `extra`, and with the extras it had, unless that has been done."""
        stamp = self.stamp.read_text().split() if self.stamp.exists() else []
        extras = sorted({extra, *stamp[1:]})
        if stamp == [self.fingerprint(), *extras] and self.python.exists():
            return
        where = self.folder.relative_to(self.root)
        _say(f"installing sqlsessions[{','.join(extras)}] in {where} (once, about half a minute)")
        if not stamp or not self.python.exists():
            venv.create(self.folder, clear=True, symlinks=True, with_pip=False)
        self.stamp.unlink(missing_ok=True)
        self._install(extras)
        self.stamp.write_text("\n".join([self.fingerprint(), *extras]))

    def _install(self, extras: list[str]) -> None:
        # Compiling every module would take a third of the time; those that are imported compile themselves.
        options = ["--disable-pip-version-check", "--no-compile", "-qq"]
        # pip itself goes along: the environment was made without, and `python -m build` wants one there.
        what = ["--editable", f"{self.root}[{','.join(extras)}]", "pip"]
        if _run([*self._pip(), "install", *options, *what]):
            sys.exit("dev.py: the installation failed; pip says why above.")

    def _pip(self) -> list[str]:
        """Return the pip that can install here: this Python's, or else the one that ensurepip unpacks."""
        host = [sys.executable, "-m", "pip", "--python", str(self.python)]
        if _succeeds([*host, "--version"]):
            return host
        if _succeeds([str(self.python), "-m", "ensurepip"]):
            return [str(self.python), "-m", "pip"]
        sys.exit(
            "dev.py: this Python has neither ensurepip nor a pip from 22.3 on; install one of them"
            " (Debian, Ubuntu: apt-get install python3-pip)."
        )


def demo(port: int) -> None:
    """Become the demo application's server, on a database that is up to date."""
    python = _python("demo")
    os.environ.setdefault("SQLSESSIONS_URL", f"sqlite+aiosqlite:///{ROOT / 'demo.db'}")
    code = _run([python, "-m", "alembic", "-c", "alembic.ini", "upgrade", "head"])
    if code:
        sys.exit(code)
    _say(f"the demo is at http://127.0.0.1:{port} (Ctrl-C ends it)")
    _become([python, "-m", "uvicorn", "examples.demo:app", "--host", "127.0.0.1", "--port", str(port)])


def test(arguments: list[str]) -> None:
    """Become pytest."""
    _become([_python("test"), "-m", "pytest", *arguments])


def bench(arguments: list[str]) -> None:
    """Become the benchmarks."""
    _become([_python("bench"), "-m", "benchmarks", *arguments])


def fuzz(arguments: list[str]) -> None:
    """Become the fuzzer."""
    _become([_python("fuzz"), "-m", "tests.fuzz", *arguments])


def check() -> None:
    """Run every gate, also after one that fails; exit with 1 if any did."""
    python = _python("test")
    gates = {
        "ruff check": [python, "-m", "ruff", "check", "--quiet"],
        "ruff format": [python, "-m", "ruff", "format", "--check", "--quiet"],
        "mypy": [python, "-m", "mypy"],
        "import-linter": [str(Path(python).with_name("lint-imports"))],
    }
    passed = [_passes(name, command) for name, command in gates.items()]
    sys.exit(not all(passed))


def _passes(name: str, command: list[str]) -> bool:
    result = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        print(result.stdout, end="")
    print(f"{name}: {'FAILED' if result.returncode else 'ok'}", flush=True)
    return not result.returncode


def _python(extra: str) -> str:
    # Installed without bytecode, so the first run has to keep what it compiles: 3 s for each process else.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    environment = Environment(ROOT)
    environment.provide(extra)
    os.chdir(ROOT)
    return str(environment.python)


def _say(what: str) -> None:
    print(f"dev.py: {what}", file=sys.stderr, flush=True)


def _run(command: list[str]) -> int:
    return subprocess.run(command, check=False).returncode


def _succeeds(command: list[str]) -> bool:
    return not subprocess.run(command, check=False, capture_output=True).returncode


def _become(command: list[str]) -> None:
    """Replace this process, so that signals and the exit code are the command's own."""
    os.execv(command[0], command)  # noqa: S606 - no shell is wanted


def main(arguments: list[str]) -> None:
    """Run the command that `arguments` name."""
    parser = argparse.ArgumentParser("dev.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | test | check | bench | fuzz")
    commands.add_parser("demo").add_argument("--port", type=int, default=8000)
    commands.add_parser("check")
    passed_on = {"test": test, "bench": bench, "fuzz": fuzz}
    for name in passed_on:
        commands.add_parser(name)
    # argparse would claim the options of those for itself, so it never sees them.
    options = parser.parse_args(arguments[:1] if arguments[:1] and arguments[0] in passed_on else arguments)
    if options.command == "demo":
        demo(options.port)
    elif options.command in passed_on:
        passed_on[options.command](arguments[1:])
    else:
        check()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1:])
    sys.exit(130)
