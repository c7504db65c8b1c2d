"""Stored values as plain JSON, for `--json` and for text that people read. Owns what each BSON type becomes.

JSON has no form for most BSON types. MongoDB's Extended JSON wraps each such value in a document (`{"$oid": …}`), which a
reader must unwrap, and which differs between its two versions. Here every type has one plain form that jq, a shell and a
spreadsheet can use at once. The forms are for reading: a value does not always become the same BSON type again.

| BSON type | form |
|---|---|
| date | text, ISO 8601 in UTC; a date that Python cannot hold: milliseconds since 1970 |
| timestamp | `{"t": seconds since 1970, "i": number within the second}` |
| ObjectId | text of 24 hexadecimal digits |
| binary | text, base64; a UUID: its usual text |
| decimal | text, so that no digit is lost |
| regular expression | `{"pattern": …, "options": …}` |
| code | text, its source |
| reference | `{"$ref": …, "$id": …}` |
| smallest and greatest key | `"MinKey"`, `"MaxKey"` |
| NaN and infinities | null: JSON has no such numbers |
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from typing import Any

import bson
import orjson
from bson.datetime_ms import DatetimeMS
from bson.dbref import DBRef
from bson.decimal128 import Decimal128
from bson.max_key import MaxKey
from bson.min_key import MinKey
from bson.regex import Regex
from bson.timestamp import Timestamp

__all__ = ["json_text"]

_OPTIONS = orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS


def json_text(value: Any, *, indented: bool = False) -> str:
    """`value` as one JSON document: a stored document, a part of one, or a list of them.

    A value of a type that BSON does not have, such as a path, is given as its text.
    """
    options = _OPTIONS | orjson.OPT_INDENT_2 if indented else _OPTIONS
    return orjson.dumps(value, default=_plain, option=options).decode()


def _plain(value: Any) -> Any:
    """The plain form of a value that orjson does not know. orjson knows text, numbers, dates, UUIDs, lists and dictionaries."""
    for kind, form in _FORMS:
        if isinstance(value, kind):
            return form(value)
    return str(value)


_FORMS: tuple[tuple[type | tuple[type, ...], Callable[[Any], Any]], ...] = (
    (bytes, lambda value: base64.b64encode(value).decode()),  # bson.Binary is one of these
    (bson.ObjectId, str),
    (Timestamp, lambda value: {"t": value.time, "i": value.inc}),
    (Decimal128, str),
    (DatetimeMS, int),
    (Regex, lambda value: _pattern(value.pattern, value.flags)),
    (re.Pattern, lambda value: _pattern(value.pattern, value.flags & ~re.UNICODE)),
    (DBRef, lambda value: dict(value.as_doc())),
    (MinKey, lambda _: "MinKey"),
    (MaxKey, lambda _: "MaxKey"),
    (Mapping, dict),
    ((tuple, set, frozenset), list),
)

_REGEX_OPTIONS = ((re.IGNORECASE, "i"), (re.LOCALE, "l"), (re.MULTILINE, "m"), (re.DOTALL, "s"), (re.UNICODE, "u"), (re.VERBOSE, "x"))
"""The letters that BSON has for the flags, in BSON's order."""


def _pattern(pattern: str | bytes, flags: int) -> dict[str, Any]:
    letters = "".join(letter for flag, letter in _REGEX_OPTIONS if flags & flag)
    return {"pattern": pattern, "options": letters}
