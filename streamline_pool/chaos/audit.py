"""What the database has accepted, from the change stream of the stored runs.

The change stream is made from the oplog and shows writes that a majority has. So it shows the end of a run that a clean-up deletes
a moment later, a deletion of a run that had not ended, and a second acceptance of one step's result.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from streamline_pool.client.app import Streamline

from .ledger import real_monotonic

__all__ = ["ENDED", "Audit", "Story", "kind_of", "pid_of"]

ENDED = ("done", "failed", "cancelled")
_RECENT = 200
_TRAIL_KEYS = ("status", "rewinds", "paused", "token", "rev", "crashes", "currentStepId", "wakeAt", "awaits")
_SHOWN = {
    **{"operationType": 1, "documentKey": 1, "wallTime": 1, "updateDescription.updatedFields": 1, "updateDescription.removedFields": 1},
    **{f"fullDocument.{name}": 1 for name in ("workflowId", "status", "idempotencyKey", "rewinds")},
}


@dataclass(slots=True)
class Story:
    """What became of one run."""

    run_id: str
    workflow_id: str
    key: str | None = None  # workflow and idempotency key
    status: str = ""
    inserted: int = 0  # place in the change stream
    deleted: int | None = None
    deleted_as: str = ""  # its status at the deletion
    changed_at: float = 0.0  # real_monotonic
    owner: str = ""  # of its lease; "" while there is none
    lease_id: str = ""  # the last one
    crashed: list[tuple[int, float]] = field(default_factory=list)  # whose lease was recovered, and when; for the present step
    paused: bool = False
    went_on: list[float] = field(default_factory=list)  # when it was claimed, a step was done, or it waited or ended
    done_at: dict[tuple[int, str], float] = field(default_factory=dict)  # (rewinds, place of a step) → when its result was accepted
    rewinds: int = 0
    code: str = ""  # of the error that it ended with
    unexplained: list[str] = field(default_factory=list)  # what is missing in the document of an ended run
    accepted: Counter[str] = field(default_factory=Counter)  # place of a step → accepted results since the last rewind
    doubled: list[str] = field(default_factory=list)
    trail: list[str] = field(default_factory=list)  # for people: every change of a field that schedules it

    @property
    def kind(self) -> str:
        """A key of `workload.KINDS`."""
        return kind_of(self.workflow_id)

    @property
    def live(self) -> bool:
        """It is stored and has not ended."""
        return self.deleted is None and self.status not in ENDED


def kind_of(workflow_id: str) -> str:
    """The kind of workflow that an id names; see `workload.KINDS`."""
    return workflow_id.rsplit("_", 1)[0]


def pid_of(owner: str) -> int:
    """The process that the owner of a lease names; 0 if it names none."""
    parts = owner.split(":")
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0


class Audit:
    """Reads the change stream of the runs on a thread of its own. `stories` is complete up to what the thread has read."""

    def __init__(self, app: Streamline) -> None:
        self.stories: dict[str, Story] = {}
        self.recent: deque[str] = deque(maxlen=_RECENT)  # runs that ended last
        self.ended: Counter[str] = Counter()
        self.deleted = 0
        self.interruptions: Counter[str] = Counter()  # how often the stream broke off, by the class of the error
        self._begun = real_monotonic()
        self._place = 0
        self._at = 0.0  # of the change that is read now
        self._live: dict[str, Story] = {}
        self._stop = threading.Event()
        self._up_to_date_at = 0.0
        self._app = app
        self._stream = self._opened(None)  # here, so that it shows all that happens from now on
        self._token = self._stream.resume_token

    def _opened(self, token: Any) -> Any:
        return self._app.runs.watch([{"$project": _SHOWN}], max_await_time_ms=200, resume_after=token)

    def run(self) -> None:
        """Read until `stop`. A stream that breaks off, because there is no primary, is opened again behind the last change."""
        while not self._stop.is_set():
            try:
                with self._stream as stream:
                    self._read(stream)
            except Exception as exc:  # noqa: BLE001 - of the driver, which only storage/ may import; counted, and `catch_up` sees the rest
                self.interruptions[type(exc).__name__] += 1
            while not self._stop.wait(0.2):
                try:
                    self._stream = self._opened(self._token)
                    break
                except Exception as exc:  # noqa: BLE001 - as above
                    self.interruptions[type(exc).__name__] += 1

    def _read(self, stream: Any) -> None:
        while not self._stop.is_set():
            asked_at = real_monotonic()
            change = stream.try_next()
            self._token = stream.resume_token
            if change is None:
                self._up_to_date_at = asked_at
                continue
            self._place += 1
            self._note(change)

    def catch_up(self, timeout_s: float) -> bool:
        """Wait until all that happened before this call was read. False if that takes longer than `timeout_s`."""
        called_at = real_monotonic()
        while self._up_to_date_at < called_at:
            if real_monotonic() - called_at > timeout_s:
                return False
            time.sleep(0.05)
        return True

    def stop(self) -> None:
        """End `run`."""
        self._stop.set()

    def live(self) -> list[Story]:
        """The runs that have not ended."""
        return list(self._live.values())

    def live_count(self) -> int:
        """How many they are."""
        return len(self._live)

    def _note(self, change: dict[str, Any]) -> None:
        run_id, operation = change["documentKey"]["_id"], change["operationType"]
        self._at = min(real_monotonic(), self._instant(change))
        if operation == "insert":
            document = change["fullDocument"]
            workflow_id, key = document.get("workflowId", ""), document.get("idempotencyKey")
            story = Story(run_id, workflow_id, key and f"{workflow_id}/{key}", inserted=self._place)
            if run_id in self.stories:
                story.doubled.append("inserted again")
            self.stories[run_id] = story
            self._move(story, document["status"], [f"inserted {document['status']}"])
            return
        known = self.stories.get(run_id)
        if known is None:
            return
        if operation == "delete":
            known.deleted, known.deleted_as = self._place, known.status
            self.deleted += 1
            self._move(known, known.status, [f"deleted as {known.status}"])
        elif operation == "update":
            self._update(known, change["updateDescription"])
        else:  # a replacement: the engine writes none
            known.doubled.append(operation)

    def _instant(self, change: dict[str, Any]) -> float:
        """When the server made the change, by the clock of the ledger: exact only if the server runs on this machine."""
        wall: datetime | None = change.get("wallTime")
        return float("inf") if wall is None else wall.replace(tzinfo=UTC).timestamp() - time.time() + real_monotonic()

    def _update(self, story: Story, update: dict[str, Any]) -> None:
        updated, removed = update.get("updatedFields", {}), update.get("removedFields", ())
        done = list(_done_steps(updated))
        if "rewinds" in updated:
            story.accepted.clear()
            story.rewinds = updated["rewinds"]
        elif story.status in ENDED and (done or "rev" in updated or "status" in updated):
            story.doubled.append(f"it was {story.status}, and changed once more: {sorted(updated)}")
        for place in done:
            story.accepted[place] += 1
            story.done_at.setdefault((story.rewinds, place), real_monotonic())  # no sooner than it was durable
            if story.accepted[place] > 1:
                story.doubled.append(f"step {place} done {story.accepted[place]} times")
        if "crashes" in updated or (updated.get("error") or {}).get("code") == "WORKER_CRASHED":
            story.crashed = [*story.crashed, (pid_of(story.owner), real_monotonic())] if updated.get("crashes", 1) else []
        claimed = self._leased(story, updated, removed)
        if claimed or done or updated.get("status") in ("waiting", *ENDED):
            story.went_on.append(self._at)
        words = [f"{name}={updated[name]}" for name in _TRAIL_KEYS if name in updated]
        words += [f"step {place} done" for place in done]
        words += [f"leased by {story.owner}"] if claimed else []
        words += [f"-{name}" for name in removed if name in ("lease", "wakeAt", "awaits", "pausedWakeAt")]
        if updated.get("status") in ENDED and "rewinds" not in updated:
            _explain(story, updated)
        story.paused = updated.get("paused", story.paused and "paused" not in removed)
        self._move(story, updated.get("status", story.status), words)

    @staticmethod
    def _leased(story: Story, updated: dict[str, Any], removed: Any) -> bool:
        """Note who holds the run now. True if this change was a claim."""
        lease = updated.get("lease")
        lease_id = str(lease.get("id")) if isinstance(lease, dict) else updated.get("lease.id")
        if "lease" in removed:
            story.owner = ""
        if lease_id is None or lease_id == story.lease_id:
            return False
        story.lease_id = lease_id
        story.owner = str(lease.get("owner") if isinstance(lease, dict) else updated.get("lease.owner", story.owner))
        return True

    def _move(self, story: Story, status: str, words: list[str]) -> None:
        story.changed_at = real_monotonic()
        if words:
            story.trail.append(f"{story.changed_at - self._begun:.2f} s {' '.join(words)}")
        if status in ENDED and story.status not in ENDED:
            self.ended[status] += 1
            self.recent.append(story.run_id)
        story.status = status
        if story.live:
            self._live[story.run_id] = story
        else:
            story.owner = ""
            self._live.pop(story.run_id, None)


def _explain(story: Story, updated: dict[str, Any]) -> None:
    """A run that ends says when, and if it failed, why."""
    error = updated.get("error")
    story.code = str(error.get("code") or "") if isinstance(error, dict) else ""
    if updated.get("endedAt") is None:
        story.unexplained.append(f"{updated['status']} without endedAt")
    if updated["status"] == "failed" and not story.code:
        story.unexplained.append("failed without an error code")


def _done_steps(updated: dict[str, Any]) -> Iterator[str]:
    """Places of the steps whose status this update has set to `done`."""
    for path, value in updated.items():
        parts = path.split(".")
        if parts[0] == "steps" and len(parts) in (2, 3):
            became = value if len(parts) == 3 and parts[2] == "status" else value.get("status") if isinstance(value, dict) else None
            if became == "done":
                yield parts[1]
