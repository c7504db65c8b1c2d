"""`streamline-pool runs list`: which runs there are. Owns what is typed to filter and page a list, and what its table shows."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import click
import orjson

from streamline_pool.client.app import Streamline
from streamline_pool.client.run_lists import LIST_SECONDS_MAX, RunPage, context_path, finding_slow_list, listing_runs
from streamline_pool.config.parsing import duration
from streamline_pool.domain.errors import ErrorCode
from streamline_pool.domain.model import RunStatus
from streamline_pool.protocol.run_list import RunFilter, most_selective
from streamline_pool.supervisor.cli.application import open_app
from streamline_pool.supervisor.cli.console import CommandError, ExitCode, ago, print_json, short
from streamline_pool.supervisor.cli.explain import part_of
from streamline_pool.supervisor.cli.options import CONNECTION, json_option, setting_options
from streamline_pool.supervisor.cli.tables import print_table

__all__ = ["context_values", "instant", "list_runs"]

_SHOWN = ("workflowId", "version", "status", "paused", "currentStepId", "queue", "createdAt", "error.message")


def instant(text: str, now: datetime) -> datetime:
    """The instant that `text` names: an age, such as `2h`, before `now`, or a date or time in ISO 8601, in UTC if it has no zone.

    Raises ValueError.
    """
    try:
        age_s = duration(text)
    except ValueError:
        named = datetime.fromisoformat(text.strip())
        return named.replace(tzinfo=UTC) if named.tzinfo is None else named.astimezone(UTC)
    if not math.isfinite(age_s):
        raise ValueError(text)
    try:
        return now - timedelta(seconds=age_s)
    except OverflowError:
        raise ValueError(text) from None


def context_values(text: str) -> list[Any]:
    """The stored values that `text` stands for: `42` is the number and the text, `"42"` the text alone. Raises ValueError.

    Numbers, true, false and null are read as JSON, and so is a text in double quotes. All else is a text as it is.
    """
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return [text]
    if isinstance(value, dict | list):
        raise ValueError(text)
    if isinstance(value, int) and value >= 2**63:
        return [text]  # MongoDB has no such number
    return [value] if isinstance(value, str) else [value, text]


@click.command("list", short_help="List runs, newest first.")
@click.option("--status", type=click.Choice([status.value for status in RunStatus]), help="Only runs in this state.")
@click.option("--workflow", "workflow_id", metavar="ID", help="Only runs of this workflow.")
@click.option("--queue", metavar="NAME", help="Only runs on this queue.")
@click.option("--user", "user_id", metavar="ID", help="Only runs that were started for this user (user_id=).")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Only runs with this tag. Repeatable: runs with all of them.")
@click.option(
    "--context",
    "context",
    multiple=True,
    metavar="NAME=VALUE",
    help="Only runs whose context has this value, such as customer=42 (number or text) or order.id='\"42\"' (text). Repeatable.",
)
@click.option("--error-code", metavar="CODE", help="Only runs that failed with this code, such as WORKER_CRASHED or STEP_TIMEOUT.")
@click.option("--since", metavar="WHEN", help="Only runs created at or after WHEN: an age such as 30m, 2h or 7d, or 2026-11-28T14:00Z.")
@click.option("--until", metavar="WHEN", help="Only runs created before WHEN.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, metavar="N", help="At most N runs.")
@click.option("--after", metavar="RUN_ID", help="The next page: only runs that follow this one in the list.")
@setting_options(*CONNECTION)
@json_option
def list_runs(limit: int, after: str | None, as_json: bool, **values: Any) -> int:
    """List runs, newest first. With several filters: runs that satisfy all of them.

    If there are more runs than --limit, the command says on standard error how to get the next page. With --json: an array of
    the stored documents; the next page is that after the last one's _id.

    In a database with more than 10,000 runs a filter needs an index. Without one the command says so, and which
    `init-db --index` makes it.
    """
    typed = {name: values.pop(name) for name in ("status", "workflow_id", "queue", "user_id", "tags", "context", "error_code")}
    since, until = values.pop("since"), values.pop("until")
    typed |= {"context": _context_filter(typed["context"]), "error_code": _known_code(typed["error_code"])}
    with open_app(values) as app:
        now = app.store().now()
        wanted = RunFilter(**typed, created_from=_when("--since", since, now), created_before=_when("--until", until, now))
        page = _read_page(app, wanted, limit, after, () if as_json else _SHOWN)
    if as_json:
        print_json(page.runs)
    elif page.runs:
        _print_list(page.runs, now)
    else:
        click.echo("No such runs.", err=True)
    if page.after is not None and not as_json:
        click.echo(f"There are more runs. For the next page, repeat the command with: --after {shlex.quote(page.after)}", err=True)
    return ExitCode.OK


def _known_code(text: str | None) -> str | None:
    if text is None:
        return None
    code = text.upper().replace("-", "_")
    if code not in set(ErrorCode):
        raise CommandError(f"--error-code {text}: there is no such code; there are {', '.join(ErrorCode)}", ExitCode.USAGE)
    return code


def _context_filter(given: Sequence[str]) -> dict[str, list[Any]]:
    """`--context` as paths and the values that each may have."""
    found: dict[str, list[Any]] = {}
    for each in given:
        name, equals, text = each.partition("=")
        if not name or not equals:
            raise CommandError(f"--context {each}: expected NAME=VALUE, such as customer=42", ExitCode.USAGE)
        path = context_path(name, "--context")
        if path in found:
            raise CommandError(f"--context: {name} is given twice, and a field has one value", ExitCode.USAGE)
        try:
            found[path] = context_values(text)
        except ValueError:
            raise CommandError(
                f"--context {each}: a list or document cannot be compared; name a field in it, such as order.id=7", ExitCode.USAGE
            ) from None
    return found


def _when(option: str, text: str | None, now: datetime) -> datetime | None:
    if text is None:
        return None
    try:
        return instant(text, now)
    except (ValueError, OverflowError):
        raise CommandError(
            f"{option} {text}: expected an age such as 30m, 2h or 7d, or a time such as 2026-11-28 or 2026-11-28T14:00Z", ExitCode.USAGE
        ) from None


def _read_page(app: Streamline, wanted: RunFilter, limit: int, after: str | None, fields: Sequence[str]) -> RunPage:
    slow = app.connections.drive(finding_slow_list(wanted))
    if slow is not None:
        by, advice = _WORDS.get(slow.field, slow.field), f"Make the index once: {_index_command(slow.field)}"
        reads = f"MongoDB may read all of about {slow.runs:,} runs, for at most {LIST_SECONDS_MAX:g} s"
        click.echo(f"No index serves this list by {by}: {reads}. {advice}", err=True)
    try:
        return app.connections.drive(listing_runs(wanted, limit=limit, after=after, fields=fields))
    except TimeoutError as exc:
        advice = f"Name a shorter time (--since, --until), or make an index: {_index_command(most_selective(wanted))}"
        raise CommandError(f"{exc}. {advice}", ExitCode.CRASH) from None


_WORDS = {"created": "time of creation", "error-code": "error code"}


def _index_command(field: str) -> str:
    return f"streamline-pool init-db --index {shlex.quote(field)}"


def _print_list(found: Sequence[Mapping[str, Any]], now: datetime) -> None:
    rows = []
    for run in found:
        paused, created_at = " (paused)" if run.get("paused") else "", run.get("createdAt")
        rows.append(
            (
                run["_id"],
                run.get("workflowId"),
                run.get("version"),
                f"{run.get('status')}{paused}",
                run.get("currentStepId"),
                run.get("queue", "default"),
                ago(created_at, now) if isinstance(created_at, datetime) else None,
                short(part_of(run, "error").get("message") or "", 60),
            )
        )
    print_table(("RUN", "WORKFLOW", "VERSION", "STATUS", "STEP", "QUEUE", "CREATED", "ERROR"), rows)
