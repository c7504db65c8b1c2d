"""Follows one run to its end, by the events of the cluster and by reads of its document.

Owns how the two sources are brought together: when the document is read, and how long its news are held back for the events
that report the same. What the lines say is in run_progress.py.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from streamline_pool.client.app import Streamline
from streamline_pool.client.run_control import reading_run
from streamline_pool.config.env import Env
from streamline_pool.domain.errors import WorkflowError, WorkflowNotFoundError
from streamline_pool.domain.model import Run
from streamline_pool.events.event import Event
from streamline_pool.supervisor.cli.run_progress import Line, RunProgress, is_terminal

__all__ = ["Moment", "follow", "present_run"]

_log = logging.getLogger("streamline_pool.command")

_FIRST_READ_S = 0.05  # the pause after the first read; it doubles up to `_READ_S`, so a short run is not waited for long
_READ_S = 0.5  # between two reads of the document; a guess: people do not notice less, and the server has no load
_LAST_EVENTS_S = 0.5  # how long the events of a run that has ended are waited for
_ENDS = frozenset({"workflow:completed", "workflow:failed", "workflow:cancelled"})


class Moment(NamedTuple):
    """What is known of the run at one moment."""

    document: Mapping[str, Any]  # as read last
    lines: list[Line]  # what has happened since the moment before


class _Events:
    """The events of one run, read by a thread. A database that refuses the subscription costs only details."""

    def __init__(self, app: Streamline, run_id: str) -> None:
        self._queue: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.subscribed = False
        self.ended = False  # the event of the run's end was taken
        threading.Thread(target=self._read, args=(app, run_id), name="streamline-follow", daemon=True).start()

    def _read(self, app: Streamline, run_id: str) -> None:
        try:
            with app.events.stream(run_id=run_id) as stream:
                self.subscribed = True
                for event in stream:
                    self._queue.put(event)
        except WorkflowError as exc:
            _log.debug("follow_without_events", extra={"run_id": run_id, "error": exc.message})

    def take(self, wait_s: float = 0.0) -> Event | None:
        """The next event. None: there is none within `wait_s` seconds."""
        try:
            event = self._queue.get(wait_s > 0, wait_s or None)
        except queue.Empty:
            return None
        self.ended = self.ended or event.name in _ENDS
        return event


def present_run(app: Streamline, run_id: str) -> Run:
    """The run, with outputs that are stored beside it. Raises WorkflowNotFoundError."""
    run = app.get_run(run_id)
    if run is None:
        raise WorkflowNotFoundError(f"there is no run {run_id!r} in this database; see: streamline-pool runs list", run_id=run_id)
    return run


def follow(app: Streamline, run_id: str, env: Env, timeout_s: float | None = None) -> Iterator[Moment]:
    """The run now, and again at every event and twice a second, until it has ended.

    Raises WorkflowNotFoundError, DataCorruptionError, and TimeoutError when the run has not ended after `timeout_s` seconds.
    """
    clock, progress = env.clock, RunProgress()
    until = None if timeout_s is None else clock.monotonic() + timeout_s
    document = app.connections.drive(reading_run(None, run_id))
    yield Moment(document, progress.on_document(document))
    if is_terminal(document):
        return
    events, pause_s = _Events(app, run_id), _FIRST_READ_S
    while True:
        left_s = pause_s if until is None else min(pause_s, until - clock.monotonic())
        if left_s <= 0:
            raise TimeoutError(run_id)
        for lines in _within(events, progress, env, left_s):
            yield Moment(document, lines)
        # What the last read has shown is told only now: the events that report the same come in their order, and say more.
        held, document = document, app.connections.drive(reading_run(None, run_id))
        yield Moment(document, progress.on_document(held))
        if is_terminal(document):
            for lines in _within(events, progress, env, _LAST_EVENTS_S if events.subscribed else 0.0):
                yield Moment(document, lines)
            yield Moment(document, progress.on_document(document))
            return
        events.ended = False  # it may have been rewound meanwhile
        pause_s = min(2 * pause_s, _READ_S)


def _within(events: _Events, progress: RunProgress, env: Env, seconds: float) -> Iterator[list[Line]]:
    """The lines of the events that come within so many seconds. It ends at once with the event of the run's end."""
    until = env.clock.monotonic() + seconds
    while not events.ended:
        left_s = until - env.clock.monotonic()
        event = events.take(max(0.0, left_s))
        if event is None:
            return
        lines = progress.on_event(event)
        if lines:
            yield lines
