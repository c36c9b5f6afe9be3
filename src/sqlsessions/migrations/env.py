"""How Alembic's own command line runs this chain, in a checkout: ``alembic upgrade head``.

The database is ``-x url=…``, else ``SQLSESSIONS_URL``, else a SQLite file beside ``alembic.ini``; whoever
drives Alembic from Python may put a connection into ``config.attributes``. The table is ``-x table=…``, ``-x
schema=…``. A new revision of the chain is begun with ``alembic revision --autogenerate --rev-id
sqlsessions_0002 -m "add a column"``.
"""

import asyncio
import logging
import os
from functools import partial
from logging.config import fileConfig
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import context
from alembic.util import CommandError

from sqlsessions.backends.connections import join_threads
from sqlsessions.errors import SessionError
from sqlsessions.migrate import Chain
from sqlsessions.schema import DEFAULT_TABLE, async_url

config = context.config
logger = logging.getLogger("alembic.sqlsessions")


def asked() -> dict[str, Any]:
    """Return what the command line asked for with ``-x``, and what was put into the configuration."""
    given = {**context.get_x_argument(as_dictionary=True), **config.attributes}
    if unknown := given.keys() - {"connection", "url", "table", "schema"}:
        raise CommandError(f"-x {min(unknown)}=… is unknown here; there are -x url=…, -x table=… and -x schema=…")
    return given


def database_url(given: str | None) -> sa.URL:
    """Return the URL of the database to migrate."""
    url = given or os.environ.get("SQLSESSIONS_URL")
    if url:
        return async_url(url)
    if config.config_file_name is None:
        raise CommandError("no database: put a connection into config.attributes, or set SQLSESSIONS_URL")
    beside = Path(config.config_file_name).resolve().parent / "sqlsessions.db"
    return sa.URL.create("sqlite+aiosqlite", database=str(beside))


def online(connection: sa.Connection, chain: Chain) -> None:
    """Run what Alembic was asked to on *connection*."""
    context.configure(connection=connection, **chain.options)
    chain.run(context.get_context(), connection)


async def connect(url: sa.URL, chain: Chain) -> None:
    """Run it on a connection of our own."""
    try:
        await chain.run_on(url, partial(online, chain=chain))
    finally:
        join_threads()


def run() -> None:
    """Run what Alembic was asked to, or print the DDL that would do it."""
    if config.config_file_name is not None:
        fileConfig(config.config_file_name, disable_existing_loggers=False)
    given = asked()
    chain = Chain(given.get("table", DEFAULT_TABLE), given.get("schema"))
    if "connection" in given:
        online(given["connection"], chain)
        return
    url = database_url(given.get("url"))
    logger.info("Table %s in %s", chain.table, url.set(query={}).render_as_string(hide_password=True))
    if context.is_offline_mode():
        context.configure(url=url, literal_binds=True, **chain.options)
        chain.run(context.get_context())
    else:
        asyncio.run(connect(url, chain))


try:
    run()
except SessionError as error:
    raise CommandError(str(error)) from error  # which Alembic prints as one line
