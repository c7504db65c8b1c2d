"""Performs a worker's claims. Owns the order of their commands; which runs to claim is decided by demand.py and poller.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streamline_pool.config.env import Env
from streamline_pool.domain.document import RunDocument
from streamline_pool.domain.errors import StoreUnavailableError, ValidationError
from streamline_pool.engine.engine import Engine
from streamline_pool.protocol import claims
from streamline_pool.storage.bulk_update import update_many

from .poller import Poller

__all__ = ["Claimer", "Terms"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What is the same in all claims of one worker."""

    owner: str  # worker "host:pid:nonce"
    lanes: Sequence[str]  # "queue/workflow/version": the only ones in which it claims
    lease_s: float


class Claimer:
    """Claims runs, and passes those that were won to the engine."""

    def __init__(
        self,
        engine: Engine,
        poller: Poller,
        terms: Terms,
        env: Env,
        *,
        store_answered: Callable[[bool], None],  # with whether a command succeeded
        retry_pause_s: Callable[[], float],  # how long to wait after the latest failure, in seconds
    ) -> None:
        self._engine = engine
        self._store = engine.store
        self._poller = poller
        self._terms = terms
        self._env = env
        self._store_answered = store_answered
        self._retry_pause_s = retry_pause_s

    async def claim_named(self, run_ids: Sequence[str], crashes_below: int | None) -> frozenset[str]:
        """Claim these runs. Yields those that were not claimed, are not held by a worker, and have not ended."""
        run_ids = await self._without_held(run_ids)
        if not run_ids:
            return frozenset()
        if len(run_ids) > 1:
            done = await self.claim_runs(run_ids, self._terms.lanes, crashes_below) == len(run_ids)
        else:
            done = await self._claim_run(run_ids[0], crashes_below)
        if done:
            return frozenset()
        return frozenset(run_ids) - await self._taken(run_ids)

    async def _without_held(self, run_ids: Sequence[str]) -> Sequence[str]:
        """Leave out runs that this worker holds, by a read: it is cheaper than a claim that matches nothing.

        The cache only says for which runs the read is worth while. They were announced late, or this worker has lost them
        without knowing: to a rewind, for example.
        """
        notes = [(run_id, self._engine.cache.get(run_id)) for run_id in run_ids]
        noted = [run_id for run_id, note in notes if note is not None and note.in_flight]
        taken = await self._taken(noted) if noted else frozenset()
        return [run_id for run_id in run_ids if run_id not in taken]

    async def _taken(self, run_ids: Sequence[str]) -> frozenset[str]:
        return frozenset(row["_id"] for row in await self._store.run(claims.taken_runs(run_ids)))

    async def _claim_run(self, run_id: str, crashes_below: int | None) -> bool:
        """Claim one run in one round trip. False: it cannot be claimed now."""
        terms, lease_id, deadline = self._terms, self._env.new_id(), self._engine.leases.deadline()
        self._env.probe("claim.before")
        claim = claims.claim_run(run_id, terms.lanes, lease_id, terms.owner, terms.lease_s, crashes_below)
        try:
            document = await self._store.run(claim)
        except ValidationError:  # the server refuses to update this run; `update_many` handles that
            await self.claim_runs([run_id], terms.lanes, crashes_below)
            return True
        self._env.probe("claim.after")
        self._store_answered(True)
        if document is not None:
            self._engine.admit(document, deadline)
        return document is not None

    async def claim_runs(self, run_ids: Sequence[str], lanes: Sequence[str] | None = None, crashes_below: int | None = None) -> int:
        """Claim many runs at once. Yields how many were won. `lanes` None: the caller knows that the runs are in its lanes."""
        terms, lease_id, deadline = self._terms, self._env.new_id(), self._engine.leases.deadline()
        self._env.probe("claim.before")
        claim = claims.claim_runs(run_ids, lanes, lease_id, terms.owner, terms.lease_s, crashes_below)
        won, refused = await update_many(self._store.run, claim, self._store.now)
        self._poller.skip_for_now(refused)
        self._env.probe("claim.after")
        documents = await self._read_back(run_ids, lease_id, deadline) if won else []
        for document in documents:
            self._engine.admit(document, deadline)
        return len(documents)

    async def _read_back(self, run_ids: Sequence[str], lease_id: str, deadline: float) -> list[RunDocument]:
        """The documents of the runs that were won.

        The read is repeated as long as the leases last. Without it these runs would wait until their leases expire, as
        if this worker had died.
        """
        while True:
            try:
                documents: list[RunDocument] = await self._store.run(claims.read_claimed(run_ids, lease_id))
            except StoreUnavailableError:
                if self._env.clock.monotonic() > deadline:
                    raise
                self._store_answered(False)
                await self._env.async_sleep(self._retry_pause_s())
                continue
            self._store_answered(True)
            return documents
