"""The nemesis' side of a proxy. Owns the process of proxy.py, its orders and their answers."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from .ending import same_package
from .ledger import real_monotonic

__all__ = ["Link"]

_ANSWER_S = 10.0
_START_S = 60.0  # a guess: 0.3 s on an idle machine


class Link:
    """What one host reaches the database by. `close` ends it."""

    def __init__(self, members: Sequence[str]) -> None:
        command = [sys.executable, "-m", "streamline_pool.chaos.proxy", str(os.getpid()), *members]
        self._process = subprocess.Popen(
            command, env=same_package(os.environ), stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._unread = b""
        self.held_port: int | None = None  # of the client whose commit is held
        self.pid = self._process.pid
        try:
            self.addresses = [f"127.0.0.1:{port}" for port in self._answer("ports", _START_S)]
        except BaseException:
            self.close()
            raise

    def order(self, mode: str, **more: Any) -> None:
        """Change the mode, and wait until it is in force."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"mode": mode, **more}).encode() + b"\n")
        self._process.stdin.flush()
        while self._answer("done", _ANSWER_S) != mode:
            pass

    def wait_held(self, timeout_s: float) -> bool:
        """After the order `hold`: True when a commit is held, whose client has `held_port`."""
        self.held_port = self._answer("held", timeout_s)
        return self.held_port is not None

    def _answer(self, name: str, timeout_s: float) -> Any:
        """The value of the next line with that name; None if there is none in time, where that is usual."""
        assert self._process.stdout is not None
        deadline = real_monotonic() + timeout_s
        while True:
            while b"\n" in self._unread:
                line, _, self._unread = self._unread.partition(b"\n")
                answer = json.loads(line)
                if name in answer:
                    return answer[name]
            readable, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - real_monotonic()))
            chunk = os.read(self._process.stdout.fileno(), 4096) if readable else b""
            if readable and not chunk:
                raise RuntimeError(f"the proxy (pid {self.pid}) has ended with code {self._process.wait()}")
            if not chunk and name == "held":
                return None
            if not chunk:
                raise RuntimeError(f"the proxy (pid {self.pid}) did not answer within {timeout_s:g} s")
            self._unread += chunk

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # an order that was not written yet
                    pipe.close()
