"""`streamline-pool workers`: what an operator learns of each worker of a live pool."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from cli_shell import Shell

from streamline_pool.config.package_version import package_version
from support import eventually


def test_workers_says_what_each_worker_is_and_how_old_the_figures_are(shell: Shell, pool: subprocess.Popen[str]) -> None:
    """An operator who rolls out a version must see which processes run it, without a look at every host."""
    [worker] = eventually(lambda: [worker for worker in shell.json("workers") if worker["state"] == "ready"], timeout=20)
    assert (worker["pool_pid"], worker["application"], worker["version"]) == (pool.pid, "shop:app", package_version())
    assert worker["queues"] == ["default", "mail"]
    assert worker["workflows"] == [
        {"id": "asking", "version": "1.0.0"},
        {"id": "orders", "version": "1.0.0"},
        {"id": "slow", "version": "2.0.0"},
    ]
    assert worker["host"]
    assert Path(f"/proc/{worker['pid']}").exists()
    assert 0 <= worker["reported_age_s"] <= worker["age_s"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", worker["reported_at"])
    assert worker["rss_bytes"] is None or worker["rss_bytes"] > 2**20
    head, row = shell("workers").stdout.splitlines()
    cells = dict(zip(re.split(r"  +", head), re.split(r"  +", row), strict=True))
    assert cells["PID"] == str(worker["pid"])
    assert cells["POOL"] == str(pool.pid)
    assert (cells["APPLICATION"], cells["VERSION"], cells["QUEUES"]) == ("shop:app", package_version(), "default, mail")
    assert cells["WORKFLOWS"] == "asking 1.0.0, orders 1.0.0, slow 2.0.0"
    assert cells["REPORTED"].endswith("ago")
    assert re.fullmatch(r"-|\d+ MiB", cells["MEMORY"])
    assert cells["AGE"].split()[1] in ("ms", "s", "min")
