"""`streamline-pool systemd`: a unit file for the options given. Pure but for the command itself."""

from __future__ import annotations

import getpass
import re
import sys
from pathlib import Path
from typing import Any

import click

from streamline_pool.config.parsing import has_password
from streamline_pool.config.settings import OPTIONS, Resolved
from streamline_pool.supervisor.cli.application import load_settings, wants_private_server
from streamline_pool.supervisor.cli.console import CommandError, ExitCode, print_json
from streamline_pool.supervisor.cli.options import json_option, setting_options

__all__ = ["systemd", "unit_file"]

_WORD = re.compile(r"[A-Za-z0-9._@:-]{1,200}")  # a line break would begin another line of the unit
_STOP_MARGIN_S = 15  # after the drain: leases are released, the embedded server writes its checkpoint

_UNIT = """\
# Install: streamline-pool systemd OPTIONS | sudo tee /etc/systemd/system/{name}.service
#          sudo systemctl daemon-reload && sudo systemctl enable --now {name}
[Unit]
Description=streamline-pool: workers of {app}
Wants=network-online.target
After=network-online.target

[Service]
Type=exec
User={user}
WorkingDirectory={folder}
{environment}ExecStart={command}
# TERM goes to the supervisor, which drains its workers; systemd kills what is left when the time is over.
KillMode=mixed
TimeoutStopSec={stop_s}
ExecReload=/bin/kill -HUP $MAINPID
Restart=on-failure
RestartSec=2
# A restart cannot fix wrong options or an application that cannot be imported.
RestartPreventExitStatus=2 78
# Another pool claims the runs that were released when the drain timed out: that is not a failure.
SuccessExitStatus=4

NoNewPrivileges=yes
CapabilityBoundingSet=
LockPersonality=yes
PrivateDevices=yes
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
# Your steps can write to {folder} and to temporary folders only; add paths they need.
ProtectSystem=strict
ReadWritePaths={folder}
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native

[Install]
WantedBy=multi-user.target
"""


@click.command(short_help="Print a systemd unit for the pool, with the options given.")
@click.option("--name", default="streamline-pool", show_default=True, help="Name of the service.")
@click.option("--user", metavar="NAME", help="Account the service runs as. Default: yours.")
@setting_options(*(option.name for option in OPTIONS))
@json_option
def systemd(name: str, user: str | None, as_json: bool, **values: Any) -> int:
    """Print a systemd unit that runs the pool from this folder with the options given here.

    Options set in a file are not repeated: the service reads the same file. A private server (embedded) is refused:
    name the server that the service is to use.
    """
    for option, text in (("--name", name), ("--user", user)):
        if text is not None and not _WORD.fullmatch(text):
            raise CommandError(
                f"{option} {text!r}: expected letters, digits, and any of . _ @ : -, which a unit file can hold", ExitCode.USAGE
            )
    resolved = load_settings(values, quiet=True)
    if resolved.settings.app is None:
        raise CommandError("systemd needs your application: give --app MODULE:ATTR", ExitCode.USAGE)
    _refuse_private_server(resolved)
    folder = Path.cwd()
    text = unit_file(resolved, name=name, user=user or getpass.getuser(), folder=folder, command=_command())
    if as_json:
        print_json({"path": f"/etc/systemd/system/{name}.service", "text": text})
    else:
        click.echo(text, nl=False)
    return ExitCode.OK


def _refuse_private_server(resolved: Resolved) -> None:
    """CommandError if the service would run a private server: it would begin empty, and end with the service."""
    if not wants_private_server(resolved):
        return
    source = resolved.source("embedded")
    raise CommandError(
        f"{source.where}: embedded is on, so this service would run a private MongoDB in {Path.cwd()}, for trying things out only. "
        "Name your server: give --mongodb-uri, or set STREAMLINE_MONGODB_URI, or set mongodb-uri instead of embedded in "
        "streamline-pool.toml.",
        ExitCode.USAGE if source.kind == "flag" else ExitCode.CONFIG,
    )


def unit_file(resolved: Resolved, *, name: str, user: str, folder: Path, command: str) -> str:
    """The unit; a URI with a password is left to a private environment file."""
    lines = []
    for option in OPTIONS:
        value = getattr(resolved.settings, option.field)
        if resolved.source(option.name).kind not in ("flag", "environment"):
            continue
        if option.name == "mongodb-uri" and has_password(value):
            path = f"/etc/{name}.env"
            lines += [
                "# The URI has a password: keep it in a file that only root can read, as one line STREAMLINE_MONGODB_URI=…",
                f"# sudo install -m 600 /dev/null {path} && sudo editor {path}",
                f"EnvironmentFile={path}",
            ]
        else:
            lines.append(f'Environment="{option.env}={_escaped(_plain(value))}"')
    return _UNIT.format_map(
        {
            "name": name,
            "app": resolved.settings.app,
            "user": user,
            "folder": _escaped(str(folder)),
            "environment": "".join(line + "\n" for line in lines),
            "command": command,
            "stop_s": round(resolved.settings.drain_timeout_s) + _STOP_MARGIN_S,
        }
    )


def _plain(value: Any) -> str:
    """As the environment variable takes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(value)
    return "none" if value is None else str(value)


def _escaped(text: str) -> str:
    """systemd expands `%` and interprets backslashes and quotes."""
    return text.replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')


def _command() -> str:
    """How this command was called, by absolute path: a service has no PATH to find it on."""
    script = Path(sys.argv[0])
    return (
        _escaped(str(script.absolute()))
        if script.name == "streamline-pool"
        else f"{_escaped(sys.executable)} -m streamline_pool.supervisor.cli"
    )
