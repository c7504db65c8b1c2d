"""What a payload may be, and how it becomes BSON and back.

Owns the limits on stored values and the codec options. Does no I/O; `bson` is used as a codec only."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import bson
from bson.raw_bson import RawBSONDocument

from streamline_pool.domain.errors import PayloadTooLargeError, ValidationError

__all__ = [
    "CODEC",
    "PAYLOAD_BYTES_MAX",
    "PAYLOAD_DEPTH_MAX",
    "SERVER_TICK",
    "Document",
    "as_payload",
    "check_payload",
    "check_text",
    "decode_payload",
    "encode_payload",
    "packed",
    "size_of",
]

Document = dict[str, Any]

CODEC: bson.CodecOptions[Document] = bson.CodecOptions(
    tz_aware=True,
    tzinfo=UTC,
    uuid_representation=bson.binary.UuidRepresentation.STANDARD,
    datetime_conversion=bson.DatetimeConversion.DATETIME_AUTO,
    unicode_decode_error_handler="replace",
)
"""How every document is written and read: instants aware in UTC, UUIDs as BSON subtype 4.

What another program has stored and Python has no value for (a date beyond the year 9999, text that is not UTF-8) is
read as the nearest thing: one such document must not make a whole batch unreadable.
"""

_RAW_CODEC: bson.CodecOptions[Any] = CODEC.with_options(document_class=RawBSONDocument)

PAYLOAD_BYTES_MAX = 12 * 1024 * 1024
"""The largest single payload; a document ends at 16 MiB and holds the other steps' outputs as well."""

PAYLOAD_DEPTH_MAX = 100
"""Levels of a payload. MongoDB stores 180 and takes 200 in a command, which wraps a payload in some of its own."""

SERVER_TICK = bson.Timestamp(0, 0)
"""As a field of an inserted document: the server stores its logical time instead, higher than all it has given before.

Which of two inserts came first is thereby told without anybody's clock: instants are estimates on whichever host made them.
"""

_SCALARS = (type(None), bool, float)
_LEAVES = frozenset({type(None), bool, int, float, str, bytes, datetime})
_INT64 = 2**63


def check_payload(value: Any, where: str) -> int:
    """The encoded size of `value` in bytes; a ValidationError with the path of the first value BSON cannot hold.

    Raises PayloadTooLargeError above PAYLOAD_BYTES_MAX.
    """
    kind = type(value)
    if kind in _SCALARS or (kind is int and -_INT64 <= value < _INT64):
        return 16
    return len(encode_payload(value, where))


def size_of(document: Mapping[str, Any]) -> int:
    """The encoded size in bytes of what has been read from the database."""
    return len(bson.encode(document, codec_options=CODEC))


def check_text(value: object, where: str) -> str:
    """`value` if it is text that can be stored; a ValidationError otherwise."""
    if not isinstance(value, str):
        raise ValidationError(f"{where}: must be text, not {type(value)}")
    check_payload(value, where)
    return value


def as_payload(value: Any, where: str, bytes_max: int = PAYLOAD_BYTES_MAX) -> tuple[Any, int]:
    """`value` as a reader will find it, and its size: a later step sees the same here as it would after a crash.

    Tuples are lists, instants are aware and have whole milliseconds, and what a handler does to the original
    afterwards changes nothing. Raises as `check_payload` does, with `bytes_max` as the limit.
    """
    kind = type(value)
    if kind in _SCALARS or (kind is int and -_INT64 <= value < _INT64):
        return value, 16
    encoded = encode_payload(value, where, bytes_max)
    return (value if kind is str else decode_payload(encoded)), len(encoded)


def packed(document: Document) -> tuple[Any, int]:
    """A document in its stored form, to be sent as it is now without being encoded again, and its size in bytes.

    Raises ValidationError for what BSON cannot hold.
    """
    try:
        encoded = bson.encode(document, codec_options=CODEC)
    except Exception as exc:  # noqa: BLE001 -- as in `encode_payload`
        raise ValidationError(f"cannot store {document.get('name')!r}: {exc}") from None
    return RawBSONDocument(encoded, codec_options=_RAW_CODEC), len(encoded)


def decode_payload(encoded: bytes) -> Any:
    """The value of which `encode_payload` made these bytes; a ValueError for bytes that are damaged."""
    try:
        return bson.decode(encoded, codec_options=CODEC)[""]
    except (bson.errors.BSONError, KeyError) as exc:
        raise ValueError(f"not a payload: {exc}") from exc


def encode_payload(value: Any, where: str, bytes_max: int = PAYLOAD_BYTES_MAX) -> bytes:
    """A payload as bytes: the BSON document `{"": value}`, which begins with its length. Raises as `check_payload` does."""
    try:
        encoded = bson.encode({"": value}, codec_options=CODEC)
    except Exception as exc:  # noqa: BLE001 -- encoding calls user code: a mapping's own methods may raise anything
        path, reason = _first_unstorable(value, where, ())
        raise ValidationError(f"{path}: {reason or exc}", path=path) from None
    size = len(encoded)
    if size > bytes_max:
        raise PayloadTooLargeError(
            f"{where}: {size} bytes, and the limit is {bytes_max}; store it elsewhere and pass a reference", path=where, size=size
        )
    if size > 7 * PAYLOAD_DEPTH_MAX and _is_too_deep(value):  # the shortest level takes seven bytes
        raise ValidationError(f"{where}: nested more than {PAYLOAD_DEPTH_MAX} levels deep", path=where)
    return encoded


def _is_too_deep(value: Any) -> bool:
    level = [value] if isinstance(value, (Mapping, list, tuple)) else []
    for _ in range(PAYLOAD_DEPTH_MAX):
        items = (item for outer in level for item in (outer.values() if isinstance(outer, Mapping) else outer))
        level = [item for item in items if type(item) not in _LEAVES and isinstance(item, (Mapping, list, tuple))]
        if not level:
            return False
    return True


_INSTEAD: Mapping[type, str] = {
    date: "; use an aware datetime, or its isoformat()",
    time: "; use its isoformat()",
    timedelta: "; use its total_seconds()",
    Decimal: "; use bson.Decimal128, or text",
    set: "; use a list",
    frozenset: "; use a list",
}
"""What to do about the types that people try most."""


def _first_unstorable(value: Any, path: str, above: tuple[int, ...]) -> tuple[str, str]:
    """Path and reason of the first value that cannot be stored; an empty reason when none is found."""
    if id(value) in above:
        return path, "refers to itself, and a document cannot"
    if len(above) > PAYLOAD_DEPTH_MAX:
        return path, f"nested more than {PAYLOAD_DEPTH_MAX} levels deep"
    try:
        if isinstance(value, Mapping):
            for key, item in value.items():
                if not isinstance(key, str):
                    return f"{path}.{key!r}", f"keys must be text, not {type(key)}"
                if "\0" in key:
                    return f"{path}.{key!r}", "keys cannot hold a NUL character"
                found = _first_unstorable(item, f"{path}.{key}", (*above, id(value)))
                if found[1]:
                    return found
        elif isinstance(value, (list, tuple)):
            for place, item in enumerate(value):
                found = _first_unstorable(item, f"{path}[{place}]", (*above, id(value)))
                if found[1]:
                    return found
        else:
            bson.encode({"": value}, codec_options=CODEC)
    except OverflowError:
        return path, f"cannot store {value!r}: whole numbers end at 64 bits, and dates at the year 9999"
    except UnicodeError:
        return path, "cannot store this text: it holds a lone surrogate, which UTF-8 cannot"
    except Exception:  # noqa: BLE001 -- as above
        return path, f"cannot store {type(value)}{_INSTEAD.get(type(value), '')}"
    return path, ""
