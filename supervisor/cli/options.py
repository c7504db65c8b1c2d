"""The command's options: one table of help texts, turned into click options.

Owns the texts of `--help`, and which options each sub-command takes. Values are passed on as typed: parsing, checking
and precedence belong to config/settings.py, so that a flag, a variable and a file mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import click

from streamline_pool.config.settings import OPTIONS, Option

__all__ = ["CONNECTION", "HELP", "POOL_ONLY", "Invocation", "json_option", "pick", "setting_options"]


@dataclass
class Invocation:
    """The options that were typed before the sub-command; they count for the sub-command too."""

    flags: dict[str, Any] = field(default_factory=dict)  # by option name, as typed
    as_json: bool = False

    @classmethod
    def current(cls) -> Invocation:
        """That of the command under way; an empty one for a sub-command that is run by itself."""
        return click.get_current_context().find_object(cls) or cls()


_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])

HELP: Mapping[str, tuple[str, str, str]] = {
    # name: (metavar, what it means, default as shown)
    "app": ("MODULE:ATTR", "Where your Streamline object is, such as shop.flows:app. The current folder is searched first.", "none"),
    "mongodb-uri": ("URI", "The MongoDB to use.", "the URI in your code, else mongodb://127.0.0.1:27017/streamline"),
    "database": ("NAME", "The database to use.", "the one in the URI, else streamline"),
    "collection-prefix": ("TEXT", "What the names of the collections begin with.", "the one in your code, else workflow_"),
    "embedded": (
        "",
        "Use a private MongoDB under .streamline/, started if none runs there. For experiments, not for production.",
        "off",
    ),
    "workers": ("N|auto", "Worker processes. auto: one for each CPU this process may use.", "auto"),
    "concurrency": ("N", "Runs that each worker advances at the same time.", "200"),
    "queue": (
        "NAME",
        "Work on this queue only. Repeatable; in the environment: separated by commas.",
        "every queue of the app",
    ),
    "burst": ("", "Work until nothing is left to do now, then stop with exit code 0.", "off"),
    "drain-timeout": ("TIME", "After TERM, how long steps in progress may take to finish, such as 30 or 5m.", "30s"),
    "log-format": ("text|json", "Log lines on standard error: for people, or one JSON object per line.", "text"),
    "log-level": ("LEVEL", "Least severe level to log: debug, info, warning, error or critical.", "info"),
    "health-port": ("PORT", "Answer health checks and metrics over HTTP on this port.", "none"),
    "health-host": ("ADDRESS", "The address on which --health-port listens; 0.0.0.0 or :: for all.", "127.0.0.1"),
    "max-rss": ("SIZE", "Replace a worker that uses more memory than this, such as 512MB.", "none"),
    "max-runs-per-worker": ("N", "Replace a worker after this many runs.", "none"),
    "lease": ("TIME", "How long the runs of a host that died wait before another host takes them.", "30s"),
    "stall-timeout": ("TIME", "Kill and replace a worker whose event loop has not moved for this long.", "30s"),
    "max-crashes": ("N", "Fail a run after it has killed this many workers.", "3"),
    "restart-budget": ("N", "Stop (exit code 1) when workers crash more often than this per minute.", "10"),
    "sweep-interval": ("TIME", "How often to search for due runs that no signal announced.", "a fifth of --lease, at most 6s"),
    "beat-interval": ("TIME", "How often workers report to the supervisor.", "1s"),
}

CONNECTION = ("app", "mongodb-uri", "database", "collection-prefix", "embedded", "log-format", "log-level")
"""The options of every sub-command that uses the database."""

POOL_ONLY = tuple(option.name for option in OPTIONS if option.name not in CONNECTION)
"""The options that matter only to the pool."""


def setting_options(*names: str) -> Callable[[_Decorated], _Decorated]:
    """Decorate a click command with the options `names`; their values arrive as keyword arguments, None when not given."""
    chosen = [option for option in OPTIONS if option.name in names]

    def decorate(command: _Decorated) -> _Decorated:
        for option in reversed(chosen):
            command = _click_option(option)(command)
        return command

    return decorate


def pick(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of click's keyword arguments, the settings that were given, by option name."""
    names = {option.name.replace("-", "_"): option.name for option in OPTIONS}
    return {names[key]: value for key, value in values.items() if key in names and value is not None and value != ()}


def json_option(command: _Decorated) -> _Decorated:
    """Decorate a click command with `--json`, which may also stand before the sub-command."""
    either = lambda _context, _option, given: given or Invocation.current().as_json  # noqa: E731 -- click wants this shape
    return click.option("--json", "as_json", is_flag=True, callback=either, help="Print one JSON document and nothing else.")(command)


def _click_option(option: Option) -> Callable[[Any], Any]:
    metavar, meaning, default = HELP[option.name]
    text = f"{meaning}  [env: {option.env}; default: {default}]"
    if option.kind == "flag":
        return click.option(f"--{option.name}/--no-{option.name}", default=None, help=text)
    return click.option(f"--{option.name}", metavar=metavar, default=None, multiple=option.kind == "list", help=text)
