"""Clients before an ASGI application in this process, with no server between them."""

import asyncio
import gc
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager

from starlette.types import ASGIApp, Message, Scope

from benchmarks.endpoints import ENDPOINTS, USER_ID, Endpoint
from benchmarks.report import Cell, Results, Sample, Setting, percentile, titled
from benchmarks.rows import Row

#: How many clients ask at once.
CLIENTS: Mapping[Setting, int] = {"1": 1, "32": 32}

#: How many requests of each client `count_statements` looks at.
_COUNTED = 3

#: The clients that ask for each endpoint.
Crowd = Mapping[Endpoint, list["Client"]]


class Client:
    """Puts one request after the other to an application."""

    def __init__(self, app: ASGIApp, cookie: bytes = b"") -> None:
        self._app = app
        self._headers = [(b"host", b"127.0.0.1"), (b"user-agent", b"benchmark"), (b"accept", b"*/*")]
        self.cookie = cookie
        self._waiting = True
        self._answer: Message = {}
        self.body = b""

    async def get(self, path: str) -> None:
        """Put one request; raise if the answer is no 200."""
        self._waiting = True
        self.body = b""
        headers = [*self._headers, (b"cookie", self.cookie)] if self.cookie else [*self._headers]
        scope: Scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "GET",
            "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": headers, "client": ("127.0.0.1", 50000), "server": ("127.0.0.1", 8000), "state": {},
        }  # fmt: skip
        await self._app(scope, self._receive, self._send)
        if self._answer["status"] != 200:
            raise RuntimeError(f"{path} was answered with {self._answer['status']}: {self.body!r}")

    async def _receive(self) -> Message:
        if not self._waiting:
            await asyncio.Event().wait()  # the client stays
        self._waiting = False
        return {"type": "http.request", "body": b"", "more_body": False}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._answer = message
        else:
            self.body += message.get("body", b"")

    def keep_cookie(self) -> None:
        """Send from now on the cookie that the last answer set, if it set one."""
        values = [value for name, value in self._answer["headers"] if name.lower() == b"set-cookie"]
        self.cookie = b"; ".join(value.partition(b";")[0] for value in values) or self.cookie


@asynccontextmanager
async def running(app: ASGIApp) -> AsyncGenerator[None, None]:
    """Run the application's lifespan around the block; one that knows none, such as Django's, does without."""
    events: asyncio.Queue[str] = asyncio.Queue()
    answers: asyncio.Queue[Message] = asyncio.Queue()

    async def receive() -> Message:
        return {"type": await events.get()}

    async def live() -> None:
        try:
            await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, answers.put)
        except Exception:  # noqa: BLE001 - the specification: such an application does not support it
            await answers.put({"type": "unsupported"})

    task = asyncio.create_task(live())

    async def say(event: str) -> None:
        await events.put(event)
        answer = await answers.get()
        if answer["type"].endswith("failed"):
            raise RuntimeError(answer.get("message"))

    await say("lifespan.startup")
    try:
        yield
    finally:
        if not task.done():
            await say("lifespan.shutdown")
        await task


async def logged_in(app: ASGIApp, count: int) -> list[Client]:
    """Return clients with a session each."""
    clients = [Client(app) for _ in range(count)]
    for client in clients:
        await client.get("/login")
        client.keep_cookie()
    return clients


async def check(app: ASGIApp) -> None:
    """Raise unless sessions work: what does not store is easily fast."""
    (client,) = await logged_in(app, 1)
    for expected in (b'"n":1}', b'"n":2}'):
        await client.get("/write")
        client.keep_cookie()
        _expect(client, expected)
    await client.get("/read")
    _expect(client, b'"user_id":%d}' % USER_ID)
    stranger = Client(app)
    await stranger.get("/read")
    _expect(stranger, b'"user_id":null}')


def _expect(client: Client, body: bytes) -> None:
    if body not in client.body.replace(b" ", b""):
        raise RuntimeError(f"the answer is {client.body!r}, and not {body!r}")


async def sample(clients: Sequence[Client], path: str, seconds: float) -> Sample:
    """Have each of the clients ask as fast as it is answered, once at least."""
    latencies: list[float] = []

    async def ask(client: Client) -> None:
        after = time.perf_counter()
        while True:
            before = after
            if len(clients) > 1:
                # An application that never waits would serve the first of them only.
                await asyncio.sleep(0)
            await client.get(path)
            after = time.perf_counter()
            latencies.append(after - before)
            if after >= deadline:
                return

    gc.collect()
    cpu = time.process_time()
    started = time.perf_counter()
    deadline = started + seconds
    await asyncio.gather(*map(ask, clients))
    took = time.perf_counter() - started
    cpu = time.process_time() - cpu
    return Sample(len(latencies) / took, percentile(latencies, 0.5), percentile(latencies, 0.99), cpu / len(latencies))


async def measure(
    applications: Mapping[Row, ASGIApp], results: Results, *, rounds: int, seconds: float, say: Callable[[str], None]
) -> None:
    """Measure every endpoint of every application, in rounds that each go over all of them."""
    crowds = {row: await _crowd(row, app) for row, app in applications.items()}
    with _frozen():
        await _measure(crowds, results, rounds, seconds, say)


async def _measure(
    crowds: Mapping[Row, Crowd], results: Results, rounds: int, seconds: float, say: Callable[[str], None]
) -> None:
    for row, crowd in crowds.items():
        say(f"warm-up: {row.title}")
        for endpoint in ENDPOINTS:
            await sample(crowd[endpoint], row.path(endpoint), seconds / 2)
    for number, (setting, count), endpoint in itertools.product(range(rounds), CLIENTS.items(), ENDPOINTS):
        say(f"round {number + 1} of {rounds}: {endpoint}, {titled(setting)}")
        # To and fro, so that no row always has the same neighbour before it.
        for row, crowd in list(crowds.items())[:: -1 if number % 2 else 1]:
            found = await sample(crowd[endpoint][:count], row.path(endpoint), seconds)
            results.add(Cell(row.key, endpoint, setting), found)


async def count_statements(row: Row, app: ASGIApp, results: Results, counted: Callable[[], Awaitable[int]]) -> None:
    """Note how many statements each request takes, by *counted*, which tells how many there have been so far."""
    crowd = await _crowd(row, app)

    async def ask(client: Client, endpoint: Endpoint) -> None:
        for _ in range(_COUNTED):
            await client.get(row.path(endpoint))

    for endpoint, (setting, count) in itertools.product(ENDPOINTS, CLIENTS.items()):
        before = await counted()
        await asyncio.gather(*(ask(client, endpoint) for client in crowd[endpoint][:count]))
        results.statements[Cell(row.key, endpoint, setting)] = (await counted() - before) / count / _COUNTED


@contextmanager
def _frozen() -> Iterator[None]:
    """Spare the collections between the samples what has been there before."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def _crowd(row: Row, app: ASGIApp) -> Crowd:
    """Return for each endpoint the clients that ask for it: with sessions of their own, or before their login."""
    count = max(CLIENTS.values())
    guests = [Client(app) for _ in range(count)]
    if row.is_baseline:
        return dict.fromkeys(ENDPOINTS, guests)
    return {"/login": guests, **dict.fromkeys(("/none", "/read", "/write"), await logged_in(app, count))}
