"""What a child keeps for a supervisor that does not read."""

from __future__ import annotations

import asyncio
import socket

from streamline_pool.supervisor.ipc.channel import Channel
from streamline_pool.supervisor.ipc.codec import FROM_STEWARD, TO_STEWARD, FrameReader, decode
from streamline_pool.supervisor.ipc.messages import FromSteward, Probe, StewardBeat, Subscribers

SUBSCRIBERS = 100
MESSAGES = 1_000


def subscribers(latest: int) -> Subscribers:
    """A list of many subscribers, of which the last one is new."""
    return Subscribers(subscribers=tuple((f"{latest - number:032}", 90.0) for number in range(SUBSCRIBERS)))


def test_of_messages_that_replace_each_other_a_stopped_supervisor_gets_the_newest() -> None:
    """Subscribers may come and go by the thousand while it is stopped, and each message names them all."""
    ours, theirs = socket.socketpair()

    async def main() -> tuple[int, list[FromSteward]]:
        channel = Channel(ours, TO_STEWARD, lambda message: None, lambda: None)
        for number in range(MESSAGES):
            channel.send_latest(subscribers(SUBSCRIBERS + number))
            channel.send_latest(Probe(ok=False, error=f"{number}"))
        kept = channel.unsent_bytes
        channel.send(StewardBeat(ready=True))  # must arrive, and is not held up by the others
        frames, messages = FrameReader(), []
        theirs.setblocking(False)
        loop = asyncio.get_running_loop()
        while channel.unsent_bytes or Probe(ok=False, error=f"{MESSAGES - 1}") not in messages:
            messages += [decode(body, FROM_STEWARD) for body in frames.feed(await loop.sock_recv(theirs, 1 << 16))]
        return kept, messages

    with ours, theirs:
        kept, messages = asyncio.run(asyncio.wait_for(main(), 10))
    assert kept < 1 << 16
    assert StewardBeat(ready=True) in messages
    newest = [message for message in messages if isinstance(message, Subscribers)][-1]
    assert newest == subscribers(SUBSCRIBERS + MESSAGES - 1)
    assert len(messages) < MESSAGES
