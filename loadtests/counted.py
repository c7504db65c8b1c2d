"""The load tests' application in a pool whose workers record every claim: how many runs it tried, and how many it won.

Writes one line per claim into the file of CLAIMS_VARIABLE. The counting wraps the store in the processes of this pool, so
that the engine itself has no code for it.
"""

from __future__ import annotations

import os
from typing import Any

from streamline_pool.protocol.operations import Command, Op
from streamline_pool.storage.store import AsyncStore

from .app import CLAIMS_VARIABLE, app

__all__ = ["app"]

_run = AsyncStore.run
_fd = os.open(os.environ[CLAIMS_VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


async def _counting(self: AsyncStore, op: Op, session: Any = None) -> Any:
    answer = await _run(self, op, session)
    if op.name == "claim_runs" and isinstance(op, Command):
        _note("due", len(op.body["updates"][0]["q"]["_id"]["$in"]), answer)
    elif op.name == "claim_run":
        _note("named", 1, answer is not None)
    elif op.name == "find_due" and not answer:
        _note("empty", 0, 0)
    return answer


def _note(kind: str, tried: int, won: int) -> None:
    os.write(_fd, f"{kind} {tried} {won:d}\n".encode())


AsyncStore.run = _counting  # type: ignore[method-assign]  # in this pool's processes only
