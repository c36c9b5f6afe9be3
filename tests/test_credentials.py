"""Ids are unique, secrets random, and one spelling of one signature by one of our keys is the only cookie there is."""

import base64
import copy
import hashlib
import os
import pickle
import re
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import hypothesis
import itsdangerous
import pytest
from hypothesis import strategies as st
from starlette.datastructures import Secret

from sqlsessions import credentials
from sqlsessions.credentials import (
    CookieSigner,
    Credential,
    hash_secret,
    new_id,
    new_secret,
    proves,
)
from sqlsessions.errors import ConfigurationError
from sqlsessions.testing import START

KEY = "k7Qv3nX9pLw2RzT8bYc5MdF1hJg6SaE0"
OTHER_KEY = "0EaS6gJh1FdM5cYb8TzR2wLp9Xn3vQ7k"
CREDENTIAL = Credential(new_id(START), new_secret())


def signer(key: str | bytes | Secret = KEY, **settings: Any) -> CookieSigner:
    """Return a signer with some key, for some cookie."""
    return CookieSigner(key, **{"cookie_name": "session", **settings})


SIGNED = signer().sign(CREDENTIAL).encode()

# ids and secrets


def test_id_is_uuid7() -> None:
    """An id is a version 7 UUID as RFC 9562 draws it: 48 bits of milliseconds, version, variant."""
    now = datetime(2022, 2, 22, 19, 22, 22, tzinfo=UTC)
    id_ = new_id(now)
    assert (id_.version, id_.variant) == (7, "specified in RFC 4122")
    assert id_.int >> 80 == 0x017F22E279B0  # the example in RFC 9562, appendix A.6


def test_ids_are_in_order() -> None:
    """Ids of later milliseconds are greater, so that new rows are neighbours in the index."""
    ids = [new_id(START + n * timedelta(milliseconds=1)) for n in range(1000)]
    assert ids == sorted(ids)


def test_ids_are_random() -> None:
    """Ids of one instant differ in 74 random bits, each of which is now 0 and now 1."""
    ids = [new_id(START).int for _ in range(2000)]
    assert len(set(ids)) == len(ids)
    always, ever = ids[0], 0
    for id_ in ids:
        always, ever = always & id_, ever | id_
    assert (always ^ ever).bit_count() == 74


def test_secrets() -> None:
    """A secret is 256 random bits."""
    made = [new_secret() for _ in range(2000)]
    assert {len(secret) for secret in made} == {32}
    assert len(set(made)) == len(made)


@pytest.mark.parametrize("make", [lambda: new_id(START), new_secret], ids=["id", "secret"])
def test_no_randomness_is_an_error(make: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """When the operating system has no randomness there is an error, and nothing weaker instead (R1)."""

    def broken(count: int) -> bytes:
        raise OSError("no randomness")

    # Both modules have taken the function over by its name.
    for place in ("os.urandom", "random._urandom", "secrets.token_bytes"):
        monkeypatch.setattr(place, broken)
    with pytest.raises(OSError, match="no randomness"):
        make()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_unique_across_forks() -> None:
    """Forked workers make different ids and secrets: nothing random is inherited (R1)."""
    count = 10_000
    pipes = []
    for _ in range(2):
        reading, writing = os.pipe()
        if not os.fork():
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(b"".join(new_id(START).bytes + new_secret() for _ in range(count)))
            os._exit(0)
        os.close(writing)
        pipes.append(reading)
    made = b""
    for reading in pipes:
        with os.fdopen(reading, "rb") as pipe:
            made += pipe.read()
        os.wait()
    places = range(0, len(made), 48)
    assert len({made[place : place + 16] for place in places}) == 2 * count
    assert len({made[place + 16 : place + 48] for place in places}) == 2 * count


def test_no_other_randomness() -> None:
    """The sources use `random` for delays and steps of versions only: whatever is hard to guess is from `secrets`."""
    paths = list((Path(__file__).parents[1] / "src").rglob("*.py"))
    assert paths
    for path in paths:
        source = path.read_text()
        assert not re.search(r"uuid[145]\(|random\.(random|choice|randint|randbytes)\(", source), path
        for line in re.findall(r".*random\.(?:uniform|getrandbits).*", source):
            assert "not a secret" in line


def test_hash() -> None:
    """The table holds the SHA-256 of the secret, and only the secret proves to be it: not its hash (R3, R4)."""
    stored = CREDENTIAL.secret_hash
    assert stored == hash_secret(CREDENTIAL.secret) == hashlib.sha256(CREDENTIAL.secret).digest()
    assert proves(CREDENTIAL, stored)
    assert not proves(Credential(CREDENTIAL.id, stored), stored)
    assert not proves(Credential(CREDENTIAL.id, new_secret()), stored)


# the signature


def test_round_trip() -> None:
    """What was signed is read back, and is no news to a previous key."""
    assert signer().unsign(SIGNED) == (CREDENTIAL, False)


def test_value() -> None:
    """A cookie value is 110 characters that need no quoting in a header."""
    assert re.fullmatch(rb"[A-Za-z0-9_-]{66}\.[A-Za-z0-9_-]{43}", SIGNED)
    assert len(SIGNED) == 110


def test_signature_is_itsdangerous() -> None:
    """The signature is what itsdangerous computes with SHA-256, HMAC key derivation and a salt of our own (R11)."""
    reference = itsdangerous.Signer(
        KEY, salt=b"sqlsessions.cookie.1\0session\0shop", key_derivation="hmac", digest_method=hashlib.sha256
    )
    value = signer(audience="shop").sign(CREDENTIAL)
    payload = base64.urlsafe_b64encode(b"\x01" + CREDENTIAL.id.bytes + CREDENTIAL.secret).rstrip(b"=")
    assert value.encode() == reference.sign(payload)


ALPHABET = bytes(range(256))


def test_one_spelling() -> None:
    """Any other byte anywhere, a byte less or more, and the value is nobody's: also where base64 ignores bits (R7)."""
    one = signer()
    assert one.unsign(SIGNED)  # and is remembered
    for place in range(len(SIGNED)):
        for byte in ALPHABET:
            if byte != SIGNED[place]:
                assert one.unsign(SIGNED[:place] + bytes([byte]) + SIGNED[place + 1 :]) is None
        assert one.unsign(SIGNED[:place] + SIGNED[place + 1 :]) is None
        assert one.unsign(SIGNED[:place]) is None
        assert one.unsign(SIGNED[place + 1 :]) is None
    for place in range(len(SIGNED) + 1):
        for byte in b"A.= \0\xe9":
            assert one.unsign(SIGNED[:place] + bytes([byte]) + SIGNED[place:]) is None


@hypothesis.given(st.binary() | st.text("ABab01-_.=", min_size=110, max_size=110).map(str.encode))
def test_any_value(value: bytes) -> None:
    """Nothing else verifies, and nothing raises."""
    assert signer().unsign(value) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda value: value.split(b".")[0],
        lambda value: value.replace(b".", b""),
        lambda value: value + b"=",
        lambda value: b'"' + value + b'"',
        lambda value: value.replace(b".", b"=="),
        lambda value: value.upper(),
        lambda value: value.split(b".")[1] + b"." + value.split(b".")[0],
        lambda value: base64.urlsafe_b64decode(value.split(b".")[0] + b"=="),
    ],
)
def test_unsigned_forms(spoil: Callable[[bytes], bytes]) -> None:
    """There is no second, weaker way to read a value (R7)."""
    assert signer().unsign(spoil(SIGNED)) is None


@pytest.mark.parametrize(
    "other",
    [
        {"cookie_name": "Session"},
        {"cookie_name": "__Host-session"},
        {"audience": "shop"},
        {"cookie_name": "sessio", "audience": "n"},
        {"key": OTHER_KEY},
        {"key": KEY.lower()},
        {"key": KEY + "="},
    ],
    ids=str,
)
def test_other_domains(other: dict[str, Any]) -> None:
    """A value signed for another cookie or audience, or with another key, is refused in both directions (R8)."""
    stranger = signer(**other)
    assert stranger.unsign(SIGNED) is None
    assert signer().unsign(stranger.sign(CREDENTIAL).encode()) is None


def test_stock_signatures() -> None:
    """What itsdangerous signs by default, as Starlette's own sessions do, is refused with the same key (R8)."""
    payload = SIGNED.split(b".")[0]
    for stock in (
        itsdangerous.Signer(KEY),
        itsdangerous.Signer(KEY, digest_method=hashlib.sha256),
        itsdangerous.Signer(KEY, salt="sqlsessions.cookie.1", key_derivation="hmac", digest_method=hashlib.sha256),
        itsdangerous.TimestampSigner(KEY),
        itsdangerous.TimestampSigner(KEY, salt="cookie-session"),
    ):
        assert signer().unsign(stock.sign(payload)) is None


@pytest.mark.parametrize("key", [KEY.encode(), Secret(KEY)], ids=["bytes", "Secret"])
def test_kinds_of_key(key: bytes | Secret) -> None:
    """A key as str, bytes or Starlette's Secret is the same key."""
    assert signer(key).unsign(SIGNED) == (CREDENTIAL, False)


def test_any_bytes_are_a_key() -> None:
    """A key of bytes need not be text."""
    one = signer(bytes(range(200, 240)))
    assert one.unsign(one.sign(CREDENTIAL).encode()) == (CREDENTIAL, False)


def test_cookies_that_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a browser sends again is not computed again. No forgery takes the place of a genuine cookie, and only so
    many are remembered.
    """
    computed: list[bytes] = []

    def signature(key: Any, payload: bytes) -> bytes:
        computed.append(payload)
        return compute(key, payload)

    compute = credentials._signature
    one = signer()
    cookies = [one.sign(Credential(new_id(START), new_secret())).encode() for _ in range(credentials.REMEMBERED + 1)]
    monkeypatch.setattr(credentials, "_signature", signature)
    found = [one.unsign(cookie) for cookie in cookies[:-1]]
    assert None not in found
    assert len(computed) == credentials.REMEMBERED
    forged = [cookie[:-2] + b"??" for cookie in cookies]
    assert [one.unsign(cookie) for cookie in forged] == [None] * len(forged)
    computed.clear()
    assert [one.unsign(cookie) for cookie in cookies[:-1]] == found
    assert computed == []
    assert one.unsign(cookies[-1])
    assert len(computed) == 1
    assert one.unsign(cookies[0]) == found[0]
    assert len(computed) == 2


# key rotation


def test_rotation() -> None:
    """The new key signs, the previous ones verify and say so, and one that was taken out does not (R9)."""
    newest = "3rd-Z8yX7wV6uT5sR4qP3oN2mL1kJ0iH"
    rotated = signer(OTHER_KEY, previous_secret_keys=[KEY])
    assert rotated.unsign(SIGNED) == (CREDENTIAL, True)
    renewed = rotated.sign(CREDENTIAL).encode()
    assert rotated.unsign(renewed) == (CREDENTIAL, False)
    assert signer(OTHER_KEY).unsign(renewed) == (CREDENTIAL, False)
    assert signer().unsign(renewed) is None
    again = signer(newest, previous_secret_keys=(OTHER_KEY, Secret(KEY)))
    assert again.unsign(renewed) == again.unsign(SIGNED) == (CREDENTIAL, True)
    assert signer(newest, previous_secret_keys=[OTHER_KEY]).unsign(SIGNED) is None


@pytest.mark.parametrize("keys", [KEY, KEY.encode(), Secret(KEY)], ids=["str", "bytes", "Secret"])
def test_previous_keys_are_a_list(keys: Any) -> None:
    """One key in the place of a list is refused, before it is taken for a list of characters."""
    with pytest.raises(ConfigurationError, match="previous_secret_keys must be a list"):
        signer(previous_secret_keys=keys)


WEAK = {
    "empty": "",
    "31 bytes": KEY[:31],
    "31 bytes of 8 bits": bytes(range(31)),
    "one symbol": "x" * 64,
    "a pattern": "abcabc" * 10,
    "digits": "1234567" * 8,
    "zero bytes": bytes(32),
    "changeme": "please-changeme-before-you-go-live-2040",
    "secret-key": "My-Super-SECRET-KEY-of-many-characters",
    "your_secret": "your_secret_goes_here_0123456789abcdef",
    "the tutorial's": "09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7",
    "Django's": "django-insecure-k7Qv3nX9pLw2RzT8bYc5MdF1hJg6SaE0",
}


@pytest.mark.parametrize("key", WEAK.values(), ids=WEAK)
def test_weak_keys(key: str | bytes) -> None:
    """A key that can be guessed is refused with the way to make one, and without being shown (R10)."""
    for given in (key, Secret(key) if isinstance(key, str) else key):
        with pytest.raises(ConfigurationError, match=r"^secret_key .*python -c") as caught:
            signer(given)
        assert not key or str(key) not in str(caught.value)
    with pytest.raises(ConfigurationError, match=r"^previous_secret_keys\[1\]"):
        signer(previous_secret_keys=[OTHER_KEY, key])


def test_a_key_from_the_environment() -> None:
    """Bytes that are no text come from the environment as surrogates, and are a key like any others; other surrogates
    are refused without being shown (R10).
    """
    key = secrets.token_bytes(64)
    cookie = signer(key).sign(CREDENTIAL)
    assert signer(os.fsdecode(key)).unsign(cookie.encode()) == (CREDENTIAL, False)
    with pytest.raises(ConfigurationError, match=r"^secret_key has a lone surrogate") as caught:
        signer(KEY + "\ud800")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("key", [None, 1, ["a" * 32]], ids=repr)
def test_no_key(key: Any) -> None:
    """What is no key is refused by its type: None is what an unset variable gives."""
    with pytest.raises(ConfigurationError, match=f"^secret_key must be str, bytes or Secret, not {type(key).__name__}"):
        signer(key)


def test_strong_keys() -> None:
    """Keys as they are usually made are accepted, each of many."""
    for _ in range(300):
        for key in (secrets.token_bytes(32), secrets.token_hex(32), secrets.token_urlsafe(32)):
            signer(key)


def test_reprs() -> None:
    """Neither keys nor secrets show in a repr."""
    assert repr(signer(previous_secret_keys=[OTHER_KEY])) == "<CookieSigner of 2 keys>"
    assert repr(CREDENTIAL) == f"<Credential {CREDENTIAL.id}>"
    assert not hasattr(signer(), "__dict__")


def test_forgery_costs_little() -> None:
    """A thousand forged cookies cost well under a second, whatever their size."""
    one = signer(previous_secret_keys=[OTHER_KEY] * 3)
    forged = [SIGNED[:-1] + b"?", b"\\" * 65536, b"." * 110, SIGNED * 100]
    begun = time.process_time()
    for _ in range(250):
        for value in forged:
            assert one.unsign(value) is None
    assert time.process_time() - begun < 1


def test_ids_are_like_any_other() -> None:
    """The id of a cookie is a UUID like any other: equal, hashed, shown, copied and pickled alike."""
    credential, _ = signer().unsign(signer().sign(CREDENTIAL).encode()) or (None, False)
    assert credential is not None
    usual = UUID(str(credential.id))
    assert credential.id == usual
    assert {credential.id: 1}[usual] == 1
    assert repr(credential.id) == repr(usual)
    assert (credential.id.bytes, credential.id.version, credential.id.is_safe) == (usual.bytes, 7, usual.is_safe)
    assert pickle.loads(pickle.dumps(credential.id)) == copy.deepcopy(credential.id) == usual  # noqa: S301 - our own
    with pytest.raises(TypeError):
        credential.id.int = 1  # type: ignore[misc]
