r"""One cookie, read by an own bounded parser and written by one function (RFC 6265bis).

Starlette's parser takes 6.8 s for a hostile 64 KiB header (CVE-2024-7592) and reads ``\xa0__Host-session`` as
``__Host-session``.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal
from urllib.parse import quote

from sqlsessions.errors import ConfigurationError

SameSite = Literal["lax", "strict", "none"]

#: More cookies of one name than this are an attack, and are all refused: it bounds the signature checks.
MAX_CANDIDATES = 32
#: RFC 6265bis §5.5: user agents cap Max-Age at 400 days.
MAX_AGE_LIMIT = 400 * 24 * 60 * 60

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", re.ASCII)
_PATH = re.compile(r"/[\x20-\x3a\x3c-\x7e]*", re.ASCII)
_DOMAIN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?", re.ASCII)
#: Prefixes browsers enforce, and ask no less for in another case: each needs Secure, and all but the last two
#: ``Path=/`` and no Domain.
_HOST_PREFIXES = ("__host-http-", "__host-")
_SECURE_PREFIXES = (*_HOST_PREFIXES, "__secure-", "__http-")


@dataclass(frozen=True, slots=True)
class CookieSettings:
    """The attributes of the session cookie; HttpOnly is not an option.

    Raises `ConfigurationError` for what browsers would refuse in silence: a prefix or ``SameSite=None`` or
    ``Partitioned`` without Secure, ``__Host-`` with a domain or path, or characters that would split the header.
    """

    #: Empty: ``__Host-session`` where the other settings allow it, else ``session``.
    name: str = ""
    https_only: bool = True
    same_site: SameSite = "lax"
    domain: str | None = None
    #: None: the ``root_path`` under which the application is mounted.
    path: str | None = "/"
    partitioned: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            hosted = self.https_only and self.path == "/" and self.domain is None
            object.__setattr__(self, "name", "__Host-session" if hosted else "session")
        self._check_characters()
        self._check_prefix()
        if not self.https_only and (self.same_site == "none" or self.partitioned):
            raise ConfigurationError(
                "cookie_same_site='none' and cookie_partitioned need cookie_https_only=True: browsers refuse them else"
            )

    def set(self, value: str, *, max_age: int | None, root_path: str = "") -> bytes:
        """Return the Set-Cookie header for *value*: until the browser closes, or for *max_age* seconds if given."""
        age = "" if max_age is None else f"; Max-Age={min(max_age, MAX_AGE_LIMIT)}"
        return f"{self.name}={value}{age}{self._attributes(root_path)}".encode("ascii")

    def expire(self, root_path: str = "") -> bytes:
        """Return the Set-Cookie header that removes the cookie: the same attributes, or the browser would keep it
        (RFC 6265bis §5.7).
        """
        return self.set("", max_age=0, root_path=root_path)

    def _attributes(self, root_path: str) -> str:
        path = self.path or quote(root_path, safe="/-._~!$&'()*+,=:@") or "/"
        domain = "" if self.domain is None else f"; Domain={self.domain}"
        secure = "; Secure" if self.https_only else ""
        partitioned = "; Partitioned" if self.partitioned else ""
        return f"; Path={path}{domain}; HttpOnly{secure}; SameSite={self.same_site.capitalize()}{partitioned}"

    def _check_characters(self) -> None:
        if not _TOKEN.fullmatch(self.name):
            raise ConfigurationError(f"cookie_name {self.name!r:.80} is not a token (RFC 9110 §5.6.2)")
        if self.path is not None and not _PATH.fullmatch(self.path):
            raise ConfigurationError(
                f"cookie_path {self.path!r:.80} must begin with / and hold neither ';' nor control characters"
            )
        if self.domain is not None and not _DOMAIN.fullmatch(self.domain):
            raise ConfigurationError(f"cookie_domain {self.domain!r:.80} is not a host name")
        if self.same_site not in ("lax", "strict", "none"):
            raise ConfigurationError(f"cookie_same_site must be 'lax', 'strict' or 'none', not {self.same_site!r:.80}")

    def _check_prefix(self) -> None:
        name = self.name.lower()
        if name.startswith(_SECURE_PREFIXES) and not self.https_only:
            raise ConfigurationError(f"cookie_name {self.name!r} needs cookie_https_only=True: browsers refuse it else")
        if name.startswith(_HOST_PREFIXES) and (self.path != "/" or self.domain is not None):
            raise ConfigurationError(
                f"cookie_name {self.name!r} needs cookie_path='/' and no cookie_domain: browsers refuse it else"
            )


def read(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[bytes] | None:
    """Return the distinct values sent for the cookie *name*, in any number of Cookie headers; None if they are more
    than `MAX_CANDIDATES`.

    The name is compared exactly and case-sensitively, only spaces and tabs are stripped, and nothing is unquoted. In
    time proportional to the headers' length.
    """
    values: list[bytes] = []
    for key, header in headers:
        if key != b"cookie" or name not in header:
            continue
        for found in _values(name)(header):
            if (value := found.strip(b" \t")) not in values:
                if len(values) == MAX_CANDIDATES:
                    return None
                values.append(value)
    return values


@lru_cache
def _values(name: bytes) -> Callable[[bytes], list[bytes]]:
    """Return what finds the values of the cookie *name* in a header."""
    # Each part matches what the one before it cannot, so that nothing is looked at again and again.
    return re.compile(rb"(?:^|;)[ \t]*%b[ \t]*=([^;]*)" % re.escape(name)).findall
