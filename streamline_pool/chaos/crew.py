"""Threads of a program whose main thread waits for them. Owns their start and end; an error in one of them is raised in `wait`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Crew"]


class Crew:
    """Threads. An error in one of them is raised in the thread that waits for them."""

    def __init__(self) -> None:
        self._threads: list[tuple[threading.Thread, Callable[[], None]]] = []
        self._errors: list[BaseException] = []

    def start(self, loop: Callable[[], None], stop: Callable[[], None]) -> threading.Thread:
        """Run `loop` on a thread; `stop` ends it."""
        thread = threading.Thread(target=self._run, args=(loop,), daemon=True)
        self._threads.append((thread, stop))
        thread.start()
        return thread

    def _run(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as exc:  # noqa: BLE001 - raised by `check`
            self._errors.append(exc)

    def check(self) -> None:
        """Raise the first error of a thread."""
        if self._errors:
            raise self._errors[0]

    def wait(self, seconds: float) -> None:
        """Let the threads work for that time, or until one fails."""
        deadline = time.monotonic() + seconds
        while (left_s := deadline - time.monotonic()) > 0:
            self.check()
            time.sleep(min(0.2, left_s))

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for _, stop in self._threads:
            stop()
        for thread, _ in self._threads:
            thread.join(60)
