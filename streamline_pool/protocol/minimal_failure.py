"""How a run fails when its document has little or no room left, as data.

Owns the one update for it: a short error, and every field removed that only a live run needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from streamline_pool.domain.errors import ErrorCode
from streamline_pool.domain.model import RunStatus

from .operations import Expression

__all__ = ["failure_update", "minimal_failure"]

_MESSAGE_MAX = 100  # characters of the message
_LIVE_FIELDS = ("lease", "wakeAt", "pausedWakeAt", "awaits")  # an index entry or a claim needs them, an ended run does not
# Some 100 bytes. `startId` too: a new run has a mebibyte of room, so its start has long been answered when it is full.
_CALL_IDS = ("lastAct", "actIds", "startId")


def minimal_failure(
    code: ErrorCode, message: str, now: datetime, *, also_unset: Sequence[str] = (), whole_error: bool = False
) -> dict[str, Any]:
    """`{"$set": …, "$unset": …}` that ends a run in as few bytes as possible. The caller owns the filter and may add fields.

    `also_unset` names further fields that make room. `whole_error` also stores an empty `type` and `traceback`, as every
    other error has them: for a caller that removes a lease, which is larger.
    """
    error: Expression = {"code": code.value, "message": message[:_MESSAGE_MAX], "stepId": None}
    if whole_error:
        error |= {"type": "", "traceback": ""}
    return failure_update(error, now, also_unset=(*_CALL_IDS, *also_unset))


def failure_update(error: Mapping[str, Any], now: datetime, *, also_unset: Sequence[str] = ()) -> dict[str, Any]:
    """`{"$set": …, "$unset": …}` that ends a run with this error. It relies on no field of the document."""
    return {
        "$set": {"status": RunStatus.FAILED.value, "error": error, "endedAt": now, "updatedAt": now},
        "$unset": dict.fromkeys((*_LIVE_FIELDS, *also_unset), ""),
    }
