"""What a steward keeps for a supervisor that is stopped, and reads later."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from streamline_pool import Streamline
from streamline_pool.supervisor.ipc.channel import Channel
from streamline_pool.supervisor.ipc.codec import FROM_STEWARD, TO_STEWARD, FrameReader, decode
from streamline_pool.supervisor.ipc.messages import Subscribers
from streamline_pool.supervisor.steward.duty import HINT_BYTES_MAX, DutyTools, StewardBoot
from streamline_pool.supervisor.steward.stream_subscribers import StreamSubscribers

RENEWALS = 2_000


def test_a_supervisor_that_was_stopped_gets_the_latest_subscribers(app: Streamline) -> None:
    """Each renewal of one subscriber is a message that names them all, and none was dropped."""

    async def main() -> tuple[int, list[Any]]:
        ours, theirs = socket.socketpair()
        channel = Channel(ours, TO_STEWARD, lambda message: None, lambda: None)
        tools = DutyTools(app, app.settings, app.env, StewardBoot(host_id="host:1:x", host="host", pid=1, first=False), channel)
        duty = StreamSubscribers(tools)
        for number in range(RENEWALS):
            duty.on_signal({"kind": "listen", "listener": f"{number % 100}"})
        duty.on_signal({"kind": "unlisten", "listener": "0"})
        kept = channel.unsent_bytes
        theirs.setblocking(False)
        frames, messages = FrameReader(), list[Any]()
        while not messages or "0" in dict(messages[-1].subscribers):
            data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(theirs, 1 << 16), 5)
            messages += (decode(body, FROM_STEWARD) for body in frames.feed(data))
        await tools.publisher.close()
        await app.close_async()
        ours.close()
        theirs.close()
        return kept, messages

    kept, messages = asyncio.run(main())
    assert kept < HINT_BYTES_MAX
    assert isinstance(messages[-1], Subscribers)
    assert set(dict(messages[-1].subscribers)) == {f"{number}" for number in range(1, 100)}
