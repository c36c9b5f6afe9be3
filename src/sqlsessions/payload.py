"""Session data as JSON text: encode with limits, decode with suspicion, merge by top-level key.

What goes in comes out, on every database, or is refused with the path of the offending value before any SQL is sent.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring
from math import isfinite
from operator import and_, is_
from typing import Any, NoReturn

from sqlsessions.errors import ConfigurationError, CorruptData, InvalidData

#: MariaDB's JSON check refuses deeper documents; the same limit holds on every database.
MAX_DEPTH = 31

#: Short of the 4,300 decimal digits that Python prints by default; beyond, Python itself is asked.
_MANY_BITS = 10_000

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")).encode


def _decimal(number: float) -> str:
    if not isfinite(number):
        raise ValueError(number)
    return repr(number)


#: How JSON spells what has no parts, by the exact type.
_SPELLED: Mapping[type, Callable[[Any], str]] = {
    str: encode_basestring,
    int: int.__repr__,
    float: _decimal,
    bool: {False: "false", True: "true"}.__getitem__,
    type(None): {None: "null"}.__getitem__,
}


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one session may hold: bytes of JSON text, and keys at its top level."""

    max_bytes: int = 64 * 1024
    max_keys: int = 1024

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_keys"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {getattr(self, name)!r}")


def encode(
    data: Mapping[str, Any],
    limits: Limits,
    *,
    known: str | None = None,
    stored: dict[str, Any] | None = None,
    lent: bool = True,
) -> str:
    """Return *data* as compact JSON text that decodes to exactly the same values.

    Raises `InvalidData` naming the path (``session['cart'][3]``) for anything JSON would alter or refuse: keys that
    are not str, tuples, sets, subclasses, NaN, lone surrogates, integers Python will not print, nesting deeper than
    31, or data over *limits*.

    *known* is the text that *stored* was decoded from. What is still the same object is neither inspected nor, if that
    can be helped, encoded again, which for a cart of twenty things is most of the cost of a session, unless somebody
    was *lent* it and the text differs.
    """
    if known is not None and stored is not None and not lent and type(data) is dict:
        text = _patched(known, stored, data, limits)
        if text is not None:
            return text
    items = list(data.items())
    fresh = items if stored is None else [item for item in items if item[1] is not stored.get(item[0], stored)]
    inspector = _Inspector(limits.max_bytes)
    try:
        _check_keys(data, limits)
        # Before there is any text: 20 MB of somebody's would become 40.
        inspector.mapping(fresh, (), 1)
        text = None if known is None else _unchecked(_plain(data))
        if text is not None and text == known:
            return known
        if stored is not None and (lent or text is None):
            inspector.mapping([item for item in items if item[1] is stored.get(item[0], stored)], (), 1)
        return _measured(text or _encode(_plain(data)), limits)
    except InvalidData:
        # Over limits that were lowered since, or spelled otherwise than we would; but nobody has changed it.
        unset = stored is None or not fresh
        if known is not None and unset and _unchecked(_plain(data)) == _unchecked(decode(known)):
            return known
        raise


def _patched(known: str, stored: dict[str, Any], data: dict[str, Any], limits: Limits) -> str | None:
    """Return *data* as JSON text, by putting into *known*, which *stored* was decoded from, the one constant that was
    set; None unless it is one, or where that is not certain to read the same, or not within *limits*.
    """
    alike = list(map(and_, map(is_, stored, data), map(is_, stored.values(), data.values())))
    others, added = alike.count(False), len(data) - len(stored)
    if others == 1 and not added:
        place = alike.index(False)
    elif added == 1 and not others and stored:
        place = -1
    else:
        return None if others or added else known
    key, value = list(data.items())[place]
    if type(key) is not str or (type(value) is str and len(value) > limits.max_bytes):
        return None
    try:
        name, becomes = encode_basestring(key), _SPELLED[type(value)](value)
        if added:
            text = f"{known[:-1]},{name}:{becomes}}}" if known.endswith("}") else None
        else:
            text = _with_value(known, name, becomes, was=_SPELLED[type(stored[key])](stored[key]))
        # As long as that is allowed; others may have filled *known* with spaces.
        return text if text is None or (_size(text) <= limits.max_bytes and len(data) <= limits.max_keys) else None
    except (KeyError, ValueError):  # another key than was there, what is no constant, or what JSON or UTF-8 has not
        return None


def _with_value(known: str, name: str, becomes: str, *, was: str) -> str | None:
    """Return *known*, in which a key is spelled *name* and its value *was*, with another value."""
    at = known.find(name)
    # Where it stands once, and no key can be spelled otherwise, that is the key: it has to stand somewhere. Of two,
    # which may share a quotation mark, one is a key of something else, or where one string ends and another begins.
    if at < 0 or at != known.rfind(name) or ("\\" in known and ("\\u" in known or "\\/" in known)):
        return None
    colon = at + len(name)
    behind = colon + 1 + len(was)
    if known.startswith(was, colon + 1) and known[colon] == ":" and known[behind] in ",}":
        return f"{known[: colon + 1]}{becomes}{known[behind:]}"
    return None


def _check_keys(data: Mapping[str, Any], limits: Limits) -> None:
    if len(data) > limits.max_keys:
        raise InvalidData(f"session has {len(data)} keys; the limit is {limits.max_keys}")


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _measured(text: str, limits: Limits) -> str:
    size = _size(text)
    if size > limits.max_bytes:
        raise _too_large(limits.max_bytes, size)
    return text


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    return data if type(data) is dict else dict(data.items())


def _unchecked(data: Any) -> str | None:
    """Return *data* as JSON text, whatever that alters; None for what JSON refuses."""
    try:
        return _encode(data)
    except (TypeError, ValueError, RecursionError):
        return None


def decode(text: object) -> dict[str, Any]:
    """Return the object that stored *text* holds; raise `CorruptData` for anything `encode` could not have written."""
    if not isinstance(text, str):
        raise CorruptData(f"stored data is {type(text).__name__}, not text")
    try:
        # Only what `encode` did not write has anything before or behind it.
        data, end = _scan(text, 0) if text.startswith("{") else (None, 0)
        if end != len(text):
            data = _decoder.decode(text)
    except (ValueError, RecursionError, StopIteration):
        # The cause would carry the document into a traceback.
        raise CorruptData("stored data is not valid JSON") from None
    if type(data) is not dict:
        raise CorruptData(f"stored data is a JSON {type(data).__name__}, not an object")
    # One character is found twenty times as fast as two.
    if not text.isascii() or ("\\" in text and "\\u" in text):
        _check_text(data)
    # Brackets within strings count too: fewer than this many cannot be deep, more may be.
    if text.count("{") + text.count("[") > MAX_DEPTH and _too_deep(data):
        raise CorruptData(f"stored data is nested deeper than {MAX_DEPTH} levels")
    return data


def changed_keys(baseline: Mapping[str, Any], ours: Mapping[str, Any]) -> set[str]:
    """Return the top-level keys that were set, altered or deleted between *baseline* and *ours*; 1, 1.0 and True
    differ, and what is no JSON differs from all that is.
    """
    return {
        key
        for key in baseline.keys() | ours.keys()
        if key not in baseline or key not in ours or _unchecked(baseline[key]) != _unchecked(ours[key])
    }


def merge(baseline: Mapping[str, Any], theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return *theirs* with this request's changes applied: deletions count, and on the same key ours wins.

    Three-way, by top-level key: a merge without the baseline cannot tell a key deleted here from one added there. What
    they left alone stays the very object of *ours*, which a handler may hold on to and change later.
    """
    changed = changed_keys(baseline, ours)
    news = changed_keys(baseline, theirs) - changed
    merged = {key: value if key in news else ours[key] for key, value in theirs.items() if key in news or key in ours}
    merged.update({key: value for key, value in ours.items() if key in changed})
    return merged


def _check_text(data: dict[str, Any]) -> None:
    try:
        _encode(data).encode()
    except UnicodeEncodeError:
        raise CorruptData("stored data holds a lone surrogate, which is not text (RFC 3629)") from None


def _too_deep(data: dict[str, Any]) -> bool:
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return False
    return True


def _constant(name: str) -> NoReturn:
    raise ValueError(name)


def _finite(literal: str) -> float:
    number = float(literal)
    if not isfinite(number):  # json reads 1e400 as infinity
        raise ValueError(literal)
    return number


_decoder: Any = json.JSONDecoder(parse_constant=_constant, parse_float=_finite)
#: What the decoder's methods are made of: the value that begins at a place, and where it ends; or `StopIteration`.
_scan = _decoder.scan_once


def _too_large(limit: int, size: int | None = None) -> InvalidData:
    found = "larger than that" if size is None else f"{size:,} bytes"
    return InvalidData(
        f"session data is {found}; the limit is {limit:,} bytes (max_bytes): keep large things in a table of your own"
    )


class _Inspector:
    """Walks data before it is encoded. A running lower bound of the size stops it early, so that 20 MB never become
    JSON text.
    """

    __slots__ = ("_limit", "_room")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._room = limit

    def mapping(self, items: Any, path: tuple[str | int, ...], depth: int) -> None:
        if depth > MAX_DEPTH:
            raise InvalidData(f"{_spell(path)} is nested deeper than {MAX_DEPTH} levels (a cycle, perhaps)")
        for key, value in items:
            if type(key) is not str:
                raise InvalidData(f"{_spell(path)} has the key {key!r:.60}; keys must be str, not {type(key).__name__}")
            self._text(key, path)
            self._value(value, path, key, depth)

    def _value(self, value: object, path: tuple[str | int, ...], key: str | int, depth: int) -> None:
        kind = type(value)
        if kind is str:
            self._text(value, (*path, key))  # type: ignore[arg-type]
        elif kind is dict:
            self.mapping(value.items(), (*path, key), depth + 1)  # type: ignore[attr-defined]
        elif kind is list:
            self._items(value, (*path, key), depth + 1)  # type: ignore[arg-type]
        elif kind is int:
            bits = value.bit_length()  # type: ignore[attr-defined]
            self._room -= bits // 4
            if bits > _MANY_BITS:
                self._printed(value, (*path, key))
        elif kind is float:
            if not isfinite(value):  # type: ignore[arg-type]
                raise InvalidData(f"{_spell((*path, key))} is {value!r}, which JSON cannot hold (RFC 8259)")
        elif value is not None and kind is not bool:
            raise InvalidData(
                f"{_spell((*path, key))} is a {kind.__module__}.{kind.__qualname__}; "
                "only dict, list, str, int, float, bool and None are stored unchanged: convert it first"
            )
        self._room -= 1
        if self._room < 0:
            raise _too_large(self._limit)

    def _items(self, items: list[object], path: tuple[str | int, ...], depth: int) -> None:
        if depth > MAX_DEPTH:
            raise InvalidData(f"{_spell(path)} is nested deeper than {MAX_DEPTH} levels (a cycle, perhaps)")
        for index, value in enumerate(items):
            self._value(value, path, index, depth)

    def _text(self, text: str, path: tuple[str | int, ...]) -> None:
        self._room -= len(text) + 2
        if self._room < 0:
            raise _too_large(self._limit)
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise InvalidData(f"{_spell(path)} holds a lone surrogate, which is not text (RFC 3629)") from None

    def _printed(self, number: object, path: tuple[str | int, ...]) -> None:
        if self._room < 0:
            raise _too_large(self._limit)
        try:
            str(number)
        except ValueError:
            raise InvalidData(f"{_spell(path)} is an integer of more digits than Python prints") from None


def _spell(path: tuple[str | int, ...]) -> str:
    return "session" + "".join(f"[{part!r}]" for part in path)
