"""The calls of clients, each with what came of it. Owns their order and their notes in the ledger; clients.py makes the calls.

An `Act` is one call on one run: begun, ended, and `ok` (acknowledged), `refused` (an error that says that nothing happened) or
`unknown` (the database did not answer, so it may have happened). `Acts` numbers begins and ends, so that a later judgement knows
which call came after which.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from .ledger import Ledger, real_monotonic

__all__ = ["Act", "Acts"]


@dataclass(slots=True)
class Act:
    """One call on one run."""

    kind: str  # start, answer, event, cancel, pause, resume, rewind
    run_id: str
    begun: int
    ended: int = 0  # 0 while under way
    outcome: str = "unknown"  # ok, refused, unknown, or corrupted: what the call read of the run had no whole output
    payload: str | None = None  # what the run must see
    generation: int = 0  # of a rewind: the run's `rewinds` after it
    status: str = ""  # the run's, as returned
    paused: bool = False  # the same
    called_at: float = field(default_factory=real_monotonic)
    returned_at: float = 0.0


@dataclass(slots=True)
class Acts:
    """All acts, by run."""

    by_run: dict[str, list[Act]] = field(default_factory=lambda: defaultdict(list))
    counts: Counter[str] = field(default_factory=Counter)
    ledger: Ledger | None = None  # where acknowledged calls are noted
    _numbers: Any = field(default_factory=itertools.count)

    def begin(self, kind: str, run_id: str, payload: str | None = None) -> Act:
        """Note a call before it is made."""
        act = Act(kind, run_id, next(self._numbers) + 1, payload=payload)
        self.by_run[run_id].append(act)
        return act

    def end(self, act: Act, outcome: str) -> None:
        """Note its outcome."""
        act.ended, act.outcome, act.returned_at = next(self._numbers) + 1, outcome, real_monotonic()
        self.counts[f"{act.kind} {outcome}"] += 1
        if self.ledger is not None:
            self.ledger.note("call", call=act.kind, run=act.run_id, outcome=outcome, payload=act.payload, began=act.called_at)

    def overridden(self, act: Act) -> bool:
        """True if a rewind or a cancel of the same run began later or was under way: what `act` did may be void."""
        others = [other for other in self.by_run[act.run_id] if other.kind in ("rewind", "cancel") and other is not act]
        return any(other.outcome != "refused" and (not other.ended or other.ended > act.begun) for other in others)

    def has_started(self, run_id: str) -> bool:
        """True if its start was acknowledged."""
        return any(act.kind == "start" and act.outcome == "ok" for act in self.by_run.get(run_id, ()))

    def has_event(self, run_id: str) -> bool:
        """True if an event to the run was acknowledged, or may have arrived, and nothing voided it."""
        acts = [act for act in self.by_run.get(run_id, ()) if act.kind == "event"]
        return any(act.outcome == "ok" and not self.overridden(act) for act in acts)
