"""What the clients of the nemesis note of their calls: the judge believes it."""

from __future__ import annotations

from pathlib import Path

from streamline_pool import Streamline
from streamline_pool.chaos.audit import Audit
from streamline_pool.chaos.clients import Load
from streamline_pool.chaos.ledger import Ledger, LedgerTail
from streamline_pool.chaos.workload import define


def test_an_event_to_all_is_noted_for_runs_whose_start_got_no_answer_too(app: Streamline, tmp_path: Path) -> None:
    """Such a run may get the event. The judge would take it for an event of no client, and the next one for lost."""
    ledger = Ledger(tmp_path)
    load = Load(define(app, ledger), Audit(app), LedgerTail(tmp_path), ledger, rate=1.0, live_max=1, seed=1)
    for run_id, outcome in (("known", "ok"), ("unknown", "unknown")):
        load.acts.end(load.acts.begin("start", run_id), outcome)

    load._send_to_all("e", ["known", "unknown"])

    sent = {run_id: acts[-1] for run_id, acts in load.acts.by_run.items()}
    assert {(act.kind, run_id, act.outcome) for run_id, act in sent.items()} == {("event", "known", "ok"), ("event", "unknown", "unknown")}
    assert sent["known"].payload == sent["unknown"].payload
