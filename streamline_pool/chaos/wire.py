"""MongoDB's wire protocol as far as the proxy reads it. Owns the recognition of commits, and of replies that name the members of a set.

Source: the MongoDB wire protocol, OP_MSG (opcode 2013) and OP_REPLY (opcode 1).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import bson

__all__ = ["HEADER_BYTES", "is_commit", "length_of", "with_addresses"]

HEADER_BYTES = 16
_OP_MSG, _OP_REPLY = 2013, 1
_HELLO_MAX = 64 * 1024
_COMMIT_MAX = 1024 * 1024


def length_of(header: bytes) -> int:
    """The bytes of the whole message."""
    (length,) = struct.unpack_from("<i", header)
    return int(length)


def is_commit(message: bytes) -> bool:
    """True for an update of runs by their lease holder: it sets `rev` and a step. Claims and control operations are pipelines."""
    if len(message) > _COMMIT_MAX or b"\x02update\x00" not in message[:64]:
        return False
    return b"workflow_runs\x00" in message and b"\x03$set\x00" in message and b"rev\x00" in message and b"\x03steps." in message


def with_addresses(message: bytes, addresses: Mapping[str, str]) -> bytes:
    """The message with the members' addresses replaced, if it is a reply that names them; else the message itself."""
    if len(message) > _HELLO_MAX or b"\x04hosts\x00" not in message:
        return message
    (opcode,) = struct.unpack_from("<i", message, 12)
    start = HEADER_BYTES + (5 if opcode == _OP_MSG else 20)
    if opcode not in (_OP_MSG, _OP_REPLY) or (opcode == _OP_MSG and message[20] != 0):
        return message
    (size,) = struct.unpack_from("<i", message, start)
    reply: dict[str, Any] = bson.decode(message[start : start + size])
    if "setName" not in reply:
        return message
    for name in ("me", "primary"):
        if name in reply:
            reply[name] = addresses.get(reply[name], reply[name])
    for name in ("hosts", "passives", "arbiters"):
        if name in reply:
            reply[name] = [addresses.get(address, address) for address in reply[name]]
    body = bson.encode(reply)
    rest = message[start + size :]
    return struct.pack("<i", start + len(body) + len(rest)) + message[4:start] + body + rest
