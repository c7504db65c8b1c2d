"""What a step is expected to ask for: everything until it was observed, then what it asked for, whatever the run."""

from __future__ import annotations

from typing import Any, cast

import pytest

from streamline_pool import DataCorruptionError, Streamline
from streamline_pool.domain.document import RunDocument
from streamline_pool.engine.loaded_outputs import LoadedOutputs
from streamline_pool.engine.output_demand import OutputDemand
from streamline_pool.protocol.codec import encode_payload

STEPS = {"a": lambda ctx: 1, "b": lambda ctx: 1, "c": lambda ctx: 1, "d": (lambda ctx: 1, {"condition": lambda ctx, run: True})}
DEFINITION = Streamline().workflow("flow", steps=cast(Any, STEPS)).definition


def run(name: str, inline: tuple[str, ...] = ()) -> RunDocument:
    """A run whose first two steps have outputs beside it, except those that are `inline`."""
    steps = [{"stepId": step, "output": 1 if step in inline else {"$external": f"{name}-{step}"}} for step in ("a", "b")]
    return cast(RunDocument, {"_id": name, "steps": [*steps, {"stepId": "c"}, {"stepId": "d"}], "output": None})


def test_everything_is_expected_until_the_step_was_observed() -> None:
    demand = OutputDemand()
    assert demand.expected(DEFINITION, 2, run("r")) == ["r-a", "r-b"]
    demand.observe(DEFINITION, 2, run("r"), ())
    assert demand.expected(DEFINITION, 2, run("s")) == []
    assert demand.expected(DEFINITION, 1, run("s")) == ["s-a", "s-b"], "another step"


def test_what_was_asked_for_once_is_expected_in_every_run() -> None:
    demand = OutputDemand()
    demand.observe(DEFINITION, 2, run("r"), ["r-b"])
    assert demand.expected(DEFINITION, 2, run("s")) == ["s-b"]
    demand.observe(DEFINITION, 2, run("s"), [])
    demand.observe(DEFINITION, 2, run("s"), ["s-a"])
    assert demand.expected(DEFINITION, 2, run("t")) == ["t-a", "t-b"]
    assert demand.expected(DEFINITION, 2, run("t", inline=("a",))) == ["t-b"]


def test_a_condition_gets_the_whole_run() -> None:
    demand = OutputDemand()
    demand.observe(DEFINITION, 3, run("r"), [])
    assert demand.expected(DEFINITION, 3, run("s")) == ["s-a", "s-b"]


def test_loaded_outputs_are_decoded_anew_and_recorded() -> None:
    """A caller that changes what it got must not change what the next one gets."""
    loaded: list[str] = []

    def load(output_id: str) -> bytes:
        loaded.append(output_id)
        return encode_payload([output_id], "x")

    outputs = LoadedOutputs(load)
    outputs.add("here", encode_payload([1], "x"))
    assert outputs["here"] is not outputs["here"]
    outputs.asked = set()
    assert (outputs["here"], outputs["there"], outputs["there"]) == ([1], ["there"], ["there"])
    assert (loaded, outputs.asked) == (["there"], {"here", "there"})
    assert ("absent" in outputs, list(outputs), len(outputs)) == (False, ["here", "there"], 2)


def test_the_error_of_a_damaged_output_is_kept() -> None:
    """The driver ends the run for it, and must not take an error of the same type that the handler made for it."""
    error = DataCorruptionError("lost")

    def load(output_id: str) -> bytes:
        raise error

    outputs = LoadedOutputs(load)
    with pytest.raises(DataCorruptionError):
        outputs["x"]
    assert outputs.damaged is error
