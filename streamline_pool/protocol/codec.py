"""What a payload may be, and how it becomes BSON and back.

Owns the limits on stored values and the codec options. Does no I/O. In this package only codec.py and plain_json.py import `bson`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import bson
from bson.codec_options import TypeRegistry
from bson.dbref import DBRef
from bson.raw_bson import RawBSONDocument

from streamline_pool.domain.done import DONE
from streamline_pool.domain.errors import DataCorruptionError, ValidationError

from .malformed_binaries import readable
from .replacements import NAIVE, way_out
from .too_large import above_limit

__all__ = [
    "CODEC",
    "PAYLOAD_BYTES_MAX",
    "PAYLOAD_DEPTH_MAX",
    "RAW_CODEC",
    "SERVER_TICK",
    "Tick",
    "as_payload",
    "check_payload",
    "check_text",
    "decode_document",
    "decode_payload",
    "encode_document",
    "encode_payload",
    "packed",
    "read_document",
    "size_of",
]


def _encode_done(value: Any) -> None:
    """Store the result of a call on `ctx` as nothing. PyMongo asks for every value that it cannot encode itself."""
    if value is not DONE:
        raise OverflowError if isinstance(value, int) else TypeError


CODEC: bson.CodecOptions[dict[str, Any]] = bson.CodecOptions(
    tz_aware=True,
    tzinfo=UTC,
    uuid_representation=bson.binary.UuidRepresentation.STANDARD,
    datetime_conversion=bson.DatetimeConversion.DATETIME_AUTO,
    unicode_decode_error_handler="replace",
    type_registry=TypeRegistry(fallback_encoder=_encode_done),
)
"""How every document is written and read: times as aware UTC, UUIDs as BSON subtype 4.

Another program may have stored what Python has no value for: a date beyond the year 9999, or text that is not UTF-8. It is
read as the nearest value, because one such document must not make a whole batch unreadable. Where PyMongo has no option for
that, `read_document` does it.
"""

RAW_CODEC: bson.CodecOptions[Any] = CODEC.with_options(document_class=RawBSONDocument)
"""The same, with documents that are not decoded yet: `read_document` decodes each of them alone."""

PAYLOAD_BYTES_MAX = 12 * 1024 * 1024
"""The largest single payload. A document ends at 16 MiB and also holds the outputs of the other steps."""

PAYLOAD_DEPTH_MAX = 100
"""Levels of a payload. MongoDB stores 180 levels and takes 200 in a command, which adds some around the payload."""

Tick = bson.Timestamp
"""The server's logical time: it is the same for all members of a replica set, and never goes back."""

SERVER_TICK = Tick(0, 0)
"""As a field of an inserted document: the server stores its logical time instead, which is higher than all earlier ones.

It shows which of two inserts came first. No clock could: the clocks of two hosts differ.
"""

_SCALARS = (type(None), bool, float)
_PLAIN = frozenset({type(None), bool, int, float, str, bytes})
_INT64 = 2**63
_UUID_BYTES = 16
_REFERENCE = b"\x02$ref\0"  # the first field of a reference, as text
_BINARY = b"\x05"  # begins every binary value; other values may hold this byte too
_ODD_UUID = re.compile(rb"\x05[^\0]*\0(?!\x10\0\0\0)....\x04", re.DOTALL)  # a UUID of another length than 16, or what looks like one
_DATETIME = b"\x09"  # begins every datetime in BSON; other values may hold this byte too


def check_payload(value: Any, where: str) -> int:
    """The encoded size of `value` in bytes. `where` names the value in errors, such as "output of step a".

    Raises ValidationError with the path of the first value that BSON cannot hold, PayloadTooLargeError above PAYLOAD_BYTES_MAX.
    """
    kind = type(value)
    if kind in _SCALARS or (kind is int and -_INT64 <= value < _INT64):
        return 16
    return len(encode_payload(value, where))


def size_of(document: Mapping[str, Any]) -> int:
    """The encoded size in bytes of a document that was read from the database."""
    return len(encode_document(document))


def encode_document(document: Mapping[str, Any]) -> bytes:
    """A document as BSON. Its values must have been checked before."""
    return bson.encode(document, codec_options=CODEC)


def decode_document(encoded: bytes) -> dict[str, Any]:
    """The document that a reader finds after these bytes were stored. Raises ValueError for bytes that are no document."""
    try:
        return bson.decode(encoded, codec_options=CODEC)
    except bson.errors.InvalidBSON:
        try:
            return bson.decode(readable(encoded), codec_options=CODEC)
        except bson.errors.BSONError as exc:
            raise ValueError(f"not a BSON document: {exc}") from exc


def read_document(raw: RawBSONDocument) -> dict[str, Any]:
    """A document that was received by `RAW_CODEC`. A binary value that PyMongo cannot read is
    of subtype 128 (malformed_binaries.py). Raises DataCorruptionError."""
    try:
        return decode_document(bytes(raw.raw))
    except ValueError as exc:
        raise DataCorruptionError(f"a stored document cannot be read: {exc}; mend it, or delete it") from exc


def check_text(value: object, where: str) -> str:
    """`value` if it is text that can be stored. Raises ValidationError otherwise."""
    if not isinstance(value, str):
        raise ValidationError(f"{where}: must be text, not {type(value)}")
    check_payload(value, where)
    return value


def as_payload(value: Any, where: str, bytes_max: int = PAYLOAD_BYTES_MAX) -> tuple[Any, int]:
    """`value` as a reader will find it, and its size in bytes. So a later step sees the same value as after a crash.

    Tuples become lists, and times become aware with whole milliseconds. The result is a copy: a handler that changes the
    original later does not change it. Raises as `check_payload` does, with `bytes_max` as the limit.
    """
    kind = type(value)
    if kind in _SCALARS or (kind is int and -_INT64 <= value < _INT64):
        return value, 16
    encoded = encode_payload(value, where, bytes_max)
    return (value if kind is str else decode_payload(encoded)), len(encoded)


def packed(document: Mapping[str, Any]) -> tuple[Any, int]:
    """A document as encoded bytes, which PyMongo sends without encoding it again, and its size in bytes.

    Raises ValidationError, with the document's `name`, for a value that BSON cannot hold.
    """
    try:
        encoded = bson.encode(document, codec_options=CODEC)
    except MemoryError:
        raise  # as in `encode_payload`
    except Exception as exc:  # noqa: BLE001 -- as in `encode_payload`
        raise ValidationError(f"cannot store {document.get('name')!r}: {exc}") from None
    return RawBSONDocument(encoded, codec_options=RAW_CODEC), len(encoded)


def decode_payload(encoded: bytes) -> Any:
    """The value that `encode_payload` turned into these bytes. Raises ValueError for damaged bytes."""
    try:
        return decode_document(encoded)[""]
    except (ValueError, KeyError) as exc:
        raise ValueError(f"not a payload: {exc}") from exc


def encode_payload(value: Any, where: str, bytes_max: int = PAYLOAD_BYTES_MAX) -> bytes:
    """A payload as bytes: the BSON document `{"": value}`, which begins with its length. Raises as `as_payload` does."""
    try:
        encoded = bson.encode({"": value}, codec_options=CODEC)
        size = len(encoded)
        may_be_deep = size > 7 * PAYLOAD_DEPTH_MAX  # the shortest level takes seven bytes
        acceptable = not (may_be_deep or _DATETIME in encoded) or _is_acceptable(value)
    except MemoryError:
        raise  # it says nothing of the value, which can be stored when there is memory again
    except Exception as exc:  # noqa: BLE001 -- encoding calls user code: a mapping's own methods may raise anything
        path, reason = _first_unstorable(value, where, ())
        raise ValidationError(f"{path}: {reason or exc}", path=path) from None
    if size > bytes_max:
        raise above_limit(f"{where}: {size} bytes", bytes_max, path=where, size=size)
    if _may_be_misread(value, encoded):
        path, reason = _first_unstorable(value, where, ())
        if reason:
            raise ValidationError(f"{path}: {reason}", path=path)
    if not acceptable:
        path, reason = _first_unstorable(value, where, ())
        raise ValidationError(f"{path}: {reason or f'nested more than {PAYLOAD_DEPTH_MAX} levels deep'}", path=path)
    return encoded


def _inside(value: Any) -> Mapping[Any, Any] | list[Any] | tuple[Any, ...] | None:
    """The values inside of `value`, as a container; None if it holds no others. A reference and a code's scope are documents too."""
    if isinstance(value, (Mapping, list, tuple)):
        return value
    if isinstance(value, DBRef):
        return value.as_doc()
    return value.scope if isinstance(value, bson.Code) else None


def _is_acceptable(value: Any) -> bool:
    """False if the value has more than PAYLOAD_DEPTH_MAX levels, or a datetime without a time zone, which is encoded as if it were UTC.

    Looks at the types of a container's items first, so that long lists of numbers or texts cost little.
    """
    outermost = _inside(value)
    level = [] if outermost is None else [outermost]
    if isinstance(value, datetime):
        return value.utcoffset() is not None
    for _ in range(PAYLOAD_DEPTH_MAX):
        deeper: list[Any] = []
        for container in level:
            items = container if type(container) is list else container.values() if isinstance(container, Mapping) else container
            if _PLAIN.issuperset(map(type, items)):
                continue
            for item in items:
                kind = type(item)
                if kind is dict or kind is list:
                    deeper.append(item)
                elif kind in _PLAIN:
                    continue
                elif isinstance(item, datetime):
                    if item.utcoffset() is None:
                        return False
                elif (inside := _inside(item)) is not None:
                    deeper.append(inside)
        if not deeper:
            return True
        level = deeper
    return False


def _first_unstorable(value: Any, path: str, above: tuple[int, ...]) -> tuple[str, str]:
    """Path and reason of the first value that cannot be stored. The reason is empty when there is no such value.

    `above`: ids of the values that contain this one.
    """
    if id(value) in above:
        return path, "refers to itself, and a document cannot"
    if len(above) > PAYLOAD_DEPTH_MAX:
        return path, f"nested more than {PAYLOAD_DEPTH_MAX} levels deep"
    try:
        if reason := _misread(value, is_whole=not above):
            return path, reason
        if (inside := _inside(value)) is not None:
            return _first_in_container(inside, path, (*above, id(value)))
        if isinstance(value, datetime) and value.utcoffset() is None:
            return path, NAIVE
        bson.encode({"": value}, codec_options=CODEC)
    except OverflowError:
        return path, f"cannot store {value!r}: whole numbers end at 64 bits, and dates at the year 9999; store str(value)"
    except UnicodeError:
        return path, "cannot store this text: it holds a lone surrogate, which UTF-8 cannot"
    except MemoryError:
        raise  # as in `encode_payload`
    except Exception:  # noqa: BLE001 -- as in `encode_payload`
        return path, f"cannot store {type(value)}{way_out(value)}"
    return path, ""


def _may_be_misread(value: Any, encoded: bytes) -> bool:
    """False if `_misread` has no reason for the value or a part of it. Costs little for a payload of many megabytes."""
    return _REFERENCE in encoded or (_BINARY in encoded and bool(_ODD_UUID.search(encoded))) or isinstance(value, bson.Timestamp)


def _misread(value: Any, *, is_whole: bool) -> str:
    """Why a reader would not find this value as it is; empty if it would. `is_whole`: it is the payload, not a part of one."""
    if isinstance(value, bson.Binary) and value.subtype == bson.binary.UUID_SUBTYPE and len(value) != _UUID_BYTES:
        return f"cannot store a UUID (binary of subtype 4) of {len(value)} bytes: it has {_UUID_BYTES}; use another subtype"
    if is_whole and isinstance(value, bson.Timestamp) and value == SERVER_TICK:
        return "cannot store Timestamp(0, 0) by itself: MongoDB stores its own time in place of it; store it within a mapping"
    fields = value.scope if isinstance(value, bson.Code) else value
    if isinstance(fields, Mapping) and isinstance(fields.get("$ref"), str) and "$id" in fields and isinstance(fields.get("$db", ""), str):
        return "cannot store a mapping with the keys $ref and $id: readers get a reference; use bson.DBRef, or rename one of the keys"
    return ""


def _first_in_container(value: Mapping[Any, Any] | list[Any] | tuple[Any, ...], path: str, above: tuple[int, ...]) -> tuple[str, str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                return f"{path}.{key!r}", f"keys must be text, not {type(key)}; use str(key)"
            if "\0" in key:
                return f"{path}.{key!r}", "keys cannot hold a NUL character"
            found = _first_unstorable(item, f"{path}.{key}", above)
            if found[1]:
                return found
    else:
        for place, item in enumerate(value):
            found = _first_unstorable(item, f"{path}[{place}]", above)
            if found[1]:
                return found
    return path, ""
