"""`streamline-pool runs watch`: what happens to a run until it has ended. The lines are in run_progress.py, their look in terminal.py."""

from __future__ import annotations

from typing import Any

import click

from streamline_pool.supervisor.cli.application import open_app
from streamline_pool.supervisor.cli.console import ExitCode, print_json
from streamline_pool.supervisor.cli.follow import follow, present_run
from streamline_pool.supervisor.cli.options import CONNECTION, json_option, setting_options
from streamline_pool.supervisor.cli.pool_commands import check_some_pool_claims, ended_well, print_result
from streamline_pool.supervisor.cli.terminal import open_view

__all__ = ["watch"]


@click.command(short_help="Print what happens to a run until it has ended.")
@click.argument("run_id")
@setting_options(*CONNECTION)
@json_option
def watch(run_id: str, as_json: bool, **values: Any) -> int:
    """Print what happens to a run until it has ended. Exit code 0: done; 1: failed or cancelled.

    One line for each attempt, failure, lost worker and wait, in their order, with the time of day. On a terminal, with the
    extra `terminal` (pip install 'streamline-pool[terminal]'): with colours, and a line that shows how far the run is. The
    environment variable NO_COLOR turns the colours off. With --json: the run as it was stored in the end, and nothing else.
    """
    with open_app(values) as app:
        run = present_run(app, run_id)
        if not run.is_terminal:
            check_some_pool_claims(app, run)
        with open_view(quiet=as_json) as view:
            for moment in follow(app, run_id, app.env):
                view.show(moment)
        run = present_run(app, run_id)
    if as_json:
        print_json(run.to_dict())
    else:
        print_result(run)
    return ExitCode.OK if ended_well(run) else ExitCode.CRASH
