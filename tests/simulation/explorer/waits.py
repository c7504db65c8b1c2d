"""The rules about waits: how they end, by which answer or event, and when. Checked after each write of a run.

Owns what is known of events to all: which were stored, and which of them a claim could have found.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from streamline_pool.engine.hooks import hash_token

from .ledger import Violation
from .pairs import paired
from .server import EPOCH

if TYPE_CHECKING:
    from .store import Request
    from .world import World

__all__ = ["CLOCKS_S", "TERMINAL", "Run", "Waits"]

TERMINAL = ("done", "failed", "cancelled")
CLOCKS_S = 30.0  # more than what a worker's reading of the server's clock is wrong by, and than that clock is set back

Run = Mapping[str, Any]


class Waits:
    """Sees every change of a stored run, and every event to all."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.events: dict[str, dict[str, Any]] = {}  # every event to all that was stored, also those that a clean-up has removed
        self._stored_at: dict[str, int] = {}  # id of a run or event -> by which operation it was stored; `bornAt` should tell the same
        self._arrived_before: dict[tuple[str, str], set[str]] = {}  # (run id, lease id) -> events that its claim could have found
        # (run id, lease id, `waitGen` and `acts` then) -> the server's time of the claim
        self._claimed: dict[tuple[str, Any, Any, Any], datetime] = {}
        self._answered: set[tuple[str, str]] = set()  # (run id, id of an answer or event) that has ended a step's wait

    def run_stored(self, run_id: str) -> None:
        """A run was started."""
        self._stored_at[run_id] = self._world.operations

    def claimed(self, old: Run, new: Run) -> None:
        """A run was claimed."""
        run_id, lease_id = new["_id"], new["lease"]["id"]
        if old.get("awaits") is not None:
            self._arrived_before[(run_id, str(lease_id))] = self._events_for(old)
        self._claimed[(run_id, lease_id, new.get("waitGen"), new.get("acts"))] = self._world.server.now()

    def check(self, request: Request, old: Run, new: Run, *, has_lagged: bool) -> None:
        """`has_lagged`: what a claim has read may be older than what was stored."""
        self._check_park(request, old, new)
        if new.get("rewinds") == old.get("rewinds"):
            self._check_ends(request, old, new, has_lagged=has_lagged)
        if request.name == "answer_hook" and old != new:
            self._check_expiry(old)
            self._check_token(request, old)

    def _check_ends(self, request: Request, old: Run, new: Run, *, has_lagged: bool) -> None:
        """A wait ends by an answer, or when its time has come by the server's clock."""
        now = self._world.server.now()
        for earlier, later in paired(old, new):
            if earlier["status"] != later["status"] == "waiting":
                self._check_instant(new["_id"], later)
            if earlier["status"] not in ("running", "waiting") or later["status"] == "waiting":
                continue
            waiting_for = earlier.get("waitingFor", {})
            if "answer" in later:
                if waiting_for.get("type") == "timer":
                    raise Violation(f"an answer has ended the sleep of step {later['stepId']}")
                if (new["_id"], str(later["answer"])) in self._answered:
                    raise Violation(f"the answer or event {later['answer']} was taken twice")
                self._answered.add((new["_id"], str(later["answer"])))
                self._check_event(request, old, str(later["answer"]))
                if later.get("output") not in (None, *self._world.workload.sent):  # None: a resume without data
                    raise Violation(f"the answer was stored as something that no client has sent: {later.get('output')}")
                continue
            if earlier["status"] == "running":
                continue
            missed = self._arrived_before.get((new["_id"], str((old.get("lease") or {}).get("id"))), set()) - set(old.get("seen") or ())
            if missed and later["status"] == "done" and not has_lagged:
                raise Violation(f"step {later['stepId']} timed out, and before that there was event {min(missed)}")
            due = waiting_for.get("resumeAt") or waiting_for.get("expiresAt")
            if later["status"] == "done" and (due is None or due > now):
                raise Violation(f"the wait of step {later['stepId']} ended before its time: {waiting_for}")

    def _check_instant(self, run_id: str, step: Mapping[str, Any]) -> None:
        """A sleep or a deadline is as long as its handler has asked for, counted from some instant between its entry and now."""
        waiting_for = step["waitingFor"]
        asked_s = self._world.workload.asked_s(waiting_for["type"], self._world.rules.runs[run_id]["workflowId"])
        until = waiting_for.get("resumeAt") or waiting_for.get("expiresAt")
        if (asked_s is None) != (until is None):
            raise Violation(f"step {step['stepId']} has asked for {asked_s} s, and waits until {until}")
        entered = [entry.at for entry in self._world.ledger.entries if (entry.run_id, entry.step_id) == (run_id, step["stepId"])]
        if until is None or asked_s is None or not entered:
            return
        at = (until - EPOCH).total_seconds() - asked_s
        if not entered[-1] - CLOCKS_S <= at <= self._world.loop.time() + CLOCKS_S:
            raise Violation(f"step {step['stepId']} waits until {until}, which is not {asked_s} s after it was entered")

    def _check_park(self, request: Request, old: Run, new: Run) -> None:
        """A holder ends a wait whose deadline was over when it claimed the run, by the clock that decides: another claim would follow.

        Not if there was a control operation since: a holder that reads the run as paused releases it, and may do so after the resume.
        """
        is_released = "lease" in old and "lease" not in new and new.get("paused") is not True and new["status"] not in TERMINAL
        if request.name != "commit_runs" or not is_released or "server clock" in self._world.harm.counts:
            return
        for earlier, later in paired(old, new):
            ends_at = later.get("waitingFor", {}).get("expiresAt")
            is_same = earlier["status"] == later["status"] == "waiting" and earlier == later
            claimed_at = self._claimed.get((old["_id"], old["lease"]["id"], new.get("waitGen"), new.get("acts")))
            if is_same and None not in (ends_at, claimed_at) and ends_at <= claimed_at:
                raise Violation(f"step {later['stepId']} waits on, and its deadline {ends_at} was over at the claim, {claimed_at}")

    def _check_event(self, request: Request, old: Run, answer_id: str) -> None:
        events = {event["_id"]: event for event in self._world.server.all_of("events")}
        event = events.get(answer_id)
        if event is None:
            return
        if not self.is_older(old, event):
            raise Violation("the run was given an event that is older than itself")
        if request.name != "commit_runs" or any(item.get("id") == answer_id for item in old.get("inbox") or ()):
            return
        seen = old.get("seen") or ()
        before = [
            other for other in events.values() if self.is_older(old, other) and self._stored_at[other["_id"]] < self._stored_at[answer_id]
        ]
        earlier = [other for other in before if other["_id"] not in seen]
        if earlier:
            raise Violation(f"the search has found event {answer_id} before {earlier[0]['_id']}, which is older")

    def _check_expiry(self, old: Run) -> None:
        step = next(step for step in old["steps"] if step["stepId"] == old["currentStepId"])
        ends = [hook.get("expiresAt") for hook in step.get("hooks", ())]
        if ends and all(end is not None and end <= self._world.server.now() for end in ends):
            raise Violation("an answer by a token was accepted after its time")

    @staticmethod
    def _check_token(request: Request, old: Run) -> None:
        if request.call is None or request.call.kind != "hook":
            return
        step = next(step for step in old["steps"] if step["stepId"] == old["currentStepId"])
        if all(bytes(hook["hash"]) != hash_token(request.call.argument) for hook in step.get("hooks", ())):
            raise Violation("a token was accepted whose hook the step has not")

    def _events_for(self, run: Run) -> set[str]:
        """The events to all that the run waits for, and that are stored."""
        events = self._world.server.all_of("events")
        return {event["_id"] for event in events if event["name"] == run["awaits"] and self.is_older(run, event)}

    def is_older(self, run: Run, event: Mapping[str, Any]) -> bool:
        """Whether the run was stored before this event to all, so that it gets the event."""
        return self._stored_at[run["_id"]] < self._stored_at[event["_id"]]

    def event_recorded(self) -> None:
        """An event to all was stored."""
        for event in self._world.server.all_of("events"):
            if event["_id"] not in self.events:
                self._stored_at[event["_id"]] = self._world.operations
            self.events[event["_id"]] = event

    # --- fail-over ---------------------------------------------------------------------------------------------------

    def lag_began(self) -> None:
        """From here on changes may be rolled back."""
        self._lag_answered = set(self._answered)
        self._lag_events = dict(self.events)

    def rolled_back(self) -> None:
        """The changes since `lag_began` have not happened."""
        self._answered, self.events = self._lag_answered, self._lag_events
