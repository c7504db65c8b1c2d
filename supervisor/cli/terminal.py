"""How a followed run looks: plain lines, or colours and a progress line on a terminal that has them.

Owns the choice between the two, and the only use of `rich`, which the extra `terminal` installs. Without it, and when
standard output is no terminal, the lines are plain text: the same words in the same order.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import click

from streamline_pool.domain.model import ENDED_STEPS
from streamline_pool.supervisor.cli.follow import Moment
from streamline_pool.supervisor.cli.run_progress import Line, Tone

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

__all__ = ["View", "open_view"]

_ENDED = frozenset(status.value for status in ENDED_STEPS)
_STYLES: Mapping[Tone, str] = {"plain": "", "good": "green", "warning": "yellow", "bad": "red"}


class View(Protocol):
    """Shows a run while it is followed."""

    def show(self, moment: Moment) -> None:
        """Show what is new."""


@contextlib.contextmanager
def open_view(*, quiet: bool = False) -> Iterator[View]:
    """The view for standard output. `quiet`: one that shows nothing."""
    if quiet:
        yield _Quiet()
        return
    console = _console()
    if console is None:
        yield _Plain()
        return
    with _progress(console) as progress:
        yield _Coloured(console, progress)


def _console() -> Console | None:
    """The terminal; None: standard output is none, or cannot move its cursor, or `rich` is not installed."""
    if sys.stdout is None or not sys.stdout.isatty():  # None: the command was started without standard output
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(highlight=False, soft_wrap=True)  # it respects NO_COLOR by itself
    return None if console.is_dumb_terminal else console


def _progress(console: Console) -> Progress:
    """The line below the others; it disappears at the end."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}", markup=False)
    return Progress(SpinnerColumn(), text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True)


class _Quiet:
    def show(self, moment: Moment) -> None:
        """Show nothing."""


class _Plain:
    def show(self, moment: Moment) -> None:
        """Print the new lines."""
        for line in moment.lines:
            click.echo(_with_time(line))


class _Coloured:
    def __init__(self, console: Console, progress: Progress) -> None:
        self._console = console
        self._progress = progress
        self._task: TaskID = progress.add_task("")

    def show(self, moment: Moment) -> None:
        """Print the new lines above the progress line, and bring that up to date."""
        from rich.text import Text

        for line in moment.lines:
            self._console.print(Text(_with_time(line), style=_STYLES[line.tone]))
        description, ended, total = _state(moment.document)
        self._progress.update(self._task, description=description, completed=ended, total=total)


def _with_time(line: Line) -> str:
    moment = f"{line.at.astimezone():%H:%M:%S}" if line.at is not None else "--:--:--"
    return f"{moment} {line.text}"


def _state(document: Mapping[str, Any]) -> tuple[str, int, int]:
    """Where the run is, in words; how many of its steps have ended; how many it has."""
    steps = document.get("steps") or ()
    current: Mapping[str, Any] = next((step for step in steps if step.get("stepId") == document.get("currentStepId")), {})
    attempt = f", attempt {current['attempts']}" if current.get("attempts", 0) > 1 else ""
    state = "paused" if document.get("paused") else document.get("status")
    at_step = f" at step {current['stepId']}{attempt}" if current else ""
    return f"{state}{at_step}", sum(step.get("status") in _ENDED for step in steps), len(steps)
