"""The rules about handlers: when one may be entered, and that none goes on after its lease. Checked at each entry, and as time passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from streamline_pool.engine.durable.step_context import StepContext

from .ledger import Entry, Violation

if TYPE_CHECKING:
    from .actors import Actor
    from .transitions import Rules
    from .world import World

__all__ = ["MAX_CRASHES", "Entries", "driven_run"]

MAX_CRASHES = 3
FENCE_GRACE_S = 1.0  # a handler may be aborted so late: one tick of the self-fence
_STOPPING = ("driver lost", "lag", "majority too late")  # by these a handler may be stopped although the lease is held

Run = Mapping[str, Any]


def driven_run(actor: Actor, run_id: str) -> Any:
    """What an actor's engine knows of a run that it drives; None: it does not drive it."""
    return None if actor.engine is None else actor.engine.active_runs.held.get(run_id)


class Entries:
    """Sees every handler that is entered, and every step of time."""

    def __init__(self, world: World, rules: Rules) -> None:
        self._world = world
        self._rules = rules
        self._entered_under_pause: dict[tuple[str, Any], int] = {}
        self._thawed_at: dict[str, float] = {}
        self._keys: dict[tuple[str, str, int], str] = {}  # (run id, step, rewinds) -> idempotency key
        self._suspects: dict[tuple[str, str], float] = {}  # (owner, run id) -> when it was first seen to keep that suspect

    def entered(self, actor: Actor, ctx: Any) -> Entry:
        """A handler was entered. Raises Violation."""
        now = self._world.loop.time()
        run = self._rules.durable().get(ctx.run_id)
        active = driven_run(actor, ctx.run_id)
        lease_id = active.lease_id if active is not None else None
        entry = Entry(
            actor=actor.name, owner=actor.owner, run_id=ctx.run_id, step_id=ctx.step_id, attempt=ctx.attempt,
            key=ctx.idempotency_key, at=now, lease_id=lease_id, is_call=isinstance(ctx, StepContext),
        )  # fmt: skip
        self._world.ledger.entries.append(entry)
        self._world.ledger.tell(now, f"{actor.owner}: ENTERS {ctx.step_id} of {ctx.run_id}, attempt {ctx.attempt}")
        if lease_id is not None and self._rules.granted.get((ctx.run_id, lease_id), 0.0) <= now:
            raise Violation(f"{actor.owner} entered {ctx.step_id} of {ctx.run_id} after its lease had expired")
        self._check_alone(entry)
        if active is None:
            raise Violation(f"{actor.owner} entered {ctx.step_id} of {ctx.run_id}, which its engine does not drive")
        self._check_key(entry, active.document.get("rewinds", 0))
        is_as_claimed = active is not None and active.document["rev"] == self._rules.claimed_rev.get((ctx.run_id, lease_id))
        if is_as_claimed and active.document.get("paused") is True:
            raise Violation(f"{actor.owner} entered {ctx.step_id} of {ctx.run_id}, and its claim has read that the run is paused")
        taken = self._rules.taken.get((ctx.run_id, str(lease_id)))
        if taken is not None:
            self._check_grant(entry, taken)
        if run is None or taken is not None:
            return entry  # a control operation came in between
        rewinds = run.get("rewinds", 0)
        mine = active.document.get("rewinds", 0) if active is not None else rewinds
        if mine != rewinds:
            return entry
        self._check_entry(actor, run, ctx, lease_id)
        return entry

    def _check_alone(self, entry: Entry) -> None:
        """A process has one handler of a run at a time, whatever it knew of its leases."""
        for other in self._world.ledger.entries[:-1]:
            if entry.is_call and other.lease_id == entry.lease_id and other.step_id != entry.step_id:
                continue  # calls of a durable function, side by side
            if other.owner == entry.owner and other.run_id == entry.run_id and not other.left:
                raise Violation(f"{entry.owner} entered {entry.step_id} of {entry.run_id} beside its handler of {other.step_id}")

    def _check_grant(self, entry: Entry, run: Run) -> None:
        """A handler may be entered after its lease was taken away, if that entry was stored before; `run` is as it was then."""
        if entry.is_call:
            return  # the entries of calls are not stored
        step = next(step for step in run["steps"] if step["stepId"] == entry.step_id)
        if (step["status"], step["attempts"]) != ("running", entry.attempt):
            raise Violation(
                f"{entry.owner} entered {entry.step_id} of {entry.run_id}, attempt {entry.attempt}, without a lease; it was {step}"
            )
        same = [other for other in self._world.ledger.entries if (other.run_id, other.lease_id) == (entry.run_id, entry.lease_id)]
        if sum((other.step_id, other.attempt) == (entry.step_id, entry.attempt) for other in same) > 1:
            raise Violation(f"{entry.owner} entered {entry.step_id} of {entry.run_id} twice as attempt {entry.attempt}")

    def _check_key(self, entry: Entry, rewinds: int) -> None:
        """A step has one idempotency key, until it is rewound, and no other step has the same."""
        key = self._keys.setdefault((entry.run_id, entry.step_id, rewinds), entry.key)
        if key != entry.key or list(self._keys.values()).count(entry.key) > 1:
            raise Violation(f"step {entry.step_id} of {entry.run_id} has the idempotency key {entry.key}; keys so far: {self._keys}")

    def _check_call(self, run: Run, ctx: Any, lease_id: str | None) -> None:
        """A call is entered only if no result of it is durable, and while nothing keeps the function from going on."""
        who = f"{ctx.step_id} of {run['_id']} was entered"
        stored = next((step for step in run["steps"] if step["stepId"] == ctx.step_id), None)
        if stored is not None and stored["status"] in ("done", "failed"):
            raise Violation(f"{who}, and it had ended as {stored['status']}")
        lease = run.get("lease") or {}
        if lease_id is not None and lease.get("id") != lease_id:
            raise Violation(f"{who} under the lease {lease_id}, and a majority has {lease or 'no lease'}")
        if run["steps"][0]["status"] != "running" or run["currentStepId"] != "main":
            raise Violation(f"{who}, and the function is {run['steps'][0]['status']}, at {run['currentStepId']}")

    def _check_entry(self, actor: Actor, run: Run, ctx: Any, lease_id: str | None) -> None:
        if isinstance(ctx, StepContext):
            self._check_call(run, ctx, lease_id)
            return
        place = next(place for place, step in enumerate(run["steps"]) if step["stepId"] == ctx.step_id)
        who = f"{actor.owner} entered {ctx.step_id} of {run['_id']}"
        if run["steps"][place]["status"] in ("done", "skipped"):
            raise Violation(f"{who}, whose result is durable")
        unfinished = [step["stepId"] for step in run["steps"][:place] if step["status"] not in ("done", "skipped")]
        if unfinished:
            raise Violation(f"{who}, but no majority has the result of {unfinished[0]}")
        lease = run.get("lease") or {}
        if lease_id is not None and lease.get("id") != lease_id:
            raise Violation(f"{who} under the lease {lease_id}, and a majority has {lease or 'no lease'}")
        if run["steps"][place]["status"] != "running":
            raise Violation(f"{who}, which is {run['steps'][place]['status']}")
        if run["steps"][place]["attempts"] != ctx.attempt:
            raise Violation(f"{who} as attempt {ctx.attempt}, and the stored count is {run['steps'][place]['attempts']}")
        for earlier in () if actor.engine is None else actor.engine.active_runs.all():
            is_other = earlier.run_id == run["_id"] and earlier.lease_id != lease_id
            if is_other and earlier.attempt is not None and not earlier.attempt.context.signal.aborted:
                raise Violation(f"{who} beside its own earlier handler, which it has not told to stop")
        suspect = None if actor.engine is None else actor.engine.suspect
        since = self._suspects.get((actor.owner, suspect or ""))
        if suspect != run["_id"] and since is not None and self._world.loop.time() > since + 0.5:
            raise Violation(f"{who} beside {suspect}, which has to run alone")
        if run["crashes"] >= MAX_CRASHES - 1 and actor in self._world.workers and actor.engine is not None:
            others = [active.run_id for active in actor.engine.active_runs.all() if active.run_id != run["_id"]]
            is_marked = lease.get("alone") is True or "full" in self._world.harm.counts  # a full document has no room for the mark
            if others or not is_marked:
                raise Violation(f"{who}, a suspect, beside {others or 'nothing, but the lease does not say so'}")
        if run.get("paused") is True:
            number = (run["_id"], run.get("acts"))
            self._entered_under_pause[number] = self._entered_under_pause.get(number, 0) + 1
            if self._entered_under_pause[number] > 1:
                raise Violation(f"{who} although the run is paused, the second handler since then")

    def stopped(self, actor: Actor, entry: Entry) -> None:
        """A handler was cancelled. Raises Violation if its worker holds the run for long enough."""
        faults = self._world.harm.counts
        if not actor.alive or entry.lease_id is None or self._world.is_ending or any(kind in faults for kind in _STOPPING):
            return
        engine = actor.engine
        active_runs = [] if engine is None else [one for one in engine.active_runs.all() if one.lease_id == entry.lease_id]
        active = next((one for one in active_runs if one.run_id == entry.run_id), None)
        if active is None or active.deadline <= self._world.loop.time() + 1.0 or not self.is_awake(actor):
            return
        if (entry.run_id, entry.lease_id) not in self._rules.taken:
            raise Violation(f"{actor.owner} stops the handler of {entry.step_id} of {entry.run_id}, and holds the run")

    def time_passed(self) -> None:
        """The clock was set forward: no worker may go on with a lease that has ended."""
        now = self._world.loop.time()
        for actor in (*self._world.workers, *self._world.clients):
            if actor.engine is not None and actor.engine.suspect is not None:
                self._suspects.setdefault((actor.owner, actor.engine.suspect), now)
            if not actor.alive or not self.is_awake(actor):
                continue
            for active in actor.engine.active_runs.all() if actor.engine is not None else ():
                granted = self._rules.granted.get((active.run_id, active.lease_id))
                if granted is None:
                    continue
                if active.deadline > granted and active.lost is None:
                    raise Violation(
                        f"{actor.owner} counts on its lease of {active.run_id} until {active.deadline:.3f}, granted is {granted:.3f}"
                    )
                attempt = active.attempt
                if attempt is not None and now > granted + FENCE_GRACE_S and not attempt.context.signal.aborted:
                    raise Violation(f"{actor.owner} goes on with the handler of {active.run_id} after its lease has expired")

    def is_awake(self, actor: Actor) -> bool:
        """Whether an actor is not frozen, and has had a moment to notice how late it is."""
        return not self._world.loop.is_frozen(actor.owner) and self._thawed_at.get(actor.owner, -9.0) <= self._world.loop.time() - 2.0

    def entered_at(self, run_id: str, lease_id: str) -> float:
        """When the last handler was entered under this lease."""
        entries = [entry.at for entry in self._world.ledger.entries if (entry.run_id, entry.lease_id) == (run_id, lease_id)]
        return max(entries, default=-1.0)

    def handlers_run(self) -> bool:
        """Whether a worker is in a handler."""
        return any(not entry.left and entry.owner not in self._rules.dead for entry in self._world.ledger.entries)

    def thawed(self, actor: Actor) -> None:
        """A frozen actor goes on: it needs a moment to notice how late it is."""
        self._thawed_at[actor.owner] = self._world.loop.time()
