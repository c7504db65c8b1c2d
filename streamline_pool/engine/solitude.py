"""Lets a suspect run alone in its worker, so that the worker's death shows that the suspect has caused it.

A run that has lost all the workers but one that it may lose is a suspect: one more, and it fails. Beside other runs it might
lose that one to a run that has never been seen before. Owns the order of entry within one engine. That a suspect fails only if
it ran alone is decided by the update in protocol/recovery.py, which reads the mark that is stored here.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from streamline_pool.domain.errors import ValidationError
from streamline_pool.protocol import commits

from .active_run import STATEMENT_BYTES, ActiveRun
from .active_runs import ActiveRuns
from .asking import Asking
from .attempt import Attempt
from .group_commit import GroupCommitter
from .run_writer import EngineState
from .write_outcome import WriteOutcome

__all__ = ["Solitude"]


class Solitude:
    """At most one suspect of an engine waits to be alone or is alone; it has the lease of its run all the time."""

    def __init__(
        self,
        active_runs: ActiveRuns,
        committer: GroupCommitter,
        state: EngineState,
        now: Callable[[], datetime],
        suspect_from: int | None,
    ) -> None:
        self._active_runs = active_runs
        self._committer = committer
        self._state = state
        self._now = now  # the server's time
        self._suspect_from = suspect_from  # lost workers; None: no run of this engine has to be alone
        self._suspect: ActiveRun | None = None
        self._left: set[Attempt | Asking] = set()  # their outcome came before the end of their handler or condition, which goes on

    @property
    def suspect(self) -> str | None:
        """The run that waits to be alone here, or is alone; None if there is none."""
        return None if self._suspect is None else self._suspect.run_id

    def admitted(self, active: ActiveRun) -> None:
        """A run was claimed. Beside a suspect it is released before it enters a handler; a suspect has the others released."""
        if self._suspect is not None:
            active.release_requested = True  # its claim was under way when the suspect was claimed
        elif self._suspect_from is not None and active.document["crashes"] >= self._suspect_from:
            self._suspect = active
            for other in self._active_runs.held.values():
                # After its current step; its other steps may take hours, and another worker can run them.
                other.release_requested = other.release_requested or other is not active

    def removed(self, active: ActiveRun) -> None:
        """An execution is over."""
        if active is self._suspect:
            self._suspect = None
        self.changed()

    def code_left(self, left: Attempt | Asking) -> None:
        """An attempt or an asking is over. Its handler or condition may go on: a suspect beside it would not be alone."""
        if left.call_when_returned(lambda: self._returned(left)):
            self._left.add(left)

    def _returned(self, left: Attempt | Asking) -> None:
        self._left.discard(left)
        self.changed()

    def changed(self) -> None:
        """What the suspect waits for may have come."""
        if self._suspect is not None:
            self._suspect.wake()

    async def reach(self, active: ActiveRun) -> None:
        """For a suspect: return once it is alone and this is stored, or once it must not enter a handler here."""
        if active is not self._suspect or active.is_alone:
            return
        while (len(self._active_runs) > 1 or self._left) and not self._must_stop(active):
            await active.woken()
        if not self._must_stop(active):
            await self._mark_alone(active)

    async def _mark_alone(self, active: ActiveRun) -> None:
        try:
            outcome = await self._committer.write(commits.mark_alone(active.fence(), self._now(), STATEMENT_BYTES))
        except ValidationError:
            active.is_alone = True  # its document has no room for the mark: it runs alone all the same, and cannot be convicted
            return
        if outcome is WriteOutcome.COMMITTED:
            active.document["rev"] += 1
            active.is_alone = True
        else:
            active.mark_lost()

    def _must_stop(self, active: ActiveRun) -> bool:
        stopping = self._state.draining or active.release_requested
        return stopping or active.lost is not None or active.document.get("paused") is True
