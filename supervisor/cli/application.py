"""From the command line to an application that is ready to use: settings, logging, import, private server.

Owns the order of these steps, and the exit code of each failure. Every sub-command begins here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamline_pool import embedded
from streamline_pool.client.app import Streamline
from streamline_pool.config.env import Env, system_env
from streamline_pool.config.settings import Resolved, SettingError, Settings, read_files, redact_text, resolve
from streamline_pool.domain.errors import StoreUnavailableError, ValidationError
from streamline_pool.protocol import hosts, run_lifecycle
from streamline_pool.supervisor.cli.app_loader import AppImportError, import_app
from streamline_pool.supervisor.cli.console import CommandError, ExitCode
from streamline_pool.supervisor.cli.options import Invocation, pick
from streamline_pool.supervisor.cli.redact_argv import hide_password
from streamline_pool.supervisor.logs import setup_logging
from streamline_pool.supervisor.pool.cpu_count import usable_cpus

__all__ = [
    "apply_settings",
    "check_connection",
    "check_rights",
    "load_app",
    "load_settings",
    "open_app",
    "private_server_is_ours",
    "server_settings",
    "uri_faults_of",
    "wants_private_server",
]

_log = logging.getLogger("streamline_pool.command")

_ADDRESS_FILE = "address.json"
"""Beside the private server's data: its address, so that a second command in this folder finds the server of the first."""

_NO_SERVER_S = 10.0  # how long a private server may take to start or to stop under another command; a guess: 0.3 to 2 s measured
_NO_SERVER_POLL_S = 0.2
_CONNECT_S = 2.0


def load_settings(values: Mapping[str, Any], *, quiet: bool = False) -> Resolved:
    """The settings of this process, from the options of the group and then of the sub-command; logging follows them.

    `quiet` keeps the log to warnings unless a level was asked for: right for commands that answer and end.
    """
    resolved = resolve({**Invocation.current().flags, **pick(values)}, os.environ, read_files(Path.cwd()), cpus=usable_cpus())
    hide_password(resolved.settings.mongodb_uri)
    given = resolved.source("log-level").kind != "default"
    setup_logging(resolved.settings.log_format, resolved.settings.log_level if given or not quiet else "warning")
    return resolved


def load_app(resolved: Resolved, *, needed_for: str = "", notify_threads: bool = True) -> tuple[Streamline | None, Resolved]:
    """The application, if one is named, and the settings with those from its code. `needed_for`: CommandError without one.

    A sub-command that only reads runs needs no application.
    """
    path = resolved.settings.app
    if path is None:
        if not needed_for:
            return None, resolved
        raise CommandError(
            f"{needed_for} needs your application: give --app MODULE:ATTR (such as --app shop.flows:app), "
            'or set STREAMLINE_APP, or write app = "MODULE:ATTR" into streamline-pool.toml.',
            ExitCode.USAGE,
        )
    try:
        app, threads = import_app(path)
    except AppImportError as exc:
        raise CommandError(f"cannot load the application {path}: {exc}", ExitCode.USAGE) from None
    if threads and notify_threads:
        advice = "worker processes will not have them: start them in a step, or on first use"
        _log.warning("import_started_threads", extra={"threads": threads, "advice": advice})
    try:
        return app, resolved.with_code(_settings_in_code(app), path)
    except SettingError as exc:
        raise CommandError(f"{path}: {exc.message}", ExitCode.USAGE) from None


def _settings_in_code(app: Streamline) -> dict[str, Any]:
    """What was passed to the application's constructor, by option name; None for what was not."""
    prefix = app.collection_prefix
    given = {"mongodb-uri": app.mongodb_uri, "database": app.database}
    return {**given, "collection-prefix": prefix if prefix != Settings().collection_prefix else None}


@contextlib.contextmanager
def server_settings(resolved: Resolved, *, lasting: bool = False) -> Iterator[Settings]:
    """The settings with the URI to use: with `--embedded`, that of a private server, which runs as long as the block.

    `lasting`: the block may outlive the command whose server it finds, so a warning is logged.
    """
    settings = resolved.settings
    if not wants_private_server(resolved):
        yield settings
        return
    server = _started_or_found(system_env(), lasting)
    if isinstance(server, str):
        advice = {"advice": "it ends with the command that started it; end this one first"} if lasting else {}
        _log.log(logging.WARNING if lasting else logging.INFO, "embedded_server_found", extra={"uri": server, **advice})
        yield _with_uri(settings, server)
        return
    with server:
        address = server.data_dir / _ADDRESS_FILE
        address.write_text(
            json.dumps({"uri": server.uri, "port": server.port, "pid": server.pid, "owner": os.getpid(), "lasting": lasting})
        )
        (server.data_dir.parent / ".gitignore").write_text("*\n")
        facts = {"data_dir": str(server.data_dir), "version": server.version}
        _log.info("embedded_server_started", extra={**facts, "for_your_programs": f"export STREAMLINE_MONGODB_URI='{server.uri}'"})
        try:
            yield _with_uri(settings, server.uri)
        finally:
            address.unlink(missing_ok=True)  # before the server ends: no other command shall begin to use it now


def private_server_is_ours() -> bool:
    """Whether this process runs the private server of this folder, so that no pool on it can outlive this process."""
    try:
        address = json.loads((embedded.DEFAULT_DATA_DIR / _ADDRESS_FILE).read_text())
    except (OSError, ValueError):
        return False
    return bool(address.get("owner") == os.getpid())


def _started_or_found(env: Env, lasting: bool) -> embedded.EmbeddedServer | str:
    """A private server of our own, or the URI of the one that another command in this folder runs.

    For a moment there is neither: while that other server starts, and while it stops because its command has ended. A
    lasting command waits until a short one has ended, rather than lose the server with it in the middle of work.
    """
    until = env.clock.monotonic() + _NO_SERVER_S
    while True:
        try:
            return embedded.start()
        except StoreUnavailableError as exc:
            found, over = _running_elsewhere(exc), env.clock.monotonic() > until
            if found is not None and (over or not lasting or found["lasting"]):
                return str(found["uri"])
            if "pid" not in exc.context or over:  # broken, or in use by a program that is not this command
                raise
        env.sleep(_NO_SERVER_POLL_S)


def wants_private_server(resolved: Resolved) -> bool:
    """Whether `--embedded` is in force: a URI from a stronger source overrides it, one from the same source contradicts it."""
    if not resolved.settings.embedded:
        return False
    embedded_from, uri_from = resolved.source("embedded"), resolved.source("mongodb-uri")
    strength = ("default", "code", "file", "environment", "flag").index
    if uri_from.kind == embedded_from.kind != "default":
        code = ExitCode.USAGE if uri_from.kind == "flag" else ExitCode.CONFIG
        raise CommandError(f"{embedded_from.where} and {uri_from.where} each name a server; keep one of them.", code)
    return strength(uri_from.kind) < strength(embedded_from.kind)


def _running_elsewhere(refusal: StoreUnavailableError) -> dict[str, Any] | None:
    """The address of the private server that another command in this folder runs, if that is why the start was refused."""
    holder = refusal.context.get("pid")
    if holder is None:
        return None
    try:
        address: dict[str, Any] = json.loads(Path(str(refusal.context["data_dir"]), _ADDRESS_FILE).read_text())
    except (OSError, ValueError, KeyError):
        return None
    if address.get("pid") != holder:  # the file is that of an earlier server
        return None
    try:
        os.kill(int(address["owner"]), 0)
        socket.create_connection(("127.0.0.1", int(address["port"])), _CONNECT_S).close()
    except PermissionError:
        pass  # another user's command, so it is alive
    except OSError:
        return None  # its command has ended, so the server is about to end
    return address


def _with_uri(settings: Settings, uri: str) -> Settings:
    return replace(settings, mongodb_uri=uri)


@contextlib.contextmanager
def open_app(values: Mapping[str, Any], *, needed_for: str = "") -> Iterator[Streamline]:
    """An application for one sub-command, connected at its first use and closed at the end."""
    app, resolved = load_app(load_settings(values, quiet=True), needed_for=needed_for)
    with server_settings(resolved) as settings, uri_faults_of(resolved):
        used = apply_settings(app or Streamline(), settings)
        try:
            check_connection(used)
            yield used
        finally:
            used.close()


def check_connection(app: Streamline) -> None:
    """Reach the database and read its clock. StoreUnavailableError if there is no answer.

    Without the engine's retries: a person is waiting, and a wrong address stays wrong.
    """
    store = app.store()
    store.run(run_lifecycle.server_info())
    store.drive(store.syncing_clock())


def check_rights(app: Streamline) -> None:
    """A read, and a write that changes nothing. StoreUnavailableError names the right that the user of the URI lacks.

    A connection proves little: a server accepts every client, and shows a missing right only by a refusal.
    """
    app.store().run(hosts.list_hosts())
    app.store().run(hosts.remove_host("(no pool has this id)"))


def apply_settings(app: Streamline, settings: Settings) -> Streamline:
    """The application on the server of `settings`. A URI that the driver cannot read is a ValidationError here, not in a worker."""
    app.configure(settings)
    app.collection_prefix = settings.collection_prefix
    _ = app.where
    return app


@contextlib.contextmanager
def uri_faults_of(resolved: Resolved) -> Iterator[None]:
    """Translate the driver's refusal of a URI: the exit code depends on the source of the URI."""
    try:
        yield
    except SettingError:
        raise
    except ValidationError as exc:
        if not exc.message.startswith("mongodb_uri"):
            raise
        source = resolved.source("mongodb-uri")
        code = ExitCode.CONFIG if source.kind in ("file", "environment") else ExitCode.USAGE
        raise CommandError(f"{source.where or 'mongodb-uri'}: {redact_text(exc.message, resolved.settings.mongodb_uri)}", code) from None
