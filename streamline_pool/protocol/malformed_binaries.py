"""Binary values that MongoDB stores and that PyMongo refuses to read: which they are, and what they are read as.

Owns the walk over encoded documents that finds them. Pure; codec.py calls it for a document that it could not decode.

The server checks the structure of a document, and not what a binary value of a special subtype holds. So another program can
store a UUID (subtype 4) that does not have 16 bytes, or a value of the old subtype 2 whose inner length is wrong. PyMongo raises
an error for such a value, and with it for every document of the same reply.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["READ_AS", "readable"]

READ_AS = 0x80
"""The subtype as which such a value is read: "user defined". PyMongo gives its bytes as they are."""

_UUID, _OLD_BINARY = 4, 2
_UUID_BYTES = 16
_INT = 4  # bytes of a length
_BINARY, _CODE_WITH_SCOPE, _REGEX, _DB_POINTER = 0x05, 0x0F, 0x0B, 0x0C
_TEXTS = frozenset({0x02, 0x0D, 0x0E})  # string, code, symbol
_DOCUMENTS = frozenset({0x03, 0x04})  # document, array
# Bytes of the values of a fixed length, by type.
_FIXED = {0x01: 8, 0x06: 0, 0x07: 12, 0x08: 1, 0x09: 8, 0x0A: 0, 0x10: 4, 0x11: 8, 0x12: 8, 0x13: 16, 0x7F: 0, 0xFF: 0}


def readable(encoded: bytes) -> bytes:
    """The same document, with the subtype `READ_AS` in place of that of every malformed binary value.

    Raises ValueError for bytes that are no document.
    """
    changed = bytearray(encoded)
    try:
        for place in _malformed(encoded):
            changed[place] = READ_AS
    except (IndexError, KeyError, ValueError) as exc:
        raise ValueError(f"not a BSON document: {type(exc).__name__} {exc}") from exc
    return bytes(changed)


def _malformed(encoded: bytes) -> Iterator[int]:
    """Where the subtypes of malformed binary values are."""
    documents = [(0, len(encoded))]  # those that are still to be read: where each begins, and where what contains it ends
    while documents:
        start, limit = documents.pop()
        end = start + _length(encoded, start) - 1
        if end >= limit:  # a damaged length; without this check a byte could be read again and again
            raise IndexError(end)
        at = start + _INT
        while at < end:
            kind = encoded[at]
            at = encoded.index(0, at + 1) + 1  # behind the key
            size = _size(encoded, kind, at)
            if kind == _BINARY and not _is_well_formed(encoded, at):
                yield at + _INT
            elif kind in _DOCUMENTS:
                documents.append((at, end))
            elif kind == _CODE_WITH_SCOPE:
                documents.append((at + 2 * _INT + _length(encoded, at + _INT), min(end, at + size)))
            at += size


def _size(encoded: bytes, kind: int, at: int) -> int:
    """Bytes of the value of this type at `at`."""
    if kind in _DOCUMENTS or kind == _CODE_WITH_SCOPE:
        return _length(encoded, at)
    if kind in _TEXTS:
        return _INT + _length(encoded, at)
    if kind == _BINARY:
        return _INT + 1 + _length(encoded, at)
    if kind == _REGEX:
        return encoded.index(0, encoded.index(0, at) + 1) + 1 - at
    if kind == _DB_POINTER:
        return _INT + _length(encoded, at) + 12
    return _FIXED[kind]


def _is_well_formed(encoded: bytes, at: int) -> bool:
    size, subtype = _length(encoded, at), encoded[at + _INT]
    if subtype == _UUID:
        return size == _UUID_BYTES
    return subtype != _OLD_BINARY or (size >= _INT and _length(encoded, at + _INT + 1) == size - _INT)


def _length(encoded: bytes, at: int) -> int:
    """The length at `at`, which the server has checked: it is never negative."""
    if not 0 <= at <= len(encoded) - _INT:
        raise IndexError(at)
    return int.from_bytes(encoded[at : at + _INT], "little")
