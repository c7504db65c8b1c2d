"""Every operation of waits, answers, events, pause and rewind fails once, in every way, those of the clients included.

The loop of test_faults.py, over runs that clients answer, pause and rewind. The clients' calls go through the same faulty
store, so their operations are numbered with the worker's. After each run: each acknowledged call took effect exactly once,
each event was delivered once, no handler was entered after its result was durable, and the run has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from faulty_store import CLAIMS, OUTAGE, EntryLog, Faults, FaultyAsyncStore, hasty_env, install_faults
from stored_runs import stored
from workers import Pool, check_invariants

from streamline_pool import Context, Streamline, create_hook, is_timeout
from streamline_pool.client.event_delivery import finishing_broadcasts
from streamline_pool.domain.errors import HookTokenError
from support import present

OPERATIONS_MAX = 70
POLL_S = 0.004
AGAIN_S = 0.12  # a second wait for the same event lasts this long: a late copy of its delivery is applied within 0.03 s


class Script(EntryLog):
    """A workflow, and what clients do to one run of it: `play` is the clients' part, `check` verifies the outcome."""

    run_id: str

    def __init__(self, app: Streamline) -> None:
        super().__init__(app)
        self.app = app
        self.woken: list[int] = []
        self.go = asyncio.Event()
        self.workflow = app.workflow(type(self).__name__, steps={name: getattr(self, name) for name in self.steps})

    steps: tuple[str, ...] = ()
    attempts_exact = True  # False if the number of entries depends on when a control operation is applied

    async def until(self, holds: Callable[[dict[str, Any]], Any]) -> None:
        """Wait until `holds(document)`. Reads as the clients do: by majority reads."""
        deadline = asyncio.get_running_loop().time() + 30
        while not holds(document := await asyncio.to_thread(stored, self.app, self.run_id)):
            assert asyncio.get_running_loop().time() < deadline, document
            await asyncio.sleep(POLL_S)

    async def until_waiting(self, step_id: str) -> None:
        await self.until(lambda document: any(s["stepId"] == step_id and s["status"] == "waiting" for s in document["steps"]))

    async def until_parked(self, step_id: str) -> None:
        await self.until_waiting(step_id)
        await self.until(lambda document: "lease" not in document)

    async def play(self) -> None:
        raise NotImplementedError

    def check(self, document: dict[str, Any], outputs: dict[str, Any], where: str) -> None:
        raise NotImplementedError


class HumanWait(Script):
    steps = ("ask", "end")

    def ask(self, ctx: Context) -> None:
        self.enter(ctx)
        ctx.set("asked", True)
        ctx.wait("may I?", {"$x": 1})

    async def end(self, ctx: Context) -> Any:
        self.enter(ctx)
        return ctx.get_output("ask")

    async def play(self) -> None:
        await self.until_waiting("ask")
        run = await self.workflow.resume_async(self.run_id, {"$answer": "$$NOW"})
        assert run.step("ask").output == {"$answer": "$$NOW"}

    def check(self, document: dict[str, Any], outputs: dict[str, Any], where: str) -> None:
        assert outputs == {"ask": {"$answer": "$$NOW"}, "end": {"$answer": "$$NOW"}}, where
        assert document["context"] == {"asked": True}, where
        assert document["waitGen"] == 1, where


class LateHook(Script):
    steps = ("ask", "end")

    def ask(self, ctx: Context) -> None:
        self.enter(ctx)
        self.token = create_hook(ctx, "may I?").token
        ctx.wait("may I?")

    async def end(self, ctx: Context) -> Any:
        self.enter(ctx)
        return ctx.get_output("ask")

    async def play(self) -> None:
        await self.until_waiting("ask")
        result = await self.app.resume_hook_async(self.token, 7)
        assert result.run.step("ask").output == 7

    def check(self, document: dict[str, Any], outputs: dict[str, Any], where: str) -> None:
        assert outputs == {"ask": 7, "end": 7}, where
        assert document.get("inbox", []) == [], where


class EarlyHook(Script):
    """The answer arrives before the wait, and the attempt that created the hook fails: the answer is kept for the next attempt."""

    steps = ("ask", "end")
    attempts_exact = False
    answered = False

    async def ask(self, ctx: Context) -> None:
        self.enter(ctx)
        if not self.answered:
            token = create_hook(ctx, "may I?").token
            with contextlib.suppress(HookTokenError):  # an interrupted attempt may have answered this wait already
                await self.app.resume_hook_async(token, "early")
            self.answered = True
            raise ValueError("after the answer")
        ctx.wait("may I?")

    async def end(self, ctx: Context) -> Any:
        self.enter(ctx)
        return ctx.get_output("ask")

    def __init__(self, app: Streamline) -> None:
        super().__init__(app)
        self.workflow = app.workflow("early", steps={"ask": (self.ask, {"retries": 5, "retry_delay": 0.001}), "end": self.end})

    async def play(self) -> None:
        self.answered = False
        await self.until(lambda document: document["endedAt"] is not None)

    def check(self, document: dict[str, Any], outputs: dict[str, Any], where: str) -> None:
        assert outputs == {"ask": "early", "end": "early"}, where
        assert document.get("inbox", []) == [], where
        assert document["waitGen"] == 1, where


class Targeted(Script):
    """One event before its wait, one during its wait, and none for the third wait, which would take a copy."""

    steps = ("before", "during", "after")

    def before(self, ctx: Context) -> None:
        self.enter(ctx)
        ctx.wait_for("e")

    def during(self, ctx: Context) -> None:
        self.enter(ctx)
        ctx.wait_for("e")

    def after(self, ctx: Context) -> None:
        self.enter(ctx)
        ctx.wait_for("e", timeout=AGAIN_S)

    async def play(self) -> None:
        self.woken.append(await self.app.send_event_async("e", {"$n": 1}, run_id=self.run_id))
        await self.until_waiting("during")
        self.woken.append(await self.app.send_event_async("e", {"$n": 2}, run_id=self.run_id))

    def check(self, document: dict[str, Any], outputs: dict[str, Any], where: str) -> None:
        assert outputs["before"] == {"$n": 1}, where
        assert outputs["during"] == {"$n": 2}, where
        assert is_timeout(outputs["after"]), f"{where}: delivered twice: {outputs}"
        assert self.woken[-1] == 1, where
        assert len(document["seen"]) == len(set(document["seen"])) == 2, where
        assert "awaits" not in document, where


class Broadcast(Script):
    """An event sent to all while the run waits. A second wait for the same name must not get it again."""

    steps = ("first", "again")

    def first(self, ctx: Context) -> None:
        self.enter(ctx)
        ctx.wait_for("all")

    def again(self, ctx: Context) -> None:
        self.enter(ctx)
        ctx.wait_for("all", timeout=AGAIN_S)

    async def play(self) -> None:
        await self.until_parked("first")
        self.woken.append(await self.app.send_event_async("all", ["$data"]))

    def check(self, document: dict[str, Any], outputs: dict[str, Any], where: str) -> None:
        assert outputs["first"] == ["$data"], where
        assert is_timeout(outputs["again"]), f"{where}: delivered twice: {outputs}"
        assert self.woken == [1], where
        assert document["seen"] == [document["steps"][0]["answer"]], where
        events = list(self.app.store().collection("events").find())
        assert [event["pending"] for event in events] == [False], where


class BroadcastFound(Broadcast):
    """An event sent to all before the run waits for it: the run's worker finds it in the stored events."""

    async def play(self) -> None:
        self.woken.append(await self.app.send_event_async("all", ["$data"]) or 1)


class TimedOut(Script):
    steps = ("ask", "event")

    def ask(self, ctx: Context) -> None:
        self.enter(ctx)
        ctx.wait("no answer comes", timeout=0.02)

    def event(self, ctx: Context) -> None:
        self.enter(ctx)
        ctx.wait_for("no event comes", timeout=0.02)

    async def play(self) -> None:
        await self.until(lambda document: document["endedAt"] is not None)

    def check(self, document: dict[str, Any], outputs: dict[str, Any], where: str) -> None:
        assert all(is_timeout(output) for output in outputs.values()), where
        assert "awaits" not in document, where


class Paused(Script):
    """A run paused and resumed while a handler works; then its wait is paused, resumed and answered."""

    steps = ("busy", "ask", "end")

    async def busy(self, ctx: Context) -> str:
        self.enter(ctx)
        await self.go.wait()
        return "stored under pause"

    def ask(self, ctx: Context) -> None:
        self.enter(ctx)
        ctx.wait("may I?")

    async def end(self, ctx: Context) -> Any:
        self.enter(ctx)
        return ctx.get_output("ask")

    async def play(self) -> None:
        await self.until(lambda document: self.entries)
        assert (await self.workflow.pause_async(self.run_id)).paused
        self.go.set()
        await self.until(lambda document: "lease" not in document)  # the result is stored, or the lease has expired
        assert [step for step, _ in self.entries].count("ask") == 0, "a step was started under pause"
        assert not (await self.workflow.resume_async(self.run_id)).paused
        await self.until_waiting("ask")
        assert (await self.workflow.pause_async(self.run_id)).paused
        store = self.app.store_async()
        assert isinstance(store, FaultyAsyncStore)
        await store.late_applied()
        run = present(await self.workflow.get_async(self.run_id))
        assert run.paused, "a late copy of an older call has undone an acknowledged pause"
        run = present(await self.workflow.resume_async(self.run_id))
        assert not run.paused
        assert run.step("ask").status == "waiting", "un-pausing answered the wait"
        await self.workflow.resume_async(self.run_id, "yes")

    def check(self, document: dict[str, Any], outputs: dict[str, Any], where: str) -> None:
        assert outputs == {"busy": "stored under pause", "ask": "yes", "end": "yes"}, where
        assert document["acts"] == 4, where
        assert document["paused"] is False, where
        assert "pausedWakeAt" not in document, where


class PausedEvent(Script):
    """An event is sent to all before the wait is stored under pause: after resume the worker must still look it up."""

    steps = ("first", "again")

    async def first(self, ctx: Context) -> None:
        self.enter(ctx)
        await self.go.wait()
        ctx.wait_for("all")

    def again(self, ctx: Context) -> None:
        self.enter(ctx)
        ctx.wait_for("all", timeout=AGAIN_S)

    async def play(self) -> None:
        await self.until(lambda document: self.entries)
        assert (await self.workflow.pause_async(self.run_id)).paused
        self.woken.append(await self.app.send_event_async("all", ["$data"]))
        self.go.set()
        # Parked, or recovered: a worker that loses its lease under the pause leaves a step that only starts again after resume.
        await self.until(lambda document: "lease" not in document)
        await self.workflow.resume_async(self.run_id)

    def check(self, document: dict[str, Any], outputs: dict[str, Any], where: str) -> None:
        assert outputs["first"] == ["$data"], where
        assert is_timeout(outputs["again"]), f"{where}: delivered twice: {outputs}"
        assert document["acts"] == 2, where


class Rewound(Script):
    """A run rewound while it waits, which invalidates its hook, and rewound again after it has ended."""

    steps = ("one", "ask", "end")
    attempts_exact = False
    tokens: list[str]

    def one(self, ctx: Context) -> str:
        self.enter(ctx)
        return ctx.idempotency_key

    def ask(self, ctx: Context) -> None:
        self.enter(ctx)
        self.tokens.append(create_hook(ctx, "may I?").token)
        ctx.wait("may I?")

    async def end(self, ctx: Context) -> Any:
        self.enter(ctx)
        return ctx.get_output("ask")

    async def play(self) -> None:
        self.tokens = []
        await self.until_parked("ask")
        rewound = await self.workflow.rewind_to_async(self.run_id, "one")
        assert rewound.to_dict()["rewinds"] == 1
        await self.until(lambda document: document["steps"][1]["status"] == "waiting" and document["waitGen"] == 2)
        await self.app.resume_hook_async(self.tokens[-1], "first answer")
        await self.until(lambda document: document["endedAt"] is not None)
        await self.workflow.rewind_to_async(self.run_id, "ask")
        await self.until_waiting("ask")
        await self.workflow.resume_async(self.run_id, "second answer")

    def check(self, document: dict[str, Any], outputs: dict[str, Any], where: str) -> None:
        assert outputs == {"one": f"{self.run_id}:one:1", "ask": "second answer", "end": "second answer"}, where
        assert (document["rewinds"], document["acts"], document["waitGen"]) == (2, 2, 3), where


SCRIPTS = [HumanWait, LateHook, EarlyHook, Targeted, Broadcast, BroadcastFound, TimedOut, Paused, PausedEvent, Rewound]
QUICK = {(HumanWait, "unknown"), (Targeted, "late")}  # the others take ten seconds each


async def drive(app: Streamline, script: Script, faults: Faults) -> dict[str, Any]:
    """Start one run and drive it to its end under `faults`, while its clients play their part. Returns its document."""
    store = app.connections.use(FaultyAsyncStore(app.where, app.env))
    script.go = asyncio.Event()
    script.run_id = (await script.workflow.start_async()).id
    store._ensured = True
    store.faults = faults

    async def ended() -> None:
        await script.until(lambda document: document["endedAt"] is not None)

    clients: Awaitable[None] = asyncio.create_task(script.play())
    async with Pool(app, recover_every_s=0.05) as pool:
        await asyncio.wait_for(clients, 60)
        await asyncio.wait_for(ended(), 60)
        faults.first = 0  # the drain is not part of the run
        await store.late_applied()
        await ended()
        await pool.until_idle(timeout=60)
    return stored(app, script.run_id)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", [pytest.param(1, id="once"), pytest.param(OUTAGE, id="for a while", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        pytest.param(make, kind, id=f"{make.__name__}-{kind}", marks=[] if (make, kind) in QUICK else [pytest.mark.slow])
        for make in SCRIPTS
        for kind in ("lost", "unknown", "late")
    ],
)
@pytest.mark.slow
@pytest.mark.slow
def test_acknowledged_calls_take_effect_once_whichever_operation_fails(
    make_app: Callable[..., Streamline], make: type[Script], kind: str, count: int
) -> None:
    """A call whose reply is lost is repeated, and late copies of it arrive: it must take effect once, and not again later."""
    app = make_app(env=hasty_env(), lease_s=0.5, max_crashes=20)
    store = install_faults(app)
    script = make(app)
    for number in range(1, OPERATIONS_MAX):
        faults = Faults(kind, number, count)
        store.faults = faults
        script.entries.clear()
        script.woken.clear()
        app.store().collection("events").delete_many({})
        document = asyncio.run(drive(app, script, faults))
        where = f"operation {number} ({', '.join(faults.hit)}) {kind}: {document}"
        check_invariants([document])
        assert document["status"] == "done", where
        assert not script.too_late, f"{where}: {script.too_late}"
        script.check(document, {step["stepId"]: step["output"] for step in document["steps"]}, where)
        assert document["output"] == document["steps"][-1]["output"], where
        if script.attempts_exact and count == 1 and not CLAIMS & set(faults.hit):
            # Only a claim of unknown outcome is abandoned. The sender repeats every other write until its outcome is known.
            assert all(step["attempts"] == 1 for step in document["steps"]), where
            assert len(script.entries) == len(document["steps"]), f"{where}: {script.entries}"
        if not faults.hit:
            assert number > 8, "the loop ended before it tested anything"
            return
    raise AssertionError(f"a run needed {OPERATIONS_MAX} operations: something repeats without end")


@pytest.mark.slow
def test_a_broadcast_whose_sender_dies_anywhere_is_finished_by_a_steward(make_app: Callable[..., Streamline]) -> None:
    """The sender dies after operation number 1, 2, 3 …: if the event was stored, every waiting run must still get it once."""
    app = make_app()
    workflow = app.workflow("dying", steps={"first": lambda ctx: ctx.wait_for("all"), "again": lambda ctx: ctx.wait_for("all")})
    events = app.store().collection("events")
    for number in range(1, 20):
        events.delete_many({})
        run_ids = [workflow.execute(workflow.start().id).id for _ in range(3)]
        store = app.store()
        original = store.run
        done: list[str] = []

        def dying(op: Any, session: Any = None, *, last: int = number, done: list[str] = done, run: Any = original) -> Any:
            if len(done) == last:
                raise SystemExit
            done.append(op.name)
            return run(op, session)

        store.run = dying  # type: ignore[method-assign]
        died = False
        try:
            app.send_event("all", 1)
        except SystemExit:
            died = True
        finally:
            store.run = original  # type: ignore[method-assign]
        is_stored = events.count_documents({}) > 0
        events.update_many({}, [{"$set": {"at": {"$dateSubtract": {"startDate": "$at", "unit": "second", "amount": 16}}}}])
        workflow.execute(run_ids[0])  # this run waits for the second time when the steward finishes the broadcast
        for _ in range(2):
            store.drive(finishing_broadcasts(app.services))
        assert events.count_documents({"pending": True}) == 0
        for run_id in run_ids:
            run = workflow.execute(run_id)
            assert run.step("first").output == (1 if is_stored else None), (number, done)
            assert run.step("again").status == ("waiting" if is_stored else "pending"), (number, done)
            workflow.cancel(run_id)
        if not died:
            assert number > 3
            return
    raise AssertionError("a send needed 20 operations: something repeats without end")
