"""What a worker reports of itself. Owns the record; the supervisor sends its fields in beats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["WorkerStatus"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """The status of one worker; counters are cumulative."""

    state: str  # "starting" | "ready" | "holding" | "draining" | "stopped"
    idle: bool  # it has room, and its last poll found nothing more
    in_flight: int  # active runs
    runs_total: int  # runs that were active here and are not any more
    steps_total: int  # handlers that have ended
    ops_ok: int  # commands answered by the database
    ops_failed: int
    consecutive_failures: int  # since the last answer
    recycle: str | None  # why this worker should be replaced; None: no reason
    running: tuple[tuple[str, str], ...]  # (run id, step id) of up to five active runs
    kept: bool = False  # it claims nothing until a suspect has run alone
    lru: Mapping[str, int] = field(default_factory=dict)  # counters of the run cache
