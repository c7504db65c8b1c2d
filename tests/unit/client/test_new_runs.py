"""What `start` accepts, and the document it makes; the database has no part in it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from streamline_pool import ValidationError
from streamline_pool.client.new_runs import RunMaker, RunRequest, StartOptions
from streamline_pool.config.env import system_env
from streamline_pool.domain.definition import Declaration
from support import shown

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
DEFINITION = Declaration("w", queue="home", steps={"a": lambda ctx: None}).freeze()


def maker(**options: Any) -> RunMaker:
    given = {"meta": None, "priority": 0, "queue": None, "start_at": None, "user_id": None, "tags": ()}
    return RunMaker(system_env(), DEFINITION, StartOptions(**{**given, **options}), NOW)


def test_a_run_has_its_own_id_and_what_the_call_shares() -> None:
    made = maker(priority=3, user_id="u", tags=("x", "y"), meta={"m": 1})
    one, other = made.make(0, RunRequest(input={"n": 1})), made.make(1, RunRequest(input={"n": 2}, idempotency_key="k"))
    assert one.document["_id"] != other.document["_id"]
    assert (one.place, other.place) == (0, 1)
    assert [run.document["context"] for run in (one, other)] == [{"n": 1}, {"n": 2}]
    for run in (one, other):
        assert (run.document["priority"], run.document["userId"], run.document["tags"]) == (3, "u", ["x", "y"])
        assert (run.document["queue"], run.document["meta"], run.document["createdAt"]) == ("home", {"m": 1}, NOW)
    assert "idempotencyKey" not in one.document and other.document["idempotencyKey"] == "k"
    assert other.size_bytes > one.size_bytes > 0


@pytest.mark.parametrize(
    ("start_at", "due_at", "status"),
    [
        (None, NOW, "running"),
        (0, NOW, "running"),
        (1.5, NOW + timedelta(seconds=1.5), "draft"),
        (timedelta(hours=1), NOW + timedelta(hours=1), "draft"),
        (NOW - timedelta(days=1), NOW - timedelta(days=1), "running"),
        (datetime(2026, 3, 1, 14, 0, 0, 1999, tzinfo=UTC), datetime(2026, 3, 1, 14, 0, 0, 1000, tzinfo=UTC), "draft"),
    ],
    ids=shown,
)
def test_start_at_is_an_instant_or_a_delay(start_at: Any, due_at: datetime, status: str) -> None:
    document = maker(start_at=start_at).make(0, RunRequest(input=None)).document
    assert (document["wakeAt"], document["status"]) == (due_at, status)


@pytest.mark.parametrize(
    "options",
    [
        {"priority": 1_000_001}, {"priority": True}, {"priority": "1"}, {"meta": [1]}, {"meta": {"a": object()}},
        {"tags": "x"}, {"tags": [1]}, {"tags": 5}, {"user_id": 5}, {"queue": "a/b"},
        {"start_at": NOW.replace(tzinfo=None)}, {"start_at": -1}, {"start_at": 4e9},
    ],
    ids=shown,
)  # fmt: skip
def test_an_option_that_cannot_be_right_is_refused_before_any_document_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        maker(**options)
