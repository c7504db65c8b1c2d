"""A real pool finishes the broadcast of a sender that died: every waiting run gets the event once."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pool_process import ROOT, running

from streamline_pool import Context, Streamline
from streamline_pool.protocol import durable_events
from streamline_pool.protocol.operations import Op
from support import eventually, present

APP = """
from streamline_pool import Streamline

app = Streamline()
waiting = app.workflow("waiting", steps={"first": lambda ctx: ctx.wait_for("go"), "last": lambda ctx: ctx.get_output("first")})
"""

SENDER = """
import os, sys
from streamline_pool import Streamline

app = Streamline(sys.argv[1], database=sys.argv[2])
store = app.store()
run = store.run

def dying(op, session=None):
    if op.name == sys.argv[3]:
        os.kill(os.getpid(), 9)
    return run(op, session)

store.run = dying
app.send_event("go", "sent")
"""


@pytest.mark.parametrize("dies_before", ["find_waiters", "deliver_to_waiters", "settle_event"])
def test_a_pool_finishes_the_event_of_a_sender_that_was_killed(
    app: Streamline, mongodb_uri: str, database: str, tmp_path: Path, dies_before: str
) -> None:
    """The sender may have reported success as soon as the event is stored, so the pool must deliver it to every waiting run."""

    def first(ctx: Context) -> None:
        ctx.wait_for("go")

    workflow = app.workflow("waiting", steps={"first": first, "last": lambda ctx: ctx.get_output("first")})
    run_ids = [workflow.execute(workflow.start().id).id for _ in range(3)]
    command = [sys.executable, "-c", SENDER, mongodb_uri, database, dies_before]
    sender = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
    assert sender.returncode == -9, sender.stderr
    events = app.store().collection("events")
    assert events.count_documents({"pending": True}) == 1
    # A steward finishes an event only after its sender had time to do so; this moves the event into the past.
    events.update_one({}, {"$set": {"at": app.store().now() - timedelta(minutes=1)}})
    assert app.store().run(durable_events.find_pending_events(app.store().now(), 10))
    with running(tmp_path, APP, mongodb_uri, "--workers", "1", database=database) as pool:
        pool.ready()
        eventually(lambda: app.runs.count_documents({"status": "done"}) == len(run_ids), timeout=30)
        eventually(lambda: events.count_documents({"pending": True}) == 0)
    assert [present(workflow.get(run_id)).output for run_id in run_ids] == ["sent"] * 3
    assert all(len(document["seen"]) == 1 for document in app.runs.find())


def test_a_sender_whose_reply_is_slow_finds_its_event_delivered_and_removed(app: Streamline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A steward delivers for a sender that seems dead, and a clean-up removes the event with the last run that could receive it."""
    store = app.store()
    run = store.run

    def slow(op: Op, session: Any = None) -> Any:
        result = run(op, session)
        if op.name == "record_event":
            store.collection("events").delete_many({})
        return result

    monkeypatch.setattr(store, "run", slow)
    assert app.send_event("go", "sent") == 0
