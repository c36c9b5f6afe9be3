"""A network that fails when told to: a TCP proxy in front of a PostgreSQL server, in the test's own event loop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from sqlalchemy import URL, make_url

#: What the network does. "stall": nothing moves, and all of it arrives when the network moves again. "drop": packets
#: are swallowed for good. In both, nothing is closed. "reset": connections break, new ones too. "slow": everything
#: takes `delay` seconds longer.
Mode = Literal["pass", "stall", "drop", "reset", "slow"]

#: How a driver ends the execution of a prepared statement: Execute (of the unnamed portal, all rows), Sync.
EXECUTE = b"E\0\0\0\x09\0\0\0\0\0" + b"S\0\0\0\x04"
#: How a server ends an answer outside a transaction: ReadyForQuery, idle.
READY = b"Z\0\0\0\x05I"


class Proxy:
    """Passes bytes both ways, until it is told to do worse."""

    def __init__(self, target: URL) -> None:
        #: Where new connections lead.
        self.target = target
        #: Seconds that each way takes in mode "slow".
        self.delay = 0.2
        self._mode: Mode = "pass"
        self._moving = asyncio.Event()
        self._moving.set()
        #: How many answers to lose: the server is given the statement and carries it out, then the connection breaks.
        self.answers_to_lose = 0
        #: How many statements were passed on.
        self.statements = 0
        self._links: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}

    @property
    def mode(self) -> Mode:
        """What the network does now."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self._mode = mode
        if mode == "stall":
            self._moving.clear()
        else:
            self._moving.set()
        if mode == "reset":
            self.cut()

    def cut(self) -> None:
        """Break all connections."""
        for writers in self._links.values():
            for writer in writers:
                writer.transport.abort()

    async def link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        task = asyncio.current_task()
        assert task
        self._links[task] = [writer]
        losing = asyncio.Event()
        try:
            if self._mode == "reset":
                raise ConnectionResetError
            upstream_reader, upstream = await asyncio.open_connection(self.target.host, self.target.port)
            self._links[task].append(upstream)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._forward(reader, upstream, losing))
                group.create_task(self._answer(upstream_reader, writer, losing))
        except* OSError:
            pass  # a connection that was cut, or a server that is not there: the client hears of it by the abort
        finally:
            for end in self._links.pop(task):
                end.transport.abort()

    async def _forward(self, client: asyncio.StreamReader, server: asyncio.StreamWriter, losing: asyncio.Event) -> None:
        while chunk := await client.read(65536):
            if not await self._arrives():
                continue
            self.statements += chunk.count(EXECUTE)
            if self.answers_to_lose and EXECUTE in chunk:
                self.answers_to_lose -= 1
                losing.set()
            server.write(chunk)
        raise ConnectionResetError

    async def _answer(self, server: asyncio.StreamReader, client: asyncio.StreamWriter, losing: asyncio.Event) -> None:
        while chunk := await server.read(65536):
            if losing.is_set() and chunk.endswith(READY):
                break
            if await self._arrives() and not losing.is_set():
                client.write(chunk)
        raise ConnectionResetError

    async def _arrives(self) -> bool:
        """Take the time that the network takes; tell whether what it carries arrives at all."""
        await self._moving.wait()
        if self._mode == "slow":
            await asyncio.sleep(self.delay)
        return self._mode != "drop"

    async def aclose(self) -> None:
        """Break what is left and wait until it has ended."""
        self.cut()
        for task in list(self._links):
            task.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)


@asynccontextmanager
async def proxied(url: str) -> AsyncIterator[tuple[Proxy, URL]]:
    """Run a proxy in front of the server of *url*; give it, and the URL that leads through it."""
    target = make_url(url)
    proxy = Proxy(target)
    server = await asyncio.start_server(proxy.link, "127.0.0.1", 0)
    try:
        yield proxy, target.set(host="127.0.0.1", port=server.sockets[0].getsockname()[1])
    finally:
        server.close()
        await proxy.aclose()
        await server.wait_closed()
