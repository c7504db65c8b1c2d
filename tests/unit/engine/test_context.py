"""`ctx` without an engine: what a handler may call, and the abort signal in threads and tasks."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import pickle
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import orjson
import pytest

from streamline_pool import InvalidStateError, LeaseLostError, ValidationError, WorkflowCancelledError, create_hook
from streamline_pool.domain.document import RunDocument
from streamline_pool.engine.abort_signal import AbortSignal, fire_signal
from streamline_pool.engine.context import Context
from streamline_pool.engine.intents import Intents, Suspension, WaitSuspension, changed_in_place
from streamline_pool.protocol.codec import as_payload


class Port:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def save_checkpoint(self, intents: Intents, value: Any, size: int) -> None:
        self.calls.append(("checkpoint", value))

    def save_hook(self, intents: Intents, reason: str, expires_s: float | None) -> str:
        self.calls.append(("hook", reason, expires_s))
        return "token"

    def heartbeat(self) -> None:
        self.calls.append("heartbeat")

    def emit(self, name: str, data: Any) -> None:
        self.calls.append((name, data))


def made(intents: Intents | None = None, **changes: Any) -> tuple[Context, Port]:
    steps = [
        {"stepId": "a", "status": "done", "attempts": 1, "output": "A"},
        {"stepId": "b", "status": "running", "attempts": 2, "checkpoint": 9},
    ]
    port = Port()
    document = cast(RunDocument, {"_id": "r", "workflowId": "w", "steps": steps, "context": {"k": [1]}, "input": 5, **changes})
    return Context(document, 1, AbortSignal(), port, intents or Intents()), port


def test_ctx_records_and_writes_nothing() -> None:
    intents = Intents()
    ctx, port = made(intents)
    ctx.set("k", 2)
    assert (intents.sets, intents.suspension, intents.closed) == ({"k": 2}, None, False)
    assert (ctx.context["k"], ctx.get_output("a"), ctx.get_output("b"), ctx.get_checkpoint(), ctx.attempt) == (2, "A", None, 9, 2)
    assert port.calls == []


def test_the_idempotency_key_is_the_same_in_all_attempts_and_another_after_a_rewind() -> None:
    assert made()[0].idempotency_key == made()[0].idempotency_key == "r:b"
    assert made(rewinds=1)[0].idempotency_key not in ("r:b", made(rewinds=2)[0].idempotency_key)


def test_a_checkpoint_can_be_awaited_or_not() -> None:
    ctx, port = made()

    async def work() -> None:
        await ctx.checkpoint((1, 2))

    asyncio.run(work())
    ctx.checkpoint(3)
    assert port.calls == [("checkpoint", [1, 2]), ("checkpoint", 3)]


def test_every_call_can_be_awaited_or_not() -> None:
    """Handlers of the Node library await each of them, and users rewrite them line by line."""
    ctx, port = made(intents := Intents())

    async def work() -> None:
        await ctx.set("k", 1)
        await ctx.log("text")
        await ctx.emit("mine")
        await ctx.heartbeat()
        await ctx.checkpoint(1)

    asyncio.run(work())
    assert intents.sets == {"k": 1}
    assert port.calls == [("mine", None), "heartbeat", ("checkpoint", 1)]


@pytest.mark.parametrize("name", ["sleep", "wait", "wait_for"])
def test_an_awaited_wait_ends_the_handler_as_one_that_is_not_awaited(name: str) -> None:
    ctx, _ = made()

    async def work() -> None:
        await getattr(ctx, name)({"sleep": 5}.get(name, "text"))

    with pytest.raises(Suspension):
        asyncio.run(work())


def test_the_result_of_a_call_counts_as_nothing() -> None:
    """`lambda ctx: ctx.set("k", 1) or 5` gives 5."""
    ctx, _ = made()
    assert (ctx.set("k", 1) or 5, bool(ctx.log("text")), repr(ctx.emit("mine"))) == (5, False, "None")


# --- the context can be read only -----------------------------------------------------------------------------------

NESTED = {"a": {"b": [1, {"c": 2}]}, "k": 1}

CHANGES: dict[str, Callable[[Any], Any]] = {
    "assignment": lambda context: context.__setitem__("k", 2),
    "new key": lambda context: context.__setitem__("new", 2),
    "del": lambda context: context.__delitem__("k"),
    "update": lambda context: context.update(k=2),
    "setdefault": lambda context: context.setdefault("new", 2),
    "pop": lambda context: context.pop("k"),
    "popitem": lambda context: context.popitem(),
    "clear": lambda context: context.clear(),
    "|=": lambda context: context.__ior__({"k": 2}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_context_is_refused_and_ctx_set_is_named(change: Callable[[Any], Any]) -> None:
    """It was visible in this handler and then lost, which no test of this handler alone shows."""
    ctx, _ = made(context=NESTED)
    with pytest.raises(ValidationError, match=r"ctx\.context is read-only.*ctx\.set\("):
        change(ctx.context)
    assert ctx.context == NESTED
    ctx.set("k", 3)
    assert ctx.context["k"] == 3


def test_the_context_is_a_dict_for_all_who_read_it() -> None:
    ctx, _ = made(context=NESTED)
    assert isinstance(ctx.context, dict)
    assert (json.loads(json.dumps(ctx.context)), orjson.loads(orjson.dumps(ctx.context))) == (NESTED, NESTED)
    copies = [
        dict(ctx.context), {**ctx.context}, ctx.context.copy(), copy.copy(ctx.context), copy.deepcopy(ctx.context), ctx.context | {},
        pickle.loads(pickle.dumps(ctx.context)), as_payload(ctx.context, "output")[0],
    ]  # fmt: skip
    for made_copy in copies:
        assert type(made_copy) is dict
        assert made_copy == NESTED
        made_copy["k"] = 5  # a copy is the handler's own
    assert ctx.context == NESTED
    assert repr(ctx.context) == repr(NESTED)


def test_a_change_inside_of_a_value_is_found_unless_its_key_is_set() -> None:
    """`ctx.context["a"]["b"] = 1` cannot be refused at once without refusing those who set the key afterwards."""
    ctx, _ = made(intents := Intents(), context=NESTED)
    assert changed_in_place(intents, NESTED) is None, "the context was not read"
    ctx.context["a"]["b"][1]["c"] = 3
    assert changed_in_place(intents, NESTED) == "a"
    ctx.set("a", ctx.context["a"])
    assert changed_in_place(intents, NESTED) is None
    ctx.context["a"]["b"].append(4)
    assert changed_in_place(intents, NESTED) == "a", "changed after it was set"


def test_a_value_that_cannot_be_compared_counts_as_changed() -> None:
    """Such as an array of numpy. What its comparison raises must fail the attempt, and not stop the engine's work on the run."""

    class Hostile:
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            raise SystemExit(9)

    ctx, _ = made(intents := Intents(), context=NESTED)
    ctx.context["a"]["b"][0] = Hostile()
    assert changed_in_place(intents, NESTED) == "a"


def test_reading_and_changing_a_copy_is_no_change() -> None:
    """Numbers that differ from themselves must not count as changed."""
    stored = {"nan": [float("nan")], "a": [1]}
    ctx, _ = made(intents := Intents(), context=stored)
    copy.deepcopy(ctx.context)["a"].append(2)
    [*ctx.context["a"]].append(2)
    ctx.set("nan2", [float("nan")])
    assert changed_in_place(intents, stored) is None


# --- steps that do not exist ----------------------------------------------------------------------------------------


def test_a_misspelt_step_is_said_once_with_the_nearest(caplog: pytest.LogCaptureFixture) -> None:
    """None from a misspelt name looks like a step without an output."""
    ctx, _ = made()
    ctx._document["steps"][0]["stepId"] = "reserve"
    with caplog.at_level(logging.WARNING):
        assert [ctx.get_output(name) for name in ("reserv", "reserv", "zzz", "reserve", "b")] == [None, None, None, "A", None]
    said = "unknown_step: ctx.get_output({}) is None, because this workflow has no such step"
    assert [record.getMessage() for record in caplog.records] == [
        said.format("'reserv'") + "; did you mean 'reserve'?",
        said.format("'zzz'"),
    ]
    assert {(record.run_id, record.step_id) for record in caplog.records} == {("r", "b")}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [None, 5, ["a"]])
def test_a_step_id_that_is_no_text_is_said_too(name: Any, caplog: pytest.LogCaptureFixture) -> None:
    ctx, _ = made()
    with caplog.at_level(logging.WARNING):
        assert ctx.get_output(name) is None
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["unknown_step"]


def test_a_sleep_is_no_exception_that_handlers_catch() -> None:
    ctx, _ = made()
    with pytest.raises(Suspension) as first:
        ctx.sleep(5)
    with pytest.raises(Suspension) as second:
        ctx.sleep(99)
    assert not isinstance(first.value, Exception)
    assert second.value is first.value, "the first ending counts"


@pytest.mark.parametrize("delay", [-1, "5", None, float("nan"), float("inf"), 10**12])
def test_an_invalid_sleep_is_refused(delay: Any) -> None:
    with pytest.raises(ValidationError, match=r"ctx\.sleep"):
        made()[0].sleep(delay)


@pytest.mark.parametrize("name", ["", "*", 5, None, "workflow:completed", "engine:error", "workflow:mine", "step:done", "engine:"])
def test_only_the_users_own_names_can_be_emitted(name: Any) -> None:
    ctx, port = made()
    with pytest.raises(ValidationError):
        ctx.emit(name)
    ctx.emit("mine", {"a": 1})
    assert port.calls == [("mine", {"a": 1})]


def test_after_its_end_ctx_does_nothing() -> None:
    intents = Intents()
    ctx, port = made(intents)
    intents.closed = True
    calls = (
        lambda: ctx.set("k", 1), lambda: ctx.sleep(1), ctx.heartbeat, lambda: ctx.emit("x"), lambda: ctx.checkpoint(1),
        lambda: ctx.wait("why"), lambda: ctx.wait_for("e"), lambda: create_hook(ctx, "why"),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(InvalidStateError):
            call()
    assert port.calls == []


# --- waiting --------------------------------------------------------------------------------------------------------


def ended(call: Any) -> WaitSuspension:
    with pytest.raises(WaitSuspension) as caught:
        call()
    assert not isinstance(caught.value, Exception), "`except Exception` in a handler does not catch it"
    return caught.value


def test_a_wait_records_its_type_reason_data_and_timeout() -> None:
    plain = ended(lambda: made()[0].wait("approve?"))
    assert (plain.waiting_for, plain.timeout_s) == ({"type": "human", "reason": "approve?"}, None)
    full = ended(lambda: made()[0].wait("approve?", {"a": (1, 2)}, timeout=timedelta(minutes=1)))
    assert (full.waiting_for, full.timeout_s) == ({"type": "human", "reason": "approve?", "data": {"a": [1, 2]}}, 60.0)
    event = ended(lambda: made()[0].wait_for("paid", timeout=5))
    assert (event.waiting_for["type"], event.waiting_for["eventName"], event.timeout_s) == ("event", "paid", 5.0)


def test_the_first_ending_counts_whatever_kinds_there_are() -> None:
    ctx, _ = made()
    first = ended(lambda: ctx.wait("why"))
    endings: list[Callable[[], Any]] = [lambda: ctx.wait_for("e"), lambda: ctx.sleep(1)]
    for end in endings:
        with pytest.raises(Suspension) as caught:
            end()
        assert caught.value is first


@pytest.mark.parametrize("reason", [None, "", 5, ["x"], "x" * 1001, "\ud800"])
def test_a_wait_and_a_hook_need_a_reason_that_can_be_shown(reason: Any) -> None:
    ctx, port = made()
    calls: list[Callable[[], Any]] = [lambda: ctx.wait(reason), lambda: create_hook(ctx, reason)]
    for call in calls:
        with pytest.raises(ValidationError):
            call()
    assert port.calls == []


@pytest.mark.parametrize("timeout", [0, -1, "5", True, float("nan"), float("inf"), 10**12, timedelta(0), timedelta(days=-1)])
def test_an_invalid_timeout_is_refused(timeout: Any) -> None:
    """An invalid timeout must fail the attempt at once and name the argument; if it were accepted, the wait would end at once or never."""
    ctx, port = made()
    calls: list[Callable[[], Any]] = [
        lambda: ctx.wait("why", timeout=timeout),
        lambda: ctx.wait_for("e", timeout=timeout),
        lambda: create_hook(ctx, "why", expires_in=timeout),
    ]
    for call in calls:
        with pytest.raises(ValidationError):
            call()
    assert port.calls == []


@pytest.mark.parametrize("name", [None, "", 5, "x" * 201, "a\0b", "\ud800", b"e", ["e"]])
def test_the_name_of_an_event_is_text(name: Any) -> None:
    with pytest.raises(ValidationError, match=r"ctx\.wait_for"):
        made()[0].wait_for(name)


def test_what_a_wait_shows_must_be_storable_and_its_path_is_named() -> None:
    with pytest.raises(ValidationError, match=r"wait\.data\.a\[1\]: cannot store"):
        made()[0].wait("why", {"a": [1, object()]})


def test_a_hook_is_registered_with_its_reason_and_its_expiry_and_one_is_open_at_a_time() -> None:
    ctx, port = made()
    assert create_hook(ctx, "approve?", expires_in=timedelta(hours=1)) == ("token", "/hooks/token")
    assert port.calls == [("hook", "approve?", 3600.0)]
    with pytest.raises(InvalidStateError, match="one at a time"):
        create_hook(ctx, "another")
    assert len(port.calls) == 1


def test_the_wait_of_a_step_with_a_hook_is_a_webhook_wait() -> None:
    """This holds in a later attempt, too: a person may hold the token of the first attempt."""
    ctx, _ = made()
    ctx._document["steps"][1]["hooks"] = [{"hash": b"h", "gen": 1, "reason": "why"}]
    assert ended(lambda: ctx.wait("why")).waiting_for["type"] == "webhook"


# --- the signal -----------------------------------------------------------------------------------------------------


def test_only_the_first_reason_counts() -> None:
    signal = AbortSignal()
    assert (signal.aborted, signal.reason, signal.wait(0)) == (False, None, False)
    signal.raise_if_aborted()
    fire_signal(signal, "timeout")
    fire_signal(signal, "cancelled")
    assert (signal.aborted, signal.reason, signal.wait()) == (True, "timeout", True)


def test_raise_if_aborted_says_why() -> None:
    for reason, error in (("cancelled", WorkflowCancelledError), ("lease-lost", LeaseLostError), ("shutdown", LeaseLostError)):
        signal = AbortSignal()
        fire_signal(signal, reason)
        with pytest.raises(error):
            signal.raise_if_aborted()


def test_waiting_threads_and_tasks_are_woken() -> None:
    async def work() -> list[Any]:
        signal = AbortSignal()
        waiting = threading.Event()

        def wait() -> bool:
            waiting.set()
            return signal.wait(10)

        async def await_signal() -> str:
            return await signal

        tasks = [asyncio.create_task(await_signal()) for _ in range(2)]
        thread = asyncio.create_task(asyncio.to_thread(wait))
        while not waiting.is_set():
            await asyncio.sleep(0)
        fire_signal(signal, "shutdown")
        return [await thread, *[await task for task in tasks], await signal]

    assert asyncio.run(work()) == [True, "shutdown", "shutdown", "shutdown"]


def test_a_signal_that_fires_while_a_handler_begins_to_wait_is_not_missed() -> None:
    """A `def` handler waits on its own thread; the signal may fire on another thread between its check and its registration."""
    signal = AbortSignal()

    class Firing(list[Any]):
        def append(self, future: Any) -> None:
            fire_signal(signal, "cancelled")
            super().append(future)

    signal._futures = Firing()

    async def wait() -> str:
        return await asyncio.wait_for(_awaited(signal), 10)

    assert asyncio.run(wait()) == "cancelled"
    assert signal._futures == []


async def _awaited(signal: AbortSignal) -> str:
    return await signal
