"""Fills a collection with runs that the measured workers cannot claim: finished, sleeping, or of another workflow. Inserted directly."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, cast
from uuid import uuid4

from pymongo.write_concern import WriteConcern

from streamline_pool import Workflow
from streamline_pool.domain import transitions, waits
from streamline_pool.domain.change import apply
from streamline_pool.domain.document import RunDocument
from streamline_pool.protocol.codec import CODEC
from streamline_pool.protocol.run_document import SLOTS, new_run

from .app import absent, noop
from .common import Server

__all__ = ["claimable", "fill", "finished", "insert", "sleeping"]

Document = dict[str, Any]

_BATCH = 2_000
_PRIORITIES = (0, 0, 0, 0, 0, 0, 0, 0, 1, -1)
"""One sleeping run in five has another priority. Each value is one more range of the index that a claim must read."""


def fill(server: Server, database: str, runs_finished: int, runs_sleeping: int, runs_absent: int) -> None:
    """Insert the runs: finished and sleeping ones of the workflow that the pool serves, and absent ones of another workflow."""
    insert(server, database, (finished() for _ in range(runs_finished)))
    insert(server, database, (sleeping() for _ in range(runs_sleeping)))
    insert(server, database, (claimable(absent) for _ in range(runs_absent)))
    server.client.admin.command("fsync")  # the server writes them to disk now, and not during the measurement


def insert(server: Server, database: str, documents: Iterator[Document]) -> None:
    """Insert in batches; acknowledged by a majority at the end of each."""
    runs = server.client[database].get_collection("workflow_runs", codec_options=CODEC, write_concern=WriteConcern("majority"))
    while batch := list(islice(documents, _BATCH)):
        runs.insert_many(batch, ordered=False)


def claimable(workflow: Workflow) -> Document:
    """A new run, due since a second."""
    now = datetime.now(UTC)
    document = new_run(
        workflow.definition,
        run_id=uuid4().hex,
        input=None,
        context={},
        meta=None,
        idempotency_key=None,
        priority=0,
        queue="default",
        due_at=now - timedelta(seconds=1),
        user_id=None,
        tags=(),
        slot=random.randrange(SLOTS),
        now=now,
        start_id=uuid4().hex,
    )
    return cast("Document", document)


def _entered(document: Document) -> RunDocument:
    """The same document, with its first step entered, as a domain record."""
    document["steps"][0] |= {"status": "running", "attempts": 1, "startedAt": datetime.now(UTC)}
    return cast(RunDocument, document)


def finished(workflow: Workflow = noop) -> Document:
    """A run that has completed all its steps."""
    document = claimable(workflow)
    del document["wakeAt"]
    run = _entered(document)
    for place in range(len(document["steps"])):
        now = datetime.now(UTC)
        apply(run, transitions.advance(run, place, None, {}, now))
    return {**document, "token": 1}


def sleeping() -> Document:
    """A run that sleeps in its first step for some days, at one of a few priorities."""
    document = claimable(noop)
    until = datetime.now(UTC) + timedelta(seconds=random.uniform(86_400, 30 * 86_400))
    run = _entered(document)
    apply(run, waits.sleep(run, 0, until.replace(microsecond=0), {}))
    return {**document, "token": 1, "wakeAt": until, "priority": random.choice(_PRIORITIES)}
