"""`streamline-pool cleanup`: delete or archive runs that ended long ago, without needing the application."""

from __future__ import annotations

from typing import Any

import click

from streamline_pool.client.app import Streamline
from streamline_pool.supervisor.cli.application import open_app
from streamline_pool.supervisor.cli.console import CommandError, ExitCode, print_json
from streamline_pool.supervisor.cli.options import CONNECTION, json_option, setting_options

__all__ = ["cleanup"]


@click.command(short_help="Delete or archive runs that ended long ago.")
@click.option("--days", type=click.FloatRange(min=0), metavar="N", help="Runs that ended at least N days ago; 0.5 is twelve hours.")
@click.option("--tenant", metavar="T", help="With --days: only runs of this tenant (context.tenantId, or the field your indexes name).")
@click.option("--archive", is_flag=True, help="With --days: move them to the collection workflow_runs_archive instead of deleting them.")
@click.option("--expired", is_flag=True, help="Runs whose context.expireAt, a date, has passed.")
@click.option("--dry-run", is_flag=True, help="Count them and change nothing.")
@setting_options(*CONNECTION)
@json_option
def cleanup(days: float | None, tenant: str | None, archive: bool, expired: bool, dry_run: bool, as_json: bool, **values: Any) -> int:
    """Delete runs that have ended: those that are old (--days), those past their own date (--expired), or both.

    A run that is done, failed or cancelled has ended; no other run is touched, however old. Ages follow the
    database's clock. The command may be interrupted and repeated, and run while pools work; a nightly call is usual.
    """
    if days is None and (tenant is not None or archive):
        raise CommandError(f"{'--archive' if archive else '--tenant'} needs --days, which says which runs are old enough.", ExitCode.USAGE)
    if days is None and not expired:
        raise CommandError("say what to clean up: --days N for old runs, --expired for those past their date, or both.", ExitCode.USAGE)
    if archive and tenant is not None:
        raise CommandError("--archive moves the runs of all tenants; leave --tenant out.", ExitCode.USAGE)
    with open_app(values) as app:
        report = _cleaned(app, days, tenant, archive=archive, expired=expired, dry_run=dry_run)
    if as_json:
        print_json({**report, "dry_run": dry_run})
    else:
        for what, count in report.items():
            click.echo(f"{count} {'run' if count == 1 else 'runs'} {'would be ' if dry_run else ''}{_WORDS[what]}")
    return ExitCode.OK


_WORDS = {"expired": "deleted because the date in context.expireAt has passed", "deleted": "deleted", "archived": "archived"}


def _cleaned(app: Streamline, days: float | None, tenant: str | None, *, archive: bool, expired: bool, dry_run: bool) -> dict[str, int]:
    """What was done (or would be) to how many runs. Expired runs are deleted first: they need not be archived."""
    report = {}
    if expired:
        report["expired"] = app.cleanup_expired(dry_run=dry_run)
    if days is not None and archive:
        report["archived"] = app.archive_old_runs(days, dry_run=dry_run)
    elif days is not None:
        report["deleted"] = app.cleanup_old_runs(days, tenant_id=tenant, dry_run=dry_run)
    return report
