"""The command `streamline-pool`: its options, its sub-commands, and one exit code for every way to end.

Owns the start of the pool, and the translation of errors into texts and exit codes. What sub-commands do is in
pool_commands.py, run_commands.py and their neighbours; what options mean is in options.py and config/settings.py.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import platform
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from streamline_pool.client.app import Streamline
from streamline_pool.config.env import system_env
from streamline_pool.config.package_version import package_version
from streamline_pool.config.settings import OPTIONS, Resolved, SettingError, Settings, read_files, redact_uri
from streamline_pool.domain.errors import StoreUnavailableError, ValidationError, WorkflowError, WorkflowNotFoundError
from streamline_pool.supervisor.cli import pool_commands, run_commands
from streamline_pool.supervisor.cli.application import (
    apply_settings,
    load_app,
    load_settings,
    server_settings,
    uri_faults_of,
    wants_private_server,
)
from streamline_pool.supervisor.cli.chaos import chaos
from streamline_pool.supervisor.cli.cleanup import cleanup
from streamline_pool.supervisor.cli.console import CommandError, ExitCode, print_error, print_json, unreachable_text
from streamline_pool.supervisor.cli.doctor import doctor
from streamline_pool.supervisor.cli.options import Invocation, pick, setting_options
from streamline_pool.supervisor.cli.systemd import systemd
from streamline_pool.supervisor.cli.worker_list import workers
from streamline_pool.supervisor.logs import drain_logs, setup_logging

__all__ = ["cli", "main"]

_log = logging.getLogger("streamline_pool.command")


@click.group(
    "streamline-pool", invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@setting_options(*(option.name for option in OPTIONS))
@click.option(
    "--print-config", is_flag=True, envvar="STREAMLINE_PRINT_CONFIG", help="Print every setting and where it came from, then stop."
)
@click.option("--json", "as_json", is_flag=True, help="Print answers as one JSON document.")
@click.version_option(package_version(), "-V", "--version", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context, /, print_config: bool, as_json: bool, **values: Any) -> int:
    """Run durable workflows from MongoDB with a pool of worker processes.

    Without a COMMAND: start the pool and work until Ctrl-C or TERM. With a COMMAND: inspect runs, or control them.

    Options may also be set in the environment (the name is beside each option) or in a file in the current folder:
    streamline-pool.toml, or [tool.streamline-pool] in pyproject.toml. A flag overrides the environment, which overrides a file.

    Exit codes: 0 done; 1 failure; 2 wrong usage, or your application cannot be imported; 3 database unreachable;
    4 drain timeout passed (work was released, not lost); 5 no such run; 78 wrong value in a file or the environment;
    130, 137 interrupted.
    """
    context.obj = Invocation(flags=pick(values), as_json=as_json)
    if context.invoked_subcommand is not None:
        return ExitCode.OK
    if print_config:
        return _print_config(load_settings({}, quiet=True), as_json)
    return _run_the_pool()


for command in (*pool_commands.ALL, chaos, cleanup, doctor, run_commands.runs, systemd, workers):
    cli.add_command(command)


def _run_the_pool() -> int:
    """Run the pool, in this process and its forks. Nothing here opens a connection or starts a thread."""
    from streamline_pool.supervisor.pool import supervisor

    for signum in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTTIN, signal.SIGTTOU):
        signal.signal(signum, lambda *_: None)  # orders for the pool: before the pool exists they must not end this process
    app, resolved = load_app(load_settings({}), needed_for="the pool", notify_threads=False)  # run_pool logs them
    assert app is not None, "load_app raises without an application"
    with server_settings(resolved, lasting=True) as settings, uri_faults_of(resolved):
        apply_settings(app, settings).freeze()
        code: int = supervisor.run_pool(app, settings, system_env(), banner=_banner(app, settings))
    if code == ExitCode.UNREACHABLE:
        # The log has the reason already; this is the last line, the one that people read.
        advice = "fix what boot_failed says; if you have no MongoDB yet, --embedded starts a private one"
        _log.error("database_unusable", extra={"advice": advice})
    return code


def _banner(app: Streamline, settings: Settings) -> list[str]:
    """One line per fact that matters. The steward adds the server's version and topology once it is connected."""
    flows = ", ".join(f"{flow.id} {flow.version}" for flow in app.workflows.values()) or "none: there will be nothing to do"
    queues = ", ".join(settings.queues) or "all of the application's"
    return [
        f"streamline-pool {package_version()}, Python {platform.python_version()}, pid {os.getpid()}",
        f"application {settings.app}, workflows: {flows}",
        f"workers: {settings.workers}, each with up to {settings.concurrency} runs in flight; queues: {queues}",
        f"database: {redact_uri(settings.mongodb_uri)}{f', database {settings.database}' if settings.database else ''}",
    ]


def _print_config(resolved: Resolved, as_json: bool) -> int:
    """Every setting in the form of streamline-pool.toml, with its source as a comment."""
    try:
        _, resolved = load_app(resolved)
    except CommandError as exc:  # the user asked for the configuration; a broken application must not hide it
        _log.warning("cannot_load_application", extra={"reason": exc.message, "so": "its settings in code are not shown"})
    rows = {option.name: (getattr(resolved.settings, option.field), resolved.source(option.name)) for option in OPTIONS}
    rows["mongodb-uri"] = (redact_uri(resolved.settings.mongodb_uri), resolved.source("mongodb-uri"))
    if as_json:
        print_json({name: {"value": value, "source": source.kind, "where": source.where or None} for name, (value, source) in rows.items()})
        return ExitCode.OK
    unused: set[str] = set()
    with contextlib.suppress(CommandError):  # two servers are named: a command that starts something reports that
        unused = {"mongodb-uri"} if wants_private_server(resolved) else set()
    for name, (value, source) in rows.items():
        unset = value is None or value == ()
        text = f"# {name} is not set" if unset else f"{name} = {_toml(value)}"
        note = "; not used, because embedded is on" if name in unused else ""
        click.echo(f"{text}  # {source.kind}{f': {source.where}' if source.where else ''}{note}")
    return ExitCode.OK


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, int | float):
        return str(value)
    return json.dumps(value, ensure_ascii=False)  # TOML's basic strings escape as JSON's do


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point. Every way to end goes through here, so that none shows a traceback for what a user can fix."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    log_format = _log_format(typed)
    setup_logging(log_format, "info")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an arrow that the terminal cannot show is no reason to crash
    try:
        code = cli.main(args=typed, prog_name="streamline-pool", standalone_mode=False)
    except SystemExit as exc:  # of Click, when the reader of standard output is gone; a normal exit would wait, see `_exit_now`
        code = exc.code if isinstance(exc.code, int) else ExitCode.CRASH
    except Exception as exc:  # noqa: BLE001 -- the last frame: every remaining error is reported and becomes an exit code
        code = _report_error(exc, log_format)
    _exit_now(int(code or 0))


def _exit_now(code: int) -> NoReturn:
    """Exit at once. Everything of this package is closed by now; a normal exit would wait half a second for PyMongo's threads,
    and for ever for a non-daemon thread that the user's module started.
    """
    drain_logs()
    logging.shutdown()
    _flush_output()
    os._exit(code)


def _flush_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        # The reader may be gone, and a process started without standard output has None for it.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _report_error(exc: Exception, log_format: str) -> ExitCode:
    """Print what happened; the exit code."""
    match exc:
        case click.exceptions.Abort():
            return ExitCode.INTERRUPTED
        case click.ClickException() if log_format == "text":
            exc.show()
            return ExitCode.USAGE
        case click.ClickException():
            message, code = exc.format_message(), ExitCode.USAGE
        case CommandError():
            message, code = exc.message, exc.code
        case SettingError():
            message, code = exc.message, ExitCode.USAGE if exc.origin in ("flag", "code") else ExitCode.CONFIG
        case StoreUnavailableError():
            message, code = unreachable_text(exc), ExitCode.UNREACHABLE
        case WorkflowNotFoundError():
            message, code = exc.message, ExitCode.NOT_FOUND
        case ValidationError():
            message, code = exc.message, ExitCode.USAGE
        case WorkflowError():
            message, code = str(exc), ExitCode.CRASH
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            message, code = f"cannot write: {exc.strerror}", ExitCode.CRASH
        case _:
            _log.critical("crash", exc_info=exc)
            return ExitCode.CRASH
    print_error(message, log_format)
    return code


def _log_format(typed: Sequence[str]) -> str:
    """The form of error messages before the options are parsed, or if parsing fails; wrong values count as text."""
    for place, word in enumerate(typed):
        if word == "--log-format" and place + 1 < len(typed):
            return _known(typed[place + 1])
        if word.startswith("--log-format="):
            return _known(word.partition("=")[2])
    in_environment = os.environ.get("STREAMLINE_LOG_FORMAT", "").strip()
    if in_environment:
        return _known(in_environment)
    try:
        in_files = [file.entries.get("log-format", file.entries.get("log_format")) for file in read_files(Path.cwd())]
    except SettingError:
        return "text"
    return _known(next((found for found in in_files if found), "text"))


def _known(word: object) -> str:
    return "json" if str(word).strip().lower() == "json" else "text"
