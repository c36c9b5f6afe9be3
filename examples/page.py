"""The demo's page: one HTML document without scripts, fonts or images from anywhere."""

import hashlib
import json
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from uuid import UUID

from sqlsessions import Record

STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --soft: #5b6474; --line: #dfe3ea; --paper: #fff; --ground: #f4f6f9;
  --accent: #1d5fd1; --on-accent: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf0; --soft: #a4adbd; --line: #333a48; --paper: #1b202a;
  --ground: #12151c; --accent: #7fb0ff; --on-accent: #0d1524; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 3rem 1rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 42rem; margin: auto; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 0 0 .75rem; }
p { margin: 0 0 1rem; }
section { margin-top: 1.25rem; padding: 1.25rem 1.5rem; background: var(--paper); border: 1px solid var(--line);
  border-radius: .75rem; }
section > :last-child { margin-bottom: 0; }
.soft { color: var(--soft); }
.row { display: flex; flex-wrap: wrap; gap: .75rem; align-items: center; justify-content: space-between; }
.row p { margin: 0; }
.row + .soft, form + .soft { margin-top: .6rem; }
.count { font-size: 2rem; font-weight: 650; line-height: 1; font-variant-numeric: tabular-nums; }
form { margin: 0; }
label { display: block; margin-bottom: .25rem; font-weight: 600; }
input { flex: 1 1 12rem; min-width: 0; }
input, button { font: inherit; padding: .5rem .9rem; border-radius: .5rem; border: 1px solid var(--soft); }
input { background: var(--paper); color: var(--ink); }
button { background: var(--paper); color: var(--ink); cursor: pointer; }
button.main { background: var(--accent); color: var(--on-accent); border-color: var(--accent); font-weight: 600; }
button:hover { filter: brightness(.95); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
a { color: var(--accent); }
ul { list-style: none; margin: 0; padding: 0; }
li { padding: .75rem 0; border-top: 1px solid var(--line); }
li:first-child { border-top: 0; padding-top: 0; }
li:last-child { padding-bottom: 0; }
code { font: .85em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
"""

#: Nothing but this style sheet, and forms that lead here.
POLICY = (
    f"default-src 'none'; style-src 'sha256-{b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>sqlsessions demo</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>sqlsessions demo</h1>
<p class="soft">All that this page knows of you is a row of a table.
The cookie holds the row's id and a secret, nothing else.</p>
{sections}
</main>
</body>
</html>
"""

_LOGIN = """<section aria-labelledby="login">
<h2 id="login">Log in</h2>
<form method="post" action="/login">
<label for="user">Name</label>
<div class="row"><input id="user" name="user" required maxlength="40" autocomplete="username" aria-describedby="hint">
<button class="main">Log in</button></div>
</form>
<p class="soft" id="hint">Any name will do. This is a demo: there are no passwords.</p>
</section>"""

_PROFILE = """<section aria-labelledby="profile">
<h2 id="profile">Profile</h2>
<div class="row"><p>Logged in as <strong>{user}</strong>. <a href="/profile">As JSON</a></p>
<form method="post" action="/logout"><button>Log out</button></form></div>
</section>"""

_CART = """<section aria-labelledby="cart">
<h2 id="cart">Cart</h2>
<div class="row"><p><span class="count">{count}</span> {things}</p>
<form method="post" action="/cart"><button class="main">Add one</button></form></div>
<p class="soft">It fills before you log in, too, and comes along when you do.</p>
</section>"""

_SESSIONS = """<section aria-labelledby="sessions">
<h2 id="sessions">Your sessions</h2>
<ul>{items}</ul>
</section>"""

_SESSION = """<li class="row"><p>{client}, last seen <time datetime="{iso}">{seen}</time><br>
<code class="soft">{id}</code></p>{action}</li>"""

_END = """<form method="post" action="/sessions/{id}/end"><button aria-label="End session {id}">End</button></form>"""


#: By their mark in the header; in this order, since the earlier ones name the later ones too.
_PROGRAMS = {
    "Edg": "Edge",
    "OPR": "Opera",
    "Firefox": "Firefox",
    "Chrome": "Chrome",
    "Safari": "Safari",
    "curl": "curl",
}


def render(user: str | None, count: int, sessions: Sequence[Record], *, this: UUID | None) -> str:
    """Return the page for *user*, or for nobody, with the session *this* marked among *sessions*."""
    parts = [_LOGIN if user is None else _PROFILE.format(user=escape(user))]
    parts.append(_CART.format(count=count, things="thing" if count == 1 else "things"))
    if sessions:
        parts.append(_SESSIONS.format(items="\n".join(_session(record, this) for record in sessions)))
    return _DOCUMENT.format(style=STYLE, sections="\n".join(parts))


def _session(record: Record, this: UUID | None) -> str:
    return _SESSION.format(
        id=record.id,
        client=escape(_client(record)),
        iso=record.last_seen_at.isoformat(),
        seen=f"{record.last_seen_at:%d %b %Y, %H:%M} UTC",
        action="<strong>this browser</strong>" if record.id == this else _END.format(id=record.id),
    )


def _client(record: Record) -> str:
    """Name the program that opened the session, as well as it named itself."""
    agent = json.loads(record.client or "{}").get("user_agent") or ""
    return next((name for mark, name in _PROGRAMS.items() if mark in agent), "Unknown program")
