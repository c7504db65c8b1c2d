"""Mutants of the claim: its filter, what it counts and grants, its read-back, and the run that is claimed again."""

from __future__ import annotations

from .mutant import Edit, Mutant, mutants_of

__all__ = ["MUTANTS"]

_CLAIMS = "streamline_pool/protocol/claims.py"
_CLAIMING = "streamline_pool/worker/claiming.py"
_ENGINE = "streamline_pool/engine/engine.py"
_DRIVER = "streamline_pool/engine/run_driver.py"
_bug = mutants_of(
    "claims",
    "conformance/test_claim.py",
    "conformance/test_engine_leases.py",
    "conformance/test_claimed_again.py",
    "conformance/test_pause.py",
)

MUTANTS: tuple[Mutant, ...] = (
    _bug(
        name="pause-is-not-in-the-claim-filter",
        file=_CLAIMS,
        old=""""status": _NOT_ENDED, "paused": NOT_PAUSED, **_DUE}""",
        new=""""status": _NOT_ENDED, **_DUE}""",
        harm="A paused run that has a `wakeAt` is claimed.",
        explorer=("--kinds", "chain"),
    ),
    _bug(
        name="claim-of-a-leased-run",
        file=_CLAIMS,
        old='''_DUE: Query = {"wakeAt": {"$type": "date"}, "$expr"''',
        new='''_DUE: Query = {"$expr"''',
        harm="In `$expr` a missing `wakeAt` is less than any date, so a run that another worker holds is claimed.",
    ),
    _bug(
        name="claim-before-its-time",
        file=_CLAIMS,
        old="""{"wakeAt": {"$type": "date"}, "$expr": {"$lte": ["$wakeAt", "$$NOW"]}}""",
        new="""{"wakeAt": {"$type": "date"}}""",
        harm="A run that sleeps, backs off or is to start later is claimed before its time.",
    ),
    _bug(
        name="claim-of-an-ended-run",
        file=_CLAIMS,
        old='''{"_id": run_id, "status": _NOT_ENDED, "paused"''',
        new='''{"_id": run_id, "paused"''',
        harm="A `wakeAt` that another program wrote revives a run that has ended.",
        explorer=("--kinds", "chain"),
    ),
    _bug(
        name="claim-outside-of-its-lanes",
        file=_CLAIMS,
        old="""    if lanes is not None:
        query["lane"] = {"$in": list(lanes)}
""",
        new="",
        harm="A worker claims by name a run of another queue, workflow or version.",
        likely=("conformance/test_isolation.py", "conformance/test_poller.py", "conformance/test_claimed_again.py"),
    ),
    _bug(
        name="claim-by-name-takes-suspects",
        file=_CLAIMS,
        old="""    if crashes_below is not None:
        query["crashes"] = {"$lt": crashes_below}
    return query""",
        new="    return query",
        harm="A wake-up brings a suspect beside other runs, which it may kill with their worker.",
        beyond_explorer="However a suspect was claimed, the engine runs it alone (solitude.py): a schedule shows no more than a pause.",
        likely=("conformance/test_suspects.py", "conformance/test_seams.py"),
    ),
    _bug(
        name="claim-does-not-count-the-attempt",
        file=_CLAIMS,
        old=""""attempts": plus_one("$$step.attempts")""",
        new='''"attempts": "$$step.attempts"''',
        harm="A crash before the first commit costs no attempt, and `ctx.attempt` of the first entry is 0.",
    ),
    _bug(
        name="claim-leaves-wake-at",
        file=_CLAIMS,
        old='''                "wakeAt": "$$REMOVE",
                "token"''',
        new='''                "token"''',
        harm="A run that a worker holds stays claimable, and the next worker claims it, too.",
    ),
    _bug(
        name="claim-enters-a-waiting-step",
        file=_CLAIMS,
        old="""enterable = {"$in": ["$$step.status", ENTERABLE_STEP_TEXTS]}""",
        new="""enterable = {"$ne": ["$$step.status", "done"]}""",
        harm="The handler of a step that waits is entered again, by the claim for its deadline.",
        likely=("conformance/test_engine_retries.py", "conformance/test_waits.py", "simulation/test_faults.py"),
    ),
    _bug(
        name="claim-does-not-raise-the-token",
        file=_CLAIMS,
        old='''                "token": plus_one("$token"),
                "lease"''',
        new='''                "lease"''',
        harm="The answer of an earlier claim that comes late ends the execution of a later one, and a lost release looks like one's own.",
    ),
    _bug(
        name="claim-id-is-the-owner",
        file=_CLAIMING,
        old='''"""Claim one run in one round trip. False: it cannot be claimed now."""
        terms, lease_id, deadline = self._terms, self._env.new_id(), ''',
        new='''"""Claim one run in one round trip. False: it cannot be claimed now."""
        terms, lease_id, deadline = self._terms, self._terms.owner, ''',
        also=(
            Edit(
                _CLAIMING,
                '''the caller knows that the runs are in its lanes."""
        terms, lease_id, deadline = self._terms, self._env.new_id(), ''',
                '''the caller knows that the runs are in its lanes."""
        terms, lease_id, deadline = self._terms, self._terms.owner, ''',
            ),
        ),
        harm="A worker that claims its own run again cannot tell the earlier execution's writes from those of the later one.",
    ),
    _bug(
        name="read-back-without-the-claim-id",
        file=_CLAIMS,
        old="""filter={"_id": {"$in": list(run_ids)}, "lease.id": lease_id})""",
        new="""filter={"_id": {"$in": list(run_ids)}})""",
        harm="A worker takes for its own the runs that another worker has claimed of the same search.",
    ),
    _bug(
        name="paused-run-is-not-released-after-its-claim",
        file=_DRIVER,
        old="""if active.document.get("paused") is True:""",
        new="if False:",
        harm="A run that was paused between its claim and the read-back enters its handler.",
        likely=("conformance/test_hostile_races.py", "conformance/test_control_meets_holders.py", "conformance/test_pause.py"),
    ),
    _bug(
        name="late-answer-of-an-earlier-claim-counts",
        file=_ENGINE,
        old="""held.document["token"] > document["token"]""",
        new="False",
        harm="When the answers of two claims come in the wrong order, the execution that holds the run is ended for one that does not.",
        beyond_explorer="Only time is lost: the claim that holds the run ends by its lease, and slow replies allow for that.",
        likely=("conformance/test_claimed_again.py",),
    ),
    _bug(
        name="earlier-execution-is-not-aborted",
        file=_ENGINE,
        old="""            self.active_runs.keep_until_over(earlier)
            earlier.abort("lease-lost")
""",
        new="""            self.active_runs.keep_until_over(earlier)
""",
        harm="A worker that claims its own run again lets the earlier handler go on to its end.",
        likely=("conformance/test_claimed_again.py",),
    ),
    _bug(
        name="new-execution-begins-beside-the-earlier",
        file=_ENGINE,
        old="self._run_after_others(active) if claimed_again else self._run_task(active)",
        new="self._run_task(active)",
        harm="Two handlers of one run are at work in one process at the same time.",
        likely=("conformance/test_claimed_again.py",),
    ),
)
