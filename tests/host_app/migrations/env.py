"""An application's env.py, as ``alembic init --template async`` makes it; the tests choose what is passed as include_object."""

import asyncio
import os
from typing import Any

from alembic import context
from models import Base  # type: ignore[import-not-found]
from sqlalchemy import Connection, NullPool
from sqlalchemy.ext.asyncio import create_async_engine

from sqlsessions import migrate


def not_legacy(item: Any, name: str | None, kind: str, reflected: bool, other: Any) -> bool:
    """Return whether something is no business of some other application."""
    return not (kind == "table" and name == "legacy")


HOOKS = {
    "none": None,
    "ours": migrate.include_object(),
    "named": migrate.include_object(table="logins", schema="auth"),
    "both": migrate.include_object(not_legacy),
    "two": migrate.include_object(migrate.include_object(table="admin_sessions")),
}

settings: dict[str, Any] = {
    "target_metadata": Base.metadata,
    "include_object": HOOKS[os.environ.get("HOST_HOOK", "ours")],
    "include_schemas": "HOST_SCHEMAS" in os.environ,
}


def do_run_migrations(connection: Connection) -> None:
    """Run the application's own migrations."""
    context.configure(connection=connection, **settings)
    with context.begin_transaction():
        context.run_migrations()


async def run_async_migrations() -> None:
    """Run them on a connection; those of the session table too, for who wants one command."""
    engine = create_async_engine(os.environ["HOST_URL"], poolclass=NullPool)
    async with engine.connect() as connection:
        if "HOST_UPGRADES_SESSIONS" in os.environ:
            await migrate.upgrade(connection)
        await connection.run_sync(do_run_migrations)
    await engine.dispose()


if context.is_offline_mode():
    context.configure(url=os.environ["HOST_URL"], literal_binds=True, **settings)
    with context.begin_transaction():
        context.run_migrations()
else:
    asyncio.run(run_async_migrations())
