"""A cancel from another process reaches a handler in a pool: by its signal at once, without the signal at the next renewal."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest
from other_program import other_program
from stored_runs import stored
from waiting_app import evidence, waiting_app, waiting_pool

from streamline_pool.protocol import control
from support import eventually


@pytest.mark.timeout(120)
def test_a_cancel_from_another_process_reaches_a_running_handler_at_once(mongodb_uri: str, database: str, tmp_path: Path) -> None:
    took_s = []
    with (
        waiting_app(mongodb_uri, database) as app,
        waiting_pool(tmp_path, mongodb_uri, database),
        other_program(mongodb_uri, database) as other,
    ):
        slow = app.workflows["slow"]
        for _ in range(5):
            run = slow.start()
            eventually(partial(evidence, app, "entered", run=run.id), timeout=20)
            called_at = time.time()
            assert other.call("cancel_run", run.id)["status"] == "cancelled"
            (left,) = eventually(partial(evidence, app, "left", run=run.id))
            assert left["reason"] == "cancelled"
            took_s.append(left["at"] - called_at)
            assert [step["status"] for step in stored(app, run)["steps"]] == ["running", "pending"]
    print([f"{took * 1000:.0f} ms" for took in took_s])
    assert min(took_s) < 0.1
    assert max(took_s) < 2.0, "renewals are ten seconds apart, so only the signal can be this fast"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_cancel_whose_signal_is_lost_reaches_the_handler_with_the_next_renewal(mongodb_uri: str, database: str, tmp_path: Path) -> None:
    """Signals are hints and may be lost. Here none is sent: the write alone must be enough."""
    with waiting_app(mongodb_uri, database) as app, waiting_pool(tmp_path, mongodb_uri, database, "--lease", "3"):
        run = app.workflows["slow"].start()
        eventually(lambda: evidence(app, "entered", run=run.id), timeout=20)
        cancelled_at = time.time()
        assert app.store().run(control.cancel_run(None, run.id, 0, None, "act")) is not None
        (left,) = eventually(lambda: evidence(app, "left", run=run.id))
        assert left["at"] - cancelled_at < 2.0, "renewals are one second apart"
        assert left["reason"] in ("cancelled", "lease-lost")
        assert stored(app, run)["status"] == "cancelled"
