"""What a commit owes is one pure function of what is known; every row of its table, and what holds for all of them."""

import itertools
from typing import Any

import pytest

from sqlsessions.manager import Action, Facts, decide

#: Every combination of facts there is.
EVERYTHING = [
    Facts(**dict(zip(Facts._fields, values, strict=True)))
    for values in itertools.product((False, True), repeat=len(Facts._fields))
]

#: Actions after which there is a row that was not there before.
CREATES = {Action.INSERT, Action.DELETE_THEN_INSERT, Action.SWITCH_USER}
#: Actions that write something a handler wanted kept.
WRITES = CREATES | {Action.UPDATE, Action.RENEW}


@pytest.mark.parametrize(
    ("facts", "action"),
    [
        # A response that failed: a logout holds, and nothing else does (R28, R56).
        ({"failed": True, "stored": True, "ended": True}, Action.DELETE),
        ({"failed": True, "stored": True, "ended": True, "changed": True}, Action.DELETE),
        ({"failed": True, "stored": True, "changed": True}, Action.NOTHING),
        ({"failed": True, "stored": True, "renewed": True}, Action.NOTHING),
        ({"failed": True, "stored": True, "touch_due": True}, Action.NOTHING),
        ({"failed": True}, Action.NOTHING),
        ({"failed": True, "ended": True}, Action.NOTHING),
        # No row: one is created for something, never for nothing (R45, R46).
        ({"empty": True}, Action.NOTHING),
        ({"empty": True, "ended": True}, Action.NOTHING),
        ({"empty": True, "settings": True, "renewed": True}, Action.NOTHING),
        ({"changed": True}, Action.INSERT),
        ({"ended": True}, Action.INSERT),
        # No row any more: it does not come back (R29), unless the handler began anew.
        ({"gone": True}, Action.NOTHING),
        ({"gone": True, "changed": True, "renewed": True}, Action.NOTHING),
        ({"gone": True, "ended": True}, Action.INSERT),
        ({"gone": True, "ended": True, "empty": True}, Action.NOTHING),
        # A row that was ended, and perhaps begun anew.
        ({"stored": True, "ended": True, "empty": True}, Action.DELETE),
        ({"stored": True, "ended": True}, Action.DELETE_THEN_INSERT),
        ({"stored": True, "ended": True, "renewed": True}, Action.DELETE_THEN_INSERT),
        # A row that was emptied, which is not the same as ended.
        ({"stored": True, "empty": True, "changed": True}, Action.DELETE_UNCHANGED),
        ({"stored": True, "empty": True, "changed": True, "renewed": True}, Action.DELETE_UNCHANGED),
        ({"stored": True, "empty": True}, Action.NOTHING),
        # A row that goes on: for another user, under another secret, with other data, or for longer.
        ({"stored": True, "switched": True, "renewed": True, "changed": True}, Action.SWITCH_USER),
        ({"stored": True, "renewed": True}, Action.RENEW),
        ({"stored": True, "renewed": True, "changed": True}, Action.RENEW),
        ({"stored": True, "changed": True}, Action.UPDATE),
        ({"stored": True, "settings": True}, Action.UPDATE),
        ({"stored": True, "changed": True, "touch_due": True}, Action.UPDATE),
        ({"stored": True, "touch_due": True}, Action.TOUCH),
        ({"stored": True}, Action.NOTHING),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else value.name,
)
def test_row(facts: dict[str, Any], action: Action) -> None:
    """Each row of the decision table names its action."""
    assert decide(Facts(**{"stored": False, **facts})) is action


def test_total() -> None:
    """Every combination of facts has an action, and every action has a combination."""
    assert {decide(facts) for facts in EVERYTHING} == set(Action)


def test_failure_only_ends() -> None:
    """A failed response never writes: at most it deletes the row of a session that was ended (R28, R56)."""
    for facts in EVERYTHING:
        if facts.failed:
            assert decide(facts) is (Action.DELETE if facts.stored and facts.ended else Action.NOTHING)


def test_nothing_is_created_for_nothing() -> None:
    """A session without data and user never gets a row (R45, R46)."""
    assert not {decide(facts) for facts in EVERYTHING if facts.empty and not facts.stored} - {Action.NOTHING}
    assert not {decide(facts) for facts in EVERYTHING if facts.empty and facts.ended} - {Action.NOTHING, Action.DELETE}


def test_gone_is_not_revived() -> None:
    """A session that is gone gets no row again unless it was ended, which begins another (R29)."""
    assert not {decide(facts) for facts in EVERYTHING if facts.gone and not (facts.stored or facts.ended)} & CREATES


def test_ended_is_deleted() -> None:
    """A stored session that was ended is deleted by id, whatever else was asked for (R28)."""
    ended = {decide(facts) for facts in EVERYTHING if facts.stored and facts.ended}
    assert ended == {Action.DELETE, Action.DELETE_THEN_INSERT}


def test_nothing_to_write_to() -> None:
    """Without a row nothing is updated, touched or deleted."""
    assert {decide(facts) for facts in EVERYTHING if not facts.stored} == {Action.NOTHING, Action.INSERT}


def test_row_is_inserted_once() -> None:
    """A stored session is inserted only where its old row is deleted: there are never two for one visitor."""
    assert Action.INSERT not in {decide(facts) for facts in EVERYTHING if facts.stored}


def test_bound_user_means_another_secret() -> None:
    """Where the user was bound, unbound or switched, the secret in the old cookie is dead afterwards (R26)."""
    dead = CREATES | {Action.RENEW, Action.DELETE, Action.DELETE_UNCHANGED}
    for facts in EVERYTHING:
        if facts.stored and not facts.failed and (facts.renewed or facts.switched):
            assert decide(facts) in dead


def test_touch_never_costs_a_write() -> None:
    """That a touch is due changes an action only from nothing to a touch (R36)."""
    for facts in EVERYTHING:
        if not facts.touch_due:
            before, after = decide(facts), decide(facts._replace(touch_due=True))
            assert after is before or (before, after) == (Action.NOTHING, Action.TOUCH)


def test_reading_writes_nothing() -> None:
    """A session in which nothing was changed or asked for is not written (R54)."""
    for facts in EVERYTHING:
        if facts.stored and not (facts.ended or facts.changed or facts.switched or facts.renewed or facts.settings):
            assert decide(facts) not in WRITES
