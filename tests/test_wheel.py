"""What is built and installed is what runs: nothing of a checkout is needed."""

import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.commands import ENVIRONMENT, ROOT, run

INSTALLED = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source distribution, and the wheel from that one alone."""
    folder = tmp_path_factory.mktemp("dist")
    result = run("build", "--no-isolation", "--outdir", str(folder), str(ROOT), cwd=folder, PYTHONWARNINGS="default")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def python(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an environment of its own, with this one's packages for its dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    interpreter = folder / "bin" / "python"
    wheel = next(built.glob("*.whl"))
    where = ["--python", str(interpreter), "install", "--no-deps", "--no-index", "--no-compile", str(wheel)]
    result = run("pip", "--disable-pip-version-check", *where, cwd=folder, PYTHONWARNINGS="default")
    assert result.returncode == 0, result.stdout + result.stderr
    packages = next(folder.glob("lib/python*/site-packages"))
    # A .pth file comes after the environment's own packages, and reads no .pth files: no editable checkout comes in.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return interpreter


def test_wheel_contents(built: Path) -> None:
    """The wheel has the migrations whole, the marker for type checkers and the licence; no tests, no leftovers."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    package = ROOT / "src" / "sqlsessions"
    sources = {
        path.relative_to(ROOT / "src").as_posix()
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    expected = {"py.typed", "migrations/env.py", "migrations/script.py.mako"}
    expected |= {f"migrations/versions/{path.name}" for path in (package / "migrations" / "versions").glob("*.py")}
    assert {f"sqlsessions/{name}" for name in expected} <= sources
    assert {name for name in names if not name.startswith("sqlsessions-")} == sources
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_sdist(built: Path, tmp_path: Path) -> None:
    """The source distribution is a checkout: Alembic runs in it, the link included, and the tests are there."""
    # Unpacked by tar: Python's own asks for a filter from 3.12 on, and has none before 3.11.4.
    subprocess.run(["tar", "-xf", next(built.glob("*.tar.gz")), "-C", tmp_path], check=True)
    (folder,) = tmp_path.iterdir()
    for name in (
        "migrations/env.py",
        "tests/test_wheel.py",
        "tests/host_app/alembic.ini",
        "README.md",
        "SECURITY.md",
        "LICENSE",
    ):
        assert (folder / name).is_file(), name
    assert not list(folder.rglob("*.pyc"))
    assert not list(folder.rglob("*.db"))
    result = run("alembic", "upgrade", "head", cwd=folder, PYTHONPATH="")
    assert result.returncode == 0, result.stderr
    assert (folder / "sqlsessions.db").is_file()


def test_installed_command(python: Path, tmp_path: Path) -> None:
    """The installed command migrates and purges from whatever directory, and so does ``python -m``."""
    database = tmp_path / "x.db"
    url = f"sqlite+aiosqlite:///{database}"

    def sqlsessions(*command: str) -> str:
        result = subprocess.run(
            command,
            cwd=tmp_path,
            env={**INSTALLED, "SQLSESSIONS_URL": url},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    script = str(python.with_name("sqlsessions"))
    assert sqlsessions(script, "migrate") == "web_sessions: at sqlsessions_0001\n"
    assert sqlsessions(str(python), "-m", "sqlsessions", "migrate", "--check") == "web_sessions: at sqlsessions_0001\n"
    assert sqlsessions(script, "purge") == "web_sessions: 0 expired sessions deleted\n"
    assert "CREATE TABLE web_sessions" in sqlsessions(script, "migrate", "--sql")
    assert sqlsessions(script, "--version").startswith("sqlsessions 0.")
    assert [path.name for path in tmp_path.iterdir()] == ["x.db"]


def test_installed_package(python: Path, tmp_path: Path) -> None:
    """What the environment imports is the wheel's, not the checkout's."""
    code = "import json, sqlsessions; print(json.dumps(sqlsessions.__file__))"
    result = subprocess.run(
        [str(python), "-c", code], cwd=tmp_path, env=INSTALLED, capture_output=True, text=True, check=True
    )
    assert Path(json.loads(result.stdout)).is_relative_to(python.parent.parent)
    assert sys.prefix != str(python.parent.parent)
