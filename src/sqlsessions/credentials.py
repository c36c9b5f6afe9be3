"""All cryptography: ids, secrets, their hashes, and the signed value a cookie holds.

The cookie value is ``base64url(format ‖ id ‖ secret) "." base64url(HMAC-SHA256)``, always 110 characters. The
signature is checked before any SQL (a forged cookie costs no statement); the table holds only the SHA-256 of the
secret (a leaked dump logs nobody in).
"""

import hashlib
import hmac
import secrets
from base64 import urlsafe_b64encode
from binascii import a2b_base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from uuid import UUID, SafeUUID

from itsdangerous import Signer
from starlette.datastructures import Secret

from sqlsessions.errors import ConfigurationError

SECRET_BYTES = 32
MIN_KEY_BYTES = 32

_FORMAT = b"\x01"
_PAYLOAD_BYTES = len(_FORMAT) + 16 + SECRET_BYTES
_PAYLOAD_CHARS = 66
_VALUE_CHARS = _PAYLOAD_CHARS + 1 + 43

#: The cookies that came last are known to be genuine, some 0.6 KB each: a browser sends the same one many times.
REMEMBERED = 1024

_TO_BASE64 = bytes.maketrans(b"-_", b"+/")

#: Fewer different symbols than this are not random: 64 hex digits have 15 of 16, 32 random bytes about 30.
_MIN_SYMBOLS = 8
#: Parts of keys that stand in tutorials and sample configurations (CVE-2020-17526, CVE-2023-27524).
_PLACEHOLDERS = (
    b"changeme", b"change-me", b"change_me", b"change this", b"change-this", b"changethis",
    b"secret-key", b"secret_key", b"secretkey", b"your-secret", b"your_secret", b"yoursecret",
    b"supersecret", b"super-secret", b"super_secret", b"insecure", b"placeholder", b"not-so-secret", b"django-insecure",
    b"09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7",  # the FastAPI tutorial's
)  # fmt: skip


@dataclass(frozen=True, slots=True, repr=False)
class Credential:
    """What a genuine cookie says: which session, and the secret that proves it. Its repr shows the id only."""

    id: UUID
    secret: bytes
    #: What the table holds of this secret.
    secret_hash: bytes = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "secret_hash", hash_secret(self.secret))

    def __repr__(self) -> str:
        return f"<Credential {self.id}>"


def new_id(now: datetime) -> UUID:
    """Return a fresh UUIDv7 (RFC 9562 §5.7): milliseconds of *now*, then 74 random bits from the operating system.

    New rows are neighbours in the index. The id is a handle, not a credential: its time part may be known to anybody.
    """
    milliseconds = int(now.timestamp() * 1000) & (1 << 48) - 1
    bits = int.from_bytes(secrets.token_bytes(10))
    value = milliseconds << 80 | 0x7 << 76 | (bits >> 68) << 64 | 0b10 << 62 | bits & (1 << 62) - 1
    return UUID(int=value)


def new_secret() -> bytes:
    """Return 256 random bits from the operating system; an error of its generator is passed on, never worked around."""
    return secrets.token_bytes(SECRET_BYTES)


def hash_secret(secret: bytes) -> bytes:
    """Return the SHA-256 of *secret*; 256 random bits need no salt and no slow hash (CVE-2019-16782 is what storing
    them raw costs).
    """
    return hashlib.sha256(secret).digest()


def proves(credential: Credential, secret_hash: bytes) -> bool:
    """Tell, in constant time, whether *credential* holds the secret whose hash the table has."""
    return hmac.compare_digest(credential.secret_hash, secret_hash)


class CookieSigner:
    """Signs and verifies cookie values for one cookie name and audience.

    The salt covers both, so that a value signed for another cookie, another application with the same key, or by
    Starlette's own middleware, is not ours (R8). The first key signs; the others only verify. Raises
    `ConfigurationError` for weak keys.
    """

    __slots__ = ("_current", "_previous", "_remembered")

    def __init__(
        self,
        secret_key: str | bytes | Secret,
        *,
        previous_secret_keys: Sequence[str | bytes | Secret] = (),
        cookie_name: str,
        audience: str = "",
    ) -> None:
        if isinstance(previous_secret_keys, (str, bytes, Secret)):
            raise ConfigurationError("previous_secret_keys must be a list of keys, not one key")
        salt = b"sqlsessions.cookie.1\0%b\0%b" % (cookie_name.encode(), audience.encode())
        self._current = _derive(_checked(secret_key, "secret_key"), salt)
        self._previous = [
            _derive(_checked(key, f"previous_secret_keys[{place}]"), salt)
            for place, key in enumerate(previous_secret_keys)
        ]
        # Only what is genuine is remembered, since `_verified` raises for all else: whoever forges evicts nothing.
        self._remembered = lru_cache(REMEMBERED)(self._verified)

    def __repr__(self) -> str:
        return f"<CookieSigner of {1 + len(self._previous)} keys>"

    def sign(self, credential: Credential) -> str:
        """Return the cookie value for *credential*, signed with the current key."""
        payload = urlsafe_b64encode(_FORMAT + credential.id.bytes + credential.secret).rstrip(b"=")
        return (payload + b"." + _signature(self._current, payload)).decode()

    def unsign(self, value: bytes) -> tuple[Credential, bool] | None:
        """Return the credential *value* holds and whether a previous key signed it; None for anything not signed by us.

        Never raises. The signature is compared as text, in constant time, so that none but the one canonical spelling
        verifies.
        """
        if len(value) != _VALUE_CHARS or value[_PAYLOAD_CHARS] != ord("."):
            return None
        try:
            return self._remembered(value)
        except _ForgedError:
            return None

    def _verified(self, value: bytes) -> tuple[Credential, bool]:
        payload, signature = value[:_PAYLOAD_CHARS], value[_PAYLOAD_CHARS + 1 :]
        if hmac.compare_digest(_signature(self._current, payload), signature):
            return _parse(payload), False
        for key in self._previous:
            if hmac.compare_digest(_signature(key, payload), signature):
                return _parse(payload), True
        raise _ForgedError


class _ForgedError(Exception):
    """The cookie value was not signed by us."""


def _signature(key: hmac.HMAC, payload: bytes) -> bytes:
    # A copy of what has taken in the key: doing that for every cookie takes as long again.
    mac = key.copy()
    mac.update(payload)
    return urlsafe_b64encode(mac.digest()).rstrip(b"=")


def _parse(payload: bytes) -> Credential:
    raw = a2b_base64(payload.translate(_TO_BASE64) + b"==")
    return Credential(_uuid(int.from_bytes(raw[1:17])), raw[17:])


def _uuid(number: int) -> UUID:
    """Return ``UUID(int=number)``, which spends most of its time on the arguments that it was not given."""
    made = object.__new__(UUID)
    object.__setattr__(made, "int", number)
    object.__setattr__(made, "is_safe", SafeUUID.unknown)
    return made


def _derive(key: bytes, salt: bytes) -> hmac.HMAC:
    derived = Signer(key, salt=salt, key_derivation="hmac", digest_method=hashlib.sha256).derive_key()
    return hmac.new(derived, digestmod="sha256")


def _checked(secret_key: str | bytes | Secret, name: str) -> bytes:
    """Return the key as bytes, or say what is wrong with it without showing it (ASVS 5 §13.2.3, R10)."""
    if not isinstance(secret_key, (str, bytes, Secret)):
        raise ConfigurationError(f"{name} must be str, bytes or Secret, not {type(secret_key).__name__}")
    remedy = 'make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"'
    try:
        # Of bytes that are no text `os.environ` makes surrogates.
        key = secret_key if isinstance(secret_key, bytes) else str(secret_key).encode(errors="surrogateescape")
    except UnicodeEncodeError:
        raise ConfigurationError(f"{name} has a lone surrogate, which is no character: {remedy}") from None
    if len(key) < MIN_KEY_BYTES:
        raise ConfigurationError(f"{name} has {len(key)} bytes; at least {MIN_KEY_BYTES} are needed: {remedy}")
    if len(set(key)) < _MIN_SYMBOLS or any(part in key.lower() for part in _PLACEHOLDERS):
        raise ConfigurationError(f"{name} is a placeholder or a repeated pattern, which attackers try first: {remedy}")
    return key
