"""What calls of a durable function have returned, as its run has it stored.

Owns the loading of outputs beside the run, ahead of a replay.
"""

from __future__ import annotations

import asyncio
from typing import Any

from streamline_pool.domain.document import StepDocument
from streamline_pool.domain.errors import DataCorruptionError, MaxRetriesExceededError
from streamline_pool.domain.model import StepStatus
from streamline_pool.engine.active_run import ActiveRun
from streamline_pool.engine.group_outputs import GroupOutputs
from streamline_pool.engine.run_context import copied
from streamline_pool.protocol.codec import decode_payload
from streamline_pool.protocol.payloads import EXTERNAL_KEY, is_external
from streamline_pool.storage.outputs import Wanted

__all__ = ["Results", "error_of_call", "ignore_result"]

_AHEAD_MAX = 32  # outputs that are loaded together. A guess
_AHEAD_BYTES = 4 * 1024 * 1024  # of them, if the next ones are as large as those before. A guess


class Results:
    """Results of the calls of one entry. In the event loop."""

    def __init__(self, active: ActiveRun, outputs: GroupOutputs) -> None:
        self._active = active
        self._outputs = outputs
        self._reads: dict[str, asyncio.Future[bytes]] = {}  # by output id: under way, or not asked for yet
        self._order: list[str] | None = None  # of the stored outputs
        self._mean_bytes = 64 * 1024.0  # of an output; a guess until one was read

    async def of(self, call: StepDocument) -> Any:
        """What a call that has ended returns. Raises what it raises, and DataCorruptionError if its output is not there."""
        if call["status"] == StepStatus.FAILED.value:
            raise error_of_call(self._active.run_id, call)
        output = call.get("output")
        return await self._load(output[EXTERNAL_KEY]) if is_external(output) else copied(output)

    def keep(self, output_id: str, content: bytes) -> None:
        """An output that was made here: its call returns it without reading it."""
        done = self._reads[output_id] = asyncio.get_running_loop().create_future()
        done.set_result(content)

    async def _load(self, output_id: str) -> Any:
        if output_id not in self._reads:
            self._read_from(output_id)
        try:
            content = await self._reads.pop(output_id)
        except DataCorruptionError as exc:
            self._active.outputs.damaged = exc
            raise
        self._mean_bytes = (self._mean_bytes + len(content)) / 2
        return decode_payload(content)

    def _read_from(self, output_id: str) -> None:
        """Begin to read this output, and those of the calls that follow, which a replay asks for next."""
        if self._order is None or output_id not in self._order:
            steps = self._active.document["steps"][1:]
            self._order = [step["output"][EXTERNAL_KEY] for step in steps if is_external(step.get("output"))]
        first = self._order.index(output_id)
        count = max(1, min(_AHEAD_MAX, int(_AHEAD_BYTES / self._mean_bytes)))
        for each in self._order[first : first + count]:
            if each not in self._reads:
                self._reads[each] = self._outputs.read(Wanted(self._active.document, each))
                self._reads[each].add_done_callback(ignore_result)
        self._order = self._order[first + 1 :]


def error_of_call(run_id: str, call: StepDocument, traceback: str = "") -> MaxRetriesExceededError:
    """The error that a call without attempts left raises, also in a replay. `traceback`: of its last attempt, for readers."""
    error = call.get("error") or {}
    cause = f"{error.get('code')}: {error.get('type')}: {error.get('message')}"
    message = f"step {call['stepId']} failed {call.get('failures', 1)} times, the last time with {cause}"
    made = MaxRetriesExceededError(message, run_id=run_id, step_id=call["stepId"], error=dict(error))
    if traceback:
        made.add_note(traceback)
    return made


def ignore_result(done: asyncio.Future[Any]) -> None:
    """For a future whose exception may never be asked for."""
    if not done.cancelled():
        done.exception()
