"""Definitions: which workflows are legal, and that every other definition is refused where it is written."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest

from streamline_pool import StepNotFoundError, Streamline, ValidationError
from streamline_pool.domain.definition import Definition, make_step
from support import shown


def step(ctx: Any) -> None: ...


async def async_step(ctx: Any) -> None: ...


class Callable:
    async def __call__(self, ctx: Any) -> None: ...


@pytest.fixture
def offline() -> Iterator[Streamline]:
    """Definitions need no server."""
    with Streamline("mongodb://127.0.0.1:1") as app:
        yield app


def test_both_forms_make_the_same_definition(offline: Streamline) -> None:
    first = offline.workflow("one", steps={"a": step, "b": (async_step, {"retries": 5})}, defaults={"timeout": 3})
    second = offline.workflow("two", defaults={"timeout": 3})
    second.step("a")(step)
    second.step("b", retries=5)(async_step)
    assert first.definition.steps == second.definition.steps
    assert first.steps == ("a", "b")


def test_a_decorated_function_stays_itself_and_names_its_step(offline: Streamline) -> None:
    workflow = offline.workflow("w")
    assert workflow.step(step) is step
    assert workflow.step(retries=2)(async_step) is async_step
    assert workflow.steps == ("step", "async_step")


@pytest.mark.parametrize(
    ("handler", "is_async"),
    [(step, False), (async_step, True), (functools.partial(async_step), True), (Callable(), True), (print, False), (lambda ctx: 1, False)],
)
def test_async_handlers_are_recognised_in_every_form(handler: Any, is_async: bool) -> None:
    """An `async def` handler that is called on a thread would only return a coroutine that is never awaited."""
    assert make_step("w", "a", handler, {}).is_async is is_async


@pytest.mark.parametrize("bad", ["", "a b", "a.b", "ä", "a/b", "x" * 101, "a\n", 5, None, b"a", "$a"])
def test_an_id_is_up_to_a_hundred_plain_characters(offline: Streamline, bad: Any) -> None:
    with pytest.raises(ValidationError):
        offline.workflow(bad)
    with pytest.raises(ValidationError):
        offline.workflow("w", steps={bad: step})


@pytest.mark.parametrize("good", ["a", "A-Z_09", "x" * 100, "-"])
def test_plain_ids_are_accepted(offline: Streamline, good: str) -> None:
    assert offline.workflow(good, steps={good: step}).steps == (good,)


@pytest.mark.parametrize(
    "options",
    [
        {"retries": 0}, {"retries": 21}, {"retries": True}, {"retries": 2.0}, {"retries": "3"}, {"retries": None},
        {"timeout": 0}, {"timeout": -1}, {"timeout": "5"}, {"timeout": float("nan")}, {"timeout": float("inf")},
        {"retry_delay": -1}, {"retry_delay": None}, {"retry_delay": "1"},
        {"retry_backoff": "quadratic"}, {"retry_backoff": 0}, {"retry_backoff": -2}, {"retry_backoff": True},
        {"retry_backoff": float("nan")}, {"retry_backoff": float("inf")}, {"retry_backoff": None}, {"retry_backoff": [2]},
        {"skip_if": "yes"}, {"condition": 1}, {"run_if": {}}, {"timeouts": 3}, {"retry": 3},
    ],
    ids=shown,
)  # fmt: skip
def test_a_bad_option_is_refused_with_the_name_of_its_step(offline: Streamline, options: Any) -> None:
    with pytest.raises(ValidationError, match=r"step w\.a"):
        offline.workflow("w", steps={"a": (step, options)})
    assert "w" not in offline.workflows


@pytest.mark.parametrize("defaults", [{"retries": 99}, {"skip_if": step}, {"nonsense": 1}, [1], "retries"], ids=shown)
def test_bad_defaults_are_refused_before_the_first_step(offline: Streamline, defaults: Any) -> None:
    with pytest.raises(ValidationError):
        offline.workflow("w", defaults=defaults)


@pytest.mark.parametrize("handler", [5, "f", None, lambda: 1, lambda a, b: 1, lambda *, x: 1, (step, 5), (step, {}, 3)], ids=shown)
def test_a_handler_takes_ctx_and_nothing_else(offline: Streamline, handler: Any) -> None:
    with pytest.raises(ValidationError):
        offline.workflow("w", steps={"a": handler})


@pytest.mark.parametrize("version", ["", "x" * 101, 5, None])
def test_a_version_is_text(offline: Streamline, version: Any) -> None:
    with pytest.raises(ValidationError, match="version"):
        offline.workflow("w", version=version)


@pytest.mark.parametrize("queue", ["", "a/b", "a b", 5, "x" * 101])
def test_a_queue_name_cannot_hold_a_slash(offline: Streamline, queue: Any) -> None:
    """A lane is queue/workflow/version: with a slash in one part, two lanes could be equal."""
    with pytest.raises(ValidationError, match="queue"):
        offline.workflow("w", queue=queue)


def test_two_workflows_with_one_id_are_refused(offline: Streamline) -> None:
    offline.workflow("w")
    with pytest.raises(
        ValidationError, match="VALIDATION_ERROR: workflow 'w' is defined twice in this app; give one of the two another id"
    ):
        offline.workflow("w")
    Streamline("mongodb://127.0.0.1:1").workflow("w")  # each app has its own registry


def test_two_steps_with_one_id_are_refused(offline: Streamline) -> None:
    workflow = offline.workflow("w")
    workflow.step(step)
    with pytest.raises(ValidationError, match="two steps have the id 'step'"):
        workflow.step(step)


def test_a_workflow_without_steps_is_refused_where_it_is_known(offline: Streamline) -> None:
    with pytest.raises(ValidationError, match="has no steps"):
        offline.workflow("w", steps={})
    empty = offline.workflow("later")
    with pytest.raises(ValidationError, match="has no steps"):
        empty.start()
    with pytest.raises(ValidationError, match="has no steps"):
        offline.freeze()


def test_steps_are_frozen_by_a_pool(offline: Streamline) -> None:
    """A step added after the first start would not be in the runs that are stored already."""
    workflow = offline.workflow("w")
    workflow.step(step)
    offline.freeze()
    with pytest.raises(ValidationError, match="comes too late"):
        workflow.step("late")(step)


def test_a_definition_lists_its_steps_when_asked_for_another() -> None:
    made = make_step("w", "a", step, {})
    definition = Definition(workflow_id="w", version="1", queue="q", steps=(made,), make_context=None)
    assert definition.step("a") is made
    assert definition.lane == "q/w/1"
    with pytest.raises(StepNotFoundError, match="its steps are a"):
        definition.step("b")


def test_the_registry_is_read_only(offline: Streamline) -> None:
    offline.workflow("w")
    with pytest.raises(TypeError):
        offline.workflows["x"] = offline.workflows["w"]  # type: ignore[index]
