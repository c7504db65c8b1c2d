"""Any bytes on a pipe between the supervisor and a child: whole messages of this version, or the one documented error."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from message_values import EVERY_MESSAGE, UNIONS, values_of

from streamline_pool.supervisor.ipc.channel import Channel
from streamline_pool.supervisor.ipc.codec import FRAME_BYTES_MAX, TO_WORKER, VERSION, Direction, FrameReader, MessageError, decode, encode
from streamline_pool.supervisor.ipc.messages import Drain, WakeUp

json_values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), inner, max_size=4)
    ),
    max_leaves=6,
)
kinds: list[Any] = [param.values for param in EVERY_MESSAGE]
names = st.sampled_from([cls.__name__ for cls, _ in kinds])
directions = st.sampled_from([direction for _, direction in UNIONS])


@st.composite
def nearly_messages(draw: st.DrawFn) -> bytes:
    """A valid message in which something is replaced, left out or added."""
    cls, _ = draw(st.sampled_from(kinds))
    body = orjson.loads(encode(draw(values_of(cls)))[4:])
    what = draw(st.sampled_from(["version", "name", "fields", "one field", "missing", "more", "length"]))
    fields = body[2]
    if what == "version":
        body[0] = draw(json_values)
    elif what == "name":
        body[1] = draw(st.one_of(names, json_values))
    elif what == "fields":
        body[2] = draw(json_values)
    elif what == "one field" and fields:
        fields[draw(st.sampled_from(sorted(fields)))] = draw(json_values)
    elif what == "missing" and fields:
        del fields[draw(st.sampled_from(sorted(fields)))]
    elif what == "more":
        fields[draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=4))] = draw(json_values)
    else:
        body = body[: draw(st.integers(0, 2))] + draw(st.lists(json_values, max_size=2))
    return orjson.dumps(body)


def check_body(body: bytes, direction: Direction[Any]) -> None:
    try:
        message = decode(body, direction)
    except MessageError as exc:
        assert len(str(exc)) < 1_000
        return
    assert type(message) in [cls for cls, _ in kinds]
    again = encode(message)[4:]
    assert decode(again, direction) == message


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.one_of(nearly_messages(), st.binary(max_size=30), json_values.map(orjson.dumps)), directions)
def test_a_body_is_a_message_or_one_error(body: bytes, direction: Direction[Any]) -> None:
    """Any other exception would end the supervisor, and with it the pool, for one child's garbage."""
    check_body(body, direction)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(st.one_of(nearly_messages(), st.binary(max_size=30), json_values.map(orjson.dumps)), directions)
def test_a_body_is_a_message_or_one_error_long(body: bytes, direction: Direction[Any]) -> None:
    """As above, with many more."""
    check_body(body, direction)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.lists(st.binary(max_size=12), max_size=5))
def test_a_stream_of_any_bytes_gives_bodies_or_one_error_and_keeps_one_frame_at_most(pieces: list[bytes]) -> None:
    reader = FrameReader()
    for data in pieces:
        try:
            bodies = list(reader.feed(data))
        except MessageError as exc:
            assert "a frame of" in str(exc)
            return
        for body in bodies:
            check_body(body, TO_WORKER)


@pytest.mark.parametrize("size", [FRAME_BYTES_MAX, FRAME_BYTES_MAX + 1])
def test_the_largest_frame_is_read_and_a_larger_one_is_refused(size: int) -> None:
    header = size.to_bytes(4, "big")
    if size > FRAME_BYTES_MAX:
        with pytest.raises(MessageError, match="above"):
            FrameReader().feed(header)
    else:
        assert [len(body) for body in FrameReader().feed(header + b"x" * size)] == [size]


DEEP = b"[" * 100_000
BODIES = {
    "deep": DEEP,
    "deep fields": orjson.dumps([VERSION, "WakeUp"])[:-1] + b"," + DEEP,
    "no UTF-8": b'[1,"Drain",{"\xff":1}]',
    "a huge number": b"[1" + b"0" * 400 + b',"Drain",{}]',
    "fields of a class": orjson.dumps([VERSION, "WakeUp", {"__class__": "x"}]),
    "a name that is a list": orjson.dumps([VERSION, ["WakeUp"], {}]),
    "a nested record that is text": orjson.dumps([VERSION, "Died", {"owner": "x", "evidence": "y"}]),
    "a tuple that is a number": orjson.dumps([VERSION, "TimersFired", {"run_ids": 5}]),
    "pairs that are no pairs": orjson.dumps([VERSION, "Parked", {"instants": [1, [2, 3, 4], "ab"]}]),
    "a number as text": orjson.dumps([VERSION, "WakeUp", {"run_id": 5}]),
    "text as a number": orjson.dumps([VERSION, "Stop", {"grace_s": "5"}]),
    "truth as a number": orjson.dumps([VERSION, "IdleCheck", {"seq": True}]),
    "an unknown state": orjson.dumps([VERSION, "Circuit", {"state": "ajar"}]),
    "a field too few": orjson.dumps([VERSION, "Reslot", {"index": 1}]),
    "true as the version": orjson.dumps([True, "Drain", {}]),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_an_awkward_body_is_refused(body: bytes) -> None:
    """A field of the wrong type would be found far from here, in a decision of the supervisor."""
    for _, direction in UNIONS:
        with pytest.raises(MessageError):
            decode(body, direction)


@pytest.mark.parametrize("garbage", [b"\xff" * 8, b"\0\0\0\2[]", encode(Drain())[:-1] + b"?"], ids=["length", "body", "last byte"])
def test_a_channel_ends_after_garbage_and_delivers_what_came_before(garbage: bytes) -> None:
    """What follows garbage cannot be trusted: after a wrong length every message would be half of another."""

    async def run() -> tuple[list[Any], int, list[str]]:
        ours, theirs = socket.socketpair()
        received: list[Any] = []
        lost: list[None] = []
        reported: list[str] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: reported.append(type(context["exception"]).__name__))
        channel = Channel(ours, TO_WORKER, received.append, lambda: lost.append(None))
        theirs.sendall(encode(WakeUp(run_id="r")) + garbage + encode(Drain()))
        async with asyncio.timeout(10):
            while not lost:
                await asyncio.sleep(0)
        channel.send(Drain())  # type: ignore[arg-type]  # silently dropped: the channel has ended
        ours.close()
        theirs.close()
        return received, len(lost), reported

    received, lost, reported = asyncio.run(run())
    assert lost == 1
    assert reported == ["MessageError"]
    assert received in ([WakeUp(run_id="r")], [])
