"""The indexes that the engine itself needs, as data. Owns their names, keys and reasons.

Indexes for the queries of users are in storage/indexes.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .operations import Command, Reply

__all__ = [
    "EVENT_INDEXES",
    "HOST_INDEXES",
    "IDEMPOTENCY",
    "OUTPUT_INDEXES",
    "RETIRED_RUN_INDEXES",
    "RUN_INDEXES",
    "IndexDefinition",
    "ensure_indexes",
    "list_indexes",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexDefinition:
    """One index, as `createIndexes` takes it."""

    name: str
    key: Mapping[str, int]  # field to 1 or -1
    partial: Mapping[str, Any] | None = None  # the filter of the documents that it holds; None: all
    unique: bool = False
    expire_after_s: int | None = None  # of a TTL index

    def spec(self) -> dict[str, Any]:
        """The element of `createIndexes.indexes`."""
        spec: dict[str, Any] = {"name": self.name, "key": dict(self.key)}
        if self.partial is not None:
            spec["partialFilterExpression"] = dict(self.partial)
        if self.unique:
            spec["unique"] = True
        if self.expire_after_s is not None:
            spec["expireAfterSeconds"] = self.expire_after_s
        return spec


IDEMPOTENCY = IndexDefinition(
    name="streamline_idempotency",
    key={"workflowId": 1, "idempotencyKey": 1},
    partial={"idempotencyKey": {"$type": "string"}},
    unique=True,
)
"""Of two starts of a workflow with one key, the server refuses the later one."""

RUN_INDEXES: tuple[IndexDefinition, ...] = (
    # Claimable now or later. One scan for each queue, however many workflows it has. The scan tests slot and lane by the key.
    IndexDefinition(
        name="streamline_claimable",
        key={"queue": 1, "priority": -1, "wakeAt": 1, "slot": 1, "lane": 1},
        partial={"wakeAt": {"$exists": True}},
    ),
    # Leased runs, few at any time. The owner is in the key, so that a release of one worker's leases reads no documents.
    IndexDefinition(
        name="streamline_lease",
        key={"lease.expiresAt": 1, "lease.owner": 1},
        partial={"lease.expiresAt": {"$exists": True}},
    ),
    IDEMPOTENCY,
    # Runs that wait for an event, so that a broadcast event finds them. By id, so that it reaches all of them in one pass.
    IndexDefinition(name="streamline_awaits", key={"awaits": 1, "_id": 1}, partial={"awaits": {"$exists": True}}),
    # All runs by age, so that a clean-up finds the oldest one, which decides which events to all are kept. Never changed.
    IndexDefinition(name="streamline_born", key={"bornAt": 1}, partial={"bornAt": {"$type": "timestamp"}}),
)
"""The indexes of the runs. The commit of a step changes none of their fields."""

RETIRED_RUN_INDEXES = ("streamline_due",)
"""Indexes that an earlier version made and this one does not use. Each costs a write at every claim until it is dropped."""

EVENT_INDEXES: tuple[IndexDefinition, ...] = (
    IndexDefinition(name="streamline_event", key={"name": 1, "bornAt": 1}),
    # Events whose sender has not finished. If the sender died, a steward delivers them.
    IndexDefinition(name="streamline_pending", key={"at": 1}, partial={"pending": True}),
    IndexDefinition(name="streamline_event_born", key={"bornAt": 1}),  # for the removal of those that no run can receive any more
)

HOST_INDEXES: tuple[IndexDefinition, ...] = (IndexDefinition(name="streamline_expire", key={"expireAt": 1}, expire_after_s=0),)

# Outputs are read by id. By run they are found when the run is removed.
OUTPUT_INDEXES: tuple[IndexDefinition, ...] = (IndexDefinition(name="streamline_output_run", key={"runId": 1}),)


def ensure_indexes(collection: str = "runs") -> Command:
    """Create the engine's indexes of "runs", "hosts", "events" or "outputs". Does nothing when they exist."""
    made = {"runs": RUN_INDEXES, "hosts": HOST_INDEXES, "events": EVENT_INDEXES, "outputs": OUTPUT_INDEXES}[collection]
    body = {"indexes": [index.spec() for index in made]}
    return Command(name=f"ensure_{collection}_indexes", collection=collection, verb="createIndexes", body=body)


def list_indexes(collection: str = "runs") -> Command:
    """Yields the indexes of a collection, as `listIndexes` describes them. Raises StoreUnavailableError if there is no collection."""
    body = {"cursor": {"batchSize": 1_000}}  # a collection has at most 64 indexes
    return Command(name="list_indexes", collection=collection, verb="listIndexes", body=body, parse=_first_batch, writes=False)


def _first_batch(reply: Reply) -> list[Mapping[str, Any]]:
    return list(reply["cursor"]["firstBatch"])
