"""What goes into a session comes out of it, or is refused with the path of the value, before any SQL."""

import enum
import json
import math
import pickle
import re
import sys
import tracemalloc
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sqlsessions.errors import ConfigurationError, CorruptData, InvalidData
from sqlsessions.payload import MAX_DEPTH, Limits, changed_keys, decode, encode, merge

LIMITS = Limits()
ROOMY = Limits(max_bytes=10**9, max_keys=10**6)


def round_trip(value: object) -> object:
    """Return what comes back of a value."""
    return decode(encode({"v": value}, ROOMY))["v"]


def same(one: object, other: object) -> bool:
    """Tell whether two values are equal in type, order and every bit of every float."""
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return one.hex() == other.hex()
    return type(one) is type(other) and one == other


# what is kept

KEPT: dict[str, object] = {
    "NUL": "a\0b",
    "NUL in a key": {"a\0b": 1},
    "non-BMP": "\N{GRINNING FACE}\U0010ffff",
    "combining": ["é", "e\N{COMBINING ACUTE ACCENT}"],
    "controls": "".join(map(chr, range(32))) + "\x7f\x85\u2028\u2029\ufeff\uffff",
    "quotes": "\"'\\/`<script>%s :a $1 ?",
    "negative zero": -0.0,
    "1e22": 1e22,
    "largest float": sys.float_info.max,
    "denormal": 5e-324,
    "0.1": 0.1,
    "whole float": 1.0,
    "integers and booleans": [1, True, 1.0, 0, False, 0.0, None],
    "2**53 + 1": 2**53 + 1,
    "4300 digits": 10**4299,
    "key order": {"zz": 1, "a": 2, "": 3, "A": 4, "1": 5},
    "empties": [{}, [], "", [[]], {"": {}}],
    "names of ours": {"__metadata__": 1, "user_id": 2, "version": 3, "expires_at": None, "_": "x"},
}


@pytest.mark.parametrize("value", KEPT.values(), ids=KEPT)
def test_kept(value: object) -> None:
    """Every JSON value comes back the same: in type, order, and every bit (R89, R90, R92-R94, R101)."""
    assert same(round_trip(value), value)


text = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=20,
)
objects = st.dictionaries(text, values, max_size=6)


@given(objects)
def test_any_data(data: dict[str, Any]) -> None:
    """Whatever JSON can say comes back the same, and encodes to the same text again."""
    encoded = encode(data, ROOMY)
    assert same(decode(encoded), data)
    assert encode(decode(encoded), ROOMY) == encoded
    assert "\0" not in encoded
    encoded.encode()


@pytest.mark.parametrize("wrap", [UserDict, MappingProxyType, OrderedDict], ids=lambda wrap: wrap.__name__)
def test_any_mapping(wrap: Any) -> None:
    """The session itself may be any mapping."""
    assert encode(wrap({"a": [1]}), LIMITS) == '{"a":[1]}'


# what is refused


class Level(enum.IntEnum):
    """An int, and more."""

    LOW = 1


class Name(enum.StrEnum):
    """A str, and more."""

    ME = "me"


class Point(NamedTuple):
    """A tuple, and more."""

    x: int


class Text(str):
    """A str of another type."""

    __slots__ = ()


CYCLE: list[object] = []
CYCLE.append(CYCLE)

REFUSED: dict[str, object] = {
    "NaN": math.nan,
    "infinity": math.inf,
    "negative infinity": -math.inf,
    "lone high surrogate": "a\ud800",
    "lone low surrogate": "\udfffb",
    "a pair as two code points": "\ud83d\ude00",
    "4301 digits": 10**4300,
    "negative 4301 digits": -(10**4300),
    "tuple": (1, 2),
    "namedtuple": Point(1),
    "set": {1},
    "frozenset": frozenset(),
    "bytes": b"x",
    "bytearray": bytearray(),
    "datetime": datetime(2040, 1, 1, tzinfo=UTC),
    "timedelta": timedelta(1),
    "Decimal": Decimal(1),
    "UUID": UUID(int=1),
    "Path": Path(),
    "IntEnum": Level.LOW,
    "StrEnum": Name.ME,
    "str subclass": Text("x"),
    "dict subclass": defaultdict(list),
    "OrderedDict": OrderedDict(a=1),
    "complex": 1j,
    "function": len,
    "object": object(),
    "cycle": CYCLE,
}


@pytest.mark.parametrize("value", REFUSED.values(), ids=REFUSED)
def test_refused(value: object) -> None:
    """What JSON would alter, or some database refuse, is refused by its path (R89-R91, R96, R97)."""
    with pytest.raises(InvalidData, match=r"session\['cart'\]\[1\]\['x'\]"):
        encode({"cart": [0, {"x": value}]}, ROOMY)


@pytest.mark.parametrize("value", REFUSED.values(), ids=REFUSED)
def test_refused_within_what_was_stored(value: object) -> None:
    """So is what a handler puts into a value that it was lent: that is the same object still."""
    known = '{"cart":[0,{"x":"stored"}]}'
    stored = decode(known)
    stored["cart"][1]["x"] = value
    with pytest.raises(InvalidData, match=r"session\['cart'\]\[1\]\['x'\]"):
        encode(dict(stored), ROOMY, known=known, stored=stored, lent=True)


@pytest.mark.parametrize("key", [1, None, True, 1.5, (1,), b"k", Text("k"), Name.ME], ids=repr)
def test_keys_refused(key: object) -> None:
    """Keys are str: others would turn into one, and 1 and "1" into the same (R95)."""
    with pytest.raises(InvalidData, match=r"^session has the key .*keys must be str"):
        encode({key: 1, "1": 2}, ROOMY)  # type: ignore[dict-item]
    with pytest.raises(InvalidData, match=r"^session\['a'\]\[0\] has the key"):
        encode({"a": [{key: 1}]}, ROOMY)
    stored = decode('{"a":[{}]}')
    stored["a"][0][key] = 1
    with pytest.raises(InvalidData, match=r"^session\['a'\]\[0\] has the key"):
        encode(dict(stored), ROOMY, known='{"a":[{}]}', stored=stored, lent=True)


def test_surrogate_in_key() -> None:
    """A lone surrogate is no text in a key either."""
    with pytest.raises(InvalidData, match="lone surrogate"):
        encode({"\ud800": 1}, ROOMY)


@pytest.mark.parametrize("nest", [lambda inner: [inner], lambda inner: {"k": inner}], ids=["list", "dict"])
def test_depth(nest: Any) -> None:
    """Data may be nested 31 deep, the session itself included; deeper, and endless, is refused (R97)."""

    def nested(depth: int) -> dict[str, Any]:
        value: Any = nest("leaf") if depth > 1 else "leaf"
        for _ in range(depth - 2):
            value = nest(value)
        return {"v": value}

    for depth in (1, MAX_DEPTH - 1, MAX_DEPTH):
        assert decode(encode(nested(depth), ROOMY)) == nested(depth)
    for depth in (MAX_DEPTH + 1, 10_000):
        with pytest.raises(InvalidData, match="nested deeper than 31 levels"):
            encode(nested(depth), ROOMY)


@pytest.mark.parametrize("filling", ["x", "é", "\N{GRINNING FACE}", '"', "\0"], ids=ascii)
def test_max_bytes(filling: str) -> None:
    """The limit is in bytes of the text as stored: up to it is kept, a byte more is refused, for any character."""
    one = len(json.dumps(filling, ensure_ascii=False).encode()) - 2
    data = {"k": filling * 100}
    size = 100 * one + len('{"k":""}')
    assert len(encode(data, Limits(max_bytes=size)).encode()) == size
    encode(data, Limits(max_bytes=size + 1))
    with pytest.raises(InvalidData, match=f"limit is {size - 1:,} bytes \\(max_bytes\\)"):
        encode(data, Limits(max_bytes=size - 1))


def test_max_bytes_by_default() -> None:
    """By default a session may hold 64 KiB of JSON text (R48)."""
    room = 64 * 1024 - len('{"k":""}')
    encode({"k": "x" * room}, LIMITS)
    with pytest.raises(InvalidData, match=r"65,537 bytes; the limit is 65,536|limit is 65,536"):
        encode({"k": "x" * (room + 1)}, LIMITS)


@given(objects, st.integers(1, 200))
def test_size_is_exact(data: dict[str, Any], limit: int) -> None:
    """Data is refused for its size exactly if its text is larger than the limit: the early stop is never too early."""
    size = len(encode(data, ROOMY).encode())
    try:
        encode(data, Limits(max_bytes=limit))
    except InvalidData:
        assert size > limit
    else:
        assert size <= limit


def test_max_keys() -> None:
    """A session may have as many keys as its limit says, 1024 by default."""
    assert Limits().max_keys == 1024
    data = {str(n): n for n in range(10)}
    encode(data, Limits(max_keys=11))
    encode(data, Limits(max_keys=10))
    with pytest.raises(InvalidData, match="has 10 keys; the limit is 9"):
        encode(data, Limits(max_keys=9))


@pytest.mark.parametrize("setting", [{"max_bytes": 0}, {"max_keys": 0}, {"max_bytes": -1}], ids=str)
def test_limits_refused(setting: dict[str, int]) -> None:
    """Limits that nothing fits in are refused by name."""
    with pytest.raises(ConfigurationError, match=next(iter(setting))):
        Limits(**setting)


@pytest.mark.parametrize("known", [None, '{"v":1}'])
@pytest.mark.parametrize(
    "value",
    [["x" * 1000] * 20_000, "x" * 20_000_000, list(range(10**6)), 2**10_000_000],
    ids=["texts", "text", "numbers", "number"],
)
def test_huge_data_costs_little(value: object, known: str | None) -> None:
    """Megabytes are refused without being turned into JSON text first."""
    tracemalloc.start()
    try:
        with pytest.raises(InvalidData, match="limit is 65,536"):
            encode({"v": value}, LIMITS, known=known, stored=None if known is None else decode(known))
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()


def test_errors_quote_no_values() -> None:
    """The message names the path, not the value: it is somebody's data."""
    for value in ({"pin-4711"}, b"pin-4711", "pin-4711\ud800"):
        with pytest.raises(InvalidData) as caught:
            encode({"v": value}, LIMITS)
        assert "4711" not in str(caught.value)


# what is read

CORRUPT: dict[str, object] = {
    "nothing": "",
    "half": '{"a":',
    "more": "{}{}",
    "a list": "[]",
    "a text": '"{}"',
    "null": "null",
    "a number": "7",
    "NaN": '{"a":NaN}',
    "Infinity": '{"a":-Infinity}',
    "1e400": '{"a":1e400}',
    "5000 digits": '{"a":' + "1" * 5000 + "}",
    "too deep for Python": "[" * 100_000,
    "single quotes": "{'a':1}",
    "a pickle": pickle.dumps({"a": 1}).decode("latin-1"),
    "bytes": b"{}",
    "pickled bytes": pickle.dumps({"a": 1}),
    "None": None,
    "an object": {"a": 1},
    "a control character": '{"a":"\n"}',
    "an escaped lone surrogate": '{"a":["\\uD800"]}',
    "an escaped lone surrogate in a key": '{"\\udfff":"é"}',
    "a lone surrogate": '{"a":"\udc00"}',
    "lists too deep for MariaDB": '{"a":' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}",
    "too deep between strings that close what is not open": '{"a":'
    + '["]",' * MAX_DEPTH
    + "1"
    + ',"["]' * MAX_DEPTH
    + "}",
    "objects too deep for MariaDB": '{"a":' * MAX_DEPTH + "{}" + "}" * MAX_DEPTH,
}


@pytest.mark.parametrize("stored", CORRUPT.values(), ids=CORRUPT)
def test_corrupt(stored: object) -> None:
    """What `encode` cannot have written is corrupt: never another error, never another decoder (R91, R92, R98, R99)."""
    with pytest.raises(CorruptData) as caught:
        decode(stored)
    assert caught.value.__cause__ is None
    assert "4711" not in str(caught.value)


@given(st.text() | st.binary() | objects.map(json.dumps).map(lambda text: text[1:]))
def test_any_text(stored: object) -> None:
    """Reading anything at all gives an object or CorruptData."""
    with suppress(CorruptData):
        assert type(decode(stored)) is dict


def test_no_pickle() -> None:
    """There is no pickle in the sources, nor anything else that runs what it reads (R98)."""
    paths = list((Path(__file__).parents[1] / "src").rglob("*.py"))
    assert paths
    for path in paths:
        assert not re.search(r"import (pickle|marshal|shelve|yaml)|(?<![.\w])(eval|exec)\(", path.read_text()), path


def test_duplicate_keys() -> None:
    """Text with a key twice, which JSON allows and we never write, reads as the last."""
    assert decode('{"a":1,"a":2}') == {"a": 2}


# merging


@pytest.mark.parametrize(
    ("baseline", "ours", "changed"),
    [
        ({}, {}, set()),
        ({"a": 1}, {"a": 1}, set()),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, set()),
        ({}, {"a": 1}, {"a"}),
        ({"a": 1}, {}, {"a"}),
        ({"a": 1}, {"a": True}, {"a"}),
        ({"a": 1}, {"a": 1.0}, {"a"}),
        ({"a": 0.0}, {"a": -0.0}, {"a"}),
        ({"a": None}, {}, {"a"}),
        ({"a": [1]}, {"a": [1, 2]}, {"a"}),
        ({"a": {"x": 1, "y": 2}}, {"a": {"y": 2, "x": 1}}, {"a"}),
    ],
    ids=str,
)
def test_changed_keys(baseline: dict[str, Any], ours: dict[str, Any], changed: set[str]) -> None:
    """A key has changed if it was set, deleted or altered in anything that is kept: 1, 1.0 and True differ."""
    assert changed_keys(baseline, ours) == changed


@pytest.mark.parametrize(
    ("baseline", "theirs", "ours", "merged"),
    [
        ({"a": 1}, {"a": 1}, {"a": 1}, {"a": 1}),
        ({"a": 1}, {"a": 2}, {"a": 1}, {"a": 2}),
        ({"a": 1}, {"a": 1}, {"a": 2}, {"a": 2}),
        ({"a": 1}, {"a": 2}, {"a": 3}, {"a": 3}),
        ({}, {"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
        ({"a": 1}, {}, {"a": 1}, {}),
        ({"a": 1}, {"a": 1, "b": 2}, {}, {"b": 2}),
        ({"a": 1}, {}, {"a": 2}, {"a": 2}),
        ({"a": 1}, {"a": 2}, {}, {}),
        ({"a": 1, "b": 1}, {"b": 1, "c": 1}, {"a": 1, "d": 1}, {"c": 1, "d": 1}),
    ],
    ids=str,
)
def test_merge(baseline: Any, theirs: Any, ours: Any, merged: Any) -> None:
    """Their changes and ours are both kept, deletions too; of two changes of one key ours wins."""
    assert merge(baseline, theirs, ours) == merged


small = st.dictionaries(st.sampled_from("abc"), st.integers(0, 2))


@given(small, small, small)
def test_merge_any(baseline: dict[str, int], theirs: dict[str, int], ours: dict[str, int]) -> None:
    """A merge has our value for each key that we changed, theirs for each other, and changes none of its arguments."""
    before = [dict(baseline), dict(theirs), dict(ours)]
    merged = merge(baseline, theirs, ours)
    for key in "abc":
        winner = ours if key in changed_keys(baseline, ours) else theirs
        assert (key in merged, merged.get(key)) == (key in winner, winner.get(key))
    assert [baseline, theirs, ours] == before
    assert merge(baseline, baseline, ours) == ours
    assert merge(baseline, theirs, baseline) == theirs


# what is known

LOOP: list[object] = []
LOOP.append(LOOP)


def test_known_text() -> None:
    """Data that still reads as the text it came from is that very text: reading a session costs no inspection."""
    known = encode({"cart": [{"id": 1, "é": None}]}, LIMITS)
    assert encode(decode(known), LIMITS, known=known) is known
    # Not even where the limits have become lower since it was stored: it is there, and is not written again.
    assert encode(decode(known), Limits(max_bytes=1), known=known) is known


def test_known_text_over_limits() -> None:
    """Data that nobody has changed is no error, however it is spelled and whatever the limits say today (R99)."""
    known = '{ "a": "\\u0041", "b": "%s" }' % ("x" * 100)
    assert encode(decode(known), Limits(max_bytes=50), known=known) == known
    assert encode(decode(known), Limits(max_keys=1), known=known) == known
    with pytest.raises(InvalidData, match="the limit is 50"):
        encode(decode(known) | {"c": 1}, Limits(max_bytes=50), known=known)


SPELLINGS: dict[str, Callable[[object], str]] = {
    "ours": partial(json.dumps, ensure_ascii=False, separators=(",", ":")),
    "json's": json.dumps,
    "indented": partial(json.dumps, indent=1),
    "a space before each colon": partial(json.dumps, separators=(",", " : ")),
}
keys = st.sampled_from(["n", "m", "", "é", '"n', 'n":0,', ',"n":0}', "\\", "cart", "}"])
constants = st.sampled_from([0, 1, -7, 10**30, 0.5, -0.0, 1e300, True, False, None, "", "é", '"n":0', ',"n":0}', "\\"])


#: In place of a value: the key is deleted.
GONE = object()


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
@settings(max_examples=300)
@example({"x": 1, "n": 1}, [(0, GONE), ("m", 2)])
@given(
    stored=st.dictionaries(keys, constants | st.just([{"n": 0}]) | st.just({"n": 0}), max_size=4),
    changes=st.lists(st.tuples(st.integers(0, 3) | keys, st.just(GONE) | constants | st.just(["n"])), max_size=3),
)
def test_few_changes(
    spell: Callable[[object], str], stored: dict[str, Any], changes: list[tuple[int | str, object]]
) -> None:
    """Whatever few keys are set or deleted, and however the rest is spelled, the text says what there is."""
    known = spell(stored)
    changed = dict(stored)
    for key, value in changes:
        # A number is that of a key which is there, counted from the last.
        name = key if isinstance(key, str) else next(iter(list(changed)[-1 - key :]), "n")
        if value is GONE:
            changed.pop(name, None)
        else:
            changed[name] = value
    text = encode(changed, ROOMY, known=known, stored=stored, lent=False)
    assert same(decode(text), changed)
    if known == encode(stored, ROOMY):
        assert text == (encode(changed, ROOMY) if changed != stored or not same(changed, stored) else known)


def test_what_is_not_lent_is_not_encoded() -> None:
    """Of a list that nobody was given, the text is the one it came from: a request that counts costs no cart."""
    cart = [object()]
    cases: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
        ('{"n":1,"cart":[0]}', {"n": 1, "cart": cart}, {"n": 2, "cart": cart}, '{"n":2,"cart":[0]}'),
        ('{"cart":[0],"n":1}', {"cart": cart, "n": 1}, {"cart": cart, "n": 2}, '{"cart":[0],"n":2}'),
        ('{"cart":[0]}', {"cart": cart}, {"cart": cart, "n": 2}, '{"cart":[0],"n":2}'),
        (
            '{"m":0,"n":1,"cart":[0]}',
            {"m": 0, "n": 1, "cart": cart},
            {"m": 0, "n": 2, "cart": cart},
            '{"m":0,"n":2,"cart":[0]}',
        ),
        (
            '{"cart":[0],"n":1,"m":0}',
            {"cart": cart, "n": 1, "m": 0},
            {"cart": cart, "n": 2, "m": 0},
            '{"cart":[0],"n":2,"m":0}',
        ),
    ]
    for known, stored, changed, text in cases:
        assert encode(changed, LIMITS, known=known, stored=stored, lent=False) == text
        with pytest.raises(InvalidData):
            encode(changed, LIMITS, known=known, stored=stored)


def test_few_changes_of_a_text_with_spaces() -> None:
    """What others have spelled at greater length than we would is stored as long as our spelling has room."""
    known = '{"n":1,"cart":[%s]}' % (" " * 50)
    stored = decode(known)
    for limit, text in [(100, known.replace("1", "2")), (50, '{"n":2,"cart":[]}')]:
        assert encode(stored | {"n": 2}, Limits(max_bytes=limit), known=known, stored=stored, lent=False) == text


def test_a_key_in_the_place_of_another() -> None:
    """A key that was set where another was deleted is written by its own name."""
    for known in ('{"x":1,"a":1}', '{"a":1,"x":1}', '{"a":1}', '{"x":[],"a":1}'):
        stored = decode(known)
        for value in (1, 2):
            changed = {("b" if key == "a" else key): (value if key == "a" else old) for key, old in stored.items()}
            text = encode(changed, LIMITS, known=known, stored=stored, lent=False)
            assert decode(text) == changed


@pytest.mark.parametrize("key", [5, None, type("Name", (str,), {})("a")], ids=repr)
@pytest.mark.parametrize("left", [{"x": 1, "a": 1}, {"x": 1}], ids=str)
def test_a_key_that_is_no_str_in_few_changes(key: Any, left: dict[str, Any]) -> None:
    """A key that is not a str, or not quite, is refused in a change of one as well, whether or not it has a
    predecessor (R95).
    """
    known = encode(left, LIMITS)
    changed: dict[Any, Any] = {name: value for name, value in left.items() if name != "a"} | {key: 2}
    with pytest.raises(InvalidData, match="keys must be str"):
        encode(changed, LIMITS, known=known, stored=left, lent=False)


def test_a_key_that_stands_there_twice() -> None:
    """Where others have written a key twice, of which the last counts, it is changed there as well."""
    for known in (
        '{"n":5,"x":[],"n":5}',
        '{"x":[],"n":4,"m":1,"n":5}',
        '{"n":5,"x":[],"n" :5}',
        '{"n":5,"x":[],"\\u006e":5}',
    ):
        stored = decode(known)
        changed = stored | {"n": 6}
        assert decode(encode(changed, LIMITS, known=known, stored=stored, lent=False)) == changed


@pytest.mark.parametrize(
    ("known", "key"),
    [
        ('{"x":1,":1,":1}', ":1,"),
        ('{"x":1,":1,":1,"y":2}', ":1,"),
        ('{"," : ":2,","a":"b",":":2,",y":1}', ","),
        ('{"a":"b",",":1}', ","),
        ('{"a":"n","m":["n"],"n":1}', "n"),
        ('{"x":{"n":1},"n":1}', "n"),
        ('{"n" :1,"x":"n"}', "n"),
    ],
)
def test_a_key_that_looks_like_what_is_around_it(known: str, key: str) -> None:
    """The text of a key is also found where one string ends and the next begins, in other values and in others' keys;
    what is changed is the value of the key.
    """
    stored = decode(known)
    changed = stored | {key: 7}
    assert decode(encode(changed, LIMITS, known=known, stored=stored, lent=False)) == changed


@pytest.mark.parametrize(("key", "value"), [("n", "\ud800"), ("\ud800", 1)])
@pytest.mark.parametrize("known", ['{"n":1,"x":[]}', '{"x":[],"m":1}'])
def test_a_lone_surrogate_in_few_changes(known: str, key: str, value: object) -> None:
    """A key or value that is no text is refused in a change of one as well (R90)."""
    stored = decode(known)
    with pytest.raises(InvalidData, match="lone surrogate"):
        encode(stored | {key: value}, LIMITS, known=known, stored=stored, lent=False)


def test_a_key_of_something_else() -> None:
    """A key that is set where another was deleted is not one that an inner object has."""
    known = '{"x":{"b":1},"a":1}'
    stored = decode(known)
    changed = {"x": stored["x"], "b": 2}
    assert decode(encode(changed, LIMITS, known=known, stored=stored, lent=False)) == changed


def test_many_brackets() -> None:
    """Data of many lists and objects is deep only where they are within each other; so are brackets in a text."""
    wide = {"a": [{"b": []}] * 100, "c": "[{" * 100, "d": json.loads("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1))}
    assert decode(encode(wide, LIMITS)) == wide


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (math.nan, "session['v'] is nan"),
        ({1: 2}, "session['v'] has the key 1"),
        ("\ud800", "session['v'] holds a lone surrogate"),
        (LOOP, "is nested deeper than 31 levels"),
        ({1, 2}, "session['v'] is a builtins.set"),
        ((1, 2), "session['v'] is a builtins.tuple"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_than_known(value: object, path: str) -> None:
    """Data that no longer reads so is inspected as ever (R89, R91, R95-R97)."""
    with pytest.raises(InvalidData, match=re.escape(path)):
        encode({"v": value}, LIMITS, known='{"v":1}')
