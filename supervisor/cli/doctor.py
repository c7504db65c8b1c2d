"""`streamline-pool doctor`: checks everything that a pool depends on, and says what to fix."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any, Literal, NamedTuple

import click

from streamline_pool import embedded
from streamline_pool.client.app import Streamline
from streamline_pool.config.package_version import package_version
from streamline_pool.config.settings import Resolved
from streamline_pool.domain.errors import StoreUnavailableError, WorkflowError
from streamline_pool.protocol.engine_indexes import RETIRED_RUN_INDEXES, RUN_INDEXES
from streamline_pool.supervisor.cli.application import (
    apply_settings,
    check_connection,
    check_rights,
    load_app,
    load_settings,
    server_settings,
    uri_faults_of,
)
from streamline_pool.supervisor.cli.console import CommandError, ExitCode, print_json, span, unreachable_text
from streamline_pool.supervisor.cli.options import CONNECTION, json_option, setting_options
from streamline_pool.supervisor.pool.cpu_count import usable_cpus

__all__ = ["Finding", "doctor"]

_OFFSET_WARN_S = 1.0
"""The engine uses the server's clock, so a wrong clock on this machine only misleads people who read logs."""


class Finding(NamedTuple):
    """The result of one check."""

    state: Literal["ok", "warn", "fail"]
    name: str
    text: str  # what was found, and what to do unless it is ok


@click.command(short_help="Check machine, application and database; say what to fix.")
@setting_options(*CONNECTION)
@json_option
def doctor(as_json: bool, **values: Any) -> int:
    """Check this machine, your application and the database, and say what to fix.

    Exit code 0: nothing is broken (there may be warnings); 1: a check failed; 3: the database does not answer.
    """
    resolved = load_settings(values, quiet=True)
    findings = [*_machine(), *_application_and_database(resolved)]
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            click.echo(f"{finding.state:4}  {finding.name}: {finding.text}")
    failed = {finding.name for finding in findings if finding.state == "fail"}
    return ExitCode.UNREACHABLE if "database" in failed else ExitCode.CRASH if failed else ExitCode.OK


def _machine() -> Iterator[Finding]:
    version = platform.python_version()
    yield Finding("ok", "python", f"{version} at {sys.executable} on {platform.system()} {platform.machine()}")
    packages = ("pymongo", "multiprocess", "psutil", "click", "orjson")
    versions = [f"streamline-pool {package_version()}", *(f"{name} {metadata.version(name)}" for name in packages)]
    yield Finding("ok", "packages", ", ".join(versions))
    yield Finding("ok", "cpus", f"{usable_cpus()} usable: that is what --workers auto means here")
    try:
        yield Finding("ok", "mongod", f"{embedded.find_mongod()} (used by --embedded only)")
    except StoreUnavailableError as exc:
        yield Finding("warn", "mongod", f"{exc.message} (needed by --embedded only)")


def _application_and_database(resolved: Resolved) -> Iterator[Finding]:
    try:
        app, resolved = load_app(resolved)
    except CommandError as exc:
        yield Finding("fail", "application", exc.message)
        app = None
    else:
        if app is None:
            yield Finding("warn", "application", "none given; name it with --app MODULE:ATTR to have it checked")
    try:
        with server_settings(resolved) as settings, uri_faults_of(resolved):
            if app is not None:
                yield _workflows(app)
            with apply_settings(app or Streamline(), settings) as used:
                yield from _database(used)
    except StoreUnavailableError as exc:
        yield Finding("fail", "database", unreachable_text(exc))
    except CommandError as exc:
        yield Finding("fail", "database", exc.message)


def _workflows(app: Streamline) -> Finding:
    if not app.workflows:
        return Finding("warn", "application", "it defines no workflow, so a pool has nothing to do")
    try:
        app.freeze()
    except WorkflowError as exc:
        return Finding("fail", "application", exc.message)
    return Finding("ok", "application", f"{len(app.workflows)} workflow(s): {', '.join(app.workflows)}")


def _database(app: Streamline) -> Iterator[Finding]:
    check_connection(app)
    facts = app.server_info()
    alone = facts["topology"] == "standalone"
    advice = "; not a replica set: sessions do not work, and one lost machine loses acknowledged work" if alone else ""
    yield Finding("warn" if alone else "ok", "database", f"{facts['database']} on MongoDB {facts['version']}, {facts['topology']}{advice}")
    check_rights(app)
    yield Finding("ok", "rights", "the user may read and write")
    offset_s = app.store().clock.offset_s
    yield Finding("ok" if abs(offset_s) < _OFFSET_WARN_S else "warn", "clock", f"differs from the server's by {span(abs(offset_s))}")
    present = set(app.runs.index_information())
    missing = [index.name for index in RUN_INDEXES if index.name not in present]
    if missing:
        yield Finding("warn", "indexes", f"missing: {', '.join(missing)}; the first pool makes them, or: streamline-pool init-db")
    else:
        yield Finding("ok", "indexes", ", ".join(index.name for index in RUN_INDEXES))
    if retired := [name for name in RETIRED_RUN_INDEXES if name in present]:
        drop = ", ".join(f'db.{app.runs.name}.dropIndex("{name}")' for name in retired)
        yield Finding("warn", "retired indexes", f"they cost writes and are not used by this version; once all pools have it: {drop}")
