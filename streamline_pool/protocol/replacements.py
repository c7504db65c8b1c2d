"""What to store instead of a value that BSON cannot hold. Owns the hints of the errors; codec.py decides what is refused.

Types of other libraries are recognised by the attributes that all their objects have, so none of them is imported.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
from collections.abc import AsyncIterator, Callable, Iterator, KeysView, Set, ValuesView
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from inspect import isawaitable, isroutine
from pathlib import PurePath
from typing import Any

__all__ = ["NAIVE", "way_out"]

NAIVE = (
    "cannot store a datetime without a time zone, because readers would take it for UTC; use datetime.now(timezone.utc), "
    "or value.replace(tzinfo=timezone.utc) if it is UTC, as those of a MongoClient without tz_aware=True are"
)
"""Why a naive datetime is refused, and the way out."""


def _has(*names: str) -> Callable[[Any], bool]:
    """True for an object whose class has these attributes. The object's own may be made up on demand."""
    return lambda value: all(hasattr(type(value), name) for name in names)


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


_HINTS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (_is(type), "it is a class; store one of its objects, or its name"),
    (lambda value: isawaitable(value) or isinstance(value, asyncio.Future), "did you forget to await it? An `async def` handler can"),
    (_has("__pydantic_validator__", "model_dump"), 'store value.model_dump(mode="json")'),
    (_has("__fields__", "dict", "json"), "store value.dict()"),  # pydantic 1
    (dataclasses.is_dataclass, "store dataclasses.asdict(value)"),
    (_has("__attrs_attrs__"), "store attrs.asdict(value)"),
    (_has("__struct_fields__"), "store msgspec.to_builtins(value)"),
    (_is(enum.Enum), "store value.value"),
    (_is(datetime), "store an aware datetime of the standard library"),
    (_is(date, time), "store value.isoformat()"),
    (_is(timedelta), "store value.total_seconds()"),
    (_is(Decimal), "store bson.Decimal128(value), or str(value)"),
    (_is(bytearray, memoryview), "store bytes(value)"),
    (_is(PurePath, BaseException), "store str(value)"),
    (_is(complex), "store [value.real, value.imag]"),
    (_has("tolist"), "store value.tolist()"),  # arrays and scalars of numpy
    (_has("to_dict"), 'store value.to_dict(), of a table value.to_dict("records")'),  # pandas, polars
    (_is(AsyncIterator), "store [item async for item in value]"),
    (_is(Set, range, Iterator, KeysView, ValuesView), "store list(value)"),
    (isroutine, "did you forget to call it?"),
    (lambda value: type(value).__dictoffset__ != 0, "store its fields as a mapping"),
)
"""The first that fits counts."""


def way_out(value: Any) -> str:
    """What to do about a value that cannot be stored, as the end of an error message; empty if nothing is known of its type."""
    try:
        return next((f"; {hint}" for fits, hint in _HINTS if fits(value)), "")
    except Exception:  # noqa: BLE001 -- asking calls the value's own code, which may raise anything
        return ""
