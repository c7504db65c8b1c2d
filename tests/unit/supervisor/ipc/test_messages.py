"""What crosses the pipes between the supervisor and its children."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from message_values import EVERY_MESSAGE, values_of

from streamline_pool.supervisor.ipc import codec
from streamline_pool.supervisor.ipc.codec import TO_WORKER, Direction, FrameReader, MessageError, decode, encode
from streamline_pool.supervisor.ipc.messages import Drain, StewardBeat, WakeUp


@pytest.mark.parametrize(("cls", "direction"), EVERY_MESSAGE)
def test_every_message_arrives_as_it_was_sent(cls: type, direction: Direction[Any]) -> None:
    """JSON turns tuples into lists and records into mappings; a decision on such a thing would differ from its test."""

    @settings(max_examples=50)
    @given(values_of(cls))
    def check(message: Any) -> None:
        (body,) = FrameReader().feed(encode(message))
        assert decode(body, direction) == message

    check()


@given(st.lists(st.builds(WakeUp, run_id=st.text(max_size=5))), st.data())
def test_frames_cut_anywhere_come_out_whole(sent: list[WakeUp], data: st.DataObject) -> None:
    """A stream socket may cut anywhere, also within the length."""
    stream = b"".join(map(encode, sent))
    reader, received, at = FrameReader(), [], 0
    while at < len(stream):
        size = data.draw(st.integers(1, len(stream)))
        received += [decode(body, TO_WORKER) for body in reader.feed(stream[at : at + size])]
        at += size
    assert received == sent


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[]",
        b"[1]",
        b"{}",
        orjson.dumps([codec.VERSION, "Explode", {}]),
        orjson.dumps([codec.VERSION, "WakeUp", {"colour": "red"}]),
        orjson.dumps([codec.VERSION, "WakeUp", [1]]),
        orjson.dumps([codec.VERSION + 1, "Drain", {}]),
        encode(StewardBeat(ready=True))[4:],
    ],
)
def test_anything_else_is_refused(body: bytes) -> None:
    """Nonsense, a message of another version and a message of another direction must not be half understood."""
    with pytest.raises(MessageError):
        decode(body, TO_WORKER)


def test_an_absurd_length_is_refused_before_it_is_waited_for() -> None:
    """A corrupted length would otherwise be a frame that never ends, and a buffer that grows for ever."""
    with pytest.raises(MessageError, match="above"):
        FrameReader().feed(b"\xff\xff\xff\xff" + encode(Drain()))
