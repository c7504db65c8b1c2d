"""Which earlier outputs each step has asked for in this process, so that a claim loads those and no others.

A guess from the past: what it leaves out is loaded when the handler asks for it, which blocks that handler for one query.
"""

from __future__ import annotations

from collections.abc import Iterable

from streamline_pool.domain.definition import Definition
from streamline_pool.domain.document import RunDocument
from streamline_pool.protocol.payloads import EXTERNAL_KEY, external_ids, is_external

__all__ = ["OutputDemand"]

_StepKey = tuple[str, str, str]  # workflow id, version, step id


class OutputDemand:
    """One for all runs of an engine. As large as the number of the application's steps."""

    def __init__(self) -> None:
        self._asked: dict[_StepKey, set[str]] = {}  # the ids of the steps whose outputs were asked for; absent: never observed

    def expected(self, definition: Definition, place: int, document: RunDocument) -> list[str]:
        """Ids of the outputs to load before the step at `place` is entered: all of them, until the step was observed.

        A `condition` gets the whole run, so everything is loaded for it.
        """
        step = definition.steps[place]
        asked = self._asked.get(_key(definition, place))
        if asked is None or step.condition is not None:
            return external_ids(document)
        return [output_id for step_id, output_id in _holders(document) if step_id in asked]

    def observe(self, definition: Definition, place: int, document: RunDocument, output_ids: Iterable[str]) -> None:
        """The handler or a condition of the step has ended, and asked for these outputs."""
        asked = self._asked.setdefault(_key(definition, place), set())
        wanted = set(output_ids)
        if wanted:
            asked.update(step_id for step_id, output_id in _holders(document) if output_id in wanted)


def _key(definition: Definition, place: int) -> _StepKey:
    return definition.workflow_id, definition.version, definition.steps[place].id


def _holders(document: RunDocument) -> list[tuple[str, str]]:
    """The steps whose output is beside the run, each with the id of that output."""
    return [(step["stepId"], step["output"][EXTERNAL_KEY]) for step in document["steps"] if is_external(step.get("output"))]
