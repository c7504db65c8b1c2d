"""A collection is dropped while a pool runs: the pool creates it again with its indexes, and receives signals again."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from pool_process import running

from streamline_pool import Streamline
from support import eventually, present

APP = """
from streamline_pool import Streamline
app = Streamline()
wf = app.workflow("w", steps={"one": lambda ctx: 1})
"""


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_a_pool_outlives_its_dropped_collections(mongodb_uri: str, database: str, tmp_path: Path) -> None:
    """Without its index no claim succeeds until an operator restarts the pool. Signals in an ordinary collection wake no
    worker, and fill the disk."""
    app = Streamline(mongodb_uri, database=database)
    workflow = app.workflow("w", steps={"one": lambda ctx: 1})
    with running(tmp_path, APP, mongodb_uri, "--workers", "2", "--lease", "5", database=database) as pool, app:
        pool.ready()
        workflow.wait_for(workflow.start().id, timeout=10)  # from here on this client creates no collections either
        for name in ("runs", "signals"):
            app.runs.database.drop_collection(f"workflow_{name}")
        workflow.start_many([None] * 20)
        eventually(lambda: app.runs.count_documents({"status": "done"}) == 20, timeout=20)
        assert "streamline_claimable" in app.runs.index_information()
        eventually(lambda: app.runs.database.command("collStats", "workflow_signals")["capped"], timeout=30)
        eventually(lambda: heard_at_once(app), timeout=10)


def heard_at_once(app: Streamline) -> bool:
    started_at = time.monotonic()
    run = app.workflows["w"].start()
    eventually(lambda: present(app.get_run(run.id)).is_terminal)
    return time.monotonic() - started_at < 0.5
