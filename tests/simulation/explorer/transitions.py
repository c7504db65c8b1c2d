"""The rules that every change of a run obeys, whatever the order of operations was. Checked after each write.

Owns the rules about single changes and about roll-backs. Those about handlers are in entries.py, those about waits in waits.py,
those about the end in judgement.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from streamline_pool.protocol.payloads import external_ids

from .entries import MAX_CRASHES, Entries, driven_run
from .ledger import Violation
from .pairs import is_code, paired
from .server import EPOCH
from .waits import CLOCKS_S, TERMINAL, Run, Waits

if TYPE_CHECKING:
    from .store import Request
    from .world import World

__all__ = ["CLEANED_AFTER_S", "LATER_S", "TERMINAL", "Rules"]

CLEANED_AFTER_S = 1.0  # after their end, by what the workload calls
ENDED = ("done", "skipped", "failed")
LATER_S = 100.0  # after which the workload has some runs started


class Rules:
    """Sees every change of the stored runs."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.entries = Entries(world, self)
        self.waits = Waits(world)
        self.runs: dict[str, dict[str, Any]] = {}
        self.history: list[tuple[int, str, dict[str, Any] | None]] = []  # (number of the change, run id, the run after it)
        self.changes = 0
        # A batch of runs is claimed under one lease id, so it takes both ids to name a lease.
        self.granted: dict[tuple[str, str], float] = {}  # (run id, lease id) -> until when the server has granted it, virtual seconds
        self.taken: dict[tuple[str, str], Run] = {}  # (run id, lease id) that was taken from its holder -> the run immediately before
        self._claimer_of: dict[Any, str] = {}  # lease id -> the actor that claimed
        self._suspect_of: dict[Any, str] = {}  # lease id -> the suspect that was claimed under it
        self.claimed_rev: dict[tuple[str, Any], int] = {}  # (run id, lease id) -> `rev` that the claim has found
        self.dead: set[str] = set()
        self._lag_at = 0
        self._lag_over_at = -1
        self._lag_runs: dict[str, dict[str, Any]] = {}
        self.strayed: set[str] = set()  # runs in which another program has stored a due time
        self.deleted: set[str] = set()
        self.archived: dict[str, Run] = {}  # what the runs were that were moved to the archive

    # --- changes -----------------------------------------------------------------------------------------------------

    def changed(self, request: Request) -> None:
        """A write to the runs was performed: compare them with what they were."""
        after = self._world.server.runs()
        before, self.runs = self.runs, after
        for run_id in {**before, **after}:
            old, new = before.get(run_id), after.get(run_id)
            if old == new:
                continue
            self.changes += 1
            self.history.append((self.changes, run_id, new))
            try:
                self._check(request, run_id, old, new)
            except Violation as violation:
                raise Violation(f"{violation} (by {request.name} of {request.owner}, run {run_id})") from None
            finally:
                self._tell(request, run_id, old, new)

    def _check(self, request: Request, run_id: str, old: Run | None, new: Run | None) -> None:
        if old is None:
            assert new is not None, "a change has two different sides"
            self.waits.run_stored(run_id)
            self._check_start(request, new)
            self._effect(request, "start", run_id, new.get("startId"))
            return
        if new is None:
            self._check_delete(request, old)
            return
        self._check_counters(old, new)
        self._check_lease(request, old, new)
        self._check_states(old, new)
        self._check_pause(request, old, new)
        self._check_release(request, old, new)
        self._check_outputs(old, new)
        if request.name == "commit_runs" and new["status"] == "done" != old["status"]:
            self._world.publications.run_done(new["_id"], request)
        self.waits.check(request, old, new, has_lagged=self._world.server.lags or self._lag_over_at >= 0)
        self._note_effects(request, run_id, old, new)
        self._note_lease(new)

    def _check_start(self, request: Request, new: Run) -> None:
        call = request.call
        if call is None or call.kind != "start later":
            return
        earliest_s = call.began_at + LATER_S - CLOCKS_S
        if new.get("wakeAt") is None or (new["wakeAt"] - EPOCH).total_seconds() < earliest_s:
            raise Violation(f"a run that is to start after {LATER_S:g} s is due at {new.get('wakeAt')}")

    def _check_delete(self, request: Request, old: Run) -> None:
        if old["status"] not in TERMINAL:
            raise Violation(f"a run that is {old['status']} was deleted")
        age_s = (self._world.server.now() - old["endedAt"]).total_seconds()
        if request.call is not None and request.call.kind in ("clean up", "archive") and age_s < CLEANED_AFTER_S:
            raise Violation(f"a run was deleted that had ended {age_s:.3f} s ago")
        self.deleted.add(old["_id"])
        if request.call is not None and request.call.kind == "archive":
            self.archived[old["_id"]] = old

    def _check_counters(self, old: Run, new: Run) -> None:
        for name in ("token", "rev", "acts", "waitGen"):
            if new.get(name, 0) < old.get(name, 0):
                raise Violation(f"{name} went from {old[name]} to {new[name]}")
        if new["rev"] > old["rev"] + 1:
            raise Violation(f"rev went from {old['rev']} to {new['rev']}")
        if not set(old.get("seen") or ()) <= set(new.get("seen") or ()):
            raise Violation("an event id was removed from `seen`")
        seen = list(new.get("seen") or ())
        if len(seen) != len(set(seen)):
            raise Violation(f"an event reached the run twice: seen {seen}")

    def _check_lease(self, request: Request, old: Run, new: Run) -> None:
        held, holds = old.get("lease"), new.get("lease")
        if holds is not None and not {"id", "owner", "expiresAt"} <= set(holds):
            raise Violation(f"a lease without its fields: {holds}")
        held_id, holds_id = (held or {}).get("id"), (holds or {}).get("id")
        is_holder = held is not None and self._claimer_of.get(held_id) == request.owner
        if new["rev"] > old["rev"]:
            if held is None or not is_holder:
                raise Violation(f"a holder's write was accepted, but the lease is {held}")
            if request.leases.get(new["_id"]) != held_id:
                raise Violation("a holder's write was accepted that was sent under another lease")
        if held_id == holds_id:
            if held is not None and holds is not None and holds["expiresAt"] != held["expiresAt"] and not is_holder:
                raise Violation(f"{request.owner} renewed the lease of {held['owner']}")
            if held is not None and holds is not None and holds["expiresAt"] != held["expiresAt"] and new["_id"] not in request.driven:
                raise Violation(f"{request.owner} renewed a lease whose run it did not drive")
            if held is not None and holds is not None and new["rev"] == old["rev"] and self._is_done_by_other(request, old, new):
                raise Violation("a result was stored without `rev`")
            return
        if holds is not None:
            self._check_claim(request, old, new)
            self.waits.claimed(old, new)
            self._claimer_of[holds_id] = request.owner
            self.claimed_rev[(new["_id"], holds_id)] = new["rev"]
            return
        assert held is not None, "one of the two sides has a lease"
        if new["rev"] > old["rev"]:
            return  # released by its holder
        if new["token"] == old["token"]:
            raise Violation("a lease was taken away, and the token is the same")
        self.taken[(new["_id"], str(held_id))] = old
        self._world.promptness.lease_taken(new["_id"], str(held_id))
        if request.call is not None or request.name == "deliver_to_waiters":
            return  # a control operation, an answer or an event
        self._check_recovery(request, old, new)

    def _is_done_by_other(self, request: Request, old: Run, new: Run) -> bool:
        return request.name == "commit_runs" and old["steps"] != new["steps"]

    def _check_claim(self, request: Request, old: Run, new: Run) -> None:
        if old.get("lease") is not None:
            raise Violation(f"claimed while {old['lease']['owner']} holds the lease {old['lease']}")
        if old.get("paused") is True:
            raise Violation("claimed while paused")
        if old["status"] in TERMINAL:
            raise Violation(f"claimed although it is {old['status']}")
        wake_at = old.get("wakeAt")
        if wake_at is None or wake_at > self._world.server.now():
            raise Violation(f"claimed before it was due: {wake_at}")
        if new["token"] != old["token"] + 1:
            raise Violation("claimed without a new token")
        if old["crashes"] >= MAX_CRASHES - 1:
            kept = None if request.actor.engine is None else request.actor.engine.suspect
            first = self._suspect_of.setdefault(new["lease"]["id"], old["_id"])
            if first != old["_id"] or (kept not in (None, old["_id"]) and request.owner == request.actor.owner):
                raise Violation(f"a second suspect was claimed by {request.owner}, beside {kept or first}")
        if new["workflowId"] not in request.actor.app.workflows:
            raise Violation(f"claimed by {request.owner}, which has no workflow {new['workflowId']}")
        for earlier, later in paired(old, new):
            is_entered = earlier["stepId"] == old["currentStepId"] and earlier["status"] in ("pending", "running")
            if is_entered and (later["attempts"], later["status"]) != (earlier["attempts"] + 1, "running"):
                raise Violation(f"the claim has not counted the attempt: {later}")

    def _check_recovery(self, request: Request, old: Run, new: Run) -> None:
        lease = old["lease"]
        if lease["expiresAt"] > self._world.server.now() and self._claimer_of.get(lease["id"]) not in self.dead:
            raise Violation(f"the lease of {lease['owner']}, which lives, was taken away before it expired")
        due = new.get("wakeAt") or new.get("pausedWakeAt")
        if due is not None and due > new["createdAt"]:
            raise Violation("a recovered run has lost its place in the queue")
        if old["crashes"] + 1 >= MAX_CRASHES and lease.get("alone") is True and new["status"] != "failed":
            raise Violation(f"not convicted after {old['crashes'] + 1} lost workers, the last of them alone")
        if new["status"] == "failed" and old["status"] != "failed":
            if lease.get("alone") is not True:
                raise Violation("convicted, although it did not run alone")
            if old["crashes"] + 1 < MAX_CRASHES:
                raise Violation(f"convicted after {old['crashes'] + 1} lost workers")
        elif new["crashes"] != old["crashes"] + 1:
            raise Violation(f"recovered, and the count of lost workers went from {old['crashes']} to {new['crashes']}")

    def _check_schedule(self, new: Run) -> None:
        """Exactly one field says when the run goes on."""
        paused = new.get("paused") is True
        if "wakeAt" in new and (paused or "lease" in new) and new["_id"] not in self.strayed:
            raise Violation("the run is due, although it is paused or leased")
        if "pausedWakeAt" in new and (not paused or "lease" in new):
            raise Violation("the run has pausedWakeAt, although it is not paused, or is leased")

    def _check_calls(self, old: Run, new: Run) -> None:
        """What a durable function has called stays as it was, and its results are dropped by a rewind or by a new generation only."""
        if new.get("generation", 0) > old.get("generation", 0):
            if len(new["steps"]) > 1 or new.get("rewinds", 0) != old.get("rewinds", 0) + 1:
                raise Violation(f"continued as new, and has {new['steps']}, rewinds {new.get('rewinds')}")
            return
        names = [step["stepId"] for step in new["steps"]]
        if len(names) != len(set(names)) or None in new["steps"]:
            raise Violation(f"a call has no name of its own: {names}")
        waits = [step["stepId"] for step in new["steps"] if step["status"] == "waiting"]
        if waits and waits != [new["currentStepId"]] and new["status"] not in TERMINAL:
            raise Violation(f"{waits} wait, and the run is at {new['currentStepId']}")
        if new.get("rewinds", 0) == old.get("rewinds", 0):
            if names[: len(old["steps"])] != [step["stepId"] for step in old["steps"]]:
                raise Violation(f"calls were {[step['stepId'] for step in old['steps']]}, and are {names}")
            return
        kept = [step for step in old["steps"][1:] if step["status"] != "waiting"][: len(names) - 1]
        if new["steps"][1:] != kept or new["steps"][0]["status"] != "pending":
            raise Violation("a rewind has changed a call before its own, or has left the function as it was")

    def _check_states(self, old: Run, new: Run) -> None:
        self._check_schedule(new)
        kept = [(item["stepId"], item.get("gen")) for item in new.get("inbox") or () if "stepId" in item]
        if len(kept) != len(set(kept)):
            raise Violation("two answers are kept for one hook")
        left = {item.get("id") for item in new.get("inbox") or ()} | {step.get("answer") for step in new["steps"]}
        gone = [item["id"] for item in old.get("inbox") or () if "name" in item and item["id"] not in left]
        if gone:
            raise Violation(f"events {gone} have left the inbox, and no step has taken them")
        if is_code(new):
            self._check_calls(old, new)
        if new.get("rewinds", 0) > old.get("rewinds", 0) and is_code(new):
            return
        if new.get("rewinds", 0) > old.get("rewinds", 0):
            place = next(place for place, step in enumerate(new["steps"]) if step["stepId"] == new["currentStepId"])
            if new["steps"][:place] != old["steps"][:place] or any(step["status"] != "pending" for step in new["steps"][place:]):
                raise Violation("a rewind has changed a step before its own, or has left one behind it as it was")
            if old["status"] == "cancelled":
                raise Violation("a cancelled run was rewound")
            pending = {step["stepId"] for step in new["steps"] if step["status"] == "pending"}
            if any(item.get("stepId") in pending for item in new.get("inbox") or ()):
                raise Violation("answers to hooks of rewound steps are still in the inbox")
            if new["crashes"] or new["failures"]:
                raise Violation(f"rewound, and the counts are {new['crashes']} lost workers, {new['failures']} failed attempts")
            return
        if _done_now(old, new) and (new["crashes"] or (new["failures"] and not is_code(new))):
            raise Violation(f"a result was stored, and the counts are {new['crashes']} lost workers, {new['failures']} failed attempts")
        if old["status"] in TERMINAL and new["status"] != old["status"]:
            raise Violation(f"went from {old['status']} to {new['status']}")
        for earlier, later in paired(old, new):
            if later["status"] in ("running", "waiting") and any(hook not in later.get("hooks", ()) for hook in earlier.get("hooks", ())):
                raise Violation(f"step {later['stepId']} has lost a hook, whose token may be in use")
            if any(bytes(hook["hash"]) == token.encode() for hook in later.get("hooks", ()) for _, token in self._world.workload.tokens):
                raise Violation("a token is stored as it is")
            if earlier["status"] in ENDED and later != earlier and old["status"] not in TERMINAL:
                raise Violation(f"step {earlier['stepId']} had ended as {earlier['status']}, and was changed")
        places = [place for place, step in enumerate(new["steps"]) if step["status"] != "pending"]
        if is_code(new):
            return
        if places != list(range(len(places))):
            raise Violation(f"a step was reached before the one in front of it: {[step['status'] for step in new['steps']]}")

    def _check_outputs(self, old: Run, new: Run) -> None:
        """What a run begins to refer to is there."""
        added = set(external_ids(new)) - set(external_ids(old))
        missing = added - {output["_id"] for output in self._world.server.all_of("outputs")} if added else None
        if missing:
            raise Violation(f"the run refers to outputs that are not there: {sorted(missing)}")

    def _check_release(self, request: Request, old: Run, new: Run) -> None:
        """A holder that is not asked to stop goes on with the step after the one whose result it stores."""
        self._check_count(request, old, new)
        is_released = "lease" in old and "lease" not in new and new["status"] == "running" and new.get("paused") is not True
        if request.name != "commit_runs" or not is_released or request.owner != request.actor.owner:
            return
        ended = _done_now(old, new)
        engine, active = request.actor.engine, driven_run(request.actor, new["_id"])
        if not ended or engine is None or active is None or active.lease_id != old["lease"]["id"]:
            return
        if not active.release_requested and not engine._state.draining:
            raise Violation("a run that is not paused was released after a step, by a holder that was not asked to stop")

    def _check_count(self, request: Request, old: Run, new: Run) -> None:
        """A step that its holder gives back has counted the entry, unless there was none. A condition that fails counts as an attempt."""
        if request.name != "commit_runs" or "lease" in new or "lease" not in old or new.get("rewinds") != old.get("rewinds"):
            return
        for earlier, later in paired(old, new):
            if (earlier["status"], later["status"]) != ("running", "pending") or new["failures"] != old["failures"] or is_code(new):
                continue
            entry = (old["_id"], old["lease"]["id"], earlier["stepId"], earlier["attempts"])
            is_entered = any((e.run_id, e.lease_id, e.step_id, e.attempt) == entry for e in self._world.ledger.entries)
            if later["attempts"] != earlier["attempts"] - (not is_entered):
                raise Violation(
                    f"step {later['stepId']} counts {later['attempts']} entries, of {entry} {'that' if is_entered else 'no'} one was"
                )

    def _check_pause(self, request: Request, old: Run, new: Run) -> None:
        if not (old.get("paused") is True and new.get("paused") is True) or new.get("rewinds") != old.get("rewinds"):
            return
        if request.call is not None:
            return
        for earlier, later in paired(old, new) if not is_code(new) else ():
            if earlier["status"] == "pending" and later["status"] == "running":
                raise Violation(f"step {later['stepId']} was started while the run was paused")
            if earlier["status"] == "waiting" and later["status"] != "waiting" and request.name == "commit_runs":
                raise Violation(f"the wait of step {later['stepId']} was ended while the run was paused")
            if later["attempts"] > earlier["attempts"]:
                raise Violation(f"an entry of step {later['stepId']} was counted while the run was paused")
        if new["status"] == "done" and old["status"] != "done":
            raise Violation("the run was finished while it was paused")

    def _note_effects(self, request: Request, run_id: str, old: Run, new: Run) -> None:
        if new.get("acts", 0) > old.get("acts", 0):
            if new.get("acts", 0) != old.get("acts", 0) + 1:
                raise Violation("one write counted as several control operations")
            self._effect(request, "act", run_id, new.get("lastAct"))
        for event_id in set(new.get("seen") or ()) - set(old.get("seen") or ()):
            self._effect(request, "event", run_id, event_id)
            in_inbox = any(item.get("id") == event_id for item in new.get("inbox") or ())
            if not in_inbox and not any(step.get("answer") == event_id for step in new["steps"]):
                raise Violation(f"event {event_id} was noted as seen, and is neither in the inbox nor a step's answer")
        known = _answer_ids(old)
        for answer_id in _answer_ids(new) - known:
            if answer_id not in (new.get("seen") or ()):
                self._effect(request, "answer", run_id, answer_id)

    def _effect(self, request: Request, kind: str, run_id: str, effect_id: Any) -> None:
        call = request.call
        if call is None:
            return
        if kind == "act" and call.outcome == "ok" and not call.effects:
            raise Violation(f"{call} had ended without an effect, and took effect afterwards")
        call.effects.append((self.changes, kind, run_id, effect_id))
        mine = [effect for effect in call.effects if effect[1] == kind and effect[2] == run_id]
        if len(mine) > 1 and run_id not in self.deleted:  # a run that was cleaned up in between is started again
            raise Violation(f"{call} took effect twice")
        # A late copy of a start whose id was taken starts the run once that id is free again.
        if call.outcome == "refused" and not (kind == "start" and run_id in self.deleted):
            raise Violation(f"{call} was refused, and took effect afterwards")

    def _note_lease(self, new: Run) -> None:
        lease = new.get("lease")
        if lease is not None:
            until = (lease["expiresAt"] - EPOCH).total_seconds() + self._world.server.behind_s
            granted = (new["_id"], lease["id"])
            self.granted[granted] = max(self.granted.get(granted, 0.0), until)

    def _tell(self, request: Request, run_id: str, old: Run | None, new: Run | None) -> None:
        self._world.ledger.tell(self._world.loop.time(), f"{request.owner}: {request.name}: {run_id}: {_difference(old, new)}")

    # --- fail-over ---------------------------------------------------------------------------------------------------

    def durable(self) -> Mapping[str, dict[str, Any]]:
        """The runs as a majority has them."""
        return self._lag_runs if self._world.server.lags else self.runs

    def lag_ended(self) -> None:
        """A majority has what the primary has."""
        self._lag_over_at = self.changes

    def durable_since(self, began: int, run_id: str | None) -> list[Run]:
        """The run as a majority had it while replication lagged, if that was after this change: readers saw it so."""
        lagged = self._world.server.lags or self._lag_over_at >= began
        run = self._lag_runs.get(run_id or "") if lagged else None
        return [] if run is None else [run]

    def lagging(self, began: int, run_id: str | None) -> list[Run]:
        """The run as a majority has it, if replication has lagged all the time since this change: readers can have seen no other."""
        run = self._lag_runs.get(run_id or "") if self._world.server.lags and began >= self._lag_at else None
        return [] if run is None else [run]

    def lag_began(self) -> None:
        """From here on changes may be rolled back."""
        self._lag_at = self.changes
        self._lag_runs = dict(self.runs)
        self.waits.lag_began()
        self._lag_taken = dict(self.taken)
        self._lag_granted = dict(self.granted)
        self._lag_deleted = set(self.deleted)
        self._lag_archived = dict(self.archived)

    def rolled_back(self) -> None:
        """A fail-over: the changes since `lag_began` have not happened. None of them may have been acknowledged."""
        self.runs = self._world.server.runs()
        self.waits.rolled_back()
        self.deleted, self.archived = self._lag_deleted, self._lag_archived
        self.changes += 1
        self.history += [(self.changes, run_id, run) for run_id, run in self.runs.items()]  # what was rolled back is no state of theirs
        self.taken = self._lag_taken
        self._world.promptness.rolled_back(self.taken)
        self.granted = self._lag_granted
        for call in self._world.ledger.calls:
            lost = [effect for effect in call.effects if effect[0] > self._lag_at]
            if lost and call.outcome == "ok":
                raise Violation(f"{call} was acknowledged, and its effect was rolled back: {lost}")
            call.effects = [effect for effect in call.effects if effect[0] <= self._lag_at]

    def died(self, owner: str) -> None:
        """An actor was killed."""
        self.dead.add(owner)

    def describe_unrest(self) -> str:
        """What the runs that are not at rest look like."""
        return "; ".join(f"{run_id}: {_difference(None, run)}" for run_id, run in self.runs.items() if run["status"] not in TERMINAL)


def _done_now(old: Run, new: Run) -> list[Any]:
    """The steps that this change has ended with a result."""
    return [later for earlier, later in paired(old, new) if earlier["status"] != later["status"] == "done"]


def _answer_ids(run: Run) -> set[Any]:
    return {step["answer"] for step in run["steps"] if "answer" in step} | {item.get("id") for item in run.get("inbox") or ()}


def _difference(old: Run | None, new: Run | None) -> str:
    if new is None:
        return "deleted"
    steps = " ".join(f"{step['stepId']}:{step['status']}" for step in new["steps"])
    lease = new.get("lease")
    facts = [
        f"{new['status']}{' PAUSED' if new.get('paused') else ''}",
        steps,
        f"rev {new['rev']} token {new['token']} acts {new.get('acts')}",
    ]
    facts.append(f"lease {lease.get('id')}" if lease else "no lease")
    if new.get("wakeAt"):
        facts.append(f"due {(new['wakeAt'] - EPOCH).total_seconds():.3f}")
    if new.get("awaits"):
        facts.append(f"awaits {new['awaits']}")
    if old is not None and old.get("inbox") != new.get("inbox"):
        facts.append(f"inbox {[item.get('id') for item in new.get('inbox') or ()]}")
    return ", ".join(facts)
