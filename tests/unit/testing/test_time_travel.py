"""Where the offset of a test is put into an operation: wherever it reads the server's time, and nowhere else."""

from __future__ import annotations

from datetime import timedelta

import pytest

from streamline_pool.protocol import recovery, signals
from streamline_pool.protocol.operations import Command, Find, Op
from streamline_pool.testing.time_travel import Timeline, shifted

DAY_MS = 86_400_000
LATER = {"$add": ["$$NOW", DAY_MS]}


def command(verb: str, **body: object) -> Command:
    return Command(name="any", collection="runs", verb=verb, body=body)


def shifted_command(op: Command) -> Command:
    """`op` in the later time. It must stay a command."""
    made = shifted(op, DAY_MS)
    assert isinstance(made, Command)
    return made


def test_a_pipeline_update_reads_the_later_time() -> None:
    update = [{"$set": {"at": "$$NOW", "deep": {"$cond": [True, ["$$NOW", "$x"], {"$dateAdd": {"startDate": "$$NOW"}}]}}}]
    wanted = [{"$set": {"at": LATER, "deep": {"$cond": [True, [LATER, "$x"], {"$dateAdd": {"startDate": LATER}}]}}}]
    made = shifted_command(command("update", updates=[{"q": {"_id": "r"}, "u": update, "multi": True}]))
    assert made.body == {"updates": [{"q": {"_id": "r"}, "u": wanted, "multi": True}]}
    made = shifted_command(command("findAndModify", query={"_id": "r"}, update=update, new=True))
    assert made.body == {"query": {"_id": "r"}, "update": wanted, "new": True}
    assert update[0]["$set"]["at"] == "$$NOW", "an operation is a value; that of the caller is not changed"


def test_filters_read_the_later_time_in_expressions() -> None:
    query = {"x": "$$NOW", "$expr": {"$lte": ["$a", "$$NOW"]}, "$or": [{"y": "$$NOW"}, {"$and": [{"$expr": {"$gt": ["$$NOW", "$b"]}}]}]}
    wanted = {"x": "$$NOW", "$expr": {"$lte": ["$a", LATER]}, "$or": [{"y": "$$NOW"}, {"$and": [{"$expr": {"$gt": [LATER, "$b"]}}]}]}
    found = shifted(Find(name="any", collection="runs", filter=query), DAY_MS)
    assert isinstance(found, Find)
    assert found.filter == wanted
    assert shifted_command(command("delete", deletes=[{"q": query, "limit": 0}])).body == {"deletes": [{"q": wanted, "limit": 0}]}
    assert shifted_command(command("update", updates=[{"q": query, "u": {}}])).body["updates"][0]["q"] == wanted
    assert shifted_command(command("count", query=query)).body["query"] == wanted
    made = shifted_command(command("aggregate", pipeline=[{"$match": query}, {"$set": {"at": "$$NOW"}}], cursor={}))
    assert made.body == {"pipeline": [{"$match": wanted}, {"$set": {"at": LATER}}], "cursor": {}}


@pytest.mark.parametrize(
    "op",
    [
        command("update", updates=[{"q": {"input": "$$NOW", "deep": {"$expr": "$$NOW"}}, "u": {"$set": {"output": "$$NOW"}}}]),
        command("update", updates=[{"q": {}, "u": [{"$set": {"reason": {"$literal": {"said": ["$$NOW"]}}}}]}]),
        command("insert", documents=[{"input": "$$NOW", "$expr": "$$NOW"}]),
        command("findAndModify", query={"_id": "$$NOW"}, remove=True),
        Find(name="any", collection="runs", filter={"context.at": {"$in": ["$$NOW"]}}),
        signals.send_signal("due", None, lane="$$NOW"),  # type: ignore[arg-type]
    ],
    ids=["plain update", "literal", "insert", "key", "find", "signal"],
)
def test_data_is_never_taken_for_the_time(op: Op) -> None:
    """Otherwise a user's text "$$NOW" would become a date, in tests only."""
    assert shifted(op, DAY_MS) == op


def test_without_a_jump_nothing_is_changed() -> None:
    op = recovery.recover_expired(3)
    assert shifted(op, 0) is op


def test_time_never_goes_back_and_rounds_up() -> None:
    """With a millisecond less, the instant of the jump would not be due yet."""
    timeline = Timeline()
    timeline.advance(timedelta(microseconds=1))
    assert timeline.offset_ms == 1
    timeline.advance(timedelta(days=-1))
    timeline.advance(timedelta(milliseconds=2))
    assert timeline.offset_ms == 3
