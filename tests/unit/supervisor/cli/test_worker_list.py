"""What the host records say of workers: also records of older pools, and of none."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from streamline_pool.supervisor.cli.worker_list import described_workers

NOW = datetime(2026, 11, 28, tzinfo=UTC)


def test_ages_are_as_of_now_and_not_as_of_the_record() -> None:
    """A record may be a minute old. A worker that was two seconds old then is older now."""
    host = {
        "_id": "box:7:abc",
        "host": "box",
        "pid": 7,
        "lanes": ["mail/orders/1/2", "default/orders/1/2"],
        "seenAt": NOW - timedelta(seconds=40),
        "workers": [{"pid": 8, "state": "ready", "uptime_s": 2.0}],
    }
    [worker] = described_workers([host], NOW)
    assert (worker["reported_age_s"], worker["age_s"]) == (40.0, 42.0)
    assert worker["queues"] == ["default", "mail"]
    assert worker["workflows"] == [{"id": "orders", "version": "1/2"}]


def test_a_record_of_an_older_pool_says_less() -> None:
    [worker] = described_workers([{"_id": "old", "workers": [{"pid": 8, "state": "ready"}]}, {"_id": "empty"}], NOW)
    absent = ("application", "version", "reported_at", "reported_age_s", "age_s")
    assert [worker[name] for name in absent] == [None] * len(absent)
    assert (worker["pid"], worker["queues"], worker["workflows"]) == (8, [], [])
