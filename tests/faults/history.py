"""What clients did and were told, and whether any database could have told them that.

A history check in the manner of Jepsen: every client notes when it asked for something, and when and how it was
answered; `anomalies` finds what no order of the operations explains. It knows nothing of how sessions are kept.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

Verb = Literal["create", "read", "write", "add", "renew", "revoke", "list"]

#: What writes to a session that has to be there.
_WRITES: tuple[Verb, ...] = ("write", "add", "renew")
#: What a secret is good for. A revocation may come from an administrator, who needs none.
_BY_SECRET: tuple[Verb, ...] = ("read", "write", "add")
#: The key that `add` counts in.
COUNTER = "n"
#: The credential of who looks at the row itself.
NO_CREDENTIAL = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One thing that a client asked for, and how it ended."""

    verb: Verb
    #: The session's handle; "" for a list.
    session: str = ""
    #: When it was asked for, and when the answer was there: points of one clock. Without an answer it may have taken
    #: effect, may still do so, or never will.
    invoked: float
    completed: float = inf
    #: Whether the answer was that nothing has been done.
    refused: bool = False
    #: Which of the session's secrets in turn it was asked for with.
    credential: int = 0
    key: str = ""
    #: What was written, or counted to; what a read saw, or None if it saw nobody's session; the handles in a list.
    value: Any = None

    @property
    def acknowledged(self) -> bool:
        """Whether it was done, and said so."""
        return self.completed < inf and not self.refused

    @property
    def possible(self) -> bool:
        """Whether it may have been done."""
        return not self.refused


@dataclass(slots=True)
class _Session:
    """The operations on one session, by what they are."""

    operations: defaultdict[Verb, list[Operation]] = field(default_factory=lambda: defaultdict(list))

    def ended_before(self, instant: float) -> bool:
        """Tell whether its end was acknowledged before *instant*."""
        return any(end.acknowledged and end.completed < instant for end in self.operations["revoke"])

    def may_have_ended(self, instant: float) -> bool:
        """Tell whether anybody had asked for its end by *instant*."""
        return any(end.possible and end.invoked < instant for end in self.operations["revoke"])

    def superseded(self, operation: Operation) -> bool:
        """Tell whether the secret that this was asked for with had been replaced before, and that acknowledged."""
        return any(
            renewal.acknowledged
            and renewal.completed < operation.invoked
            and renewal.credential == operation.credential
            for renewal in self.operations["renew"]
        )

    def may_be_superseded(self, read: Operation) -> bool:
        """Tell whether the secret that was read with may have been replaced by then."""
        return any(
            renewal.possible and renewal.invoked < read.completed and renewal.credential == read.credential
            for renewal in self.operations["renew"]
        )


def anomalies(history: Sequence[Operation]) -> list[str]:
    """Return what cannot have happened, in words; nothing if the history is one of a database without faults."""
    sessions: defaultdict[str, _Session] = defaultdict(_Session)
    for operation in history:
        sessions[operation.session].operations[operation.verb].append(operation)
    found = list(_lists(sessions))
    for handle, session in sessions.items():
        for rule in (_ends, _secrets, _values, _counts):
            found.extend(f"{handle}: {line}" for line in rule(session))
    return found


def _ends(session: _Session) -> Iterator[str]:
    """Nothing happens to a session after its end; and it does not end by itself."""
    for verb in _WRITES:
        for late in session.operations[verb]:
            if late.acknowledged and session.ended_before(late.invoked):
                yield f"{verb} acknowledged after the end: {late}"
    nobody: dict[int, float] = {}
    for read in sorted(session.operations["read"], key=lambda read: read.invoked):
        if read.value is not None and session.ended_before(read.invoked):
            yield f"resurrected: read after the end: {read}"
        if read.value is not None and nobody.get(read.credential, inf) < read.invoked:
            yield f"resurrected: read after it had been gone: {read}"
        if read.value is None:
            nobody[read.credential] = min(nobody.get(read.credential, inf), read.completed)
            if not session.may_have_ended(read.completed) and not session.may_be_superseded(read):
                yield f"lost session: gone though nobody ended it: {read}"


def _secrets(session: _Session) -> Iterator[str]:
    """A secret that was replaced is worth nothing, and is replaced once."""
    for verb in _BY_SECRET:
        for late in session.operations[verb]:
            if late.acknowledged and late.value is not None and session.superseded(late):
                yield f"superseded secret: still good for a {verb}: {late}"
    renewals = [renewal for renewal in session.operations["renew"] if renewal.acknowledged]
    for renewal in renewals:
        if sum(other.credential == renewal.credential for other in renewals) > 1:
            yield f"two heirs: one secret was replaced twice: {renewal}"


def _values(session: _Session) -> Iterator[str]:
    """Every key is a register: a read sees the last write, or one under way."""
    writes = {(write.key, write.value): write for write in session.operations["write"]}
    reads = [read for read in session.operations["read"] if read.value is not None]
    #: By when each write has certainly taken effect.
    known = {place: write.completed if write.acknowledged else inf for place, write in writes.items()}
    for read in reads:
        for place in known.keys() & read.value.items():
            known[place] = min(known[place], read.completed)
    for read in reads:
        yield from _phantoms(read, writes)
        for (key, value), write in writes.items():
            seen = read.value.get(key)
            newer = key in read.value and known.get((key, seen), inf) >= write.invoked
            if known[key, value] < read.invoked and not newer:
                yield f"lost write: {key}={value!r} was there, but {seen!r} was read: {read}"


def _phantoms(read: Operation, writes: dict[tuple[str, Any], Operation]) -> Iterator[str]:
    for key, value in read.value.items():
        write = writes.get((key, value))
        if key != COUNTER and (write is None or write.refused or write.invoked > read.completed):
            yield f"phantom write: {key}={value!r} was read, but not written: {write} {read}"


def _counts(session: _Session) -> Iterator[str]:
    """The counter counts each addition once."""
    adds = [add for add in session.operations["add"] if add.possible]
    done = [add for add in adds if add.acknowledged]

    def beyond(count: int, seen: Operation) -> str | None:
        least = sum(add.completed < seen.invoked for add in done)
        most = sum(add.invoked < seen.completed for add in adds)
        if count < least:
            return f"lost increment: {count} of at least {least}: {seen}"
        return f"phantom increment: {count} of at most {most}: {seen}" if count > most else None

    counted = [(add.value, add) for add in done]
    for number, add in counted:
        if sum(other == number for other, _ in counted) > 1:
            yield f"lost increment: two were told {number}: {add}"
    looks = [(read.value.get(COUNTER, 0), read) for read in session.operations["read"] if read.value is not None]
    for number, seen in [*counted, *looks]:
        if line := beyond(number, seen):
            yield line


def _lists(sessions: dict[str, _Session]) -> Iterator[str]:
    """A list has every session that lives, and none that has ended."""
    lists = sessions[""].operations["list"]
    for handle, session in list(sessions.items()):
        begun = [create.completed for create in session.operations["create"] if create.acknowledged]
        for seen in lists:
            if handle in seen.value and session.ended_before(seen.invoked):
                yield f"{handle}: resurrected: listed after the end: {seen}"
            alive = any(instant < seen.invoked for instant in begun) and not session.may_have_ended(seen.completed)
            if alive and handle not in seen.value:
                yield f"{handle}: lost session: not listed: {seen}"
