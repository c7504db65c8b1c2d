"""The clients: threads that start runs, answer, send events, control runs and clean up, and note every call.

Owns what is called when; acts.py keeps the calls. Most calls come at a random moment of a run's life. Some are aimed at the instant
at which a step is completed: the ledger shows the entry of its handler, and the input says how long that takes.
"""

from __future__ import annotations

import heapq
import itertools
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from streamline_pool import DataCorruptionError, HookTokenError, InvalidStateError, StoreUnavailableError, Streamline, WorkflowNotFoundError
from streamline_pool.protocol.operations import Find

from .acts import Acts
from .audit import ENDED, Audit, kind_of
from .ledger import Ledger, LedgerTail, Note, real_monotonic
from .workload import NEVER

__all__ = ["Load"]

_REFUSALS = (InvalidStateError, WorkflowNotFoundError, HookTokenError)
_KEYS = 20  # idempotency keys in use at a time; each is used for a second
_PATIENCE_S = 1.0  # how long a run waits or is paused before a client acts on it
_CLEAN_S = (0.1, 1.5)  # between two clean-ups, at random
_AIMED = 0.03  # the share of handlers at whose end a control operation is aimed
_AGE_S = (0.5, 6.0)  # of the ended runs that they take, at random; the TTL takes what they leave


class Load:
    """The clients. `start_runs` ends with `stop_starting`, the other loops with `stop`."""

    def __init__(self, app: Streamline, audit: Audit, tail: LedgerTail, ledger: Ledger, *, rate: float, live_max: int, seed: int) -> None:
        self.app, self.audit, self.acts = app, audit, Acts(ledger=ledger)
        self.streamed: Counter[str] = Counter()
        self.cleaned: Counter[str] = Counter()
        self.aimed: Counter[str] = Counter()  # calls at the instant of a completion
        self.last_streamed_at = 0.0
        self._tail, self._rate, self._live_max = tail, rate, live_max
        self._chance = random.Random(seed)
        self._numbers = itertools.count()
        self._starting, self._running = threading.Event(), threading.Event()
        self._starting.set()
        self._running.set()
        self._agenda: list[tuple[float, int, Callable[[], Any]]] = []
        self._agenda_changed = threading.Condition()
        self._hooks: deque[Note] = deque()  # tokens that were not answered yet

    def stop_starting(self) -> None:
        """Start, pause, cancel and rewind nothing more. Answers, events, resumes and clean-ups go on."""
        self._starting.clear()

    def stop(self) -> None:
        """End every loop."""
        self._starting.clear()
        self._running.clear()

    def act(self, kind: str, run_id: str, call: Callable[[], Any], payload: str | None = None) -> Any:
        """Make the call and note it. Returns its result, or None if there is none."""
        act = self.acts.begin(kind, run_id, payload)
        try:
            result = call()
        except StoreUnavailableError:
            self.acts.end(act, "unknown")
            return None
        except _REFUSALS:
            self.acts.end(act, "refused")
            return None
        except DataCorruptionError as exc:  # judged later: it is right only if the run is still stored
            act.status = str(exc)
            self.acts.end(act, "corrupted")
            return None
        run = getattr(result, "run", result)
        if hasattr(run, "to_dict"):
            act.status, act.paused, act.generation = str(run.status), run.paused, run.to_dict().get("rewinds", 0)
        self.acts.end(act, "ok")
        return result

    # --- starting --------------------------------------------------------------------------------------------------

    def start_runs(self) -> None:
        """Start runs of random kinds at the rate, and do later to some what their plans say. Several threads do this."""
        ways = (
            [self._start_one] * 12
            + [self._start_many]
            + [self._start_with_a_key] * 3
            + [self._start_five_for_one_event]
            + [self._rewind_an_ended]
        )
        next_at = time.monotonic()
        while self._starting.is_set():
            if time.monotonic() < next_at or self.audit.live_count() > self._live_max:
                time.sleep(0.02)
                continue
            next_at = max(next_at + self._chance.expovariate(self._rate), time.monotonic() - 1.0)
            self._chance.choice(ways)()

    # --- acting later ----------------------------------------------------------------------------------------------

    def _later(self, delay_s: float, call: Callable[[], Any]) -> None:
        with self._agenda_changed:
            heapq.heappush(self._agenda, (time.monotonic() + delay_s, next(self._numbers), call))
            self._agenda_changed.notify()

    def act_when_due(self) -> None:
        """Make the calls that were put off, each at its time. Several threads do this, because a call may take long."""
        while self._running.is_set():
            with self._agenda_changed:
                wait_s = self._agenda[0][0] - time.monotonic() if self._agenda else 0.2
                if wait_s > 0 or not self._agenda:
                    self._agenda_changed.wait(min(wait_s, 0.2))
                    continue
                call = heapq.heappop(self._agenda)[2]
            call()

    def read_ledger(self) -> None:
        """Collect hook tokens, and aim control operations at the end of handlers whose length is known."""
        while self._running.is_set():
            for note in self._tail.read():
                if note["kind"] == "hook":
                    self._hooks.append(note)
                elif note["kind"] == "entry" and self._starting.is_set() and self._chance.random() < _AIMED:
                    self._aim(note)
            time.sleep(0.02)

    def _aim(self, note: Note) -> None:
        """Cancel, pause or rewind the run about when this handler returns and its result is committed."""
        story, length_s = self.audit.stories.get(note["run"]), note.get("length_s", 0.0)
        if story is None or story.workflow_id not in self.app.workflows:
            return
        workflow, run_id = self.app.workflows[story.workflow_id], note["run"]
        control = self._chance.choice(("cancel", "pause", "rewind"))
        calls: dict[str, Callable[[], Any]] = {
            "cancel": lambda: self.act("cancel", run_id, lambda: workflow.cancel(run_id, reason="chaos")),
            "pause": lambda: self.act("pause", run_id, lambda: workflow.pause(run_id, reason="chaos")),
            "rewind": lambda: self._rewind(workflow, run_id),
        }
        self.aimed[control] += 1
        self._later(note["at"] + length_s + self._chance.uniform(-0.004, 0.008) - real_monotonic(), calls[control])

    # --- starting, continued ---------------------------------------------------------------------------------------

    def _pick(self) -> Any:
        return self._chance.choice(list(self.app.workflows.values()))

    def _input(self, **more: Any) -> dict[str, Any]:
        return {"n": next(self._numbers), "seconds": self._chance.uniform(0.4, 2.5), "event": "chaos-one", **more}

    def _start_one(self) -> None:
        workflow = self._pick()
        run_id = f"chaos-{next(self._numbers)}"
        options: dict[str, Any] = {"priority": self._chance.choice((0, 0, 0, 5, -5))}
        given = self._input()
        if self._chance.random() < 0.1:
            options["start_at"] = self._chance.uniform(0.3, 3.0)
            given["not_before"] = real_monotonic() + options["start_at"]
        if self._chance.random() < 0.1:
            options["queue"] = self._chance.choice(("default", "second"))
        if self.act("start", run_id, lambda: workflow.start(given, run_id=run_id, tags=["chaos"], **options)) is None:
            return
        if kind_of(workflow.id) in ("event-one", "event-all"):  # before it waits, or while it does
            self._later(self._chance.uniform(0.0, 1.5), lambda: self._send(run_id, "chaos-one"))
        self._plan(workflow, run_id)

    def _plan(self, workflow: Any, run_id: str) -> None:
        """One in four runs is paused, cancelled or rewound at a random moment of its life."""
        control = self._chance.choice(("pause", "cancel", "rewind", "rewind", *[""] * 12))
        delay_s = self._chance.uniform(0.0, 3.0)
        if control == "pause":
            self._later(delay_s, lambda: self.act("pause", run_id, lambda: workflow.pause(run_id, reason="chaos")))
        elif control == "cancel":
            self._later(delay_s, lambda: self.act("cancel", run_id, lambda: workflow.cancel(run_id, reason="chaos")))
        elif control == "rewind":
            self._later(delay_s, lambda: self._rewind(workflow, run_id))

    def _rewind(self, workflow: Any, run_id: str) -> None:
        step_id = self._chance.choice(workflow.steps)
        self.act("rewind", run_id, lambda: workflow.rewind_to(run_id, step_id))

    def _start_many(self) -> None:
        workflow = self._pick()
        inputs = [self._input() for _ in range(self._chance.randint(2, 8))]
        try:
            runs = workflow.start_many(inputs)
        except StoreUnavailableError:
            self.acts.counts["start unknown"] += len(inputs)
            return
        for run in runs:
            self.acts.end(self.acts.begin("start", run.id), "ok")
            self._plan(workflow, run.id)

    def _start_with_a_key(self) -> None:
        """Clients that start with the same key at about the same time must get the same run, as long as it is stored."""
        number = int(time.monotonic()) * _KEYS + self._chance.randrange(_KEYS)
        workflow = list(self.app.workflows.values())[number % len(self.app.workflows)]
        for _ in range(self._chance.randint(1, 3)):
            try:
                run = workflow.start(self._input(), idempotency_key=f"chaos-{number}")
            except (StoreUnavailableError, DataCorruptionError) as exc:  # the latter as in `act`, of a run that has ended
                self.acts.counts[f"start {type(exc).__name__}"] += 1
                continue
            self.acts.end(self.acts.begin("start", run.id), "ok")

    def _start_five_for_one_event(self) -> None:
        """Five runs, and one event to all: each must get it, whether it waits already or will."""
        workflow, name = self.app.workflows["event-all_0"], f"chaos-all-{next(self._numbers)}"
        run_ids = [f"chaos-{next(self._numbers)}" for _ in range(5)]
        for run_id in run_ids:
            self.act("start", run_id, lambda run_id=run_id: workflow.start(self._input(event=name), run_id=run_id))  # type: ignore[misc]
        self._later(self._chance.uniform(0.0, 1.5), lambda: self._send_to_all(name, run_ids))

    def _send_to_all(self, name: str, run_ids: list[str]) -> None:
        """One call that is an act on each of the runs. On one whose start was not acknowledged, its outcome stays unknown.

        Such a run may be stored before the event, and gets it; or after it, and does not.
        """
        payload = f"event-{next(self._numbers)}"
        acts = [(self.acts.begin("event", run_id, payload), self.acts.has_started(run_id)) for run_id in run_ids]
        try:
            self.app.send_event(name, {"act": payload})
            outcome = "ok"
        except StoreUnavailableError:
            outcome = "unknown"
        for act, started in acts:
            self.acts.end(act, outcome if started else "unknown")

    def _send(self, run_id: str, name: str) -> None:
        payload = f"event-{next(self._numbers)}"
        self.act("event", run_id, lambda: self.app.send_event(name, {"act": payload}, run_id=run_id), payload)

    def _rewind_an_ended(self) -> None:
        run_id = self._chance.choice(list(self.audit.recent) or [""])
        story = self.audit.stories.get(run_id)
        if story is not None and story.deleted is None:
            self._rewind(self.app.workflows[story.workflow_id], run_id)

    # --- answering -------------------------------------------------------------------------------------------------

    def look_after_runs(self) -> None:
        """Answer waits, give an event to runs that wait for one and were sent none, and resume paused runs."""
        while self._running.is_set():
            try:
                self._answer_people()
                self._answer_hooks()
                self._send_missing_events()
                self._resume_paused()
            except StoreUnavailableError:
                pass  # a failover: the next turn reads again
            time.sleep(0.3)

    def _find(self, filter: dict[str, Any]) -> list[dict[str, Any]]:
        """Runs that nothing has changed for a while. StoreUnavailableError without an answer."""
        store = self.app.store()
        quiet = {"updatedAt": {"$lt": store.now() - timedelta(seconds=_PATIENCE_S)}}
        shown = {"workflowId": 1, "currentStepId": 1, "steps.stepId": 1, "steps.waitingFor": 1}
        find = Find(name="find_quiet", collection="runs", filter={**filter, **quiet}, projection=shown, limit=100)
        return list(store.run(find))

    def _answer_people(self) -> None:
        for run in self._find({"status": "waiting", "paused": {"$ne": True}, "steps.waitingFor.type": "human"}):
            payload = f"answer-{next(self._numbers)}"
            resume = self.app.workflows[run["workflowId"]].resume
            self.act("answer", run["_id"], lambda: resume(run["_id"], {"act": payload}), payload)  # noqa: B023

    def _answer_hooks(self) -> None:
        """Answer each token once; those of the kind `hook-late` after some seconds, when the run waits."""
        for _ in range(len(self._hooks)):
            hook = self._hooks.popleft()
            story = self.audit.stories.get(hook["run"])
            if story is None or (story.kind == "hook-late" and self._chance.random() < 0.8):
                self._hooks.append(hook)
                continue
            payload = f"hook-{next(self._numbers)}"
            self.act("answer", hook["run"], lambda: self.app.resume_hook(hook["token"], {"act": payload}), payload)  # noqa: B023
            if self.acts.by_run[hook["run"]][-1].outcome == "unknown":
                self._hooks.append(hook)

    def _send_missing_events(self) -> None:
        """Never to a run whose event was acknowledged: if such a run waits for ever, its event was lost, and the judge must see it."""
        for run in self._find({"status": "waiting", "steps.waitingFor.type": "event"}):
            waiting = next((step["waitingFor"] for step in run["steps"] if step["stepId"] == run["currentStepId"]), None) or {}
            name = waiting.get("eventName")
            if name and name != NEVER and not self.acts.has_event(run["_id"]):
                self._send(run["_id"], name)

    def _resume_paused(self) -> None:
        for run in self._find({"paused": True, "status": {"$nin": list(ENDED)}}):
            resume = self.app.workflows[run["workflowId"]].resume
            self.act("resume", run["_id"], lambda: resume(run["_id"]))  # noqa: B023

    # --- cleaning and following ------------------------------------------------------------------------------------

    def clean_up(self) -> None:
        """Archive and delete ended runs all the time. The TTL index of the database does it beside this."""
        clean_ups: dict[str, Callable[[], int]] = {
            "expired": self.app.cleanup_expired,
            "archived": lambda: self.app.archive_old_runs(timedelta(seconds=self._chance.uniform(*_AGE_S))),
            "deleted": lambda: self.app.cleanup_old_runs(timedelta(seconds=self._chance.uniform(*_AGE_S))),
        }
        while self._running.is_set():
            name = self._chance.choice(list(clean_ups))
            try:
                self.cleaned[name] += clean_ups[name]()
            except StoreUnavailableError:
                self.cleaned["not answered"] += 1
            time.sleep(self._chance.uniform(*_CLEAN_S))

    def follow(self, stream: Any) -> None:
        """Count the events of a stream. Ends when it is closed."""
        for event in stream:
            self.streamed[event.name] += 1
            self.last_streamed_at = time.monotonic()
