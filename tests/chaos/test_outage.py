"""The database is unreachable for longer than any timeout, and comes back: the pool continues without a restart."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from chaos_app import APP, acceptances, assert_nothing_is_wedged, log_line
from pool_client import loaded_app
from pool_process import running

from streamline_pool import Streamline
from streamline_pool.embedded import EmbeddedServer
from support import eventually

pytestmark = pytest.mark.chaos

OUTAGE_S = 20.0
RESUMED_WITHIN_S = 3.0


@pytest.mark.timeout(180)
@pytest.mark.parametrize("lease", ["30", "5"])
def test_after_twenty_seconds_without_a_database_work_resumes_within_three(
    mongod: EmbeddedServer, database: str, tmp_path: Path, lease: str
) -> None:
    """Active, sleeping and unclaimed runs must all continue without help, also if their leases have expired."""
    options = ("--workers", "2", "--concurrency", "5", "--lease", lease)
    with running(tmp_path, APP, mongod.uri, *options, database=database) as pool, loaded_app(APP, mongod.uri, database) as app:
        pool.ready()
        runs = app.workflows["busy"].start_many([{"seconds": 0.5}] * 60)
        eventually(lambda: app.runs.count_documents({"lease.expiresAt": {"$exists": True}}) == 10)
        app.close()
        mongod.halt()
        stopped_at = time.monotonic()
        eventually(lambda: time.monotonic() - stopped_at > OUTAGE_S, timeout=OUTAGE_S + 5)
        mongod.restart()
        back_at = time.monotonic()
        with acceptances(app) as accepted:
            before = finished_steps(app)
            eventually(lambda: finished_steps(app) > before, timeout=30)
            resumed_s = time.monotonic() - back_at
            eventually(lambda: app.runs.count_documents({"status": "done"}) == len(runs), timeout=90)
        log_line(f"lease {lease} s: resumed {resumed_s:.2f} s after the server was back")
        assert_nothing_is_wedged(app)
        assert [n for n in accepted.values() if n != 1] == []
        assert not pool.logged("child_died"), "no worker may die of the outage"
        pool.signal(signal.SIGTERM)
        assert pool.exit_code() == 0
    assert resumed_s < RESUMED_WITHIN_S


def finished_steps(app: Streamline) -> int:
    rows = list(app.runs.aggregate([{"$unwind": "$steps"}, {"$match": {"steps.status": "done"}}, {"$count": "n"}]))
    return int(rows[0]["n"]) if rows else 0
