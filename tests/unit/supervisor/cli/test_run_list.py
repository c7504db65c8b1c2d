"""What is typed to filter a list: instants and values of the context."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from streamline_pool.supervisor.cli.run_list import context_values, instant

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("2h", NOW - timedelta(hours=2)),
        ("90", NOW - timedelta(seconds=90)),
        ("7d", NOW - timedelta(days=7)),
        ("2026-11-28", datetime(2026, 11, 28, tzinfo=UTC)),
        ("2026-11-28T14:00", datetime(2026, 11, 28, 14, tzinfo=UTC)),
        ("2026-11-28T14:00Z", datetime(2026, 11, 28, 14, tzinfo=UTC)),
        ("2026-11-28T14:00+02:00", NOW),
    ],
)
def test_an_instant_is_an_age_or_a_time(text: str, meant: datetime) -> None:
    assert instant(text, NOW) == meant


@pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01", "99999999999d", "-2h"])
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        instant(text, NOW)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("42", [42, "42"]),
        ('"42"', ["42"]),
        ("4.5", [4.5, "4.5"]),
        ("9223372036854775807", [2**63 - 1, "9223372036854775807"]),
        ("9223372036854775808", ["9223372036854775808"]),
        ("true", [True, "true"]),
        ("null", [None, "null"]),
        ("acme", ["acme"]),
        ("a=b", ["a=b"]),
        ("", [""]),
        ("{a", ["{a"]),
    ],
)
def test_a_value_is_what_a_stored_field_may_hold(text: str, values: list[Any]) -> None:
    """A shell has no types. An operator who types 42 does not know whether the customer's number is stored as a number or as text."""
    found = context_values(text)
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


@pytest.mark.parametrize("text", ["[1]", '{"a": 1}'])
def test_a_list_or_document_is_no_value(text: str) -> None:
    with pytest.raises(ValueError):
        context_values(text)
