"""What the actors do: workflows over every kind of step, and clients that start and control their runs.

Owns the plans. A plan is drawn from the seed, apart from the recorded choices, so shrinking a schedule keeps it. A client acts at once,
after a pause, or at a moment of the protocol: when another actor's claim, commit or call is sent, or has been performed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from streamline_pool import Context, Run, StepOptions, Streamline, create_hook
from streamline_pool.domain.errors import StoreUnavailableError, WorkflowError, WorkflowNotFoundError
from streamline_pool.protocol.payloads import EXTERNAL_BYTES

from .call_outcomes import check_outcome
from .code import Code
from .duels import DUELS, ENDED, LONG, PARKED, WAITING, WHEN
from .ledger import Call, Entry, Violation
from .server import EPOCH
from .store import Request
from .transitions import CLEANED_AFTER_S, LATER_S, TERMINAL

if TYPE_CHECKING:
    from .actors import Actor, ClientActor
    from .world import World

__all__ = ["KINDS", "NAMED_KINDS", "Workload"]

KINDS = ("chain", "retry", "sleep", "wait", "waits", "hook", "hooks", "event", "events", "mixed", "mixed", "large", "poison", "choice")
NAMED_KINDS = (*dict.fromkeys(KINDS), "code")
"""Kinds that can be asked for. A durable function is not drawn: the schedules of the other kinds stay as they were."""
EVENT = "news"
ACTIONS = (
    "pause", "pause", "resume", "resume", "cancel", "rewind", "rewind", "answer", "answer", "hook", "hook",
    "event", "event", "event to all", "event to all", "forged hook",
    "start again", "start", "start mine", "start later",
    "stray wake-up", "clean up", "clean up expired", "archive", "execute", "drain", "pause and resume",
)  # fmt: skip
FITTING = {
    "wait": ("answer", "answer", "pause", "rewind", "cancel", "resume"),
    "waits": ("answer", "answer", "answer", "pause", "rewind"),
    "hook": ("hook", "hook", "forged hook", "pause", "rewind", "resume"),
    "hooks": ("hook", "hook", "hook", "forged hook", "rewind"),
    "event": ("event", "event to all", "pause", "resume", "rewind"),
    "events": ("event", "event to all", "event to all", "event", "rewind"),
    "mixed": ("hook", "event", "event to all", "rewind", "pause"),
    "code": ("answer", "answer", "pause", "rewind", "resume", "cancel"),
    "sleep": ("pause", "resume", "rewind", "execute"),
    "chain": ("clean up", "archive", "clean up expired", "rewind", "start again", "pause and resume", "cancel"),
    "large": ("clean up", "archive", "rewind", "cancel"),
    "retry": ("pause", "resume", "start again"),
    "poison": ("pause", "rewind"),
    "choice": ("pause", "resume", "pause and resume", "rewind", "cancel"),
}
MOMENTS = (
    ("sent", "commit_runs"), ("done", "commit_runs"), ("sent", "claim"), ("done", "claim"), ("done", "read_claimed"), ("sent", "call"),
    ("done", "call"), ("sent", "recover"), ("done", "recover"), ("sent", "find_event_for"), ("done", "find_event_for"), ("sent", "renew"),
    ("done", "checkpoint"), ("sent", "settle_event"), ("done", "record_event"),
    ("done", "scan_runs"), ("done", "copy_runs"),
)  # fmt: skip
LONG_SHARE = 0.3  # of these
DUEL_SHARE = 0.6  # of the schedules whose first workflow has duels
PAUSES_S = (0.0, 0.002, 0.01, 0.1, 1.0, 6.0, 29.0, 35.0)
WORK_S = (0.0, 0.0, 0.0, 0.003, 0.5, 8.0, 33.0)
DEADLINES_S = (None, None, 0.5, 20.0, 40.0)
AGE = timedelta(seconds=CLEANED_AFTER_S)
MOMENT_S = 45.0  # a client waits so long for its moment


@dataclass(frozen=True, slots=True)
class Action:
    """One act of a client's plan."""

    kind: str
    when: tuple[str, str] | float
    target: int  # which of the runs, in the order of their start
    place: int  # of the step to rewind to


class Workload:
    """The plan of one schedule, and what it needs at run time: hook tokens and run ids."""

    def __init__(self, world: World) -> None:
        self._world = world
        draw = world.choices.fixed
        self.clients = draw.randint(1, 3)
        self.kinds = [draw.choice(world.choices.kinds or KINDS), *(draw.choice(KINDS) for _ in range(draw.choice((0, 0, 1))))]
        if draw.random() < 0.15:
            self.kinds = [self.kinds[0]] * 3  # runs that go side by side, so that their writes go together
        self.run_ids: list[str] = []
        self.tokens: list[tuple[str, str]] = []  # (run id, token), oldest first
        self._work = {(kind, place): draw.choice(WORK_S) for kind in KINDS for place in range(4)}
        self._deadline = {kind: draw.choice(DEADLINES_S) for kind in KINDS}
        self._expires_in = draw.choice((None, None, None, 0.5, 20.0))
        self._hooks_fail = draw.random() < 0.3
        self._sleep_s = draw.choice((0.0, 0.01, 3.0, 50.0))
        self.differs = draw.random() < 0.12  # the second worker has another application
        self.sent: list[dict[str, Any]] = []  # the data of answers and events
        self._saved: dict[str, int] = {}  # idempotency key of a step -> the last checkpoint that its handler has stored
        self._priorities = [draw.choice((0, 0, 0, 5, -5)) for _ in range(3)]
        self._tidies = draw.random() < 0.3
        self._failures = draw.choice((1, 2))
        self._poisoned = draw.choice((1, 2, 3, 9))  # entries that kill the worker
        is_duel, is_long = draw.random() < DUEL_SHARE, draw.random() < LONG_SHARE
        self.duel = draw.choice(LONG if is_long else DUELS[self.kinds[0]]) if is_duel else None
        if self.duel is not None and self.duel.rival:
            self.clients = max(2, self.clients)
        if self.duel is not None and (is_long or self.duel.is_long):
            self._work = {key: draw.choice((8.0, 33.0, 70.0)) for key in self._work}
            self.kinds = [self.kinds[0]] * draw.choice((1, 2, 3))  # side by side, so that they are claimed and renewed together
        self._plans = [self._draw_plan(number) for number in range(self.clients)]
        self._played: set[str] = set()
        self._started: asyncio.Future[None] = world.loop.create_future()  # the first run
        self._moments: list[tuple[ClientActor, str, str, asyncio.Future[None]]] = []
        self._calls = 0
        self.kind_of: dict[str, str] = {}
        self.code = Code(world)

    def _draw_plan(self, number: int) -> list[Action]:
        draw = self._world.choices.fixed
        plan = []
        if number == 0:
            plan = [Action("start", 0.0, index, 0) for index in range(len(self.kinds))]
            if len(set(self.kinds)) == 1 < len(self.kinds) and draw.random() < 0.5:
                plan = [Action("start many", 0.0, 0, 0)]  # claimed together, too
        if self.duel is not None and number < 2:
            calls = self.duel.calls if number == 0 else self.duel.rival
            if calls or number == 0:
                return plan + [self._parse(call) for call in calls]
        fitting = [kind for name in self.kinds for kind in FITTING.get(name, ())]
        for _ in range(draw.randint(1, 4)):
            kind = draw.choice(fitting) if fitting and draw.random() < 0.6 else draw.choice(ACTIONS)
            when = draw.choice(MOMENTS) if draw.random() < 0.55 else draw.choice(PAUSES_S)
            plan.append(Action(kind, when, draw.randrange(len(self.kinds)), draw.choice((0, 0, 1, 2))))
        return plan

    def _parse(self, call: str) -> Action:
        draw = self._world.choices.fixed
        when: tuple[str, str] | float = draw.choice((*PAUSES_S, *MOMENTS))
        for words, moment in WHEN.items():
            if call.endswith(f" {words}"):
                call, when = call.removesuffix(f" {words}"), moment
        kind, _, place = call.rpartition(" ")
        return Action(kind, when, 0, int(place)) if place.isdigit() else Action(call, when, 0, 0)

    # --- workflows ---------------------------------------------------------------------------------------------------

    def define(self, app: Streamline, actor: Actor) -> None:
        """Register every kind of workflow, with handlers that report to the ledger as this actor."""
        steps: dict[str, list[Callable[[Context], Awaitable[Any]]]] = {
            "chain": [self._work_step] * 3,
            "retry": [self._failing_step, self._work_step],
            "sleep": [self._sleeping_step, self._work_step],
            "wait": [self._waiting_step, self._work_step],
            "waits": [self._waiting_step, self._waiting_step, self._work_step],
            "hook": [self._hook_step, self._work_step],
            "hooks": [self._hook_step, self._hook_step, self._work_step],
            "event": [self._event_step, self._work_step],
            "events": [self._event_step, self._event_step, self._work_step],
            "mixed": [self._checkpoint_step, self._hook_step, self._event_step, self._work_step],
            "poison": [lambda ctx: self._poisoned_step(actor, ctx), self._work_step],
            "choice": [self._work_step] * 3,
            "large": [self._large_step, self._checkpoint_step, self._large_step],
        }
        known = list(dict.fromkeys(self.kinds))
        if self.differs and actor.name == "worker-1":
            known = [*known[1:], "chain" if known[0] != "chain" else "retry"]  # it cannot run the first workflow
        for kind in dict.fromkeys(known):
            if kind == "code":
                app.workflow(kind).main(self.code.main(actor))
                continue
            behaviours = steps[kind]
            handlers = {f"s{place}": self._handler(actor, kind, place, act) for place, act in enumerate(behaviours)}
            options: StepOptions = {"retries": 8, "retry_delay": 0.5}
            if kind == "choice":
                options["run_if"] = self._is_chosen
            app.workflow(kind, steps={step: (handler, options) for step, handler in handlers.items()})

    def _handler(
        self, actor: Actor, kind: str, place: int, act: Callable[[Context], Awaitable[Any]]
    ) -> Callable[[Context], Awaitable[Any]]:
        async def handle(ctx: Context) -> Any:
            try:
                entry = self._world.rules.entries.entered(actor, ctx)
                self._check_checkpoint(entry, ctx)
            except Violation as violation:
                self._world.fail(violation)
                raise
            number = len(self._world.ledger.entries) - 1
            try:
                work_s = self._work[(kind, place)]
                if work_s:
                    await asyncio.sleep(work_s)
                result = await act(ctx)
                return {"entry": number, "of": result}
            except asyncio.CancelledError:
                self._check_stop(actor, entry)
                raise
            finally:
                try:
                    if self._tidies:
                        await asyncio.sleep(0.5)  # a handler may clean up after its cancellation
                finally:
                    entry.left = True

        return handle

    def _check_checkpoint(self, entry: Entry, ctx: Context) -> None:
        """A new attempt finds the last checkpoint that an earlier one has stored, unless its lease was taken away before it began.

        A run that was deleted may have been started again under its id.
        """
        saved, found = self._saved.get(entry.key, 0), ctx.get_checkpoint() or 0
        rules = self._world.rules
        if found < saved and (entry.run_id, str(entry.lease_id)) not in rules.taken and entry.run_id not in rules.deleted:
            raise Violation(f"checkpoint {saved} of {entry.step_id} of {entry.run_id} is lost, there is {found}")

    def _check_stop(self, actor: Actor, entry: Entry) -> None:
        try:
            self._world.rules.entries.stopped(actor, entry)
        except Violation as violation:
            self._world.fail(violation)

    async def _work_step(self, ctx: Context) -> str:
        if ctx.workflow_id == "chain":
            ctx.set("expireAt", EPOCH)  # over at once, but a run that has not ended is not cleaned up
        return ctx.step_id

    async def _is_chosen(self, ctx: Context) -> bool:
        """A condition, which takes its time."""
        await asyncio.sleep(self._work[("choice", 3)])
        return ctx.step_id != "s1"

    async def _failing_step(self, ctx: Context) -> str:
        if ctx.attempt <= self._failures:
            raise ValueError("a failure of the workload")
        return "done"

    async def _sleeping_step(self, ctx: Context) -> None:
        ctx.sleep(self._sleep_s)

    async def _waiting_step(self, ctx: Context) -> None:
        ctx.wait("answer me", timeout=self._deadline["wait"])

    async def _hook_step(self, ctx: Context) -> None:
        hook = create_hook(ctx, "answer me", expires_in=self._expires_in)
        self.tokens.append((ctx.run_id, hook.token))
        self._moment("done", "hook", None)
        await asyncio.sleep(self._work[("hook", 2)])
        if self._hooks_fail and ctx.attempt == 1:
            raise ValueError("the hook's first attempt fails")
        ctx.wait("answer me", timeout=self._deadline["hook"])

    async def _event_step(self, ctx: Context) -> None:
        ctx.wait_for(EVENT, timeout=self._deadline["event"])

    def asked_s(self, kind: str, workflow_id: str) -> float | None:
        """How long a step sleeps or waits at most, by the type of its wait; None: without end."""
        if workflow_id == "code":
            return self.code.asked_s(kind)
        return self._sleep_s if kind == "timer" else self._deadline[{"human": "wait", "webhook": "hook"}.get(kind, kind)]

    async def _checkpoint_step(self, ctx: Context) -> int:
        so_far = ctx.get_checkpoint() or 0
        ctx.checkpoint(so_far + 1)
        self._saved[ctx.idempotency_key] = so_far + 1
        self._moment("done", "checkpoint", None)
        await asyncio.sleep(self._work[("mixed", 3)])
        ctx.checkpoint(so_far + 2)
        self._saved[ctx.idempotency_key] = so_far + 2
        if ctx.get_checkpoint() != so_far + 2:
            self._world.fail(Violation(f"checkpoint {so_far + 2} of {ctx.run_id} was not kept"))
        return so_far

    async def _poisoned_step(self, actor: Actor, ctx: Context) -> str:
        if ctx.attempt <= self._poisoned and not self._world.is_settling:
            self._world.harm.kill(actor)
            await asyncio.Event().wait()
        return "survived"

    async def _large_step(self, ctx: Context) -> str:
        return "x" * (EXTERNAL_BYTES + 1)

    # --- moments -----------------------------------------------------------------------------------------------------

    def on_sent(self, request: Request) -> None:
        """An operation was sent: a client may wait for that, to overtake it."""
        if self._moment("sent", _moment_of(request), request.actor):
            request.hold = self._world.choices.one_of((0, 1, 2, 4, 8))

    def on_performed(self, request: Request) -> None:
        """An operation was performed."""
        self._moment("done", _moment_of(request), request.actor)

    def on_changed(self) -> None:
        """A run was changed. A client may wait until one waits, or has ended."""
        for when in (WAITING, PARKED, ENDED) if self._moments else ():
            if self._has_come(when):
                self._moment(*when, None)

    def _has_come(self, when: tuple[str, str] | float) -> bool:
        runs = self._world.rules.runs.values()
        if when == ENDED:
            return any(run["status"] in TERMINAL for run in runs)
        is_wait = when in (WAITING, PARKED)
        return is_wait and any(run["status"] == "waiting" and (when == WAITING or "lease" not in run) for run in runs)

    def _moment(self, side: str, name: str, actor: Actor | None) -> bool:
        waiting = [entry for entry in self._moments if (entry[1], entry[2]) == (side, name) and entry[0] is not actor]
        for entry in waiting:
            self._moments.remove(entry)
            if not entry[3].done():
                entry[3].set_result(None)
        return bool(waiting)

    async def _await(self, client: ClientActor, when: tuple[str, str] | float) -> None:
        if isinstance(when, float):
            await asyncio.sleep(when)
            return
        if self._has_come(when):
            return
        future: asyncio.Future[None] = self._world.loop.create_future()
        self._moments.append((client, *when, future))
        await asyncio.wait([future], timeout=MOMENT_S)

    # --- playing -----------------------------------------------------------------------------------------------------

    def has_played(self, client: ClientActor) -> bool:
        """Whether the client's plan is over."""
        return client.name in self._played

    def died(self, client: ClientActor) -> None:
        """The client was killed."""
        if client.call is not None:
            client.call.outcome = "died"
        self._played.add(client.name)

    async def play(self, client: ClientActor) -> None:
        """Follow the plan of this client."""
        for action in self._plans[int(client.name.rpartition("-")[2])]:
            if action.kind not in ("start", "start many") and not self.run_ids:
                await asyncio.wait([self._started], timeout=MOMENT_S)
            await self._await(client, action.when)
            if self._world.is_settling:
                break
            await self._act(client, action)
        self._played.add(client.name)

    async def _act(self, client: ClientActor, action: Action) -> None:
        app = client.app
        target = self.run_ids[action.target % len(self.run_ids)] if self.run_ids else None
        match action.kind:
            case "start":
                kind = self.kinds[action.target]
                await self._start(client, kind, None if action.place else self._key(action.target))
            case "start again":
                target_kind = action.place if action.place < len(self.kinds) else action.target
                await self._start(client, self.kinds[target_kind], self._key(target_kind))
            case "start mine":
                await self._start(client, self.kinds[0], None, "chosen")
            case "start later":
                await self._start(client, self.kinds[0], None, later=True)
            case "start many":
                await self._start_many(client, self.kinds[0])
            case "clean up":
                await self._call(client, "clean up", None, None, app.cleanup_old_runs_async(AGE))
            case "clean up expired":
                await self._call(client, "clean up expired", None, None, app.cleanup_expired_async())
            case "archive":
                await self._call(client, "archive", None, None, app.archive_old_runs_async(AGE))
            case "event to all":
                data = self._data(client)
                await self._call(client, "event to all", None, data, app.send_event_async(EVENT, data))
            case "drain":
                self._drain()
            case _ if target is not None:
                await self._act_on(client, action, target)

    async def _act_on(self, client: ClientActor, action: Action, run_id: str) -> None:
        app = client.app
        match action.kind:
            case "pause":
                await self._call(client, "pause", run_id, None, app.pause_run_async(run_id))
            case "resume":
                await self._call(client, "resume", run_id, None, app.resume_run_async(run_id))
            case "pause and resume":
                await self._call(client, "pause", run_id, None, app.pause_run_async(run_id))
                await self._call(client, "resume", run_id, None, app.resume_run_async(run_id))
            case "cancel":
                await self._call(client, "cancel", run_id, None, app.cancel_run_async(run_id))
            case "rewind":
                await self._call(client, "rewind", run_id, f"s{action.place}", app.rewind_run_async(run_id, f"s{action.place}"))
            case "answer":
                await self._call(client, "answer", run_id, None, app.resume_run_async(run_id, self._data(client)))
            case "hook":
                tokens = [token for of_run, token in self.tokens if of_run == run_id]
                if tokens:
                    token = tokens[-1 if action.place == 0 else 0]
                    await self._call(client, "hook", run_id, token, app.resume_hook_async(token, self._data(client)))
            case "forged hook":
                forged = f"{run_id}.{'0' * 32}"
                await self._call(client, "forged hook", run_id, None, app.resume_hook_async(forged, {"by": "a stranger"}))
            case "stray wake-up":
                self._world.harm.stray_wake_up(run_id)
            case "event":
                await self._call(client, "event", run_id, None, app.send_event_async(EVENT, self._data(client), run_id=run_id))
            case "execute":
                kind = self.kind_of[run_id]
                try:
                    await app.workflows[kind].execute_async(run_id)
                except WorkflowError:
                    return

    def _data(self, client: ClientActor) -> dict[str, Any]:
        """The data of an answer or event. An expression in it must stay a text."""
        self.sent.append({"number": len(self.sent), "by": client.name, "costs": "$rev"})
        return self.sent[-1]

    def _drain(self) -> None:
        worker = self._world.workers[0]
        if worker.alive:
            worker.drain()

    def _key(self, target: int) -> str:
        """Workflows of different kinds share a key, which belongs to each of them alone."""
        return f"key-{self.kinds[:target].count(self.kinds[target])}"

    async def _start(self, client: ClientActor, kind: str, key: str | None, run_id: str | None = None, *, later: bool = False) -> None:
        given = {"kind": kind, "by": client.name}
        priority = self._priorities[len(self.run_ids) % 3]
        start_at = timedelta(seconds=LATER_S) if later else None
        work = client.app.workflows[kind].start_async(given, idempotency_key=key, run_id=run_id, priority=priority, start_at=start_at)
        call = await self._call(client, "start later" if later else "start", None, (kind, key or run_id), work)
        self._check_started(call, may_be_refused=run_id is not None)
        if call.outcome == "ok":
            self._started_run(call, call.result, kind, None if key is not None else given)

    async def _start_many(self, client: ClientActor, kind: str) -> None:
        keys = [self._key(number) for number in range(len(self.kinds))]
        given = {"kind": kind, "by": client.name}
        work = client.app.workflows[kind].start_many_async([given] * len(keys), idempotency_keys=keys)
        call = await self._call(client, "start many", None, (kind, keys), work)
        self._check_started(call, may_be_refused=False)
        for run in call.result if call.outcome == "ok" else ():
            self._started_run(call, run, kind, None)

    def _check_started(self, call: Call, *, may_be_refused: bool) -> None:
        if not may_be_refused and (call.outcome == "refused" or (call.outcome == "unknown" and not self._world.harm.counts)):
            self._world.fail(Violation(f"{call} was {call.outcome}: {call.result}"))

    def _started_run(self, call: Call, run: Run, kind: str, given: Mapping[str, Any] | None) -> None:
        """A start was acknowledged. `given`: its input; None if an earlier call with its key may have given another one."""
        if run.workflow_id != kind or (given is not None and run.input != given):
            self._world.fail(Violation(f"{call} was given run {run.id} of {run.workflow_id} with the input {run.input}"))
        self.kind_of[run.id] = kind
        if run.id not in self.run_ids:
            self.run_ids.append(run.id)
            if not self._started.done():
                self._started.set_result(None)
        rules = self._world.rules
        if run.id not in rules.durable() and run.id not in rules.deleted:
            self._world.fail(Violation(f"{call} was acknowledged, and no majority has the run {run.id}"))

    async def _call(self, client: ClientActor, kind: str, run_id: str | None, argument: Any, work: Awaitable[Any]) -> Call:
        self._calls += 1
        rules = self._world.rules
        call = Call(number=self._calls, actor=client.owner, kind=kind, run_id=run_id, argument=argument, began=rules.changes)
        call.began_at = self._world.loop.time()
        self._world.ledger.calls.append(call)
        client.call = call
        self._world.ledger.tell(self._world.loop.time(), f"{call}: begins")
        try:
            call.result = await work
            outcome = "ok"
        except StoreUnavailableError:
            outcome = "unknown"
        except WorkflowNotFoundError as exc:
            outcome, call.result = "unknown", exc
        except WorkflowError as exc:
            outcome, call.result = ("unknown" if "all the time" in exc.message else "refused"), exc
        finally:
            client.call = None
        call.ended = rules.changes
        call.ended_at = self._world.loop.time() if outcome == "ok" else None
        self._world.ledger.tell(self._world.loop.time(), f"{call}: {outcome} {call.result if outcome == 'refused' else ''}")
        try:
            check_outcome(self._world, call, outcome)
        except Violation as violation:
            self._world.fail(violation)
        call.outcome = outcome
        return call


def _moment_of(request: Request) -> str:
    name = request.name
    if name in ("scan_runs", "copy_runs"):
        return name
    if request.call is not None:
        return "call" if request.writes else ""
    if name in ("claim_run", "claim_runs"):
        return "claim"
    return "recover" if name in ("recover_expired", "release_owner") else name
