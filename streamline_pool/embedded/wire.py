"""Sends one command to a mongod over a plain socket, for server.py, which waits for a starting server.

A MongoClient is not used: it starts threads, and it checks a server only every half second.
"""

from __future__ import annotations

import socket
import struct
from typing import Any

import bson

__all__ = ["run_command"]


def run_command(connection: socket.socket, **command: Any) -> dict[str, Any]:
    """Run one command on the database `admin`. Returns its reply, error replies included; OSError if the connection ends.

    Source: the MongoDB wire protocol, OP_MSG (opcode 2013) with one section of kind 0.
    """
    body = bson.encode({**command, "$db": "admin"})
    connection.sendall(struct.pack("<iiiiIB", 21 + len(body), 1, 0, 2013, 0, 0) + body)
    (length,) = struct.unpack_from("<i", _receive(connection, 16))
    return bson.decode(_receive(connection, length - 16)[5:])


def _receive(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(count - len(parts))
        if not part:
            raise ConnectionResetError("mongod closed the connection")
        parts += part
    return bytes(parts)
