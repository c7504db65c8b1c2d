"""Each I/O method `x` of the public classes has a real `x_async` with the same signature, and one procedure behind both."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Collection
from typing import Any, get_type_hints

import pytest

from streamline_pool import Streamline, Workflow

WITHOUT_IO = {
    Streamline: {"configure", "definition_of", "freeze", "lanes", "make_engine", "store", "store_async", "workflow"},
    Workflow: {"main", "step"},
}
"""Public methods that reach no database by themselves."""

OTHER_BODIES = {"close", "execute", "shutdown"}
"""Methods that do more than to drive one procedure: threads and loops differ by their nature."""


def public_methods(owner: type) -> dict[str, Callable[..., Any]]:
    return {name: member for name, member in vars(owner).items() if inspect.isfunction(member) and not name.startswith("_")}


def pairs(*, but: Collection[str] = ()) -> list[Any]:
    """(class, name) of every public method that does I/O, by its synchronous name."""
    found = []
    for owner, without_io in WITHOUT_IO.items():
        methods = public_methods(owner)
        assert without_io <= set(methods), "a name listed here is gone"
        names = sorted({name.removesuffix("_async") for name in set(methods) - without_io})
        found += [pytest.param(owner, name, id=f"{owner.__name__}.{name}") for name in names if name not in but]
    return found


each_method = pytest.mark.parametrize(("owner", "name"), pairs())


@each_method
def test_both_exist_with_one_signature(owner: type, name: str) -> None:
    """A parameter that one of the two lacks is found by a user, in production, when he changes to asyncio."""
    methods = public_methods(owner)
    assert name in methods and f"{name}_async" in methods
    call, call_async = methods[name], methods[f"{name}_async"]
    assert inspect.signature(call) == inspect.signature(call_async), "names, kinds, defaults, annotations and the result are equal"
    assert not inspect.iscoroutinefunction(call) and inspect.iscoroutinefunction(call_async)


@each_method
def test_every_parameter_and_result_has_a_type_that_can_be_resolved(owner: type, name: str) -> None:
    """Tools that read annotations at run time, such as documentation generators, need the names they hold."""
    method = public_methods(owner)[name]
    hints = get_type_hints(method)
    parameters = list(inspect.signature(method).parameters)[1:]
    assert set(hints) == {*parameters, "return"}


@each_method
def test_both_are_documented(owner: type, name: str) -> None:
    methods = public_methods(owner)
    assert inspect.getdoc(methods[name])
    documented = inspect.getdoc(methods[f"{name}_async"]) or ""
    assert documented.startswith(f"`{name}` for the running event loop.") or name == "close"


@pytest.mark.parametrize(("owner", "name"), pairs(but=OTHER_BODIES))
def test_one_procedure_is_behind_both(owner: type, name: str) -> None:
    """Two copies of the logic would drift apart. The bodies are equal, but for `await` and the name of the driver."""
    methods = public_methods(owner)
    assert body(methods[name]) == body(methods[f"{name}_async"])


def body(method: Callable[..., Any]) -> str:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(method))).body
    assert isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef)
    *before, last = definition.body[1:]  # the docstring comes first
    assert isinstance(last, ast.Return) and last.value is not None
    driven = last.value.value if isinstance(last.value, ast.Await) else last.value
    return "\n".join([*map(ast.unparse, before), ast.unparse(driven).replace(".drive_async(", ".drive(")])


def test_a_misspelt_argument_is_refused_by_the_name_of_the_method() -> None:
    workflow: Any = Streamline("mongodb://127.0.0.1:1").workflow("w")
    with pytest.raises(TypeError, match=r"Workflow\.start\(\) got an unexpected keyword argument 'prioritty'"):
        workflow.start(prioritty=1)
