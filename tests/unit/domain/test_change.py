"""A change that the tables of moves do not allow cannot be made."""

from __future__ import annotations

from typing import Any, cast

import pytest

from streamline_pool.domain.change import ChangeKind, make_change
from streamline_pool.domain.document import RunDocument, StepDocument
from streamline_pool.domain.model import RUN_MOVES, STEP_MOVES, RunStatus, StepStatus


def run(status: str = "running", step_status: str = "running") -> RunDocument:
    return cast(RunDocument, {"_id": "r", "status": status, "steps": [step(step_status)], "currentStepId": "a", "rev": 1})


def step(status: str) -> StepDocument:
    return {"stepId": "a", "status": status, "attempts": 1}


@pytest.mark.parametrize("new", RunStatus)
@pytest.mark.parametrize("old", RunStatus)
def test_a_run_changes_its_status_only_as_the_table_allows(old: RunStatus, new: RunStatus) -> None:
    """A wrong status would be stored for ever: a change can only be refused where it is made."""

    def make() -> Any:
        return make_change(run(old.value), ChangeKind.ADVANCE, {"status": new.value}, {})

    if new in RUN_MOVES[old]:
        assert make().fields == {"status": new.value}
    else:
        with pytest.raises(AssertionError, match=f"a run goes from {old} to {new}"):
            make()


@pytest.mark.parametrize("new", StepStatus)
@pytest.mark.parametrize("old", StepStatus)
def test_a_step_changes_its_status_only_as_the_table_allows(old: StepStatus, new: StepStatus) -> None:
    def make() -> Any:
        return make_change(run(step_status=old.value), ChangeKind.ADVANCE, {}, {0: step(new.value)})

    if new in STEP_MOVES[old]:
        assert make().steps[0]["status"] == new.value
    else:
        with pytest.raises(AssertionError, match=f"step a goes from {old} to {new}"):
            make()
