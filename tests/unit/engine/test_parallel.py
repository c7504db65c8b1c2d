"""Parallel work: every mode, limits, timeouts, and that nothing is left at work, in event loops and on threads."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import logging
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest

from streamline_pool import LeaseLostError, Settled, ValidationError, WorkflowCancelledError, execute_parallel, execute_parallel_sync
from streamline_pool.engine.abort_signal import AbortSignal, current_signal, fire_signal
from streamline_pool.engine.intents import SleepSuspension, Suspension
from streamline_pool.engine.parallel import GRACE_S, MODES, THREADS_MAX
from support import eventually, shown

FOREVER_S = 30.0  # far beyond what any of these tests may take, and below what would hold up the suite

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nobody's")


@pytest.fixture(params=["async", "sync"])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """One of the two functions, called from synchronous code."""
    if request.param == "sync":
        return execute_parallel_sync

    def call(*args: Any, **options: Any) -> Any:
        async def main() -> Any:
            try:
                return await execute_parallel(*args, **options)
            finally:
                others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
                assert all("streamline" not in task.get_name() for task in others if task not in left_behind()), others

        return asyncio.run(main())

    return call


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """What there was before these tests need not be looked through after each of them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_is_left(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No thread, no task, no complaint of asyncio's about an error or a task that nobody looked at."""
    yield
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("streamline-parallel")])
    gc.collect()
    assert not left_behind()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio" and record.levelno >= logging.WARNING] == []


def left_behind() -> set[Any]:
    from streamline_pool.engine import parallel

    return parallel._left_behind


def left_behind_log(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(record.place, record.kind) for record in caplog.records if record.getMessage() == "parallel_task_left_behind"]


async def value_of(value: Any) -> Any:
    await asyncio.sleep(0)
    return value


async def failing(error: BaseException) -> Any:
    await asyncio.sleep(0)
    raise error


def fail(error: BaseException) -> Any:
    raise error


class Sleeper:
    """An `async def` task that goes on until it is stopped, and takes a moment to clean up."""

    def __init__(self) -> None:
        self.entered = 0
        self.stopped = 0  # cleaned up completely

    async def __call__(self) -> None:
        self.entered += 1
        try:
            await asyncio.sleep(FOREVER_S)
        finally:
            await asyncio.sleep(0.01)
            self.stopped += 1


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
    """A loser that goes on would act beside the step's next attempt."""
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


def test_race_gives_what_ends_first_be_it_a_value_or_an_error(call: Callable[..., Any]) -> None:
    sleeper = Sleeper()
    assert call([sleeper, lambda: value_of(1)], mode="race") == 1
    with pytest.raises(ValueError, match="first"):
        call([sleeper, lambda: failing(ValueError("first"))], mode="race")
    assert (sleeper.entered, sleeper.stopped) == (2, 2)


def test_all_settled_tells_how_each_task_ended(call: Callable[..., Any]) -> None:
    error, stop = ValueError("why"), StopIteration(1)
    settled = call([lambda: 1, lambda: fail(error), lambda: value_of(None), lambda: failing(error), lambda: fail(stop)], mode="all_settled")
    assert settled == [
        Settled(True, 1, None), Settled(False, None, error), Settled(True, None, None), Settled(False, None, error),
        Settled(False, None, stop),
    ]  # fmt: skip
    assert call([lambda: 1], mode="all_settled", concurrency=3)[0].ok


def test_no_tasks_have_no_results(call: Callable[..., Any]) -> None:
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
def test_senseless_arguments_are_refused_before_anything_starts(call: Callable[..., Any], options: dict[str, Any], says: str) -> None:
    entered: list[int] = []
    with pytest.raises(ValidationError, match=says):
        call([lambda: entered.append(1)], **options)
    assert entered == []


@pytest.mark.parametrize("bad", [5, None, "fetch", {}, asyncio.sleep], ids=shown)
@pytest.mark.parametrize("mode", MODES)
def test_what_is_no_list_is_refused(call: Callable[..., Any], bad: Any, mode: str) -> None:
    with pytest.raises(ValidationError, match="tasks is a list of callables"):
        call(bad, mode)


@pytest.mark.parametrize("mode", ["race", "any"])
def test_a_race_of_nobody_is_refused(call: Callable[..., Any], mode: str) -> None:
    """It could only wait for ever."""
    with pytest.raises(ValidationError, match="at least one task"):
        call([], mode)


def test_what_cannot_be_called_is_named_before_anything_starts(call: Callable[..., Any]) -> None:
    entered: list[int] = []
    with pytest.raises(ValidationError, match=r"tasks\[2\] is not a callable without arguments but 5") as raised:
        call([lambda: entered.append(1), lambda: entered.append(1), 5])
    assert (entered, raised.value.context) == ([], {"index": 2})


def test_coroutines_instead_of_callables_are_refused_without_further_warnings(call: Callable[..., Any]) -> None:
    """The likeliest mistake. Warnings are errors here: a coroutine left unawaited would fail this test."""
    with pytest.raises(ValidationError, match=r"tasks\[1\] is not a callable .*lambda: fetch\(url\)"):
        call([value_of, value_of(1), value_of(2)])
    with pytest.raises(ValidationError, match="not coroutine"):
        call(value_of(1))


# --- at once -----------------------------------------------------------------------------------------------------------


def test_plain_tasks_are_at_work_at_the_same_time_and_the_loop_goes_on(call: Callable[..., Any]) -> None:
    """A plain callable on the loop's own thread would hold up every run of the worker."""
    together = threading.Barrier(3)

    async def in_the_loop() -> None:
        while together.n_waiting < 2:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(together.wait, FOREVER_S)

    call([lambda: together.wait(FOREVER_S), lambda: together.wait(FOREVER_S), in_the_loop])


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_no_more_tasks_than_concurrency_are_at_work_and_they_begin_in_order(call: Callable[..., Any], kind: str) -> None:
    """A limit protects somebody else's server."""
    lock, at_work, most, begun = threading.Lock(), 0, 0, []

    def enter(place: int) -> None:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
            begun.append(place)

    def leave(place: int) -> int:
        nonlocal at_work
        with lock:
            at_work -= 1
        return place

    def plain(place: int) -> int:
        enter(place)
        threading.Event().wait(0.005)
        return leave(place)

    async def work(place: int) -> int:
        enter(place)
        await asyncio.sleep(0.005)
        return leave(place)

    task = plain if kind == "def" else work
    assert call([functools.partial(task, place) for place in range(12)], concurrency=3) == list(range(12))
    assert most == 3
    assert sorted(begun[:3]) == [0, 1, 2]
    begun.clear()
    assert call([functools.partial(task, place) for place in range(4)], concurrency=1) == begun == [0, 1, 2, 3]


def test_without_a_limit_plain_tasks_do_not_use_up_all_threads(call: Callable[..., Any]) -> None:
    lock, at_work, most = threading.Lock(), 0, 0

    def work() -> None:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        threading.Event().wait(0.01)
        with lock:
            at_work -= 1

    call([work] * (2 * THREADS_MAX))
    assert 1 < most <= THREADS_MAX


def test_without_a_limit_all_coroutines_are_at_work_at_once_also_those_of_lambdas(call: Callable[..., Any]) -> None:
    """The bound on threads must not become one on what needs no thread."""
    count, entered = THREADS_MAX + 20, 0

    async def work() -> None:
        nonlocal entered
        entered += 1
        while entered < 2 * count:
            await asyncio.sleep(0.001)

    call([*[work] * count, *[lambda: work()] * count])  # noqa: PLW0108 -- a plain callable that returns a coroutine


def test_a_concurrency_above_the_bound_on_threads_is_the_callers_own_choice(call: Callable[..., Any]) -> None:
    together = threading.Barrier(THREADS_MAX + 1)
    call([lambda: together.wait(FOREVER_S)] * (THREADS_MAX + 1), concurrency=THREADS_MAX + 1)


def test_a_thread_that_cannot_be_started_fails_its_task(call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "streamline-parallel-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    settled = call([lambda: 0, lambda: 1, lambda: 2], "all_settled")
    assert [one.value for one in settled] == [0, None, 2]
    assert "can't start new thread" in str(settled[1].error)


@pytest.mark.parametrize("concurrency", [None, 1])
def test_tasks_see_the_callers_context_variables_and_keep_their_own_to_themselves(
    call: Callable[..., Any], concurrency: int | None
) -> None:
    """A tenant or a trace id that is lost on the way, or changed by a neighbour, would end up in the wrong log or bill."""

    def plain() -> str:
        before = variable.get()
        variable.set("plain")
        return before

    async def work() -> str:
        before = variable.get()
        variable.set("work")
        await asyncio.sleep(0)
        return before

    token = variable.set("caller's")
    try:
        from_lambda = lambda: work()  # noqa: E731, PLW0108 -- a plain callable that returns a coroutine
        assert call([plain, work, from_lambda, plain], concurrency=concurrency) == ["caller's"] * 4
        assert variable.get() == "caller's"
    finally:
        variable.reset(token)


def test_tasks_that_had_to_wait_for_a_thread_see_the_callers_context_variables_too(call: Callable[..., Any]) -> None:
    """They are started by the end of another's thread, which has no context of its own."""
    token = variable.set("caller's")
    try:
        assert set(call([variable.get] * (3 * THREADS_MAX))) == {"caller's"}
    finally:
        variable.reset(token)


def test_calls_can_be_nested(call: Callable[..., Any]) -> None:
    async def inner() -> list[Any]:
        return list(await execute_parallel([lambda: 1, lambda: value_of(2)]))

    assert call([inner, lambda: execute_parallel_sync([lambda: 3, lambda: value_of(4)])]) == [[1, 2], [3, 4]]


def test_the_synchronous_call_refuses_to_stop_an_event_loop() -> None:
    async def main() -> None:
        with pytest.raises(ValidationError, match="await execute_parallel"):
            execute_parallel_sync([lambda: 1])

    asyncio.run(main())


# --- timeouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0.05, timedelta(milliseconds=50)], ids=shown)
def test_a_task_that_takes_too_long_is_stopped_and_named(call: Callable[..., Any], timeout: Any) -> None:
    sleeper, quick = Sleeper(), functools.partial(value_of, 1)  # without a thread, which on a busy machine may not be quick
    with pytest.raises(TimeoutError, match=r"^tasks\[1\] took longer than its timeout of 0\.05 s$"):
        call([quick, sleeper], timeout=timeout)
    settled = call([sleeper, quick, sleeper], "all_settled", timeout=timeout)
    assert [type(one.error) for one in settled] == [TimeoutError, type(None), TimeoutError]
    with pytest.raises(ExceptionGroup) as raised:
        call([sleeper, functools.partial(failing, ValueError())], "any", timeout=timeout)
    assert [type(error) for error in raised.value.exceptions] == [TimeoutError, ValueError]
    with pytest.raises(TimeoutError):
        call([sleeper], "race", timeout=timeout)
    assert sleeper.entered == sleeper.stopped == 5


def test_the_timeout_counts_from_where_each_task_begins(call: Callable[..., Any]) -> None:
    """Counted from the call, tasks at the end of a queue would have no time at all."""
    lived: list[float] = []

    async def work() -> None:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            await asyncio.sleep(FOREVER_S)
        finally:
            lived.append(loop.time() - begun)

    settled = call([work] * 3, "all_settled", concurrency=1, timeout=0.05)
    assert [type(one.error) for one in settled] == [TimeoutError] * 3
    assert min(lived) > 0.04


def test_a_result_that_is_there_is_not_thrown_away_because_the_loop_was_held_up(call: Callable[..., Any]) -> None:
    """The timer and the end of a task may fall into the same round of the loop."""

    async def hold_up() -> int:
        threading.Event().wait(0.1)
        return 2

    settled = call([functools.partial(value_of, 1), hold_up], "all_settled", timeout=0.05)
    assert [one.value for one in settled] == [1, 2]


def test_what_a_task_does_after_its_time_is_up_makes_no_difference(call: Callable[..., Any]) -> None:
    error = ValueError("while cleaning up")

    async def late() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(FOREVER_S)
        return "late"

    async def broken() -> str:
        try:
            await asyncio.sleep(FOREVER_S)
        finally:
            raise error

    settled = call([late, broken], "all_settled", timeout=0.02)
    assert [(one.ok, type(one.error), one.error.__cause__) for one in settled] == [
        (False, TimeoutError, None),
        (False, TimeoutError, error),
    ]


def test_a_plain_task_that_takes_too_long_is_over_and_what_it_returns_is_dropped(
    call: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A thread cannot be stopped; a call that waited for it would hang with it."""
    release, returned = threading.Event(), threading.Event()

    def stuck() -> Any:
        release.wait(FOREVER_S)
        returned.set()
        return value_of("nobody awaits this")

    try:
        settled = call([stuck, functools.partial(value_of, 1)], "all_settled", concurrency=1, timeout=0.05)
        assert ([one.value for one in settled], type(settled[0].error)) == ([None, 1], TimeoutError)
        assert not returned.is_set()
        assert left_behind_log(caplog) == [(0, "thread")]
    finally:
        release.set()
    assert returned.wait(FOREVER_S)


def test_a_coroutine_that_comes_in_the_moment_its_time_is_up_is_dropped() -> None:
    """Warnings are errors here: left unawaited it would fail this test."""

    async def main() -> None:
        entered, release = threading.Event(), threading.Event()

        def work() -> Any:
            entered.set()
            assert release.wait(FOREVER_S)
            return value_of("nobody awaits this")

        parallel = asyncio.create_task(execute_parallel([work], timeout=0.05))
        while not entered.is_set():
            await asyncio.sleep(0)
        release.set()
        threading.Event().wait(0.1)  # the loop stands still: the thread's reply and the timeout meet in its next round
        with pytest.raises(TimeoutError):
            await parallel

    asyncio.run(main())


def test_a_plain_task_that_ends_within_the_grace_is_awaited(call: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    """When the call returns, nothing is at work any more, if that can be had at a small price."""
    entered, won, ended = threading.Event(), threading.Event(), []

    def loser() -> Any:
        entered.set()
        assert won.wait(FOREVER_S)
        threading.Event().wait(0.1)
        ended.append(1)
        return value_of("nobody awaits this")

    async def winner() -> str:
        await asyncio.to_thread(entered.wait, FOREVER_S)
        won.set()
        return "won"

    assert call([loser, winner], "race") == "won"
    assert (ended, left_behind_log(caplog)) == ([1], [])


# --- tasks that will not end -------------------------------------------------------------------------------------------


def test_a_task_that_refuses_to_end_is_left_behind(call: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    """It must neither hang the handler nor be destroyed half-way."""
    release, ended = threading.Event(), threading.Event()

    async def stubborn() -> None:
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
        ended.set()

    async def main() -> Any:
        result = await execute_parallel([stubborn, lambda: value_of(1)], "race")
        assert not ended.is_set()
        release.set()
        while not ended.is_set():
            await asyncio.sleep(0.01)
        return result

    try:
        if call is execute_parallel_sync:
            assert call([stubborn, lambda: value_of(1)], "race") == 1
            assert not ended.is_set()
        else:
            assert asyncio.run(main()) == 1
    finally:
        release.set()
    assert left_behind_log(caplog) == [(0, "coroutine")]
    assert ended.wait(FOREVER_S)
    eventually(lambda: not left_behind())


def test_a_task_left_behind_is_not_collected_half_way() -> None:
    """An event loop holds its tasks weakly; what waits for something that only itself refers to would vanish."""

    async def main() -> None:
        ended, waits = asyncio.Event(), []

        async def stubborn() -> None:
            while not ended.is_set():
                future = asyncio.get_running_loop().create_future()
                waits[:] = [weakref.ref(future)]
                with contextlib.suppress(asyncio.CancelledError):
                    await future
                    ended.set()

        assert await execute_parallel([stubborn, lambda: value_of(1)], "race") == 1
        gc.collect()
        future = waits[0]()
        assert future is not None
        future.set_result(None)
        await ended.wait()

    asyncio.run(main())


def test_a_task_that_refuses_its_timeout_is_over_after_the_grace(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> Any:
        release = asyncio.Event()

        async def stubborn() -> None:
            while not release.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await release.wait()

        try:
            return await execute_parallel([stubborn, functools.partial(value_of, 1)], "all_settled", concurrency=1, timeout=0.02)
        finally:
            release.set()

    settled = asyncio.run(main())
    assert [(type(one.error), one.value) for one in settled] == [(TimeoutError, None), (type(None), 1)]
    assert left_behind_log(caplog) == [(0, "coroutine")]


def test_a_task_that_loses_its_first_cancellation_is_stopped_by_the_next(
    call: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Drivers do lose one now and then (see tasks.py)."""
    ended: list[int] = []

    async def absent_minded() -> None:
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(FOREVER_S)
            await asyncio.sleep(FOREVER_S)
        finally:
            ended.append(1)

    assert call([absent_minded, lambda: value_of(1)], "race") == 1
    assert (ended, left_behind_log(caplog)) == ([1], [])


# --- the caller is cancelled -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_cancelled_caller_stops_and_awaits_every_task(mode: str) -> None:
    sleeper, told, plain_ended = Sleeper(), threading.Event(), []

    def plain() -> None:
        assert told.wait(FOREVER_S)
        plain_ended.append(1)

    async def main() -> None:
        parallel = asyncio.create_task(execute_parallel([sleeper, sleeper, plain], mode))
        while sleeper.entered < 2:
            await asyncio.sleep(0)
        parallel.cancel("no longer wanted")
        told.set()
        with pytest.raises(asyncio.CancelledError, match="no longer wanted"):
            await parallel
        assert (sleeper.stopped, plain_ended) == (2, [1])
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_second_cancellation_does_not_cut_the_cleaning_up_short() -> None:
    sleeper = Sleeper()

    async def main() -> None:
        parallel = asyncio.create_task(execute_parallel([sleeper, sleeper], concurrency=1))
        while not sleeper.entered:
            await asyncio.sleep(0)
        for _ in range(3):
            parallel.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await parallel
        assert (sleeper.entered, sleeper.stopped) == (1, 1)

    asyncio.run(main())


def test_a_cancellation_while_losers_are_awaited_is_not_lost() -> None:
    """The handler would go on as if nobody had cancelled the run."""

    async def main() -> None:
        cleaning = asyncio.Event()

        async def loser() -> None:
            try:
                await asyncio.sleep(FOREVER_S)
            finally:
                cleaning.set()
                await asyncio.sleep(0.02)

        parallel = asyncio.create_task(execute_parallel([loser, lambda: value_of(1)], "race"))
        await cleaning.wait()
        parallel.cancel()
        with pytest.raises(asyncio.CancelledError):
            await parallel

    asyncio.run(main())


def test_a_cancellation_in_the_moment_of_the_result_is_not_lost() -> None:
    async def main() -> None:
        parallel: asyncio.Task[Any]

        async def last_act() -> int:
            asyncio.get_running_loop().call_soon(parallel.cancel)
            return 1

        parallel = asyncio.create_task(execute_parallel([last_act]))
        with pytest.raises(asyncio.CancelledError):
            await parallel

    asyncio.run(main())


def test_a_callers_own_timeout_works_around_the_call() -> None:
    sleeper = Sleeper()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await execute_parallel([sleeper])
        assert sleeper.stopped == 1
        await asyncio.sleep(0)  # and no cancellation is left over

    asyncio.run(main())


def test_an_unwatched_interrupt_stops_the_synchronous_call() -> None:
    """Ctrl-C in a program's main thread."""
    sleeper = Sleeper()

    async def interrupt() -> None:
        while not sleeper.entered:
            await asyncio.sleep(0)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        execute_parallel_sync([sleeper, interrupt, sleeper])
    assert sleeper.entered == sleeper.stopped == 2


@pytest.mark.parametrize(("reason", "error"), [("cancelled", WorkflowCancelledError), ("timeout", LeaseLostError)])
def test_the_signal_of_a_def_handler_stops_its_tasks(reason: str, error: type[Exception]) -> None:
    """Nobody can cancel a thread: without this, the tasks of a cancelled run would go on to their end."""
    sleeper, abort = Sleeper(), AbortSignal()

    def watch() -> None:
        eventually(lambda: sleeper.entered)
        fire_signal(abort, reason)

    watcher = threading.Thread(target=watch)
    token = current_signal.set(abort)
    try:
        watcher.start()
        with pytest.raises(error):
            execute_parallel_sync([sleeper])
        assert sleeper.stopped == 1
        with pytest.raises(error):
            execute_parallel_sync([sleeper])
        assert sleeper.entered == 1
    finally:
        current_signal.reset(token)
        watcher.join()


def test_a_signal_that_never_fires_is_not_burdened_by_the_calls_it_watched() -> None:
    abort = AbortSignal()
    token = current_signal.set(abort)
    try:
        assert [execute_parallel_sync([lambda: value_of(1)]) for _ in range(3)] == [[1]] * 3
    finally:
        current_signal.reset(token)
    assert abort._futures == []


# --- what is no ordinary failure ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize("error", [SleepSuspension(60), SystemExit(3), KeyboardInterrupt()], ids=shown)
def test_what_is_no_exception_ends_the_call_in_every_mode(call: Callable[..., Any], mode: str, kind: str, error: BaseException) -> None:
    """`ctx.sleep` in a task must put the run to sleep, and `sys.exit` must not end the worker's loop."""
    sleeper = Sleeper()
    leave = (lambda: fail(error)) if kind == "def" else functools.partial(failing, error)
    with pytest.raises(type(error)) as raised:
        call([sleeper, leave, sleeper], mode)
    assert raised.value is error
    assert sleeper.entered == sleeper.stopped == 2


def test_an_ending_is_not_lost_when_it_comes_while_a_task_is_stopped(call: Callable[..., Any]) -> None:
    async def leave_at_last() -> None:
        try:
            await asyncio.sleep(FOREVER_S)
        finally:
            raise SleepSuspension(60)

    with pytest.raises(Suspension):
        call([leave_at_last, lambda: value_of(1)], "race")
    with pytest.raises(Suspension):
        call([leave_at_last], "all_settled", timeout=0.02)


def test_an_ending_of_a_plain_task_is_not_lost_when_its_time_is_up(call: Callable[..., Any]) -> None:
    begun = threading.Event()

    def leave_late() -> None:
        begun.set()
        threading.Event().wait(0.1)
        raise SleepSuspension(60)

    with pytest.raises(Suspension):
        call([leave_late], "all_settled", timeout=0.02)
    assert begun.is_set()


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_task_that_cancels_itself_has_failed_and_the_caller_is_not_cancelled(call: Callable[..., Any], kind: str) -> None:
    """CancelledError passed on would look like a cancellation of the whole handler, and fits in no ExceptionGroup."""
    error = asyncio.CancelledError()
    cancel = (lambda: fail(error)) if kind == "def" else functools.partial(failing, error)
    with pytest.raises(RuntimeError, match=r"tasks\[1\] was cancelled by its own code") as raised:
        call([lambda: value_of(1), cancel])
    assert raised.value.__cause__ is error
    with pytest.raises(ExceptionGroup):
        call([cancel], "any")


# --- the loop of the synchronous call ----------------------------------------------------------------------------------


def test_what_a_task_has_started_itself_is_ended_with_the_loop() -> None:
    stray = Sleeper()

    async def careless() -> Any:
        task = asyncio.create_task(stray())
        await asyncio.sleep(0)
        return task

    assert execute_parallel_sync([careless])[0].cancelled()
    assert stray.stopped == 1


def test_a_generator_left_half_way_is_closed_with_the_loop() -> None:
    closed: list[int] = []

    async def numbers() -> Any:
        try:
            yield 1
            yield 2
        finally:
            closed.append(1)

    async def first() -> Any:
        left = numbers()
        await anext(left)
        return left

    kept = execute_parallel_sync([first])
    assert (len(kept), closed) == (1, [1])


def test_a_thread_of_a_tasks_own_does_not_hold_up_the_call() -> None:
    """`asyncio.run` waits for such threads without an end."""
    release = threading.Event()

    async def work() -> None:
        await asyncio.to_thread(release.wait, FOREVER_S)

    try:
        with pytest.raises(TimeoutError):
            execute_parallel_sync([work], timeout=0.05)
        assert not release.is_set()
    finally:
        release.set()


def test_a_great_many_tasks_take_no_more_than_their_share() -> None:
    """Waiting for all again after each would take the square of it: minutes."""
    assert sum(execute_parallel_sync([functools.partial(value_of, 1)] * 20_000)) == 20_000


def test_the_grace_is_shorter_than_a_handlers_own() -> None:
    """Otherwise a handler that waits for a stubborn task would count as stubborn itself, and cost its worker."""
    from streamline_pool.engine.attempt import ABORT_GRACE_S

    assert GRACE_S < 1.0 < ABORT_GRACE_S  # 1 s: what `shutdown` gives
