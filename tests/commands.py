"""Real commands, as subprocesses: warnings are errors in them too."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: From the sources, whether or not they are installed; nothing of the developer's shell.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("SQLSESSIONS_", "ALEMBIC_", "PG"))},
    "PYTHONPATH": str(ROOT / "src"),
    "PYTHONWARNINGS": "error",
    "COLUMNS": "120",
}


def command(module: str, *arguments: str) -> list[str]:
    """Return the command line of an installed Python module."""
    return [sys.executable, "-m", module, *arguments]


def run(module: str, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a module to its end, in a directory, with more environment variables."""
    return subprocess.run(
        command(module, *arguments),
        cwd=cwd,
        env={**ENVIRONMENT, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
