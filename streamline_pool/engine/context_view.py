"""`ctx.context`: a dict that refuses changes, because only `ctx.set` stores them. Owns that class; context.py fills it.

Its values are plain lists and dicts, so readers pay nothing. A change inside of one is found when the handler has ended (intents.py).
"""

from __future__ import annotations

from typing import Any, Never, NoReturn

from streamline_pool.domain.errors import ValidationError

__all__ = ["ContextView", "put"]


class ContextView(dict[str, Any]):
    """The run's context, for reading. Every change raises ValidationError and names `ctx.set`.

    Copies are plain dicts: `copy()`, `dict(…)`, `{**…}`, `|`, the module `copy`, and pickles. The parameters of type `Never`
    make type checkers report a change too.
    """

    __slots__ = ()

    def __setitem__(self, key: Never, value: Never, /) -> None:  # type: ignore[override]
        _refuse(f"ctx.set({key!r}, value)")

    def __delitem__(self, key: Never, /) -> None:  # type: ignore[override]
        _refuse(f"ctx.set({key!r}, None)")

    def pop(self, key: Never, _default: Never = ..., /) -> NoReturn:  # type: ignore[override,assignment]
        """Refused."""
        _refuse(f"ctx.set({key!r}, None)")

    def update(self, *_args: Never, **_kwargs: Never) -> None:  # type: ignore[override]
        """Refused."""
        _refuse("ctx.set(key, value)")

    def setdefault(self, key: Never, _default: Never = ..., /) -> NoReturn:  # type: ignore[override,assignment]
        """Refused."""
        _refuse(f"ctx.set({key!r}, value)")

    def popitem(self) -> NoReturn:
        """Refused."""
        _refuse("ctx.set(key, None)")

    def clear(self) -> NoReturn:
        """Refused."""
        _refuse("ctx.set(key, None)")

    def __ior__(self, other: Never, /) -> NoReturn:  # type: ignore[override,misc]
        _refuse("ctx.set(key, value)")

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self),)  # pickles and the module `copy` would fill a new object by assignments


def put(view: ContextView, key: str, value: Any) -> None:
    """Change a view, for `ctx.set`."""
    dict.__setitem__(view, key, value)


def _refuse(instead: str) -> NoReturn:
    raise ValidationError(f"ctx.context is read-only, and this change would be lost: call {instead}, or change a copy, dict(ctx.context)")
