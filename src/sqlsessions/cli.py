"""The command ``sqlsessions``: migrate the table, purge it. The library itself never reads ``SQLSESSIONS_URL``."""

import argparse
import asyncio
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from datetime import timedelta
from importlib import metadata
from typing import Any, NoReturn

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from sqlsessions import migrate
from sqlsessions.backends.connections import connected, join_threads, new_engine
from sqlsessions.backends.sqlalchemy import SQLAlchemyBackend
from sqlsessions.errors import BackendError, ConfigurationError, SchemaMissing, SessionError
from sqlsessions.purge import BATCH_SIZE, MAX_BATCH_SIZE, purge, purge_forever
from sqlsessions.record import utc_now
from sqlsessions.schema import DEFAULT_TABLE, async_url, masked, missing_file, place, sessions_table

EPILOG = """\
The database is --url or, better, the environment variable SQLSESSIONS_URL:
the command lines of running processes are there for others to read.

exit status:
  0  done; with --check: up to date; with --every: ended by SIGTERM or SIGINT
  1  the database could not be used, or did not allow it; with --check: behind;
     or the output could not be written
  2  the command line or a setting is wrong: nothing was done
"""

#: Seconds that counting what a purge will delete may take.
_COUNTING = 5

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    options.url = options.url or os.environ.get("SQLSESSIONS_URL")
    if not options.url:
        options.parser.error(
            "no database: set SQLSESSIONS_URL, or give --url sqlite+aiosqlite:///sessions.db or the like"
        )
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        asyncio.run(_run(options))
    except ConfigurationError as error:
        return _failed(error, 2)
    except SessionError as error:
        return _failed(error, 1)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


async def _run(options: argparse.Namespace) -> None:
    try:
        await options.run(options)
    finally:
        join_threads()


async def run_migrate(options: argparse.Namespace) -> None:
    """``sqlsessions migrate``."""
    place = {"table": options.table, "schema": options.schema}
    if options.sql:
        _say(migrate.sql(options.url, **place), end="")
        return
    if options.check:
        try:
            await migrate.check(options.url, **place)
        except SchemaMissing as error:
            raise SchemaMissing(_remedied(str(error), options)) from error
    else:
        await migrate.upgrade(options.url, **place)
    _say(f"{options.table}: at {await migrate.current(options.url, **place)}")


async def run_downgrade(options: argparse.Namespace) -> None:
    """``sqlsessions downgrade``."""
    if not options.yes:
        raise ConfigurationError(f"this may drop {options.table} with all its sessions: say --yes if that is meant")
    place = {"table": options.table, "schema": options.schema}
    await migrate.downgrade(options.url, options.revision, **place)
    _say(f"{options.table}: at {await migrate.current(options.url, **place) or 'base'}")


async def run_purge(options: argparse.Namespace) -> None:
    """``sqlsessions purge``."""
    url = async_url(options.url)
    backend = SQLAlchemyBackend(url, table=options.table, schema=options.schema)

    async def once() -> None:
        if missing_file(url):
            missing = f"{place(url)}: there is no such file; if it is the right one, run 'sqlsessions migrate'"
            raise SchemaMissing(_remedied(missing, options))
        bar = Bar(options.table, await _expired(options) if sys.stderr.isatty() else None)
        try:
            deleted = await purge(backend, batch_size=options.batch_size, on_batch=bar.show)
        except BackendError as error:
            raise type(error)(_remedied(f"{place(url)}: {error}", options)) from error
        finally:
            bar.clear()
        _say(f"{options.table}: {deleted:,} expired {'session' if deleted == 1 else 'sessions'} deleted")

    try:
        if options.every is None:
            await once()
        else:
            # A wrong setting is as wrong the next time, and who read the output is gone.
            fatal = (ConfigurationError, _Unwritable)
            endless = purge_forever(once, options.every, sleep=_beginning_at_once(asyncio.sleep), fatal=fatal)
            await _until_told(endless)
    finally:
        await backend.aclose()


class Bar:
    """A progress bar on standard error, if that is a terminal; without a *total*, a running number."""

    def __init__(self, title: str, total: int | None) -> None:
        self._title = title
        self._total = total
        self._terminal = sys.stderr.isatty()

    def show(self, done: int) -> None:
        """Draw the bar anew, over the one before."""
        if self._terminal:
            print(
                f"\r\x1b[K{self.line(done, shutil.get_terminal_size().columns - 1)}",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def clear(self) -> None:
        """Leave an empty line for what comes next."""
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def line(self, done: int, width: int) -> str:
        """Return the bar as text of at most *width* characters."""
        if not self._total:
            return f"{self._title}: {done:,} deleted"[:width]
        # Sessions go on expiring, and other processes purging: the total is what was there to begin with.
        total = max(done, self._total)
        before, after = f"{self._title} [", f"] {done:,} of {total:,}"
        room = max(0, min(40, width - len(before) - len(after)))
        filled = room * done // total
        return f"{before}{'#' * filled}{'.' * (room - filled)}{after}"[:width]


async def _expired(options: argparse.Namespace) -> int | None:
    """Count the expired sessions, by one statement on the expiry index; None if that cannot be had quickly."""
    sessions = sessions_table(sa.MetaData(), options.table, options.schema)
    engine = new_engine(async_url(options.url), deadline=_COUNTING, poolclass=sa.NullPool)
    counted = sa.select(sa.func.count()).select_from(sessions).where(sessions.c.expires_at <= utc_now())
    # What ails the database is for the purge to report.
    with suppress(SQLAlchemyError, OSError, TimeoutError):
        async with asyncio.timeout(_COUNTING), aclosing(await connected(engine)) as connection:
            return (await connection.execute(counted)).scalar_one()
    return None


async def _until_told(endless: Coroutine[Any, Any, NoReturn]) -> None:
    """Await *endless* until SIGTERM or SIGINT."""
    task = asyncio.ensure_future(endless)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with suppress(NotImplementedError):  # Windows has no such handlers; there, Ctrl-C raises KeyboardInterrupt
            loop.add_signal_handler(number, task.cancel)
    with suppress(asyncio.CancelledError):
        await task


def _beginning_at_once(sleep: Callable[[float], Awaitable[object]]) -> Callable[[float], Awaitable[object]]:
    """Return *sleep*, but for its first call, which does not."""
    first = True

    async def sleep_from_the_second_call_on(seconds: float) -> None:
        nonlocal first
        await sleep(0 if first else seconds)
        first = False

    return sleep_from_the_second_call_on


def _remedied(message: str, options: argparse.Namespace) -> str:
    """Return *message*, in which the command to run at the end, if there is one, names the table as *options* do.

    ``alembic upgrade head`` makes the usual table only.
    """
    given = {"--table": options.table if options.table != DEFAULT_TABLE else None, "--schema": options.schema}
    unusual = [f" {name} {value}" for name, value in given.items() if value is not None]
    return re.sub(r"run '.*'$", f"run 'sqlsessions migrate{''.join(unusual)}'", message) if unusual else message


class _Unwritable(SessionError):
    """Raised when standard output takes nothing: the disk is full, or who read it is gone."""


def _say(text: str, *, end: str = "\n") -> None:
    """Print *text* at once; raise `_Unwritable` if that fails."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        # Python would try again at its end, and complain itself.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise _Unwritable(f"the output cannot be written: {error.strerror}") from error


def _failed(error: SessionError, status: int) -> int:
    print(f"sqlsessions: {error}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints quote no password: a URL in the wrong place is still a URL."""

    def error(self, message: str) -> NoReturn:
        """Print the complaint and end with status 2."""
        super().error(masked(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sqlsessions",
        description="Server-side login sessions in a table of your SQL database.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sqlsessions {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _command(commands, "migrate", run_migrate, "create the session table, or bring it up to date")
    how = command.add_mutually_exclusive_group()
    how.add_argument(
        "--sql",
        action="store_true",
        help="print the DDL instead of running it; of the URL only the dialect matters",
    )
    how.add_argument("--check", action="store_true", help="change nothing; fail if the table is behind")

    command = _command(
        commands, "downgrade", run_downgrade, "take the session table back to an earlier revision, or drop it"
    )
    command.add_argument(
        "revision",
        nargs="?",
        default="base",
        help="the revision to keep (default: base, which drops the table)",
    )
    command.add_argument("--yes", action="store_true", help="yes, sessions may be lost")

    command = _command(commands, "purge", run_purge, "delete expired sessions, once or every so often")
    command.add_argument(
        "--batch-size",
        type=_batch_size,
        default=BATCH_SIZE,
        metavar="N",
        help=f"sessions per statement, 1 to {MAX_BATCH_SIZE} (default: {BATCH_SIZE})",
    )
    command.add_argument(
        "--every",
        type=_duration,
        metavar="5m",
        help="go on, half to one and a half times this apart: 30s, 5m, 1h, 1d. Errors of the database are survived",
    )
    return parser


def _command(
    commands: "argparse._SubParsersAction[_Parser]",
    name: str,
    run: Callable[[argparse.Namespace], Awaitable[None]],
    what: str,
) -> argparse.ArgumentParser:
    """Add a command with the options that all of them have."""
    command = commands.add_parser(
        name,
        help=what,
        description=f"{what.capitalize()}.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run, parser=command)
    command.add_argument(
        "--url",
        help="postgresql+asyncpg://... or sqlite+aiosqlite:///... (default: $SQLSESSIONS_URL)",
    )
    command.add_argument("--table", default=DEFAULT_TABLE, help="the session table (default: %(default)s)")
    command.add_argument("--schema", help="its schema (default: the database's own default)")
    return command


def _duration(text: str) -> timedelta:
    """Read 30s, 5m, 1h or 1d."""
    found = re.fullmatch(r"([1-9][0-9]{0,5})([smhd])", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 30s, 5m, 1h or 1d")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def _batch_size(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= MAX_BATCH_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MAX_BATCH_SIZE}")
    return int(text)


def _version() -> str:
    try:
        return metadata.version("sqlsessions")
    except metadata.PackageNotFoundError:
        return "(not installed)"
