"""Reads a stream of events up to a given event, for the tests of streams."""

from __future__ import annotations

import threading

from streamline_pool import Event
from streamline_pool.events.stream import EventStream

__all__ = ["read_until"]


def read_until(stream: EventStream, name: str, count: int = 1, timeout: float = 20.0) -> list[Event]:
    """The events of a stream up to the last of `count` events of that name. After `timeout` seconds the stream is closed."""
    deadline = threading.Timer(timeout, stream.close)
    deadline.start()
    read = []
    for event in stream:
        read.append(event)
        count -= event.name == name
        if not count:
            break
    deadline.cancel()
    assert not count, f"{count} × {name} missing after {len(read)} events, missed {stream.missed}: {read[-20:]}"
    return read
