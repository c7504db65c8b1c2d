"""Every message that crosses a pipe, and values for its fields, for the tests of pipes."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import strategies as st

from streamline_pool.supervisor.ipc.codec import FROM_STEWARD, FROM_WORKER, TO_STEWARD, TO_WORKER
from streamline_pool.supervisor.ipc.messages import FromSteward, FromWorker, ToSteward, ToWorker

__all__ = ["EVERY_MESSAGE", "UNIONS", "values_of"]

UNIONS = ((ToWorker, TO_WORKER), (FromWorker, FROM_WORKER), (ToSteward, TO_STEWARD), (FromSteward, FROM_STEWARD))
EVERY_MESSAGE = [pytest.param(cls, direction, id=cls.__name__) for union, direction in UNIONS for cls in get_args(union)]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PLAIN = {bool: st.booleans(), int: st.integers(-(2**53), 2**53), float: st.floats(allow_nan=False, allow_infinity=False), str: texts}


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field of that type, for the types that messages use."""
    if hint in PLAIN:
        return PLAIN[hint]
    if is_dataclass(hint) and isinstance(hint, type):
        return st.builds(hint, **{name: values_of(inner) for name, inner in get_type_hints(hint).items()})
    origin, args = get_origin(hint), get_args(hint)
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(values_of(args[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values_of, args))
    if origin is dict:
        return st.dictionaries(values_of(args[0]), values_of(args[1]), max_size=2)
    return st.sampled_from(args) if origin is Literal else st.one_of(st.none(), values_of(args[0]))
