"""What the database has accepted during the storm, from the change stream of the stored runs.

The change stream is made from the oplog and shows writes that a majority has. So it shows the end of a run that a clean-up deletes
a moment later, a deletion of a run that had not ended, and a second acceptance of one step's result.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pymongo import MongoClient

__all__ = ["ENDED", "Audit", "Story", "kind_of"]

ENDED = ("done", "failed", "cancelled")
_RECENT = 200
_TRAIL_KEYS = ("status", "rewinds", "paused", "token", "rev", "crashes", "currentStepId", "wakeAt", "awaits")
_SHOWN = {
    **{"operationType": 1, "documentKey": 1, "updateDescription.updatedFields": 1, "updateDescription.removedFields": 1},
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
    changed_at: float = 0.0  # monotonic
    accepted: Counter[str] = field(default_factory=Counter)  # place of a step → accepted results since the last rewind
    doubled: list[str] = field(default_factory=list)
    trail: list[str] = field(default_factory=list)  # for people: every change of a field that schedules it

    @property
    def kind(self) -> str:
        """A key of `storm_app.KINDS`."""
        return kind_of(self.workflow_id)

    @property
    def live(self) -> bool:
        """It is stored and has not ended."""
        return self.deleted is None and self.status not in ENDED


def kind_of(workflow_id: str) -> str:
    """The kind of workflow that an id names; see `storm_app.KINDS`."""
    return workflow_id.rsplit("_", 1)[0]


class Audit:
    """Reads the change stream on a thread of its own. `stories` is complete up to what the thread has read."""

    def __init__(self, uri: str, database: str, collection: str) -> None:
        self.stories: dict[str, Story] = {}
        self.recent: deque[str] = deque(maxlen=_RECENT)  # runs that ended last
        self.ended: Counter[str] = Counter()
        self.deleted = 0
        self._begun = time.monotonic()
        self._place = 0
        self._live: dict[str, Story] = {}
        self._stop = threading.Event()
        self._client = MongoClient[dict[str, Any]](uri, tz_aware=True)
        self._stream = self._client[database][collection].watch([{"$project": _SHOWN}], max_await_time_ms=200)

    def run(self) -> None:
        """Read until `stop`."""
        with self._client, self._stream:
            while not self._stop.is_set():
                change = self._stream.try_next()
                if change is not None:
                    self._place += 1
                    self._note(change)

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

    def _update(self, story: Story, update: dict[str, Any]) -> None:
        updated = update.get("updatedFields", {})
        if "rewinds" in updated:
            story.accepted.clear()
        for place in _done_steps(updated):
            story.accepted[place] += 1
            if story.accepted[place] > 1:
                story.doubled.append(f"step {place} done {story.accepted[place]} times")
        words = [f"{name}={updated[name]}" for name in _TRAIL_KEYS if name in updated]
        words += [f"step {place} done" for place in _done_steps(updated)]
        words += [f"leased by {updated['lease'].get('owner')}"] if isinstance(updated.get("lease"), dict) else []
        words += [f"-{name}" for name in update.get("removedFields", ()) if name in ("lease", "wakeAt", "awaits", "pausedWakeAt")]
        self._move(story, updated.get("status", story.status), words)

    def _move(self, story: Story, status: str, words: list[str]) -> None:
        story.changed_at = time.monotonic()
        if words:
            story.trail.append(f"{story.changed_at - self._begun:.2f} s {' '.join(words)}")
        if status in ENDED and story.status not in ENDED:
            self.ended[status] += 1
            self.recent.append(story.run_id)
        story.status = status
        if story.live:
            self._live[story.run_id] = story
        else:
            self._live.pop(story.run_id, None)


def _done_steps(updated: dict[str, Any]) -> Iterator[str]:
    """Places of the steps whose status this update has set to `done`."""
    for path, value in updated.items():
        parts = path.split(".")
        if parts[0] == "steps" and len(parts) in (2, 3):
            became = value if len(parts) == 3 and parts[2] == "status" else value.get("status") if isinstance(value, dict) else None
            if became == "done":
                yield parts[1]
