"""Log lines: one event is one line, in both forms, and no password leaves by them."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

import pytest

from streamline_pool.supervisor.logs import JsonFormatter, TextFormatter


def record(message: str, *args: Any, exc_info: Any = None, name: str = "streamline_pool", **extra: Any) -> logging.LogRecord:
    made = logging.getLogger(name).makeRecord(name, logging.INFO, __file__, 1, message, args, exc_info, extra=extra)
    made.created = datetime(2030, 1, 2, 12, 0, 1, 250_000, tzinfo=UTC).timestamp()
    return made


def test_text_is_time_level_event_and_fields() -> None:
    line = TextFormatter().format(record("run_claimed", run_id="r-17", token=3, lag_s=0.25, note="two words", lanes=["a", "b"], gone=None))
    clock, rest = line.split(" ", 1)
    assert len(clock) == len("12:00:01")
    assert rest == 'INFO run_claimed run_id=r-17 token=3 lag_s=0.25 note="two words" lanes=["a","b"] gone=None'


def test_a_field_cannot_forge_a_line_or_another_field() -> None:
    """Run ids and messages come from users; a newline in one must not look like a log line of ours."""
    fields: dict[str, Any] = {"other": "a=b", "escape": "\x1b[31m", "control": "\x9b31m", "parts": ["\n\x9b", "c=d"]}
    line = TextFormatter().format(record("run_claimed", run_id="x\n12:00:01 INFO run_done", **fields))
    assert "\n" not in line
    assert "\x1b" not in line
    assert "\x9b" not in line
    assert 'other="a=b"' in line


def test_lines_of_children_name_their_process() -> None:
    made = record("run_claimed")
    made.process = 4711
    assert TextFormatter().format(made).endswith("run_claimed process=4711")


def test_json_is_one_object_with_utc_time() -> None:
    entry = json.loads(
        JsonFormatter().format(record("run %s", "claimed", run_id="r-17", at=datetime(2030, 1, 2, tzinfo=UTC), level="x", odd={1, 2}))
    )
    assert entry["time"] == "2030-01-02T12:00:01.250+00:00"
    assert (entry["level"], entry["event"], entry["run_id"]) == ("info", "run claimed", "r-17")
    assert entry["level_"] == "x", "a field named like one of ours is kept beside it"
    assert sorted(entry["odd"]) == [1, 2]


def test_a_traceback_stays_within_the_object() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        made = record("step_failed", exc_info=sys.exc_info())
    text = JsonFormatter().format(made)
    assert "\n" not in text
    assert "ValueError: broken" in json.loads(text)["traceback"]
    assert TextFormatter().format(made).splitlines()[-1] == "ValueError: broken"


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
@pytest.mark.parametrize("value", [2**70, float("nan"), "\ud800", object(), b"bytes", {"deep": object()}, {1: 2}])
def test_any_value_can_be_logged(formatter: logging.Formatter, value: Any) -> None:
    line = formatter.format(record("event", value=value))
    assert "event" in line
    assert "\n" not in line


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
def test_a_message_that_does_not_fit_its_arguments_is_shown_all_the_same(formatter: logging.Formatter) -> None:
    assert "%d things" in formatter.format(record("%d things", "many"))


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
def test_passwords_are_removed_from_every_part_of_a_line(formatter: logging.Formatter) -> None:
    uri = "mongodb://ann:s3cret@db/x"
    try:
        raise ValueError(f"cannot reach {uri}")
    except ValueError:
        made = record("lost %s", uri, uri=uri, nested={"uri": uri}, exc_info=sys.exc_info())
    line = formatter.format(made)
    assert "s3cret" not in line
    assert "ann" in line
