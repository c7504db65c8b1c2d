"""Finds due runs for one worker: in its own slots first, then in all slots; the oldest first.

Owns what is remembered between polls. MongoDB keeps the index entries of claimed runs for as long as a snapshot may
ask for them (five minutes by default), and a poll that starts at the beginning of the queue steps over them all:
measured, 0.4 µs each, so after a million claims such a poll takes half a second. So a poll normally starts where the
last one found its first run. A full poll, from the beginning of the queue, is made only as often as its own cost allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from zlib import crc32

from streamline_pool.config.env import Env
from streamline_pool.domain.definition import queue_of
from streamline_pool.protocol import claims
from streamline_pool.protocol.claims import SlotShare
from streamline_pool.protocol.run_document import SLOTS
from streamline_pool.storage.store import AsyncStore

__all__ = ["Poller", "slots_of"]

_SCANS_MAX = 190  # queues times priorities in one find; MongoDB merges at most 200 index scans
_QUEUES_MAX = 60  # in one find, which leaves room for three priorities; a worker with more queues takes turns through them
_PRIORITIES_MAX = 50  # remembered
_FULL_SHARE = 1 / 50  # of the time that full polls may take; a guess
_MARGIN = timedelta(seconds=5)  # runs become visible later than their `wakeAt` says, by an insert's duration and clock errors
_ALL_SLOTS_S = 5.0  # how long a run in the slots of a full worker waits behind a backlog in those of the others; a guess
_SKIP_S = 30.0  # then the run is shown again: an operator may have repaired it
_SKIPPED_MAX = 5_000  # measured: with so many, a full poll takes 30 ms instead of 7; beyond it, runs behind them may wait


def slots_of(index: int, total: int) -> SlotShare | None:
    """The slots that worker `index` of `total` claims from first; together the workers cover them all. None: all slots."""
    divisor = min(total, SLOTS)
    return SlotShare(divisor, index % divisor) if divisor > 1 else None


class _Group(NamedTuple):
    """The lanes of so many queues, which one find covers."""

    lanes: tuple[str, ...]
    queues: int


def _grouped(lanes: Sequence[str]) -> list[_Group]:
    by_queue: dict[str, list[str]] = {}
    for lane in lanes:
        by_queue.setdefault(queue_of(lane), []).append(lane)
    queues = list(by_queue)
    parts = [queues[start : start + _QUEUES_MAX] for start in range(0, len(queues), _QUEUES_MAX)]
    return [_Group(tuple(lane for queue in part for lane in by_queue[queue]), len(part)) for part in parts]


@dataclass(slots=True)
class _ScanStart:
    """What the last full poll has shown of some queues and slots."""

    since: datetime  # everything due before that was chosen, or is of a lower priority than what was found
    priorities: frozenset[int]  # whose runs due before `since` were all found
    settled: bool  # the last poll reached the end of the queue, so nothing of a lower priority was left before `since`
    full_at: float  # monotonic; from then on the next full poll is affordable


@dataclass(frozen=True, slots=True, kw_only=True)
class _Query:
    """One find, as far as it does not depend on where the scan starts."""

    lanes: Sequence[str]
    slots: SlotShare | None  # None: all of them
    now: datetime
    limit: int
    crashes_below: int | None
    skipped: Sequence[str]

    async def find(
        self, store: AsyncStore, limit: int, *, since: datetime | None = None, priorities: Sequence[int] = ()
    ) -> list[Mapping[str, Any]]:
        """Up to `limit` rows; see `claims.find_due` for `since` and `priorities`."""
        op = claims.find_due(self.lanes, self.slots, self.now, limit, self.crashes_below, self.skipped, since=since, priorities=priorities)
        rows: list[Mapping[str, Any]] = await store.run(op)
        return rows


class Poller:
    """Polls for due runs on behalf of one worker."""

    def __init__(self, lanes: Sequence[str], index: int, total: int, env: Env) -> None:
        self._groups = _grouped(lanes)
        self._env = env
        self._turn = 0  # which group comes first
        self._scan_starts: dict[tuple[str, bool], _ScanStart] = {}  # by (first lane, whether all slots were polled)
        self._priorities: frozenset[int] = frozenset()  # of the runs that were found lately
        self._skipped: dict[str, float] = {}  # run id -> until when (monotonic)
        self._own_slots_until: float | None = None  # monotonic; then a poll is for all slots. None: the last one was
        self.reslot(index, total)

    def reslot(self, index: int, total: int) -> None:
        """This is worker `index` of `total` on its host."""
        self._index, self._total = index, total
        self._slots = slots_of(index, total)
        self.forget()

    def forget(self) -> None:
        """Make the next poll a full one: there may be runs that are due since long, and were not a moment ago."""
        self._scan_starts = {}  # a new one: a poll that is under way writes to the old one, which is dropped

    def keep_in_sight(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """A poll has found these runs, and this worker does not claim them now: the next poll is to show them if they are still due.

        They may have been due since long: they were released or recovered. No other worker has to claim them soon.
        """
        self._keep_in_sight(rows, self._scan_starts.values())

    def _keep_in_sight(self, rows: Iterable[Mapping[str, Any]], scan_starts: Iterable[_ScanStart | None]) -> None:
        earliest = min((row["wakeAt"] for row in rows if isinstance(row["wakeAt"], datetime)), default=None)
        for scan_start in scan_starts:
            if earliest is not None and scan_start is not None:
                scan_start.since = min(scan_start.since, earliest)

    def _is_turn_of_all_slots(self) -> bool:
        """Whether the next poll is for all slots, without shares.

        The worker of the other slots may be full for hours, while the backlog in this worker's own never ends.
        """
        return self._own_slots_until is not None and self._env.clock.monotonic() >= self._own_slots_until

    def _polled(self, *, all_slots: bool) -> None:
        if all_slots:
            self._own_slots_until = None
        elif self._own_slots_until is None:
            self._own_slots_until = self._env.clock.monotonic() + _ALL_SLOTS_S

    def skip_for_now(self, run_ids: Iterable[str]) -> None:
        """Do not show these runs for a while: they cannot be claimed, and would be found first again and again.

        When too many are remembered, further ones are not, and polls go on to show them.
        """
        until = self._env.clock.monotonic() + _SKIP_S
        for run_id in run_ids:
            if len(self._skipped) < _SKIPPED_MAX:
                self._skipped[run_id] = until

    def skips(self, run_id: str) -> bool:
        """Whether the next poll does not show this run."""
        return run_id in self._skipped

    def _still_skipped(self) -> list[str]:
        if self._skipped:
            now = self._env.clock.monotonic()
            self._skipped = {run_id: until for run_id, until in self._skipped.items() if until > now}
        return list(self._skipped)

    async def poll(self, store: AsyncStore, limit: int, crashes_below: int | None) -> tuple[list[Mapping[str, Any]], bool]:
        """Up to `limit` due runs `{_id, crashes, priority, wakeAt}`, and whether there may be more."""
        for seen in range(len(self._groups)):
            group = self._groups[(self._turn + seen) % len(self._groups)]
            slots = None if self._is_turn_of_all_slots() else self._slots
            rows = chosen = await self._find(store, group, slots, limit, crashes_below)
            self._polled(all_slots=slots is None or len(rows) < limit)
            if len(rows) < limit and slots is not None:
                own, rows = rows, await self._find(store, group, None, limit, crashes_below)
                chosen = self._share_of(own, rows)
                self._keep_in_sight(_without(rows, chosen), [self._scan_starts.get((group.lanes[0], True))])
            if rows:
                self._turn += seen + 1
                return chosen, len(chosen) < len(rows) or len(rows) == limit or seen + 1 < len(self._groups)
        return [], False

    def _share_of(self, own: Sequence[Mapping[str, Any]], rows: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """What to claim of `rows`, which are from all slots: the runs in this worker's slots, and its share of the others.

        When the queue ends, all workers poll all slots at about the same time, and all see the same runs. Without shares
        each worker would try to claim them all. When only other workers' shares are left, one of those, by chance.
        """
        mine = {row["_id"] for row in own}
        chosen = [row for row in rows if row["_id"] in mine or crc32(str(row["_id"]).encode()) % self._total == self._index % self._total]
        return chosen or ([rows[int(self._env.random() * len(rows))]] if rows else [])

    async def _find(
        self, store: AsyncStore, group: _Group, slots: SlotShare | None, limit: int, crashes_below: int | None
    ) -> list[Mapping[str, Any]]:
        scan_starts, key = self._scan_starts, (group.lanes[0], slots is None)
        scan_start = scan_starts.get(key)
        skipped = self._still_skipped()
        asked_at = self._env.clock.monotonic()
        query = _Query(lanes=group.lanes, slots=slots, now=store.now(), limit=limit, crashes_below=crashes_below, skipped=skipped)
        if scan_start is not None and asked_at < scan_start.full_at:
            found = await self._follow(store, query, scan_start, group.queues)
            if found is not None:
                return found
            asked_at = self._env.clock.monotonic()
        rows = await query.find(store, limit)
        answered_at = self._env.clock.monotonic()
        settled = len(rows) < limit
        scan_starts[key] = _ScanStart(
            since=_start_of_next(query, rows, settled),
            priorities=self._priorities_to_follow(rows),
            settled=settled,
            full_at=answered_at + (answered_at - asked_at) / _FULL_SHARE,
        )
        return rows

    async def _follow(self, store: AsyncStore, query: _Query, scan_start: _ScanStart, queues: int) -> list[Mapping[str, Any]] | None:
        """Poll from where the last poll began. None: a full poll is needed, because runs may be due since before that."""
        if not scan_start.settled and not 0 < len(scan_start.priorities) * queues <= _SCANS_MAX:
            return None
        priorities = [] if scan_start.settled else sorted(scan_start.priorities)
        rows = await query.find(store, query.limit, since=scan_start.since, priorities=priorities)
        if len(rows) < query.limit and not scan_start.settled:
            return None
        scan_start.settled = len(rows) < query.limit
        scan_start.since = _start_of_next(query, rows, scan_start.settled)
        scan_start.priorities = self._priorities_to_follow(rows)
        return rows

    def _priorities_to_follow(self, rows: Sequence[Mapping[str, Any]]) -> frozenset[int]:
        """The priorities of these rows, and the higher ones that were seen before.

        Of a lower one, runs may be due since before the rows: a poll that starts at the rows would take younger runs of it first.
        """
        # A priority that is not a whole number was written by another program; full polls find such runs.
        found = frozenset(row["priority"] for row in rows if isinstance(row.get("priority"), int))
        self._priorities = found | self._priorities if len(self._priorities) < _PRIORITIES_MAX else found
        return frozenset(priority for priority in self._priorities if priority >= min(found, default=priority + 1))


def _without(rows: Iterable[Mapping[str, Any]], chosen: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    run_ids = {row["_id"] for row in chosen}
    return [row for row in rows if row["_id"] not in run_ids]


def _start_of_next(query: _Query, rows: Sequence[Mapping[str, Any]], settled: bool) -> datetime:
    """From which `wakeAt` on the next poll is to start."""
    # What is no date, or one before the year 1, was written by another program; full polls find such runs.
    found = [row["wakeAt"] for row in rows if isinstance(row["wakeAt"], datetime)]
    return query.now - _MARGIN if settled or not found else min(found)
