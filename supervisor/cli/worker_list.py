"""`streamline-pool workers`: the worker processes of all pools. Owns what a worker's row says, and the age of its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import click

from streamline_pool.supervisor.cli.application import open_app
from streamline_pool.supervisor.cli.console import ExitCode, ago, print_json, short, span
from streamline_pool.supervisor.cli.explain import seen_lately
from streamline_pool.supervisor.cli.options import CONNECTION, json_option, setting_options
from streamline_pool.supervisor.cli.tables import print_table, size

__all__ = ["described_workers", "workers"]

_NAMES_MAX = 60  # characters of a cell that lists names; --json has all of them


@click.command(short_help="List the worker processes of the pools seen lately.")
@setting_options(*CONNECTION)
@json_option
def workers(as_json: bool, **values: Any) -> int:
    """List the worker processes of every pool that was seen in the last minute.

    POOL is the process id of the pool's supervisor, VERSION that of streamline-pool, AGE the time since the worker's start.
    A pool stores these figures within seconds of a start or an end of workers, and every half minute otherwise: REPORTED
    says how old they are. With --json: an array with one object for each worker, and more figures.
    """
    with open_app(values) as app:
        now = app.store().now()
        hosts = seen_lately(app.workers(), now)
    found = described_workers(hosts, now)
    if as_json:
        print_json(found)
    elif found:
        print_table([heading for heading, _ in _COLUMNS], [[cell(worker, now) for _, cell in _COLUMNS] for worker in found])
    else:
        click.echo("No pool has been seen in the last minute. Start one with: streamline-pool", err=True)
    return ExitCode.OK


def described_workers(hosts: Sequence[Mapping[str, Any]], now: datetime) -> list[dict[str, Any]]:
    """One mapping for each worker in these host records: the fields of the record, and facts of its pool.

    `age_s` is seconds since the worker's start and `reported_age_s` seconds since the record was written, both as of `now`.
    None stands for what the record does not say: a pool of an older version writes fewer fields.
    """
    return [_described(host, worker, now) for host in hosts for worker in host.get("workers") or ()]


def _described(host: Mapping[str, Any], worker: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    lanes = [parts for parts in (str(lane).split("/", 2) for lane in host.get("lanes") or ()) if len(parts) == 3]
    seen_at, uptime_s = host.get("seenAt"), worker.get("uptime_s")
    reported_age_s = round((now - seen_at).total_seconds(), 1) if isinstance(seen_at, datetime) else None
    pool = {
        "host": host.get("host"),
        "pool": host.get("_id"),
        "pool_pid": host.get("pid"),
        "pool_state": host.get("state"),
        "application": host.get("app"),
        "version": host.get("version"),
        "queues": sorted({queue for queue, _, _ in lanes}),
        "workflows": [{"id": flow, "version": version} for flow, version in sorted({(flow, version) for _, flow, version in lanes})],
        "reported_at": seen_at,
        "reported_age_s": reported_age_s,
        "age_s": None if uptime_s is None or reported_age_s is None else round(uptime_s + max(0.0, reported_age_s), 1),
    }
    return {**pool, **worker}


def _age(worker: Mapping[str, Any]) -> str | None:
    return None if worker["age_s"] is None else span(worker["age_s"])


def _names(names: Sequence[str]) -> str:
    return short(", ".join(names), _NAMES_MAX)


_COLUMNS = (
    ("HOST", lambda worker, _: worker["host"]),
    ("PID", lambda worker, _: worker.get("pid")),
    ("STATE", lambda worker, _: worker.get("state")),
    ("POOL", lambda worker, _: worker["pool_pid"]),
    ("APPLICATION", lambda worker, _: worker["application"]),
    ("VERSION", lambda worker, _: worker["version"]),
    ("QUEUES", lambda worker, _: _names(worker["queues"])),
    ("MEMORY", lambda worker, _: size(worker.get("rss_bytes"))),
    ("AGE", lambda worker, _: _age(worker)),
    ("IN FLIGHT", lambda worker, _: worker.get("in_flight")),
    ("RUNS", lambda worker, _: worker.get("runs_total")),
    ("STEPS", lambda worker, _: worker.get("steps_total")),
    ("REPORTED", lambda worker, now: ago(worker["reported_at"], now)),
    ("WORKFLOWS", lambda worker, _: _names([f"{flow['id']} {flow['version']}" for flow in worker["workflows"]])),
)
