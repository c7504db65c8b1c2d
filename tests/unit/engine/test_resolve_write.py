"""What a read shows of a fenced write: every verdict, told from the document alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from streamline_pool.domain import transitions
from streamline_pool.engine.group_commit import WriteOutcome, resolve_write
from streamline_pool.protocol import commits
from streamline_pool.protocol.operations import Fence, Statement

NOW = datetime(2026, 1, 1, tzinfo=UTC)
FENCE = Fence("r", "mine", 4, 1)


def run(**changes: Any) -> dict[str, Any]:
    step = {"stepId": "a", "status": "running", "attempts": 1, "startedAt": NOW, "hooks": [{"hash": b"h", "gen": 1}]}
    return {"_id": "r", "lease": {"id": "mine"}, "rev": 4, "token": 1, "steps": [step], "context": {}, "waitGen": 0, **changes}


def statement(kind: str, *, paused: bool = False) -> Statement:
    change = {
        "wait": lambda: transitions.wait(run(), 0, {"type": "webhook", "reason": "?"}, {}, NOW),
        "await": lambda: transitions.await_event(run(), 0, {"type": "event", "eventName": "paid"}, {}, NOW),
        "decide": lambda: transitions.decide_entry(run(), 0),
        "release": lambda: transitions.release(run(), 0, NOW, entered=True),
        "wake": lambda: transitions.decide_entry(run(), 0)._replace(not_before=NOW + timedelta(days=1)),
    }[kind]()
    if paused:
        return commits.commit_under_pause(FENCE, change, NOW, 100)
    return commits.commit(FENCE, change, NOW, 100)


ANSWER = {"stepId": "a", "gen": 1}
GONE = {"lease": None}


@pytest.mark.parametrize(
    ("kind", "paused", "changes", "verdict"),
    [
        ("wait", False, {"inbox": [ANSWER]}, WriteOutcome.ARRIVED),
        ("wait", False, {"inbox": [{"name": "paid"}, ANSWER]}, WriteOutcome.ARRIVED),
        ("wait", False, {"inbox": [{"stepId": "a", "gen": 2}]}, None),
        ("wait", False, {"inbox": [{"stepId": "b", "gen": 1}]}, None),
        ("wait", False, {"inbox": [{"name": "paid"}]}, None),
        ("wait", False, {}, None),
        ("await", False, {"inbox": [{"name": "paid"}]}, WriteOutcome.ARRIVED),
        ("await", False, {"inbox": [{"name": "other"}, ANSWER]}, None),
        ("await", False, {"inbox": []}, None),
        # The pause is told first: what has arrived is found out by the twin.
        ("wait", False, {"inbox": [ANSWER], "paused": True}, WriteOutcome.PAUSED),
        ("wait", True, {"inbox": [ANSWER], "paused": True}, WriteOutcome.ARRIVED),
        ("wait", True, {"inbox": [ANSWER]}, WriteOutcome.RESUMED),
        ("await", True, {"inbox": [{"name": "paid"}], "paused": True}, WriteOutcome.ARRIVED),
        # Whose run it is no longer, what is in its inbox is none of his business.
        ("wait", False, {"inbox": [ANSWER], "lease": {"id": "theirs"}}, WriteOutcome.FENCED),
        ("wait", False, {"inbox": [ANSWER], **GONE}, WriteOutcome.FENCED),
        ("wait", False, {"inbox": [ANSWER], "rev": 6}, WriteOutcome.FENCED),
        # It had landed, and its answer or event came afterwards.
        ("wait", False, {"rev": 5, **GONE}, WriteOutcome.COMMITTED_BY_READ),
        ("wait", False, {"rev": 5, "token": 2, **GONE}, WriteOutcome.FENCED),
        ("await", False, {"rev": 5, "inbox": [{"name": "paid"}]}, WriteOutcome.COMMITTED_BY_READ),
        ("decide", False, {"inbox": [ANSWER]}, None),
        ("decide", False, {"paused": True}, WriteOutcome.PAUSED),
        ("decide", True, {}, WriteOutcome.RESUMED),
        ("release", False, {"rev": 5, **GONE}, WriteOutcome.COMMITTED_BY_READ),
        ("wake", False, {}, WriteOutcome.NOT_YET),
        ("wake", False, {"rev": 5}, WriteOutcome.COMMITTED_BY_READ),
    ],
)
def test_a_document_tells_what_became_of_a_write(kind: str, paused: bool, changes: dict[str, Any], outcome: WriteOutcome | None) -> None:
    """A wrong verdict repeats a write that has landed, or goes on from one that has not."""
    assert resolve_write(statement(kind, paused=paused), run(**changes)) is outcome


def test_a_run_that_is_gone_is_nobodys() -> None:
    assert resolve_write(statement("wait"), None) is WriteOutcome.FENCED


@pytest.mark.parametrize("inbox", [None, "garbage", 5, [None, 5, "x"], {}])
def test_garbage_in_an_inbox_stops_nobody(inbox: Any) -> None:
    """Another program may have changed the field; the committer judges a whole batch and must not fail for one run."""
    assert resolve_write(statement("wait"), run(inbox=inbox)) is None
