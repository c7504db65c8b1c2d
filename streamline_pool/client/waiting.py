"""Waiting for a run to end. A client procedure, without I/O.

Owns how the deadline, the polling interval and the "ended" signals work together.
"""

from __future__ import annotations

import math
from datetime import timedelta

from streamline_pool.domain.model import TERMINAL, Run, seconds
from streamline_pool.protocol import signals
from streamline_pool.protocol.run_document import check_run_id, parse_run
from streamline_pool.storage.procedures import AwaitSignal, Procedure

from .run_control import making_run, reading_run
from .services import Services

__all__ = ["waiting_for_run"]


def waiting_for_run(
    services: Services, workflow_id: str, run_id: str, timeout: float | timedelta | None, poll_interval: float | timedelta
) -> Procedure[Run]:
    """The run once it is terminal; see `Workflow.wait_for`."""
    clock = services.env.clock
    until = None if timeout is None else clock.monotonic() + seconds(timeout, "wait_for: timeout", zero_ok=True)
    poll_s = seconds(poll_interval, "wait_for: poll_interval")
    if until is not None:
        # The time is cut into equal pieces, so the last poll is at the deadline and not after it.
        left_s = max(0.001, until - clock.monotonic())
        poll_s = left_s / math.ceil(left_s / poll_s)
    check_run_id(run_id)
    yield from services.ensure()
    # From the beginning of the collection: no clock is asked, and what an earlier end of a rewound run has left costs one read.
    tail = signals.signals_after(None, kind="ended", runs=run_id)
    while True:
        document = yield from reading_run(workflow_id, run_id)
        run = parse_run(document)
        if run.status in TERMINAL:
            return (yield from making_run(document))
        if until is not None and clock.monotonic() >= until:
            raise TimeoutError(f"run {run_id} is still {run.status} after {timeout} s, at step {run.current_step_id}")
        yield AwaitSignal(tail, poll_s)
