"""What a read shows of a fenced write: every outcome, known from the document alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from streamline_pool.domain import transitions, waits
from streamline_pool.domain.document import RunDocument
from streamline_pool.engine.write_outcome import WriteOutcome, resolve_write
from streamline_pool.protocol import commits
from streamline_pool.protocol.operations import Fence, Statement

NOW = datetime(2026, 1, 1, tzinfo=UTC)
FENCE = Fence("r", "mine", 4, 1)


def run(**changes: Any) -> RunDocument:
    step = {"stepId": "a", "status": "running", "attempts": 1, "startedAt": NOW, "hooks": [{"hash": b"h", "gen": 1}]}
    fields = {"status": "running", "lease": {"id": "mine"}, "rev": 4, "token": 1, "steps": [step], "context": {}, "waitGen": 0}
    return cast(RunDocument, {"_id": "r", **fields, **changes})


def statement(kind: str, *, paused: bool = False) -> Statement:
    change = {
        "wait": lambda: waits.wait(run(), 0, {"type": "webhook", "reason": "?"}, {}),
        "await": lambda: waits.await_event(run(), 0, {"type": "event", "eventName": "paid"}, {}),
        "decide": lambda: transitions.decide_entry(run(), 0),
        "release": lambda: transitions.release(run(), 0, NOW, was_entered=True),
        "wake": lambda: transitions.decide_entry(run(), 0)._replace(not_before=NOW + timedelta(days=1)),
    }[kind]()
    if paused:
        return commits.commit_under_pause(FENCE, change, NOW, 100)
    return commits.commit(FENCE, change, NOW, 100)


ANSWER = {"stepId": "a", "gen": 1}
GONE = {"lease": None}


@pytest.mark.parametrize(
    ("kind", "paused", "changes", "outcome"),
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
        # The pause is seen first: the form for paused runs then shows what has arrived.
        ("wait", False, {"inbox": [ANSWER], "paused": True}, WriteOutcome.PAUSED),
        ("wait", True, {"inbox": [ANSWER], "paused": True}, WriteOutcome.ARRIVED),
        ("wait", True, {"inbox": [ANSWER]}, WriteOutcome.RESUMED),
        ("await", True, {"inbox": [{"name": "paid"}], "paused": True}, WriteOutcome.ARRIVED),
        # A worker that no longer holds the run must not act on its inbox.
        ("wait", False, {"inbox": [ANSWER], "lease": {"id": "theirs"}}, WriteOutcome.FENCED),
        ("wait", False, {"inbox": [ANSWER], **GONE}, WriteOutcome.FENCED),
        ("wait", False, {"inbox": [ANSWER], "rev": 6}, WriteOutcome.FENCED),
        # It was stored, and its answer or event came afterwards.
        ("wait", False, {"rev": 5, **GONE}, WriteOutcome.COMMITTED),
        ("wait", False, {"rev": 5, "token": 2, **GONE}, WriteOutcome.FENCED),
        ("await", False, {"rev": 5, "inbox": [{"name": "paid"}]}, WriteOutcome.COMMITTED),
        ("decide", False, {"inbox": [ANSWER]}, None),
        ("decide", False, {"paused": True}, WriteOutcome.PAUSED),
        ("decide", True, {}, WriteOutcome.RESUMED),
        ("release", False, {"rev": 5, **GONE}, WriteOutcome.COMMITTED),
        ("release", False, {"rev": 5}, WriteOutcome.FENCED),
        ("wait", True, {"rev": 5}, WriteOutcome.FENCED),
        ("wake", False, {}, WriteOutcome.NOT_YET),
        ("wake", False, {"rev": 5}, WriteOutcome.COMMITTED),
    ],
)
def test_a_document_shows_the_outcome_of_a_write(kind: str, paused: bool, changes: dict[str, Any], outcome: WriteOutcome | None) -> None:
    """A wrong outcome repeats a write that was stored, or continues after one that was not."""
    assert resolve_write(statement(kind, paused=paused), run(**changes)) is outcome


@pytest.mark.parametrize("kind", ["wait", "await", "release", "wake"])
@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"rev": 5}, WriteOutcome.FORM_COMMITTED),
        ({"rev": 5, **GONE}, WriteOutcome.FORM_COMMITTED),
        ({"rev": 5, "token": 2, **GONE}, WriteOutcome.FENCED),
        ({"rev": 5, "lease": {"id": "theirs"}}, WriteOutcome.FENCED),
        ({"rev": 6}, WriteOutcome.FENCED),
    ],
)
def test_a_document_does_not_show_which_of_several_forms_is_stored(kind: str, changes: dict[str, Any], outcome: WriteOutcome) -> None:
    """A late copy of an earlier form, which keeps the lease or not, may be stored in the place of the last one."""
    assert resolve_write(statement(kind)._replace(follows_form=True), run(**changes)) is outcome


def test_a_run_that_is_deleted_is_lost() -> None:
    assert resolve_write(statement("wait"), None) is WriteOutcome.FENCED


@pytest.mark.parametrize("inbox", [None, "garbage", 5, [None, 5, "x"], {}])
def test_garbage_in_an_inbox_stops_no_other_run(inbox: Any) -> None:
    """Another program may have changed the field; the committer resolves a whole batch and must not fail for one run."""
    assert resolve_write(statement("wait"), run(inbox=inbox)) is None
