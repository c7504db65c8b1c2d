"""What a parent keeps for a child that does not read."""

from __future__ import annotations

import socket

from streamline_pool.supervisor.ipc.messages import CheckRun
from streamline_pool.supervisor.pool.child import UNSENT_BYTES_MAX, Child


def test_hints_to_a_child_that_does_not_read_are_bounded() -> None:
    """A run that was changed is a hint, too: the child learns of it when it renews the lease."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        child = Child.__new__(Child)
        child.sock, child._unsent = ours, bytearray()
        for number in range(20_000):
            child.send(CheckRun(run_id=f"{number:032}"))
        assert len(child._unsent) < UNSENT_BYTES_MAX + 1_000
