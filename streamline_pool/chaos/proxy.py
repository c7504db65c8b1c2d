"""The process between one host and the members of the database: it forwards, delays, swallows, holds or refuses what they say.

Owns the connections of one host. Run as `python -m streamline_pool.chaos.proxy PARENT_PID ADDRESS…`, one address for each member.
Standard output has first `{"ports": [...]}`, in the order of the addresses. Orders arrive on standard input, one line of JSON each,
and each is answered by a line `{"done": ORDER}`. It ends with its parent, and when its input ends.

    {"mode": "pass"}               as if it were not there
    {"mode": "delay", "s": 0.2}    every message is that late, in both directions
    {"mode": "partition"}          nothing arrives, nor does a new connection get an answer; afterwards all of it arrives
    {"mode": "swallow"}            what is sent is lost for good; afterwards those connections are reset
    {"mode": "deaf"}               the database gets everything, its replies are lost; afterwards those connections are reset
    {"mode": "half-open"}          the present connections are closed towards the database only; new ones work
    {"mode": "refuse"}             connections are reset, new ones refused
    {"mode": "hold"}               the next commit is held: an extra line `{"held": PORT}` names the client's port
    {"mode": "release"}            what was held is forwarded
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from typing import Any

from .ending import end_with_parent
from .wire import HEADER_BYTES, is_commit, length_of, with_addresses

__all__: list[str] = []


class _Link:
    """One connection of a client, and its other half to a member."""

    def __init__(self, proxy: _Proxy, client: asyncio.StreamWriter) -> None:
        self._proxy, self._client = proxy, client
        self._member: asyncio.StreamWriter | None = None
        self.cut = False  # towards the database: what the client says is lost
        self.lossy = False  # something was lost on it, so it cannot go on

    async def run(self, reader: asyncio.StreamReader, address: str) -> None:
        """Forward until one side ends."""
        await self._proxy.answering.wait()
        host, _, port = address.rpartition(":")
        try:
            member_reader, self._member = await asyncio.open_connection(host, int(port), limit=2**20)
        except OSError:
            self.abort()
            return
        ways = [
            asyncio.ensure_future(self._forward(reader, self._member, to_member=True)),
            asyncio.ensure_future(self._forward(member_reader, self._client, to_member=False)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        while self.cut and not ways[0].done():  # half-open: the client is not told
            await asyncio.wait(ways[:1])
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        self.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, to_member: bool) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                header = await reader.readexactly(HEADER_BYTES)
                message = header + await reader.readexactly(length_of(header) - HEADER_BYTES)
                if not to_member:
                    message = with_addresses(message, self._proxy.addresses)
                if await self._passes(message, to_member=to_member):
                    writer.write(message)
                    await writer.drain()

    async def _passes(self, message: bytes, *, to_member: bool) -> bool:
        """Wait as long as the mode says. False if the message is lost."""
        proxy = self._proxy
        if proxy.mode == "hold" and to_member and is_commit(message):
            await proxy.held(self._client.get_extra_info("peername")[1])
        if proxy.mode == "delay":
            await asyncio.sleep(proxy.delay_s)
        await proxy.answering.wait()
        if self.cut or proxy.mode == "swallow" or (proxy.mode == "deaf" and not to_member):
            self.lossy = True
            return False
        return True

    def halve(self) -> None:
        """Close it towards the database only."""
        self.cut = True
        if self._member is not None:
            self._member.transport.abort()

    def abort(self) -> None:
        """Reset both halves."""
        for half in (self._client, self._member):
            if half is not None:
                half.transport.abort()


class _Proxy:
    def __init__(self, members: list[str]) -> None:
        self._members = members
        self._ports = [0] * len(members)
        self._servers: list[asyncio.Server] = []
        self._links: set[_Link] = set()
        self._released = asyncio.Event()
        self.addresses: dict[str, str] = {}  # of a member → of this proxy
        self.mode, self.delay_s = "pass", 0.0
        self.answering = asyncio.Event()  # not during a partition
        self.answering.set()

    async def listen(self) -> None:
        """Accept connections: at first on free ports, later on the same ones."""
        for place, member in enumerate(self._members):
            server = await asyncio.start_server(self._accepting(member), "127.0.0.1", self._ports[place], limit=2**20)
            self._ports[place] = server.sockets[0].getsockname()[1]
            self.addresses[member] = f"127.0.0.1:{self._ports[place]}"
            self._servers.append(server)

    def _accepting(self, member: str) -> Any:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            link = _Link(self, writer)
            self._links.add(link)
            try:
                await link.run(reader, member)
            finally:
                self._links.discard(link)

        return accept

    async def held(self, port: int) -> None:
        """Hold one message until the release."""
        self.mode = "pass"  # one is enough
        self._released.clear()
        _say(held=port)
        await self._released.wait()

    async def order(self, order: dict[str, Any]) -> None:
        """Change the mode."""
        before, self.mode = self.mode, order["mode"]
        if self.mode == "release":
            self._released.set()
            self.mode = "pass"
        self.delay_s = order.get("s", 0.0)
        if before == "refuse":
            await self.listen()
        if before in ("swallow", "deaf", "half-open"):
            for link in [link for link in self._links if link.lossy or link.cut]:
                link.abort()
        if self.mode == "half-open":
            for link in list(self._links):
                link.halve()
        if self.mode == "refuse":
            for server in self._servers:
                server.close()
            self._servers.clear()
            for link in list(self._links):
                link.abort()
        if self.mode == "partition":
            self.answering.clear()
        else:
            self.answering.set()

    async def run(self) -> None:
        """Obey until the input ends."""
        await self.listen()
        _say(ports=self._ports)
        orders = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
        while line := await orders.readline():
            order = json.loads(line)
            await self.order(order)
            _say(done=order["mode"])


def _say(**answer: Any) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    asyncio.run(_Proxy(sys.argv[2:]).run())
