"""Sub-commands about the application and its pools: check, demo, init-db, start."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import click

from streamline_pool.client.app import Streamline
from streamline_pool.client.run_lists import indexing_lists
from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.domain.model import Run, RunStatus
from streamline_pool.protocol.run_list import LIST_FIELDS
from streamline_pool.supervisor.cli.application import (
    apply_settings,
    check_connection,
    check_rights,
    load_app,
    load_settings,
    open_app,
    private_server_is_ours,
    server_settings,
    uri_faults_of,
)
from streamline_pool.supervisor.cli.console import (
    CommandError,
    ExitCode,
    error_line,
    parsed_json,
    print_error,
    print_json,
    short,
    span,
    unreachable_text,
)
from streamline_pool.supervisor.cli.explain import explain, seen_lately
from streamline_pool.supervisor.cli.follow import follow, present_run
from streamline_pool.supervisor.cli.options import CONNECTION, json_option, setting_options
from streamline_pool.supervisor.cli.tables import print_table

__all__ = ["ALL", "check_some_pool_claims", "ended_well", "print_result"]


@click.command(short_help="Import your application, validate it, and check the database.")
@setting_options(*CONNECTION)
@json_option
def check(as_json: bool, **values: Any) -> int:
    """Import your application, validate its workflows, and check that the database answers.

    Exit code 0: no fault; 2: the application has a fault; 3: the database does not answer or refuses.
    """
    resolved = load_settings(values, quiet=True)
    app, resolved = load_app(resolved, needed_for="check")
    assert app is not None, "load_app raises without an application"
    with server_settings(resolved) as settings, uri_faults_of(resolved):
        apply_settings(app, settings).freeze()
        report: dict[str, Any] = {
            "app": settings.app,
            "workflows": _described(app),
            "queues": sorted({flow.queue for flow in app.workflows.values()}),
        }
        try:
            check_connection(app)
            check_rights(app)
            facts, fault = dict(app.server_info()), None
        except StoreUnavailableError as exc:
            facts, fault = {}, unreachable_text(exc)
        finally:
            app.close()
    report |= {"ok": fault is None, "database": facts | {"ok": fault is None} | ({"error": fault} if fault else {})}
    if as_json:
        print_json(report)
    else:
        _print_check(report, resolved.settings.log_format)
    return ExitCode.UNREACHABLE if fault else ExitCode.OK


def _described(app: Streamline) -> list[dict[str, Any]]:
    return [{"id": flow.id, "version": flow.version, "queue": flow.queue, "steps": list(flow.steps)} for flow in app.workflows.values()]


def _print_check(report: Mapping[str, Any], log_format: str) -> None:
    click.echo(f"Application {report['app']}: {len(report['workflows'])} workflow(s)")
    print_table(
        ("WORKFLOW", "VERSION", "QUEUE", "STEPS"),
        [(flow["id"], flow["version"], flow["queue"], " → ".join(flow["steps"])) for flow in report["workflows"]],
    )
    if not report["workflows"]:
        click.echo("It defines no workflow: a pool would have nothing to do. Is the module with the workflows imported?")
    facts = report["database"]
    if facts["ok"]:
        click.echo(f"Database {facts['database']}: MongoDB {facts['version']}, {facts['topology']}")
        if facts["topology"] == "standalone":
            click.echo("Warning: this server is not a replica set, so one lost machine loses acknowledged work, and sessions do not work.")
    else:
        print_error(facts["error"], log_format)


@click.command("init-db")
@click.option(
    "--index",
    "lists",
    multiple=True,
    metavar="FIELD",
    help=f"Also the index that serves `runs list` by FIELD: {', '.join(LIST_FIELDS)}, or context.NAME. Repeatable.",
)
@setting_options(*CONNECTION)
@json_option
def init_db(lists: tuple[str, ...], as_json: bool, **values: Any) -> int:
    """Create the collections and indexes that the engine needs. It may be repeated.

    With --index: also indexes for lists of runs. Each costs a write when a run is stored; that of the status also costs one
    whenever the status changes. Lists of less than ten thousand runs need none.
    """
    with open_app(values) as app:
        names = list(app.init_db())
        names += app.connections.drive(indexing_lists(lists)) if lists else []
        facts = app.server_info()
    if as_json:
        print_json({"database": facts["database"], "names": names})
    else:
        click.echo(f"Database {facts['database']} is ready: " + ", ".join(names))
    return ExitCode.OK


@click.command(short_help="Store a run of WORKFLOW, for any pool to work on.")
@click.argument("workflow")
@click.option("--input", "input_text", metavar="JSON", help="The run's input; @FILE reads a file, - reads standard input.")
@click.option("--id", "run_id", metavar="TEXT", help="Id of the new run. Default: a random one.")
@click.option("--idempotency-key", metavar="TEXT", help="If a run has this key already, show that one and start nothing.")
@click.option("--priority", type=int, default=0, show_default=True, metavar="N", help="Higher is claimed first.")
@click.option("--queue", metavar="NAME", help="Put the run on this queue instead of the workflow's own.")
@click.option("--wait", is_flag=True, help="Wait for the run to end. Exit code 0: done; 1: failed or cancelled.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="With --wait: how long at most.")
@setting_options(*CONNECTION)
@json_option
def start(workflow: str, input_text: str | None, wait: bool, timeout: float | None, as_json: bool, **values: Any) -> int:
    """Store a run of WORKFLOW, for any pool to work on, and print its id.

    With --wait: say on standard error when an attempt fails and when the next one follows, and when a worker is lost. Print how
    the run ended on standard output.
    """
    given = {name: values.pop(name) for name in ("run_id", "idempotency_key", "priority", "queue")}
    run_input = parsed_json("--input", input_text)
    with open_app(values, needed_for="start") as app:
        if workflow not in app.workflows:
            raise CommandError(_no_such_workflow(workflow, list(app.workflows)), ExitCode.USAGE)
        flow = app.workflows[workflow]
        run = flow.start(run_input, **given)
        if not as_json:
            click.echo(run.id)
        if wait:
            check_some_pool_claims(app, run)
            try:
                _report_setbacks(app, run, timeout)
            except TimeoutError:
                raise CommandError(
                    f"run {run.id} has not ended within {timeout:g} s; it goes on. Inspect it with: streamline-pool runs show {run.id}",
                    ExitCode.CRASH,
                ) from None
            run = present_run(app, run.id)
    if as_json:
        print_json(run.to_dict())
    elif wait:
        print_result(run)
    return ExitCode.OK if not wait or ended_well(run) else ExitCode.CRASH


def _report_setbacks(app: Streamline, run: Run, timeout_s: float | None) -> None:
    """Wait until the run has ended. Say on standard error what went wrong meanwhile. TimeoutError after `timeout_s` seconds."""
    for moment in follow(app, run.id, app.env, timeout_s):
        for line in moment.lines:
            if line.is_setback:
                click.echo(line.text, err=True)


def check_some_pool_claims(app: Streamline, run: Run) -> None:
    """Before a wait: warn if no live pool can claim the run, and raise CommandError if no pool can appear while this waits."""
    if private_server_is_ours():
        raise CommandError(
            f"run {run.id} is stored, but no pool works on it: no pool runs in this folder. Start one (streamline-pool --embedded), "
            f"then, in another terminal: streamline-pool --embedded runs watch {run.id}",
            ExitCode.CRASH,
        )
    now = app.store().now()
    hosts = seen_lately(app.workers(), now)
    lane = f"{run.queue}/{run.workflow_id}/{run.version}"
    if not any(lane in (host.get("lanes") or ()) for host in hosts):
        click.echo(
            f"{explain(run.to_dict(), hosts, now)}\nThis command waits until a pool claims it; Ctrl-C ends the wait, not the run.", err=True
        )


def _no_such_workflow(workflow: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(workflow, known, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"It has: {', '.join(known) or 'none'}."
    return f"the application has no workflow {workflow!r}. {hint}"


def ended_well(run: Run) -> bool:
    """Whether the run is done, neither failed nor cancelled: a script that waited for it should go on."""
    return run.status is RunStatus.DONE


def print_result(run: Run) -> None:
    """Print how a run ended."""
    took = f" after {span((run.ended_at - run.created_at).total_seconds())}" if run.ended_at else ""
    click.echo(f"{run.status}{took}")
    if run.error:
        click.echo(f"error: {error_line(run.error)}")
    elif run.output is not None:
        click.echo(f"output: {short(run.output, 2000)}")


@click.command(short_help="See the pool at work on your own standard library.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Index only about N of the files, evenly spread.")
@click.option("--workers", type=click.IntRange(1, 1024), default=4, show_default=True, metavar="N", help="Worker processes.")
@click.option(
    "--concurrency", type=click.IntRange(1, 10_000), default=16, show_default=True, metavar="N", help="Runs in flight per worker."
)
def demo(limit: int | None, workers: int, concurrency: int) -> int:
    """Index every Python file of your standard library, one run per file, on a private MongoDB.

    One worker is killed half-way. At the end the stored counts are compared with a count made without the engine. Exit code 0:
    they are equal, and no result was accepted twice.
    """
    from streamline_pool.demo.program import run_demo  # imports PyMongo, and defines an application

    return run_demo(limit=limit, workers=workers, concurrency=concurrency)


ALL: tuple[click.Command, ...] = (check, demo, init_db, start)
