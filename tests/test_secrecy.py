"""Nothing that logs, errors or reprs show is worth stealing: everything at DEBUG, under every error that can be forced.

What is looked for is in the session, the cookie, the table and the key: each in all the spellings in which bytes show.
"""

import base64
import logging
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from sqlsessions import BackendError, SQLAlchemyBackend
from sqlsessions.credentials import CookieSigner
from sqlsessions.record import Expected, Record
from sqlsessions.testing import expecting, make_record
from tests.asgi import COOKIE, Browser, Request, Site
from tests.looking import closing, sql

pytestmark = pytest.mark.anyio

KEY = "canary-Wq7uP0xJ5vTz-of-a-signing-key-4711"
DATA = "canary-of-data-4711"
LOGGERS = ("aiosqlite", "asyncpg", "asyncio", "sqlalchemy", "sqlalchemy.engine", "sqlalchemy.pool", "sqlsessions")


class Eavesdropper(logging.Handler):
    """Keeps all that anybody logs: message, arguments and tracebacks."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.heard: list[str] = []
        self.names: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what a formatter could make of the record."""
        self.names.add(record.name)
        self.heard += [logging.Formatter().format(record), repr(record.args), repr(record.msg)]


@pytest.fixture
def eavesdropper() -> Iterator[Eavesdropper]:
    """A handler at the root, with every logger that has to do with us at DEBUG."""
    one, levels = Eavesdropper(), {name: logging.getLogger(name).level for name in ("", *LOGGERS)}
    for name in levels:
        logging.getLogger(name).setLevel(logging.DEBUG)
    logging.getLogger().addHandler(one)
    yield one
    logging.getLogger().removeHandler(one)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def spellings(secret: bytes) -> set[str]:
    """Return how *secret* may be written."""
    return {
        secret.hex(), secret.hex().upper(), repr(secret)[2:-1], str(list(secret))[1:-1],
        base64.b64encode(secret).decode().rstrip("="), base64.urlsafe_b64encode(secret).decode().rstrip("="),
    }  # fmt: skip


def secrets_of(browsers: list[Browser], records: list[Record]) -> set[str]:
    """Return everything that must not be seen, in all its spellings."""
    canaries = {KEY, DATA}
    for value in {browser.cookies[COOKIE] for browser in browsers if COOKIE in browser.cookies}:
        unsigned = CookieSigner(KEY, cookie_name=COOKIE).unsign(value.encode())
        assert unsigned
        canaries |= {value, *value.split("."), *spellings(unsigned[0].secret)}
    for record in records:
        canaries |= spellings(record.secret_hash)
    return canaries


def fill(request: Request) -> None:
    """Put the canary into the session."""
    request.session.update(user_id="ada", secret=DATA)


def look(request: Request) -> int:
    """Use the session, and show nothing of it."""
    return len(request.session)


async def spoil(url: str, site: Site, hidden: set[str]) -> list[str]:
    """Force every error there is, and return what the application was told; add to what is *hidden*."""
    told: list[str] = []

    async def attempt(browser: Browser, handler: Any, **options: Any) -> None:
        try:
            answer = await browser.visit(handler, **options)
            told.extend([str(answer.status), answer.body.decode()])
        except Exception as error:  # noqa: BLE001 - whatever it is, its traceback is looked at
            told.append("".join(traceback.format_exception(error)))

    async def collide(request: Request) -> None:
        request.session["secret"] = DATA + "again"
        await site.backend.insert(await site.record())

    async def crash(request: Request) -> None:
        request.session["secret"] = {DATA}
        raise RuntimeError(repr(request.session) + repr(request.scope["app_state"]))

    def invalid(request: Request) -> None:
        request.session["bad"] = {DATA}

    browser = await site.visitor(fill)
    await attempt(browser, look)
    await attempt(browser, collide)
    await attempt(browser, crash, app_state=[site.app, site.backend, await site.record()])
    await attempt(browser, invalid)
    forged = browser.twin()
    forged.cookies[COOKIE] = forged.cookies[COOKIE][:-1] + "?"
    await attempt(forged, look)
    record = await site.record()
    hidden |= secrets_of([browser], [record])
    for spoiled in (record._replace(user_id="x" * 10_000), record._replace(data=f'{{"{DATA}"'), make_record(data=DATA)):
        try:
            await site.backend.insert(spoiled._replace(id=make_record().id))
            await site.backend.replace(spoiled, expecting(spoiled, site.clock()))
        except BackendError as error:
            told.append("".join(traceback.format_exception(error)))
    await site.backend.replace(
        record._replace(data=f'["{DATA}"]'), Expected(record.version, record.secret_hash, site.clock())
    )
    await attempt(browser, look)
    await sql(url, "DROP TABLE web_sessions")
    for victim in (browser, site.browser()):
        await attempt(victim, fill)
    return told


async def test_nothing_shows(sessions_url: str, eavesdropper: Eavesdropper) -> None:
    """No key, cookie value, secret, hash or data is in a log record, an error or a repr (R13, R107, R110)."""
    backend = SQLAlchemyBackend(create_async_engine(sessions_url, echo="debug"))
    site = Site(backend, [], secret_key=KEY)

    def hook(event: object) -> None:
        raise RuntimeError(repr(event))

    async with closing(backend):
        browsers = [site.browser(), site.reconfigured(on_event=hook).browser()]
        for browser in browsers:
            await browser.visit(fill)
            await browser.visit(lambda request: request.session.renew())
            await browser.visit(look)
        records = await site.records()
        hidden = secrets_of(browsers, records)
        await backend.revoke_everything()
        told = await spoil(sessions_url, site, hidden)
        shown = [repr(site.app), repr(backend), repr(records), repr(site.events), repr(site.app._manager.signer)]
    assert {"sqlsessions", "sqlalchemy.engine.Engine.sqlsessions"} <= eavesdropper.names
    assert len(eavesdropper.heard) > 100
    lines = [*eavesdropper.heard, *told, *shown]
    assert [(secret, line) for line in lines for secret in hidden if secret in line] == []


async def test_the_applications_own_logging(
    sqlite_sessions_url: str, sqlite_url: str, eavesdropper: Eavesdropper
) -> None:
    """What is hidden is ours only: the application's own engine logs its parameters and rows as ever (R107)."""
    engine = create_async_engine(sqlite_url)
    async with closing(SQLAlchemyBackend(sqlite_sessions_url)) as backend, engine.connect() as connection:
        await backend.ping()
        (await connection.execute(sa.text("SELECT :a AS b"), {"a": "shown"})).all()
    await engine.dispose()
    said = [line for line in eavesdropper.heard if "shown" in line]
    assert any("SELECT ? AS b" in line for line in said)
    assert any("Row ('shown',)" in line for line in said)


def test_filters_are_installed_once(sqlite_sessions_url: str) -> None:
    """However many backends there are, a logger has one filter of ours for each table (R107)."""
    driver = logging.getLogger("aiosqlite")
    for _ in range(3):
        SQLAlchemyBackend(sqlite_sessions_url, table="one")
        SQLAlchemyBackend(sqlite_sessions_url, table="two")
    names = [getattr(found, "name", "") for found in driver.filters]
    assert [name for name in names if name in ("one", "two")] == ["one", "two"]
    assert len(logging.getLogger("sqlalchemy.engine.Engine.sqlsessions").filters) == 1
