"""Fails the test that leaves an asyncio task behind, or about which the event loop complains.

Owns the watch over event loops during a pytest session: a plugin that tests/conftest.py loads. A task that is pending in a closed
loop never ends; asyncio says so ("Task was destroyed but it is pending!") when the garbage collector finds it, in the middle of
another test or after the last one, where no test fails for it. So the plugin looks for such tasks at the end of each test.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from asyncio.base_events import BaseEventLoop
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import pytest

__all__ = ["LoopWatch", "LoopWatchPlugin"]

OUTPUT = "loop_watch"  # the key of what an xdist worker reports at its end


class LoopWatch(logging.Handler):
    """What is wrong with event loops and tasks of this process, each fault once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._loops: WeakSet[BaseEventLoop] = WeakSet()
        self._known: WeakSet[asyncio.Task[Any]] = WeakSet()  # reported, or not for us to report
        self._faults: list[str] = []

    def watch(self) -> None:
        """From now on, see every new event loop and every message of asyncio."""
        logging.getLogger("asyncio").addHandler(self)
        made = BaseEventLoop.__init__

        def make(loop: BaseEventLoop) -> None:
            made(loop)
            self._loops.add(loop)

        BaseEventLoop.__init__ = make  # type: ignore[method-assign, assignment]  # there is no public way to see the loops of other threads

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            self._faults.append(f"asyncio logs: {record.getMessage()}")

    def new_faults(self, *, at_the_end: bool = False) -> list[str]:
        """The faults since the last call. At the end of the session a loop that is still open counts as one that is closed."""
        if at_the_end:
            gc.collect()
        for loop in list(self._loops):
            if not loop.is_closed() and not (at_the_end and not loop.is_running()):
                continue
            for task in asyncio.all_tasks(loop) - set(self._known):
                self._known.add(task)
                loop.set_exception_handler(lambda _loop, _context: None)  # asyncio would report it again, during another test
                self._faults.append(f"a task is pending in {'a closed' if loop.is_closed() else 'an abandoned'} event loop: {task!r}")
        found, self._faults = self._faults, []
        return found


class LoopWatchPlugin:
    """Reports faults to pytest: those of a test as an error of that test, those after the last one as a failure of the session."""

    def __init__(self) -> None:
        self._watch = LoopWatch()
        self._at_the_end: list[str] = []
        self._watch.watch()

    @pytest.fixture(autouse=True)
    def no_task_is_left(self) -> Iterator[None]:
        """Set up before all other fixtures of the test, so that it looks after they have cleaned up."""
        yield
        if faults := self._watch.new_faults():
            pytest.fail("\n".join(faults), pytrace=False)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._at_the_end += self._watch.new_faults(at_the_end=True)
        output = getattr(session.config, "workeroutput", None)
        if output is not None:  # this is a worker of xdist, whose exit status does not count
            output[OUTPUT] = self._at_the_end
        elif self._at_the_end:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker of xdist has ended."""
        self._at_the_end += getattr(node, "workeroutput", {}).get(OUTPUT, [])

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._at_the_end:
            terminalreporter.section("event loops after the last test", red=True)
            for fault in self._at_the_end:
                terminalreporter.line(fault)
