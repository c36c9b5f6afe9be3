"""What is sent to a database, and how it stands beside another version of this library."""

import json

import pytest
import sqlalchemy as sa

from sqlsessions import SQLAlchemyBackend
from sqlsessions.record import FORMAT
from sqlsessions.schema import Statements, Write, sessions_table
from sqlsessions.testing import START, make_record
from tests.asgi import Request, Site, read
from tests.looking import sql

pytestmark = pytest.mark.anyio

#: What would end a literal, a name or a placeholder, if it stood in one.
HOSTILE = ["'; DROP TABLE web_sessions; --", '" OR 1=1', "%(now)s", ":now", "\\", "{x}", "*/", "\u2028"]


@pytest.mark.parametrize("name", ["postgresql", "sqlite"])
def test_values_are_bound(name: str) -> None:
    """No statement has a value in its text: all of them are parameters (R112)."""
    dialect = sa.make_url(f"{name}://").get_dialect()()
    for verb, value in vars(Statements(sessions_table(sa.MetaData()), name)).items():
        for statement in (value.plain, value.passing, value.prompt) if isinstance(value, Write) else (value,):
            if isinstance(statement, sa.ClauseElement) and not isinstance(statement, sa.Table):
                # Of literals there is none but the comma between many ids.
                assert "'" not in str(statement.compile(dialect=dialect)).replace("','", ""), verb


@pytest.mark.parametrize("text", HOSTILE)
async def test_hostile_values(sessions_url: str, text: str) -> None:
    """A user id or data that looks like SQL is only ever a value (R112)."""
    backend = SQLAlchemyBackend(sessions_url)
    record, other = make_record(user_id=text, data=json.dumps({"x": text})), make_record(user_id="x")
    await backend.insert(record)
    await backend.insert(other)
    assert await backend.load(record.id, START) == record
    assert list(await backend.list_for_user(text, START)) == [record]
    assert await backend.revoke_all(text) == 1
    assert await backend.load(other.id, START) == other
    await backend.aclose()


async def test_next_version_beside_this_one(sessions_url: str, statements: list[str]) -> None:
    """In a rolling deploy the next version's column and format are no trouble; ours says what we wrote (R100)."""
    await sql(sessions_url, "ALTER TABLE web_sessions ADD COLUMN of_the_next_version TEXT")
    backend = SQLAlchemyBackend(sessions_url)
    site = Site(backend, statements)
    browser = await site.visitor(count)
    theirs = (await site.record())._replace(format=FORMAT + 1)
    await sql(
        sessions_url, "UPDATE web_sessions SET format = :format, of_the_next_version = 'theirs'", format=theirs.format
    )
    assert (await browser.visit(read)).json() == {"n": 1}
    assert await site.record() == theirs
    await browser.visit(count)
    assert (await browser.visit(read)).json() == {"n": 2}
    assert (await site.record()).format == FORMAT
    assert [row.of_the_next_version for row in await sql(sessions_url, "SELECT * FROM web_sessions")] == ["theirs"]
    await backend.aclose()


def count(request: Request) -> None:
    """Count this visit."""
    request.session["n"] = request.session.get("n", 0) + 1
