"""The bytes of a message on a pipe: a length, then orjson of `[version, name, fields]`.

Owns the frame, the version, and which messages may travel in which direction. Does no I/O: pool/child.py and channel.py
move the bytes. There is no pickle: a frame becomes one of the records of messages.py, or the reader gets a `MessageError`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import orjson

from streamline_pool.supervisor.ipc.messages import FromSteward, FromWorker, ToSteward, ToWorker

__all__ = [
    "FROM_STEWARD",
    "FROM_WORKER",
    "TO_STEWARD",
    "TO_WORKER",
    "VERSION",
    "Direction",
    "FrameReader",
    "M_co",
    "MessageError",
    "decode",
    "encode",
]

VERSION = 1  # raised with every incompatible change; both ends are forks of one program, so a mismatch is a bug
FRAME_BYTES_MAX = 8 << 20  # a guess, far above any real message: a larger length means a corrupted stream
_HEADER_BYTES = 4

M_co = TypeVar("M_co", covariant=True)


class MessageError(Exception):
    """The bytes on a pipe are not a message of this version. The stream cannot be trusted any more: end the child."""


class Direction(dict[str, Callable[[Any], M_co]]):
    """The messages that may travel one way: the name of each, and the function that makes its record from decoded fields."""


def encode(message: ToWorker | FromWorker | ToSteward | FromSteward) -> bytes:
    """One frame: four bytes of length, then the message."""
    body = orjson.dumps((VERSION, type(message).__name__, message))
    return len(body).to_bytes(_HEADER_BYTES, "big") + body


def decode(body: bytes, direction: Direction[M_co]) -> M_co:
    """The message in a frame's body. MessageError: the body is not a message that may travel in this direction."""
    try:
        version, name, values = orjson.loads(body)
        if type(version) is not int or version != VERSION:
            raise MessageError(f"message version {version}, expected {VERSION}")
        return direction[name](values)
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise MessageError(f"not a message: {body[:80]!r} ({type(exc).__name__}: {exc})") from exc


class FrameReader:
    """Cuts a byte stream into frames. Holds at most one unfinished frame."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterable[bytes]:
        """The bodies of the frames that `data` completes. MessageError: a length above `FRAME_BYTES_MAX`."""
        buffer, at, bodies = self._rest + data, 0, []
        while len(buffer) - at >= _HEADER_BYTES:
            size = int.from_bytes(buffer[at : at + _HEADER_BYTES], "big")
            if size > FRAME_BYTES_MAX:
                raise MessageError(f"a frame of {size} bytes, above the {FRAME_BYTES_MAX} allowed")
            end = at + _HEADER_BYTES + size
            if len(buffer) < end:
                break
            bodies.append(buffer[at + _HEADER_BYTES : end])
            at = end
        self._rest = buffer[at:]
        return bodies


# ---- from annotations to parsers -----------------------------------------------------------------------------------


def _direction(union: types.UnionType) -> Direction[Any]:
    return Direction({cls.__name__: _record_maker(cls) for cls in get_args(union)})


def _record_maker(cls: type) -> Callable[[Any], Any]:
    """JSON has neither tuples nor records, and the types of fields are checked here. What each field needs is found once for a class."""
    hints = get_type_hints(cls)
    convert = {f.name: _converter(hints[f.name]) for f in fields(cls)}

    def make(values: Any) -> Any:
        return cls(**{name: convert[name](value) for name, value in _of_type(dict, values).items()})

    return make


def _converter(hint: Any) -> Callable[[Any], Any]:
    """How to restore a value of type `hint` from JSON. The function raises TypeError or ValueError for a value of another type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is tuple and args[-1] is Ellipsis:
        item = _converter(args[0])
        return lambda value: tuple(map(item, _of_type(list, value)))
    if origin is tuple:
        items = tuple(map(_converter, args))
        return lambda value: tuple(convert(part) for convert, part in zip(items, _of_type(list, value), strict=True))
    if origin is dict:
        held = _converter(args[1])  # JSON's keys are text
        return lambda value: {key: held(part) for key, part in _of_type(dict, value).items()}
    if is_dataclass(hint) and isinstance(hint, type):
        return _record_maker(hint)
    if origin is Literal:
        return _checker(frozenset({str}), frozenset(args))
    kinds = frozenset(args if origin in (Union, types.UnionType) else (hint,))
    assert kinds <= _SCALARS, f"{hint}: no message has an optional record or tuple"
    return _checker(kinds | {int} if float in kinds else kinds)


_SCALARS = frozenset({bool, int, float, str, types.NoneType})


def _checker(kinds: frozenset[type], allowed: frozenset[str] | None = None) -> Callable[[Any], Any]:
    """Passes a value on if it has one of these types, and is one of the `allowed` values if there are such."""

    def check(value: Any) -> Any:
        if type(value) not in kinds or (allowed is not None and value not in allowed):
            raise TypeError(f"{type(value).__name__} is not what this field holds")
        return value

    return check


def _of_type(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} in place of a {kind.__name__}")
    return value


TO_WORKER: Direction[ToWorker] = _direction(ToWorker)
FROM_WORKER: Direction[FromWorker] = _direction(FromWorker)
TO_STEWARD: Direction[ToSteward] = _direction(ToSteward)
FROM_STEWARD: Direction[FromSteward] = _direction(FromSteward)
