"""The invariants of a stored run (docs/architecture.md) after random interleavings of waits, answers, events, pauses and lost workers.

As test_invariants.py, for runs that clients answer and control: handlers wait randomly for people, hooks and events, while
clients answer, send, pause, resume, rewind and cancel, leases expire and senders die. In the end everything is answered,
and every run ends.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from workers import Pool, check_invariants

from streamline_pool import Context, StepOptions, Streamline, create_hook
from streamline_pool.client.event_delivery import broadcasting
from streamline_pool.domain.errors import HookTokenError, InvalidStateError
from streamline_pool.protocol import durable_events, operations, recovery
from streamline_pool.storage.procedures import Procedure

RUNS = 30
CLIENTS = 4
ACTS_EACH = 60
STEPS = ("one", "two", "three")
NAMES = ("e0", "e1")
SEEDS = [pytest.param(seed, marks=[pytest.mark.slow] if seed > 2 else []) for seed in range(1, 21)]


class Scripted:
    """Handlers that end randomly in every way a handler can end."""

    def __init__(self, app: Streamline, chance: random.Random) -> None:
        self.app = app
        self.chance = chance
        self.calm = False
        self.tokens: list[str] = []
        self.entered_done: list[str] = []
        self.outputs_seen: dict[tuple[str, str], set[tuple[str, Any]]] = defaultdict(set)
        options: StepOptions = {"retries": 20, "retry_delay": 0.005}
        handlers = {"one": self.step, "two": self.step_async, "three": self.step}
        self.workflow = app.workflow("scripted", steps={name: (handlers[name], options) for name in STEPS})

    def enter(self, ctx: Context) -> str:
        stored = self.app.runs.find_one({"_id": ctx.run_id})
        step = next(step for step in stored["steps"] if step["stepId"] == ctx.step_id)
        rewound = stored.get("rewinds", 0) != ctx._document.get("rewinds", 0)
        if step["status"] in ("done", "waiting") and ctx.signal.reason is None and not rewound:
            self.entered_done.append(f"{ctx.run_id} {ctx.step_id} attempt {ctx.attempt}: {step}")
        return self.chance.choice(["return", "fail", "sleep", "slow", "human", "human", "hook", "hook early", "event", "event", "event"])

    def act(self, ctx: Context, what: str) -> Any:
        timeout = self.chance.choice([None, None, 0.01, 0.1])
        ctx.set("entered", ctx.step_id)
        match what:
            case "fail":
                raise ValueError("by chance")
            case "sleep":
                ctx.sleep(self.chance.random() / 50)
            case "human":
                ctx.wait("please answer", timeout=timeout)
            case "hook":
                self.tokens.append(create_hook(ctx, "please answer").token)
                ctx.wait("please answer", timeout=timeout)
            case "event":
                ctx.wait_for(self.chance.choice(NAMES), timeout=timeout)
        return ctx.step_id

    def early(self, ctx: Context) -> None:
        token = create_hook(ctx, "please answer").token
        self.tokens.append(token)
        if self.chance.random() < 0.5:
            try:
                self.app.resume_hook(token, {"early": token})
            except HookTokenError:
                return  # the run was rewound meanwhile, or another client has answered first

    def step(self, ctx: Context) -> Any:
        what = self.enter(ctx)
        if what == "slow":
            ctx.signal.wait(0.02)
        if what == "hook early":
            self.early(ctx)
            ctx.wait("please answer")
        return self.act(ctx, what)

    async def step_async(self, ctx: Context) -> Any:
        what = self.enter(ctx)
        if what == "slow":
            await asyncio.sleep(0.02)
        return self.act(ctx, "hook" if what == "hook early" else what)

    def witness(self, documents: list[dict[str, Any]]) -> None:
        """Check a snapshot, and record which step of a run took which event."""
        check_invariants(documents)
        for document in documents:
            run_id, ended = document["_id"], True
            seen = document.get("seen", [])
            assert len(seen) == len(set(seen)), f"{run_id} has seen an event twice: {seen}"
            inbox = [item["id"] for item in document.get("inbox", [])]
            assert len(inbox) == len(set(inbox)), f"{run_id} was sent an item twice: {inbox}"
            for step in document["steps"]:
                if step["stepId"] == document["currentStepId"]:
                    ended = False
                assert (step["status"] in ("done", "skipped")) is ended or document["status"] == "failed", f"order: {document}"
                if step["status"] == "waiting":
                    # A run must not wait for an event in its inbox: nothing would read the inbox again.
                    wanted = {"event": step["waitingFor"].get("eventName")}.get(step["waitingFor"]["type"])
                    unread = [item for item in document.get("inbox", []) if item.get("name") == wanted is not None]
                    if step["waitingFor"]["type"] in ("human", "webhook"):  # a hook ends neither a sleep nor a wait for an event
                        unread += [item for item in document.get("inbox", []) if item.get("gen") == step["gen"]]
                    assert not unread, f"{run_id} waits for what it has: {document}"
                if step["stepId"] != document["currentStepId"]:
                    assert "hooks" not in step, f"{run_id}: hooks of a step that is over: {step}"
                if step["status"] == "done" and isinstance(step["output"], dict) and "event" in step["output"]:
                    self.outputs_seen[run_id, step["output"]["event"]].add((step["stepId"], step["endedAt"]))


async def client(scripted: Scripted, runs: list[str], chance: random.Random, record: dict[str, Any]) -> None:
    """One of several clients. It makes random calls and simulates random losses."""
    app, workflow, store = scripted.app, scripted.workflow, scripted.app.store_async()
    for number in range(ACTS_EACH):
        await asyncio.sleep(chance.random() / 30)
        run_id = chance.choice(runs)
        payload = {"answer": app.env.new_id()}
        try:
            match chance.randrange(15):
                case 0 | 1:
                    await workflow.pause_async(run_id)
                case 2 | 3:
                    await workflow.resume_async(run_id)
                case 4 | 5:
                    run = await workflow.resume_async(run_id, payload)
                    assert payload in [step.output for step in run.steps], f"acknowledged, but not stored: {run.to_dict()}"
                case 6 | 7:
                    if scripted.tokens:
                        token = chance.choice(scripted.tokens[-20:])
                        await app.resume_hook_async(token, {"token": token})
                        assert token not in record["used"], f"a token was accepted twice: {token}"
                        record["used"].add(token)
                case 8:
                    await app.send_event_async(chance.choice(NAMES), {"event": app.env.new_id()}, run_id=run_id)
                case 9:
                    await app.send_event_async(chance.choice(NAMES), {"event": app.env.new_id()})
                case 10:
                    # A sender that dies after its event was stored.
                    event_id = app.env.new_id()
                    await store.run(durable_events.record_event(event_id, chance.choice(NAMES), {"event": event_id}, store.now()))
                case 11:
                    await workflow.rewind_to_async(run_id, chance.choice(STEPS))
                    record["rewinds"][run_id] += 1
                case 12:
                    # As if its worker had not renewed in time: the lease holder learns it at its next write.
                    query = {"_id": run_id, "lease.expiresAt": {"$exists": True}}
                    await store.run(
                        operations.update_matching("expire", query, [{"$set": {"lease.expiresAt": {"$subtract": ["$$NOW", 1]}}}])
                    )
                    await store.run(recovery.recover_expired(app.settings.max_crashes))
                case 13:
                    await store.drive(finishing(app))
                case 14:
                    if number % 3 == 0 and (await workflow.cancel_async(run_id)).status == "cancelled":
                        record["cancelled"].add(run_id)
        except (InvalidStateError, HookTokenError):
            continue


def finishing(app: Streamline) -> Procedure[None]:
    """The steward's duty to finish broadcasts, without its waiting time for their senders."""
    for event in (yield durable_events.find_pending_events(app.services.now(), 100)):
        yield from broadcasting(app.services, event)


async def answer_everything(scripted: Scripted) -> None:
    """Resume paused runs and answer waiting runs until every run has ended."""
    app, workflow = scripted.app, scripted.workflow
    deadline = asyncio.get_running_loop().time() + 45
    while live := await asyncio.to_thread(lambda: list(app.runs.find({"endedAt": None}))):
        scripted.witness(live)
        assert asyncio.get_running_loop().time() < deadline, f"these do not end: {live}"
        for document in live:
            try:
                ended: dict[str, Any] = {"status": "ended"}
                step = next((step for step in document["steps"] if step["stepId"] == document["currentStepId"]), ended)
                waits_for = step["waitingFor"]["type"] if step["status"] == "waiting" else None
                if document["paused"] or waits_for in ("human", "webhook"):
                    await workflow.resume_async(document["_id"])
                elif waits_for == "event":
                    await app.send_event_async(step["waitingFor"]["eventName"], {"event": app.env.new_id()}, run_id=document["_id"])
            except InvalidStateError:
                continue
        await app.store_async().drive(finishing(app))
        await asyncio.sleep(0.02)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.slow
def test_runs_end_after_everything_is_answered_whatever_clients_did_before(make_app: Callable[..., Streamline], seed: int) -> None:
    """Client calls meet workers at every moment of a step; one that gets lost between two writes would wedge a run."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    app = make_app(lease_s=2.0, max_crashes=1_000, concurrency=chance.choice([1, 5, 50]))
    scripted = Scripted(app, chance)
    runs = [run.id for run in scripted.workflow.start_many(range(RUNS))]
    record: dict[str, Any] = {"used": set(), "cancelled": set(), "rewinds": defaultdict(int)}

    async def play() -> None:
        async with Pool(app, workers=chance.choice([1, 2, 3]), recover_every_s=0.05) as pool:
            storm = asyncio.gather(*(client(scripted, runs, random.Random(f"{seed} {number}"), record) for number in range(CLIENTS)))
            while not storm.done():
                await asyncio.sleep(0.03)
                scripted.witness(await asyncio.to_thread(lambda: list(app.runs.find())))
            await storm
            await answer_everything(scripted)
            await pool.until_idle()

    asyncio.run(play())
    documents = list(app.runs.find())
    scripted.witness(documents)
    assert not scripted.entered_done
    assert app.store().collection("events").count_documents({"pending": True}) == 0
    twice = {key: steps for key, steps in scripted.outputs_seen.items() if len(steps) > 1}
    assert not twice, f"taken more than once: {twice}"
    for document in documents:
        assert document["status"] == ("cancelled" if document["_id"] in record["cancelled"] else "done"), document
        assert document.get("rewinds", 0) == record["rewinds"][document["_id"]], document
        if document["status"] == "done":
            assert all(step["status"] == "done" for step in document["steps"])
            assert document["output"] == document["steps"][-1]["output"]
