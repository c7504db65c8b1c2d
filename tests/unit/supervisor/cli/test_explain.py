"""`runs show` says why a run does not go on: one sentence for each state a run can be in."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from streamline_pool.supervisor.cli.explain import explain

NOW = datetime(2030, 1, 2, 12, 0, 0, tzinfo=UTC)


def later(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def run(status: str = "running", step: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    current = {"stepId": "charge", "status": "pending", "attempts": 0} | (step or {})
    return {
        "_id": "r1", "workflowId": "orders", "version": "1.0.0", "status": status, "queue": "default", "currentStepId": "charge",
        "steps": [{"stepId": "reserve", "status": "done", "attempts": 1}, current], **fields,
    }  # fmt: skip


def pool(*lanes: str, state: str = "ready") -> dict[str, Any]:
    return {"_id": "h:1:n", "lanes": list(lanes), "state": state}


WAITS = {"status": "waiting", "attempts": 1}

CASES = [
    (run("done", endedAt=later(-30)), "It was done 30.0 s ago."),
    (run("cancelled", endedAt=later(-30), cancelReason="typo"), "It was cancelled 30.0 s ago: typo."),
    (
        run("failed", endedAt=later(-30), error={"code": "STEP_FAILED", "message": "card refused", "stepId": "charge"}),
        "It failed 30.0 s ago at step charge: STEP_FAILED: card refused",
    ),
    (run(paused=True, pauseReason="audit"), "It is paused (audit) before step charge, until it is resumed."),
    (run(paused=True, lease={"owner": "h:7:n"}), "It is paused; worker h:7:n still finishes step charge."),
    (
        run(step={"status": "running", "attempts": 2, "startedAt": later(-4)}, lease={"owner": "h:7:n", "expiresAt": later(9)}),
        "Worker h:7:n is running step charge (attempt 2, begun 4.0 s ago).",
    ),
    (
        run(lease={"owner": "h:7:n", "expiresAt": later(-5)}),
        "Worker h:7:n had it but stopped renewing its lease, which ended 5.0 s ago; any pool that is alive takes it over.",
    ),
    (
        run("waiting", step=WAITS | {"waitingFor": {"type": "timer", "resumeAt": later(300)}}, wakeAt=later(300)),
        "Step charge sleeps; it goes on in 5 min.",
    ),
    (
        run("waiting", step=WAITS | {"waitingFor": {"type": "human", "reason": "approve"}}),
        "Step charge waits for an answer (approve). Answer it with: streamline-pool runs resume r1 --payload JSON",
    ),
    (
        run("waiting", step=WAITS | {"waitingFor": {"type": "event", "eventName": "paid", "expiresAt": later(7200)}}, wakeAt=later(7200)),
        "Step charge waits for the event 'paid'; it times out in 2 h.",
    ),
    (
        run("waiting", step=WAITS | {"waitingFor": {"type": "webhook", "reason": "bank"}}),
        "Step charge waits for a call of its hook (bank).",
    ),
    (run("draft", wakeAt=later(300)), "It starts in 5 min, as asked by start_at."),
    (
        run("waiting", step={"attempts": 2, "error": {"message": "card refused"}}, wakeAt=later(3)),
        "Step charge failed (card refused) and is attempted again in 3.0 s (attempt 3).",
    ),
    (run(), "No worker has it, and it has no time to wake at: another program changed the document; cancel it, or start it anew."),
]


@pytest.mark.parametrize(("stored", "sentence"), CASES, ids=[sentence[:40] for _, sentence in CASES])
def test_the_sentence_for_each_state(stored: dict[str, Any], sentence: str) -> None:
    assert explain(stored, [], NOW) == sentence


NEEDS = "It is ready for 5.0 s and needs a worker that has workflow orders 1.0.0 on queue default"


@pytest.mark.parametrize(
    ("pools", "sentence"),
    [
        ([], f"{NEEDS}; no pool has been seen in the last minute. Start one with: streamline-pool"),
        (
            [pool("default/other/1.0.0")],
            f"{NEEDS}: none seen in the last minute. The pools that are alive do not have this workflow.",
        ),
        (
            [pool("default/orders/2.0.0")],
            f"{NEEDS}: none seen in the last minute. The pools that are alive have version 2.0.0; deploy 1.0.0 again to finish this run.",
        ),
        (
            [pool("mail/orders/1.0.0")],
            f"{NEEDS}: none seen in the last minute. The pools that are alive work on queue mail; start one with --queue default.",
        ),
        (
            [pool("default/orders/1.0.0", state="held")],
            "It is ready for 5.0 s; pools that can run it are alive (held), so it is next as soon as a worker has a free place.",
        ),
    ],
)
def test_for_a_run_that_no_worker_claims_the_sentence_says_what_is_missing(pools: list[dict[str, Any]], sentence: str) -> None:
    """The most frequent question of operators: why does nothing happen?"""
    assert explain(run(wakeAt=later(-5)), pools, NOW) == sentence


@pytest.mark.parametrize(
    "damaged", [{"steps": None}, {"steps": [3]}, {"currentStepId": None}, {"lease": {}}, {"error": None, "status": "failed"}]
)
def test_a_damaged_document_is_no_reason_to_crash(damaged: dict[str, Any]) -> None:
    assert explain(run() | damaged, [], NOW)
