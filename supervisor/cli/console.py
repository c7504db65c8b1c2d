"""What the command prints and its exit code. Owns exit codes, error texts, JSON documents, and lengths of time in words.

Tables are in tables.py. Standard output carries answers only (with `--json` exactly one document). All other text goes to
standard error.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from datetime import datetime, timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any

import click
import orjson

from streamline_pool import embedded
from streamline_pool.config.settings import DEFAULT_MONGODB_URI, redact_text
from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.protocol.plain_json import json_text

__all__ = [
    "CommandError",
    "ExitCode",
    "ago",
    "error_line",
    "parsed_json",
    "print_error",
    "print_json",
    "short",
    "span",
    "unreachable_text",
]

_log = logging.getLogger("streamline_pool.command")


class ExitCode(IntEnum):
    """The exit codes of the command."""

    OK = 0
    CRASH = 1  # also: the run that was watched or waited for failed or was cancelled
    USAGE = 2  # a flag, an argument or the application
    UNREACHABLE = 3  # the database
    DRAIN_TIMEOUT = 4  # work was released, not lost
    NOT_FOUND = 5  # no such run
    CONFIG = 78  # EX_CONFIG of sysexits.h: a value in a file or the environment
    INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class CommandError(Exception):
    """The command cannot go on; `message` is for the user and says what to do."""

    def __init__(self, message: str, code: ExitCode) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


_ADVICE = (
    "Check that MongoDB runs there and that this machine may reach it; name another one with --mongodb-uri, "
    "or start a private one with --embedded."
)
"""What to do when the database does not answer."""

_PRIVATE = "This folder has the data of a private one: was --embedded forgotten?"


def unreachable_text(error: StoreUnavailableError) -> str:
    """The message of `error`, with advice unless the error itself says what is wrong."""
    if not error.context.get("transient"):
        return error.message
    private = f"\n{_PRIVATE}" if DEFAULT_MONGODB_URI in error.message and embedded.DEFAULT_DATA_DIR.is_dir() else ""
    return f"{error.message}\n{_ADVICE}{private}"


def error_line(error: Mapping[str, Any]) -> str:
    """A stored error on one line: `KeyError: 'sku'` with the type where a handler raised it, else the engine's own text."""
    code, kind, message = error.get("code"), error.get("type"), error.get("message")
    return f"{code}: {kind}: {message}" if kind and code == "STEP_FAILED" else f"{code}: {message}"


def print_error(message: str, log_format: str) -> None:
    """One error on standard error, in the form of the log lines around it."""
    if log_format == "json":
        _log.error("command_failed", extra={"error": redact_text(message)})
    else:
        click.echo(f"Error: {redact_text(message)}", err=True)


def print_json(value: Any) -> None:
    """One JSON document on standard output. The forms of BSON types are those of protocol/plain_json.py."""
    click.echo(json_text(value, indented=True))


def parsed_json(option: str, text: str | None) -> Any:
    """The JSON value of an option: as typed, from a file (`@FILE`) or from standard input (`-`). None if it was not given."""
    if text is None:
        return None
    where = option
    try:
        if text == "-":
            text, where = sys.stdin.read(), "standard input"
        elif text.startswith("@"):
            where = text[1:]
            text = Path(where).read_text("utf-8")
        return orjson.loads(text)
    except orjson.JSONDecodeError as exc:
        advice = f" Text needs double quotes inside single ones: {option} '\"text\"'." if where == option else ""
        raise CommandError(f"{where} is not JSON: {exc.msg} (line {exc.lineno}, column {exc.colno}).{advice}", ExitCode.USAGE) from None
    except (OSError, UnicodeDecodeError) as exc:
        raise CommandError(f"{option}: cannot read {where}: {getattr(exc, 'strerror', None) or exc}", ExitCode.USAGE) from None


def span(seconds: float) -> str:
    """A length of time for people: `340 ms`, `12.3 s`, `4 min`, `3 h`, `12 d`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size or unit == "min":
            return f"{seconds / size:.0f} {unit}"
    raise AssertionError("the loop ends with minutes")


def ago(moment: datetime | None, now: datetime) -> str:
    """`12.3 s ago`, `in 4 min`, or `-` for no moment."""
    if moment is None:
        return "-"
    distance = now - moment
    return f"{span(distance.total_seconds())} ago" if distance >= timedelta(0) else f"in {span(-distance.total_seconds())}"


def short(value: Any, limit: int = 80) -> str:
    """`value` on one line, cut after `limit` characters."""
    text = " ".join((value if isinstance(value, str) else json_text(value)).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
