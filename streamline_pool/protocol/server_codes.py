"""MongoDB's error codes that need an action, listed once. Owns which codes have one meaning; storage/, engine/ and client/ use them.

Source: `src/mongo/base/error_codes.yml` of the server. Only codes that need an action of their own are listed.
"""

from __future__ import annotations

__all__ = [
    "AUTHENTICATION_FAILED",
    "BAD_VALUE",
    "DUPLICATE_KEY",
    "INDEX_BUILD_UNDER_WAY",
    "INDEX_CONFLICT",
    "INVALID_DOCUMENT",
    "NAMESPACE_EXISTS",
    "NAMESPACE_NOT_FOUND",
    "TIME_EXCEEDED",
    "TOO_LARGE",
    "TRANSIENT",
    "UNAUTHORIZED",
    "WILL_BE_REFUSED_AGAIN",
]

DUPLICATE_KEY = 11000
BAD_VALUE = 2  # of a find with a hint: there is no such index
NAMESPACE_NOT_FOUND = 26
NAMESPACE_EXISTS = 48
UNAUTHORIZED = 13
AUTHENTICATION_FAILED = 18
TIME_EXCEEDED = 50
"""A read took longer than `Find.seconds_max`."""

TOO_LARGE = frozenset({10334, 17419, 17420})
"""The document would outgrow 16 MiB: BSONObjectTooLarge, and the same found after an update (17419) or its pipeline (17420)."""

INDEX_CONFLICT = frozenset({85, 86})
"""Another index has these keys with other options, or this name."""

INDEX_BUILD_UNDER_WAY = frozenset({12586, 12587})
"""An index of this collection is being built."""

INVALID_DOCUMENT = frozenset({15, 121})
"""A whole command is refused for its document: nested too deep (Overflow), or against a validator of the collection."""

WILL_BE_REFUSED_AGAIN = TOO_LARGE | frozenset({2, 9, 14, 15, 22, 28, 52, 55, 56, 57, 121, DUPLICATE_KEY})
"""One statement is refused, and would be again: a bad value or type, a document nested too deep, a path through a value that
is no document, a validator or a unique index that users have put on the collection."""

TRANSIENT = frozenset({6, 7, 64, 89, 91, 112, 189, 262, 9001, 10107, 11600, 11602, 13435, 13436})
"""No primary at the moment, a fail-over, a shutdown, a write conflict or a network error between servers: try again."""
