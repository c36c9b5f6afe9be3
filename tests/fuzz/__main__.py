"""Fuzz each target for a while: ``python3 dev.py fuzz [--seconds N] [TARGET ...]``.

What breaks a target is kept in its corpus, where the test suite runs it from then on. Needs atheris.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["sqlsessions"]) if "--here" in sys.argv else nullcontext():
    from tests.fuzz import targets

CORPUS = Path(__file__).with_name("corpus")


def main() -> None:
    """Run each target in a process of its own, for libFuzzer ends the one that it runs in."""
    parser = argparse.ArgumentParser("dev.py fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=20, help="for each target (default: %(default)s)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("targets", nargs="*", choices=[[], *targets.TARGETS], metavar="TARGET")
    options = parser.parse_args()
    if options.here:
        fuzz(options.targets[0], options.seconds)
    else:
        sys.exit(run(options.targets or list(targets.TARGETS), options.seconds))


def run(names: list[str], seconds: int) -> int:
    """Run the targets one after the other; return 1 if one of them broke."""
    failed = 0
    for name in names:
        command = [sys.executable, "-m", "tests.fuzz", "--here", "--seconds", str(seconds), name]
        result = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode:
            failed = 1
            print(result.stdout)
        tried = re.search(r"number_of_executed_units: (\d+)", result.stdout)
        print(
            f"{name}: {'FAILED' if result.returncode else 'ok'}, {tried[1] if tried else 'no'} inputs tried", flush=True
        )
    return failed


def fuzz(name: str, seconds: int) -> None:
    """Fuzz one target until the time is up or it breaks, and end the process."""
    targets.slack = 10  # counting the paths taken takes its time
    saved = CORPUS / name
    with tempfile.TemporaryDirectory() as found:
        arguments = [found, str(saved), f"-artifact_prefix={saved}/", f"-max_total_time={seconds}", "-max_len=65536"]
        atheris.Setup(["fuzz", *arguments, "-timeout=5", "-print_final_stats=1", "-verbosity=0"], targets.TARGETS[name])
        atheris.Fuzz()


main()
