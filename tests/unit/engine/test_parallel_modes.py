"""Parallel calls: what each mode returns or raises, and which arguments are refused."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from parallel_tasks import FOREVER_S, Sleeper, fail, failing, value_of

from streamline_pool import Settled, ValidationError
from streamline_pool.engine.parallel import MODES
from support import shown

pytestmark = pytest.mark.usefixtures("nothing_is_left")


# --- modes -------------------------------------------------------------------------------------------------------------


def test_all_gives_the_values_in_the_order_of_the_tasks(call: Callable[..., Any]) -> None:
    """Results in the order of arrival would be attributed to the wrong task."""
    second_is_done = threading.Event()

    def first() -> str:
        assert second_is_done.wait(FOREVER_S)
        return "first"

    async def second() -> str:
        second_is_done.set()
        return "second"

    class Asked:
        async def __call__(self) -> str:
            return "asked"

    tasks = [first, second, lambda: "plain", lambda: value_of("awaited"), functools.partial(value_of, "partial"), Asked()]
    assert call(tasks) == ["first", "second", "plain", "awaited", "partial", "asked"]
    assert call(tuple(tasks)[2:], mode="all") == ["plain", "awaited", "partial", "asked"]


def test_all_raises_the_first_error_and_stops_the_others(call: Callable[..., Any]) -> None:
    """A task that goes on would run beside the next attempt of the step."""
    sleeper, error = Sleeper(), ValueError("why")
    with pytest.raises(ValueError, match="why") as raised:
        call([sleeper, lambda: fail(error), sleeper])
    assert raised.value is error
    assert (sleeper.entered, sleeper.stopped) == (2, 2)


def test_after_the_first_error_no_further_task_is_started(call: Callable[..., Any]) -> None:
    entered: list[int] = []
    with pytest.raises(ValueError, match="first"):
        call([lambda: fail(ValueError("first")), *[lambda: entered.append(1)] * 3], concurrency=1)
    assert entered == []


def test_any_gives_the_first_value_and_stops_the_others(call: Callable[..., Any]) -> None:
    sleeper = Sleeper()
    assert call([sleeper, lambda: failing(ValueError("no matter")), lambda: value_of(2)], "any") == 2
    assert (sleeper.entered, sleeper.stopped) == (1, 1)


def test_any_raises_all_errors_in_the_order_of_the_tasks(call: Callable[..., Any]) -> None:
    second_failed = threading.Event()

    def first() -> None:
        assert second_failed.wait(FOREVER_S)
        raise ValueError("first")

    async def second() -> None:
        second_failed.set()
        raise KeyError("second")

    with pytest.raises(ExceptionGroup, match="all of 2 tasks failed") as raised:
        call([first, second], mode="any")
    assert [type(error) for error in raised.value.exceptions] == [ValueError, KeyError]


def test_race_gives_the_value_or_error_of_the_task_that_ends_first(call: Callable[..., Any]) -> None:
    sleeper = Sleeper()
    assert call([sleeper, lambda: value_of(1)], mode="race") == 1
    with pytest.raises(ValueError, match="first"):
        call([sleeper, lambda: failing(ValueError("first"))], mode="race")
    assert (sleeper.entered, sleeper.stopped) == (2, 2)


def test_all_settled_gives_the_end_of_each_task(call: Callable[..., Any]) -> None:
    error, stop = ValueError("why"), StopIteration(1)
    settled = call([lambda: 1, lambda: fail(error), lambda: value_of(None), lambda: failing(error), lambda: fail(stop)], mode="all_settled")
    assert settled == [
        Settled(True, 1, None), Settled(False, None, error), Settled(True, None, None), Settled(False, None, error),
        Settled(False, None, stop),
    ]  # fmt: skip
    assert call([lambda: 1], mode="all_settled", concurrency=3)[0].ok


def test_without_tasks_there_are_no_results(call: Callable[..., Any]) -> None:
    assert call([]) == call([], mode="all_settled") == []


# --- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mode": "first"}, "mode is one of all, race, any, all_settled, not 'first'"),
        ({"mode": None}, "mode is one of"),
        ({"mode": ["all"]}, "mode is one of"),
        ({"mode": "race", "concurrency": 2}, "mode 'race' starts all tasks at once"),
        ({"mode": "any", "concurrency": 2}, "mode 'any' starts all tasks at once"),
        *(({"concurrency": bad}, "concurrency is a whole number of at least 1") for bad in (0, -1, True, 1.0, "2")),
        *(({"timeout": bad}, "timeout: a duration") for bad in (0, -1, True, "2", float("nan"), float("inf"), timedelta(0), timedelta(-1))),
    ],
    ids=shown,
)  # fmt: skip
def test_invalid_arguments_are_refused_before_any_task_starts(call: Callable[..., Any], options: dict[str, Any], says: str) -> None:
    entered: list[int] = []
    with pytest.raises(ValidationError, match=says):
        call([lambda: entered.append(1)], **options)
    assert entered == []


@pytest.mark.parametrize("bad", [5, None, "fetch", {}, asyncio.sleep], ids=shown)
@pytest.mark.parametrize("mode", MODES)
def test_tasks_that_are_no_list_are_refused(call: Callable[..., Any], bad: Any, mode: str) -> None:
    with pytest.raises(ValidationError, match="tasks is a list of callables"):
        call(bad, mode)


@pytest.mark.parametrize("mode", ["race", "any"])
def test_a_race_without_tasks_is_refused(call: Callable[..., Any], mode: str) -> None:
    """It would wait for ever."""
    with pytest.raises(ValidationError, match="at least one task"):
        call([], mode)


def test_a_task_that_cannot_be_called_is_named_before_any_task_starts(call: Callable[..., Any]) -> None:
    entered: list[int] = []
    with pytest.raises(ValidationError, match=r"tasks\[2\] is not a callable without arguments but 5") as raised:
        call([lambda: entered.append(1), lambda: entered.append(1), 5])
    assert (entered, raised.value.context) == ([], {"index": 2})


def test_coroutines_instead_of_callables_are_refused_without_further_warnings(call: Callable[..., Any]) -> None:
    """The most likely mistake. Warnings are errors here: a coroutine that is not awaited would fail this test."""
    with pytest.raises(ValidationError, match=r"tasks\[1\] is not a callable .*lambda: fetch\(url\)"):
        call([value_of, value_of(1), value_of(2)])
    with pytest.raises(ValidationError, match="not coroutine"):
        call(value_of(1))
