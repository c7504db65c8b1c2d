"""Updates of many runs at once, in which one run that the server refuses to store does not stop the others.

Owns what is done about such a run. The server ends a multi-update at the first refusal, and its reply counts nothing.
Without this module a claim or a recovery would stop at the same run every time, and at every run behind it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from streamline_pool.domain.errors import ErrorCode, ValidationError
from streamline_pool.protocol import operations, server_codes
from streamline_pool.protocol.minimal_failure import minimal_failure
from streamline_pool.protocol.operations import Command, Find, Op
from streamline_pool.protocol.too_large import no_room

__all__ = ["Updated", "update_many"]

log = logging.getLogger("streamline_pool")

_APART_MAX = 1_000  # runs updated one by one; the next poll, sweep or renewal does the rest


class Updated(NamedTuple):
    """The result of an update of many runs."""

    matched: int  # at least so many
    refused: Mapping[str, Mapping[str, Any]]  # by run id: the server's error


async def update_many(run: Callable[[Op], Awaitable[Any]], op: Command, now: Callable[[], datetime]) -> Updated:
    """Update every run that `op` matches and that the server can store. A run that is full fails with PAYLOAD_TOO_LARGE.

    `run` performs one operation, `now` gives the server's time. Raises StoreUnavailableError.
    """
    try:
        return Updated(await run(op), {})
    except ValidationError:
        run_ids = [found["_id"] for found in await run(_matching(op))]
    if not run_ids:
        return Updated(1, {})  # the refused run has changed meanwhile; the runs before it were updated
    reply = await run(_apart(op, run_ids))
    refused = {run_ids[error["index"]]: error for error in reply.get("writeErrors", ())}
    for run_id, error in refused.items():
        log.error("run_refused", extra={"run_id": run_id, "operation": op.name, "error": str(error.get("errmsg"))[:500]})
        if error.get("code") in server_codes.TOO_LARGE:
            try:
                await run(_fail_minimal(op, run_id, now()))
            except ValidationError:
                log.exception("run_unstorable", extra={"run_id": run_id})
    return Updated(max(1, reply["n"]), refused)


def _matching(op: Command) -> Find:
    """Ids of the runs that the operation would update now."""
    query = op.body["updates"][0]["q"]
    return Find(name=f"{op.name}_ids", collection="runs", filter=query, projection={"_id": 1}, limit=_APART_MAX)


def _apart(op: Command, run_ids: Sequence[str]) -> Command:
    """The same update run by run. Yields the reply, with `writeErrors` by index."""
    many = op.body["updates"][0]
    updates = [{"q": {"$and": [{"_id": run_id}, many["q"]]}, "u": many["u"]} for run_id in run_ids]
    body = {"updates": updates, "ordered": False}
    return Command(name=f"{op.name}_apart", collection="runs", verb="update", body=body, parse=dict)


def _fail_minimal(op: Command, run_id: str, now: datetime) -> Command:
    """End a run that is full. It loses its lane and slot, which make room for the error; `rewind_run` sets them again."""
    update = minimal_failure(ErrorCode.PAYLOAD_TOO_LARGE, no_room(op.name), now, also_unset=("lane", "slot"))
    query = {"$and": [{"_id": run_id}, op.body["updates"][0]["q"]]}
    body = {"updates": [{"q": query, "u": update}]}
    return Command(name="fail_full", collection="runs", verb="update", body=body, parse=operations.all_or_refused)
