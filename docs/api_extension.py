"""For the documentation site only: shows public methods that are made from private procedures.

`start, start_async = sync_and_async(_proc_start)` gives a class two public methods. A static reader of the source sees
two attributes without a signature. This extension of griffe gives them the signature and the docstring of `_proc_start`.
"""

from __future__ import annotations

from typing import Any

import griffe

__all__ = ["PublicProcedures"]


class PublicProcedures(griffe.Extension):
    """Replaces each `name, name_async = sync_and_async(_proc_name)` by one documented function `name`."""

    def on_class_members(self, *, cls: griffe.Class, **_kwargs: Any) -> None:
        for private, found in list(cls.members.items()):
            name = private.removeprefix("_proc_")
            if name == private or not isinstance(found, griffe.Function):
                continue
            text = found.docstring.value if found.docstring else ""
            shown = griffe.Function(
                name,
                lineno=found.lineno,
                endlineno=found.endlineno,
                parameters=found.parameters,
                returns=_result(found.returns),
                docstring=griffe.Docstring(f"{text}\n\nThe asyncio form is `{name}_async`.", lineno=found.lineno),
            )
            for replaced in (name, f"{name}_async"):
                cls.members.pop(replaced, None)
            cls.set_member(name, shown)


def _result(annotation: Any) -> Any:
    """`Procedure[Run]` is what the private function returns; its caller gets a `Run`."""
    return annotation.slice if isinstance(annotation, griffe.ExprSubscript) else annotation
