"""An active run whose document is read again: calls that have begun here keep their places, each once."""

from __future__ import annotations

from typing import Any, cast

import pytest

from streamline_pool.engine.active_run import ActiveRun


def run_with(*names: str, rewinds: int = 0) -> Any:
    return {"_id": "run", "rewinds": rewinds, "steps": [{"stepId": name} for name in ("main", *names)]}


@pytest.mark.parametrize(
    ("stored", "kept"),
    [
        (run_with("a"), ["main", "a", "b", "c"]),  # nothing of what began here is stored
        (run_with("a", "b"), ["main", "a", "b", "c"]),  # a write in doubt has stored one of the two
        (run_with("a", "b", "c"), ["main", "a", "b", "c"]),
        (run_with(rewinds=1), ["main"]),  # it has stored another generation
    ],
)
def test_a_call_that_a_write_in_doubt_has_stored_is_there_once(stored: Any, kept: list[str]) -> None:
    active = ActiveRun(cast(Any, None), cast(Any, None), run_with("a"), "lease", 0.0)
    active.document["steps"] += run_with("b", "c")["steps"][1:]
    active.replace_document(stored)
    assert [step["stepId"] for step in active.document["steps"]] == kept
