"""The session cookie is read by an own parser that nothing surprises, and written so that browsers obey."""

import itertools
import sys
import time
from types import FrameType
from typing import Any

import httpx
import pytest

from sqlsessions import cookies
from sqlsessions.cookies import MAX_AGE_LIMIT, MAX_CANDIDATES, CookieSettings, SameSite
from sqlsessions.credentials import CookieSigner, Credential, new_id, new_secret
from sqlsessions.errors import ConfigurationError
from sqlsessions.record import utc_now
from tests.asgi import KEY, SetCookie

HOSTILE = 64 * 1024


def sent(*lines: bytes) -> list[tuple[bytes, bytes]]:
    """Return the headers of a request with these Cookie headers among others."""
    return [(b"host", b"session=host"), *((b"cookie", line) for line in lines), (b"x-cookie", b"session=other")]


@pytest.mark.parametrize(
    ("header", "values"),
    [
        (b"session=a", [b"a"]),
        (b"x=1; session=a; y=2", [b"a"]),
        (b"x=1;session=a;y=2", [b"a"]),
        (b"session=a=b==", [b"a=b=="]),
        (b" \tsession\t= \ta\t ;", [b"a"]),
        (b"session=", [b""]),
        (b"session=a,session=b", [b"a,session=b"]),
        (b"session=a; session=a", [b"a"]),
        (b"session=a; session=b", [b"a", b"b"]),
        (b"", []),
        (b";;;", []),
        (b"session", []),
        (b"=session", []),
        (b"=session=a", []),
        (b"session;=a", []),
        (b"x=session=a", []),
    ],
)
def test_pairs(header: bytes, values: list[bytes]) -> None:
    """A Cookie header is pairs between semicolons, each split at its first equals sign (RFC 6265bis §5.6)."""
    assert cookies.read(sent(header), b"session") == values


@pytest.mark.parametrize(
    "name",
    [b"Session", b"SESSION", b"sessionx", b"xsession", b"__Host-session", b'"session"', b"%73ession", b"$session",
     b"ses sion", b"session\0"],
)  # fmt: skip
def test_exact_name(name: bytes) -> None:
    """The name is compared exactly and case-sensitively (R21)."""
    assert cookies.read(sent(name + b"=evil"), b"session") == []


@pytest.mark.parametrize("space", [b"\xa0", b"\x85", b"\x0b", b"\x0c", b"\x1c", b"\x1f", b"\r", b"\n", b"\xe2\x80\x83"])
def test_only_blanks_are_stripped(space: bytes) -> None:
    """What Python takes for a space is part of the name, so that it bypasses no prefix (R21)."""
    for disguised in (space + b"__Host-session", b"__Host-session" + space, b" " + space + b"__Host-session"):
        assert cookies.read(sent(disguised + b"=evil"), b"__Host-session") == []
    assert cookies.read(sent(b"session=" + space + b"a"), b"session") == [space + b"a"]


@pytest.mark.parametrize("value", [b'"a"', b'"a\\073b"', b"a\\", b"%61", b'"', b"a b", b"\xff\xfe", b"=?utf-8?q?a?="])
def test_nothing_is_unquoted(value: bytes) -> None:
    """A value is taken as the bytes it is: quotes, octal escapes and percent signs mean nothing (R21)."""
    assert cookies.read(sent(b"session=" + value), b"session") == [value]


def test_quotes_do_not_hide_a_semicolon() -> None:
    """A quoted value of another cookie ends at its first semicolon, as it does in browsers (R21)."""
    assert cookies.read(sent(b'$Version=1; x="a; session=b; y=c"'), b"session") == [b"b"]


def test_several_headers() -> None:
    """All Cookie headers are read, as HTTP/2 splits them (R21)."""
    assert cookies.read(sent(b"x=1", b"session=a", b"session=b; y=1"), b"session") == [b"a", b"b"]


def test_too_many_candidates() -> None:
    """More values of one name than a browser could mean are all refused, so that signature checks are bounded (R22)."""
    many = [b"session=%d" % number for number in range(MAX_CANDIDATES)]
    for least in (many, [*many, *many]):
        assert len(cookies.read(sent(b"; ".join(least)), b"session") or ()) == MAX_CANDIDATES
    assert cookies.read(sent(b"; ".join([*many, b"session=one more"])), b"session") is None
    assert cookies.read(sent(*many, b"session=one more"), b"session") is None


HOSTILE_UNITS = {
    "backslashes": b"\\",
    "an unterminated quote": b'session="\\',
    "octal escapes": b"\\073",
    "semicolons": b";",
    "equals": b"=",
    "blanks": b" ",
    "empty": b"session=;",
    "the same": b"session=a;",
    "almost": b"session;",
    "others": b"a=b; ",
    "not blanks": b"\xa0",
}


@pytest.mark.parametrize("unit", HOSTILE_UNITS.values(), ids=HOSTILE_UNITS)
def test_hostile_headers(unit: bytes) -> None:
    """The work for a hostile header grows no faster than the header, and 64 KiB take less than 20 ms of CPU time (R22).

    A collection of garbage may fall into any one reading, so that the shortest of three counts.
    """
    header = b"session=x;" + unit * (HOSTILE // len(unit))
    assert work(header) <= 2.1 * work(header[: HOSTILE // 2]) + 20
    spent = []
    for _ in range(3):
        started = time.process_time()
        cookies.read(sent(header), b"session")
        spent.append(time.process_time() - started)
    assert min(spent) < 0.02


def test_hostile_distinct_values() -> None:
    """Distinct values stop the reading at the limit, however many follow (R22)."""
    header = b";".join(b"session=%d" % number for number in range(6000))
    assert work(header) < 1000


def work(header: bytes) -> int:
    """Return how many calls reading *header* takes, each of which is over a part of its own."""
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "c_call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        cookies.read(sent(header), b"session")
    finally:
        sys.setprofile(before)
    return calls


def test_defaults() -> None:
    """By default the cookie is Secure, HttpOnly, Lax, host-only and for all paths, under a __Host- name (R14)."""
    settings = CookieSettings()
    assert settings.set("v", max_age=None) == b"__Host-session=v; Path=/; HttpOnly; Secure; SameSite=Lax"
    assert settings.expire() == b"__Host-session=; Max-Age=0; Path=/; HttpOnly; Secure; SameSite=Lax"


@pytest.mark.parametrize(
    ("settings", "header"),
    [
        (CookieSettings(https_only=False), "session=v; Path=/; HttpOnly; SameSite=Lax"),
        (CookieSettings(same_site="strict"), "__Host-session=v; Path=/; HttpOnly; Secure; SameSite=Strict"),
        (CookieSettings(same_site="none"), "__Host-session=v; Path=/; HttpOnly; Secure; SameSite=None"),
        (CookieSettings(partitioned=True), "__Host-session=v; Path=/; HttpOnly; Secure; SameSite=Lax; Partitioned"),
        (
            CookieSettings(domain="example.com"),
            "session=v; Path=/; Domain=example.com; HttpOnly; Secure; SameSite=Lax",
        ),
        (CookieSettings(path="/app"), "session=v; Path=/app; HttpOnly; Secure; SameSite=Lax"),
        (CookieSettings(name="login_2"), "login_2=v; Path=/; HttpOnly; Secure; SameSite=Lax"),
    ],
)
def test_attributes(settings: CookieSettings, header: str) -> None:
    """Each setting is one attribute, and the name has the strictest prefix that the settings allow (R14, R17)."""
    assert settings.set("v", max_age=None).decode() == header
    assert SetCookie.parse(header).attributes.keys() >= {"path", "httponly", "samesite"}


@pytest.mark.parametrize(
    ("asked", "said"), [(1, "1"), (1_209_600, "1209600"), (MAX_AGE_LIMIT, "34560000"), (10**12, "34560000")]
)
def test_max_age(asked: int, said: str) -> None:
    """Max-Age is digits, and at most the 400 days that browsers accept (R16, R20)."""
    assert SetCookie.parse(CookieSettings().set("v", max_age=asked).decode()).attributes["max-age"] == said


def test_size() -> None:
    """Name and value of a session cookie are always 124 bytes, far from any limit (R19)."""
    signer = CookieSigner(KEY, cookie_name="__Host-session")
    for _ in range(100):
        value = signer.sign(Credential(new_id(utc_now()), new_secret()))
        assert len("__Host-session" + value) == 124


@pytest.mark.parametrize(
    ("root_path", "path"),
    [
        ("", "/"),
        ("/admin", "/admin"),
        ("/a/b", "/a/b"),
        ("/caf\u00e9 1", "/caf%C3%A9%201"),
        ("/a; Domain=evil", "/a%3B%20Domain=evil"),
        ("/a\r\nSet-Cookie: evil=1", "/a%0D%0ASet-Cookie:%20evil=1"),
    ],
)
def test_mount_path(root_path: str, path: str) -> None:
    """With cookie_path=None the cookie is for the path the application is mounted under, safely spelt (R24, R16)."""
    settings = CookieSettings(path=None)
    for header in (settings.set("v", max_age=None, root_path=root_path), settings.expire(root_path)):
        assert SetCookie.parse(header.decode("ascii")).attributes["path"] == path
    assert settings.name == "session"
    assert SetCookie.parse(CookieSettings().expire(root_path).decode()).attributes["path"] == "/"


@pytest.mark.parametrize(
    "options",
    [
        {"name": "__Host-session", "https_only": False},
        {"name": "__Host-session", "path": "/app"},
        {"name": "__Host-session", "path": None},
        {"name": "__Host-session", "domain": "example.com"},
        {"name": "__HOST-session", "https_only": False},
        {"name": "__hOsT-session", "domain": "example.com"},
        {"name": "__Secure-session", "https_only": False},
        {"name": "__secure-session", "https_only": False},
        {"name": "__Http-session", "https_only": False},
        {"name": "__http-session", "https_only": False},
        {"name": "__Host-Http-session", "https_only": False},
        {"name": "__host-http-session", "path": "/app"},
        {"same_site": "none", "https_only": False},
        {"partitioned": True, "https_only": False},
    ],
)
def test_combinations_that_browsers_refuse(options: dict[str, Any]) -> None:
    """What a browser would drop in silence is refused at construction, prefixes in any case included (R15)."""
    with pytest.raises(ConfigurationError, match=r"cookie_https_only=True|cookie_path='/' and no cookie_domain"):
        CookieSettings(**options)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("name", name) for name in ("a b", "a;b", "a=b", "a\r\nb", "a\0", "é", "a,b", '"a"', "a/b", "[a]", "a\x7f")),
        *(("path", path) for path in ("", "app", "/a;b", "/a\r\nSet-Cookie: x=y", "/\0", "/\x7f", "/é", "/a\n", "*")),
        *(("domain", domain) for domain in ("", ".", ".example.com", "a;b", "a b", "a\r\nb", "exa\0mple", "é.com",
                                            "https://example.com", "example.com/", "example.com:443", "a_b.com\n")),
        *(("same_site", value) for value in ("Lax", "", "relaxed", "lax; Domain=evil", None)),
    ],
)  # fmt: skip
def test_characters_that_split_headers(option: str, value: Any) -> None:
    """The name is a token, and no setting can end an attribute or the header (R16)."""
    with pytest.raises(ConfigurationError, match=f"cookie_{option}"):
        CookieSettings(**{option: value})


SAME_SITES: tuple[SameSite, ...] = ("lax", "strict", "none")
MIXES = [
    (CookieSettings("", https_only, same_site, domain, path, partitioned), max_age)
    for https_only, same_site, domain, path, partitioned, max_age in itertools.product(
        (True, False), SAME_SITES, (None, "example.com"), ("/", "/app", None), (True, False), (None, 60)
    )
    if https_only or not (partitioned or same_site == "none")
]


@pytest.mark.parametrize(("settings", "max_age"), MIXES)
def test_expiry_in_a_cookie_jar(settings: CookieSettings, max_age: int | None) -> None:
    """The expiring cookie takes the cookie out of a real jar, whatever its attributes, which it repeats (R18)."""
    given, expired = settings.set("v", max_age=max_age, root_path="/app"), settings.expire("/app")
    jar = httpx.Cookies()
    for header, kept in ((given, 1), (expired, 0)):
        request = httpx.Request("GET", "https://www.example.com/app/page")
        jar.extract_cookies(httpx.Response(200, headers=[(b"set-cookie", header)], request=request))
        assert len(jar.jar) == kept
    before, after = SetCookie.parse(given.decode()), SetCookie.parse(expired.decode())
    assert (after.name, after.value, after.attributes.pop("max-age")) == (before.name, "", "0")
    before.attributes.pop("max-age", None)
    assert after.attributes == before.attributes
