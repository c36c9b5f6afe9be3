"""What a database says of its tables."""

import re
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from sqlsessions.schema import DEFAULT_TABLE, sessions_table
from tests.looking import sql

#: What each catalogue says of a table, its columns, constraints, indexes and storage options.
CATALOGUE = {
    "sqlite": ["SELECT type, name, sql FROM sqlite_master WHERE tbl_name = :name AND sql IS NOT NULL ORDER BY name"],
    "postgresql": [
        "SELECT unnest(reloptions) FROM pg_class WHERE relname = :name ORDER BY 1",
        """SELECT attname, format_type(atttypid, atttypmod), attnotnull, atthasdef, attstorage FROM pg_attribute
        JOIN pg_class ON attrelid = pg_class.oid WHERE relname = :name AND attnum > 0 ORDER BY attnum""",
        """SELECT conname, pg_get_constraintdef(pg_constraint.oid) FROM pg_constraint
        JOIN pg_class ON conrelid = pg_class.oid WHERE relname = :name ORDER BY 1""",
        "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = :name ORDER BY 1",
    ],
}


async def tables(url: str, schema: str | None = None) -> set[str]:
    """Return the names of the tables in a database."""
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        names = await connection.run_sync(lambda sync: sa.inspect(sync).get_table_names(schema))
    await engine.dispose()
    return set(names)


async def catalogue(url: str, name: str) -> list[Any]:
    """Return everything that the database says of a table, with its name written as TABLE."""
    dialect = sa.make_url(url).get_backend_name()
    rows = [row for statement in CATALOGUE[dialect] for row in await sql(url, statement, name=name)]
    # SQLite keeps the statement as it was written, with Alembic's white space or SQLAlchemy's.
    return [
        tuple(re.sub(r"\s+", " ", value.replace(name, "TABLE")) if isinstance(value, str) else value for value in row)
        for row in rows
    ]


async def create_from_metadata(url: str, name: str = DEFAULT_TABLE) -> None:
    """Create a session table as `sqlsessions.schema` has it today."""
    metadata = sa.MetaData()
    sessions_table(metadata, name)
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    await engine.dispose()
