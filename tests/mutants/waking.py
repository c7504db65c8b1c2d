"""Mutants of wake-ups: polls, sweeps, timers. Each loses a run to all workers until something else looks for it."""

from __future__ import annotations

from .mutant import Mutant, mutants_of

__all__ = ["MUTANTS"]

_SWEEP = "supervisor/steward/sweep.py"
_DEMAND = "streamline_pool/worker/demand.py"
_bug = mutants_of(
    "waking",
    "unit/worker/test_demand.py",
    "unit/worker/test_demand_sequences.py",
    "conformance/test_poller.py",
    "conformance/test_left_behind.py",
    "conformance/test_seams.py",
    "conformance/test_sweep.py",
)

MUTANTS: tuple[Mutant, ...] = (
    _bug(
        name="sweep-never-looks-for-due-runs",
        file=_SWEEP,
        old="        await self._plan_due()\n",
        new="",
        harm="A run whose wake-up was lost is claimed by no worker for as long as all are idle.",
        likely=("conformance/test_sweep.py", "conformance/test_supervisor.py"),
    ),
    _bug(
        name="sweep-never-recovers-leases",
        file=_SWEEP,
        old="        await self._recover_expired(full)\n",
        new="",
        harm="The runs of a dead host are held for ever.",
        likely=("conformance/test_sweep.py", "conformance/test_supervisor.py"),
    ),
    _bug(
        name="sweep-never-finishes-events",
        file=_SWEEP,
        old="if self._sweeps % BROADCASTS_EVERY == 1:",
        new="if False:",
        harm="An event to all whose sender has died never reaches the runs that wait for it.",
        likely=("conformance/test_dead_senders.py", "conformance/test_events_refused.py"),
    ),
    _bug(
        name="sweep-looks-only-behind-the-last-one",
        file=_SWEEP,
        old="return recent if self._tools.env.clock.monotonic() < self._due_from_start_at else None",
        new="return recent",
        harm="A run that keeps its old place in the queue, and whose wake-up was lost, is never found.",
        likely=("conformance/test_sweep.py", "conformance/test_supervisor.py"),
    ),
    _bug(
        name="soon-due-runs-hide-overdue-ones",
        file=_SWEEP,
        old="if len(rows) == SWEEP_LIMIT:",
        new="if False:",
        harm="With a thousand runs that are due soon in one queue, the overdue runs of the next queue are not found.",
        beyond_explorer="It takes a thousand runs.",
        likely=("conformance/test_sweep.py",),
    ),
    _bug(
        name="recovered-runs-wake-no-worker",
        file=_SWEEP,
        old="            self._wake_ups.wake_up(None, recovered, overdue=True)\n",
        new="",
        harm="The runs of a dead host wait for one more sweep after their recovery.",
        explorer=("--kinds", "poison"),
        likely=("conformance/test_sweep.py", "conformance/test_supervisor.py"),
    ),
    _bug(
        name="dead-workers-leases-are-left-to-expire",
        file="supervisor/steward/lease_recovery.py",
        old="runs = await self._tools.insist(functools.partial(recover_leases, self._tools, self._release_of(died)))",
        new="runs = 0",
        harm="The runs of a killed worker wait until their leases expire, instead of going on at once.",
        likely=("conformance/test_supervisor.py", "conformance/test_supervisor_children.py"),
    ),
    _bug(
        name="parked-run-sets-no-timer",
        file="streamline_pool/engine/run_writer.py",
        old="if change.releases and change.wake_at is not None:",
        new="if False:",
        harm="A sleep ends when a sweep finds it, seconds late, and not when its time has come.",
        likely=("conformance/test_engine_retries.py", "conformance/test_timers_in_pools.py", "conformance/test_engine_local.py"),
    ),
    _bug(
        name="start-sends-no-wake-up",
        file="streamline_pool/client/starting.py",
        old="""    yield from services.signal("due", wakeAt=first["wakeAt"] + later, lane=first["lane"], runId=run_id, count=len(chunk))
""",
        new="    yield from ()\n",
        harm="A run that is started in an idle pool waits for a sweep.",
        likely=("conformance/test_supervisor.py", "conformance/test_engine_starting.py"),
    ),
    _bug(
        name="cancel-sends-no-hint",
        file="streamline_pool/client/run_control.py",
        old="""    yield from services.signal("cancel", runId=run_id)
""",
        new="    yield from ()\n",
        harm="The handler of a cancelled run goes on until the next renewal of its lease.",
        likely=("conformance/test_timers_in_pools.py", "conformance/test_cancel_in_pools.py", "conformance/test_engine_cancel.py"),
    ),
    _bug(
        name="hinted-run-is-not-checked",
        file="streamline_pool/engine/leases.py",
        old="""            if lease_id_of(document) != active.lease_id:
                self._lost(active, document)

    def""",
        new="""            if False:
                self._lost(active, document)

    def""",
        harm="The handler of a cancelled run goes on until the next renewal of its lease, although the hint has come.",
        likely=("conformance/test_engine_cancel.py", "conformance/test_cancel_in_pools.py", "conformance/test_timers_in_pools.py"),
    ),
    _bug(
        name="wake-up-for-busy-workers-is-forgotten",
        file="supervisor/pool/work_sharing.py",
        old="owed_wake_ups=max(owed, 0),",
        new="owed_wake_ups=0,",
        harm="A run that was announced while all workers were busy is found only by a sweep.",
        beyond_explorer="The explorer's supervisor wakes every worker, so it owes no wake-up.",
        likely=("unit/supervisor/pool/test_pool_work_sharing.py", "unit/supervisor/pool/test_pool_burst.py"),
    ),
    _bug(
        name="wake-up-during-a-poll-is-lost",
        file=_DEMAND,
        old="        self._backlog = self._backlog or more\n",
        new="        self._backlog = more\n",
        harm="A run that was announced while a worker polled, and that the poll has just missed, is found only by a sweep.",
        beyond_explorer="A hint goes to both workers of a schedule, so the other one finds the run. The supervisor chooses one.",
    ),
    _bug(
        name="wake-up-before-the-insert-is-lost",
        file=_DEMAND,
        old="""            if tries >= _EXPECT_TRIES:
                self._backlog = True
""",
        new="""            if tries >= 0:
                pass
""",
        harm="A run whose announcement overtakes its insert is found only by a sweep.",
    ),
    _bug(
        name="runs-of-a-failed-claim-are-forgotten",
        file=_DEMAND,
        old="self._failing = self._backlog = self._pausing = True",
        new="self._failing = self._pausing = True",
        harm="After an outage a worker does not look for the runs that it could not claim.",
        beyond_explorer="A sweep announces the runs again within seconds. Rules about time hold only in schedules in which nothing fails.",
    ),
    _bug(
        name="overdue-wake-up-polls-behind-the-runs",
        file="streamline_pool/worker/worker.py",
        old="        if overdue:\n",
        new="        if False:\n",
        harm="A recovered run keeps its old place in the queue, and the polls of the workers begin behind it.",
        beyond_explorer="Polls from the start of the queue are rare only where they are expensive. In a schedule each may begin there.",
    ),
    _bug(
        name="poll-never-begins-at-the-start",
        file="streamline_pool/worker/poller.py",
        old="if scan_start is not None and asked_at < scan_start.full_at:",
        new="if scan_start is not None:",
        harm="A run of a priority that was never seen, or with an old place in the queue, is left behind by every poll.",
        beyond_explorer="The sweep of a steward finds such a run as well, and has the workers begin at the start: only time is lost.",
    ),
    _bug(
        name="runs-that-were-not-claimed-are-passed",
        file="streamline_pool/worker/poller.py",
        old="scan_start.since = min(scan_start.since, earliest)",
        new="pass",
        harm="The runs beside a suspect, or of a claim that failed, are left behind by the following polls.",
        explorer=("--kinds", "poison"),
    ),
)
