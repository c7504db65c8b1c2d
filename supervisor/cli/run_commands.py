"""`streamline-pool runs`: show one stored run or control it, without the application.

`runs list` is in run_list.py and `runs watch` in run_watch.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import click

from streamline_pool.domain.model import Run, RunStatus
from streamline_pool.supervisor.cli.application import open_app
from streamline_pool.supervisor.cli.console import ExitCode, ago, error_line, parsed_json, print_json, short, span
from streamline_pool.supervisor.cli.explain import explain, part_of, seen_lately
from streamline_pool.supervisor.cli.follow import present_run
from streamline_pool.supervisor.cli.options import CONNECTION, json_option, setting_options
from streamline_pool.supervisor.cli.run_list import list_runs
from streamline_pool.supervisor.cli.run_watch import watch
from streamline_pool.supervisor.cli.tables import print_table

__all__ = ["runs"]


@click.group()
def runs() -> None:
    """Inspect stored runs, or control one."""


runs.add_command(list_runs)
runs.add_command(watch)


@runs.command()
@click.argument("run_id")
@setting_options(*CONNECTION)
@json_option
def show(run_id: str, as_json: bool, **values: Any) -> int:
    """Show one run: its steps, its data, and what it waits for."""
    with open_app(values) as app:
        run = present_run(app, run_id)
        now = app.store().now()
        hosts = [] if as_json or run.is_terminal else seen_lately(app.workers(), now)
    if as_json:
        print_json(run.to_dict())
    else:
        _print_run(run, hosts, now)
    return ExitCode.OK


def _print_run(run: Run, hosts: Sequence[Mapping[str, Any]], now: datetime) -> None:
    click.echo(f"Run {run.id} of {run.workflow_id} {run.version}: {run.status}{', paused' if run.paused else ''}")
    click.echo(explain(run.to_dict(), hosts, now))
    click.echo()
    rows = [
        (
            step.step_id,
            step.status.value,
            str(step.attempts),
            "-" if step.duration is None else span(step.duration),
            short(error_line(step.error), 100) if isinstance(step.error, Mapping) else "",
        )
        for step in run.steps
    ]
    print_table(("STEP", "STATUS", "ATTEMPTS", "DURATION", "ERROR"), rows)
    click.echo()
    facts = {"queue": run.queue, "priority": run.priority, "created": ago(run.created_at, now), "updated": ago(run.updated_at, now)}
    payloads = {"tags": list(run.tags), "input": run.input, "context": run.context, "output": run.output, "meta": run.meta}
    facts |= {name: short(value, 400) for name, value in payloads.items() if value not in (None, [], {})}
    for name, value in facts.items():
        click.echo(f"{name + ':':10} {value}")
    traceback = part_of(run.to_dict(), "error").get("traceback")
    if traceback:
        click.echo(f"\n{str(traceback).rstrip()}")


@runs.command()
@click.argument("run_id")
@click.option("--reason", metavar="TEXT", help="Stored with the run, and shown by `runs show`.")
@setting_options(*CONNECTION)
@json_option
def cancel(run_id: str, reason: str | None, as_json: bool, **values: Any) -> int:
    """End a run for good, whichever worker drives it. A run that has ended stays as it is."""
    with open_app(values) as app:
        run = app.cancel_run(run_id, reason=reason)
    cancelled = run.status is RunStatus.CANCELLED
    ended = f"run {run.id} had already ended ({run.status}); nothing was changed"
    return _print_outcome(run, as_json, f"run {run.id} is cancelled" if cancelled else ended)


@runs.command()
@click.argument("run_id")
@click.option("--reason", metavar="TEXT", help="Stored with the run, and shown by `runs show`.")
@setting_options(*CONNECTION)
@json_option
def pause(run_id: str, reason: str | None, as_json: bool, **values: Any) -> int:
    """Start no further step of a run until it is resumed. A step in progress is finished and stored."""
    with open_app(values) as app:
        run = app.pause_run(run_id, reason=reason)
    ended = f"run {run.id} had already ended ({run.status}); nothing was changed"
    return _print_outcome(run, as_json, f"run {run.id} is paused" if run.paused else ended)


@runs.command(short_help="Resume a paused run, or answer a run that waits.")
@click.argument("run_id")
@click.option("--payload", "payload_text", metavar="JSON", help="The answer; @FILE reads a file, - standard input. Default: null.")
@setting_options(*CONNECTION)
@json_option
def resume(run_id: str, payload_text: str | None, as_json: bool, **values: Any) -> int:
    """Resume a paused run, or answer a run that waits.

    A run that waits (ctx.wait) goes on with the payload as the output of its step. A paused run goes on where it was,
    and takes no payload.
    """
    payload = parsed_json("--payload", payload_text)
    with open_app(values) as app:
        run = app.resume_run(run_id, payload)
    return _print_outcome(run, as_json, f"run {run.id} goes on{f' with step {run.current_step_id}' if run.current_step_id else ''}")


@runs.command()
@click.argument("run_id")
@click.argument("step_id")
@setting_options(*CONNECTION)
@json_option
def rewind(run_id: str, step_id: str, as_json: bool, **values: Any) -> int:
    """Run a step and all later ones of a run again, whether the run has ended or not. A cancelled run stays cancelled."""
    with open_app(values) as app:
        run = app.rewind_run(run_id, step_id)
    return _print_outcome(run, as_json, f"run {run.id} is back at step {step_id}{', and paused' if run.paused else ''}")


def _print_outcome(run: Run, as_json: bool, sentence: str) -> int:
    if as_json:
        print_json(run.to_dict())
    else:
        click.echo(sentence)
    return ExitCode.OK
