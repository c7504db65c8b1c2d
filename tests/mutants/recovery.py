"""Mutants of the recovery of lost workers' runs, and of suspects, which run alone."""

from __future__ import annotations

from .mutant import Mutant, mutants_of

__all__ = ["MUTANTS"]

_RECOVERY = "streamline_pool/protocol/recovery.py"
_SOLITUDE = "streamline_pool/engine/solitude.py"
_DEMAND = "streamline_pool/worker/demand.py"
_bug = mutants_of(
    "recovery",
    "conformance/test_group_commit.py",
    "conformance/test_engine_leases.py",
    "conformance/test_claim.py",
    "conformance/test_supervisor.py",
)
_suspect_bug = mutants_of(
    "suspects",
    "unit/engine/test_solitude.py",
    "conformance/test_suspects.py",
    "conformance/test_seams.py",
    "unit/worker/test_demand.py",
    kinds="poison",
)

MUTANTS: tuple[Mutant, ...] = (
    _bug(
        name="recover-without-expiry",
        file=_RECOVERY,
        old="""query = {"lease.expiresAt": _lease_from(since), "$expr": {"$lte": ["$lease.expiresAt", "$$NOW"]}}""",
        new="""query = {"lease.expiresAt": _lease_from(since)}""",
        harm="A sweep takes the runs of living workers away, and counts each of them as lost.",
    ),
    _bug(
        name="recovery-does-not-count-the-crash",
        file=_RECOVERY,
        old="""        "crashes": crashes,
""",
        new="",
        harm="A run that kills each of its workers is never convicted, and kills on.",
    ),
    _bug(
        name="recovery-does-not-raise-the-token",
        file=_RECOVERY,
        old="""        "token": plus_one("$token"),
""",
        new="",
        harm="A holder whose release is in doubt takes the recovery of its lease for its own write.",
    ),
    _bug(
        name="recovery-keeps-the-lease",
        file=_RECOVERY,
        old="""        "lease": "$$REMOVE",
""",
        new="",
        harm="A lost worker that wakes up goes on with a run that is claimable again.",
    ),
    _bug(
        name="recovery-ends-a-pause",
        file=_RECOVERY,
        old=""""wakeAt": {"$cond": [{"$or": [is_convicted, IS_PAUSED]}, "$$REMOVE", due_at]}""",
        new=""""wakeAt": {"$cond": [is_convicted, "$$REMOVE", due_at]}""",
        harm="A run whose worker dies after `pause` gets a `wakeAt`, although it is paused.",
    ),
    _bug(
        name="recovery-of-a-paused-run-plans-nothing",
        file=_RECOVERY,
        old=""""pausedWakeAt": {"$cond": [{"$and": [IS_PAUSED, {"$not": [is_convicted]}]}, due_at, "$$REMOVE"]},""",
        new=""""pausedWakeAt": "$$REMOVE",""",
        harm="A paused run whose worker died is never due again after `resume`.",
    ),
    _bug(
        name="release-of-a-dead-worker-takes-all-leases",
        file=_RECOVERY,
        old="""query = {"lease.expiresAt": _lease_from(since), "lease.owner": owner}""",
        new="""query = {"lease.expiresAt": _lease_from(since)}""",
        harm="The death of one worker takes the runs of all others away.",
    ),
    _bug(
        name="recovered-run-queues-behind-all-others",
        file=_RECOVERY,
        old="""due_at = {"$cond": [{"$eq": [{"$type": "$createdAt"}, "date"]}, {"$min": ["$createdAt", "$$NOW"]}, "$$NOW"]}""",
        new='''due_at = "$$NOW"''',
        harm="The runs of a dead worker wait behind a whole backlog of younger runs.",
    ),
    _suspect_bug(
        name="convicted-without-having-been-alone",
        file=_RECOVERY,
        old="""is_convicted = {"$and": [is_convicted, {"$eq": ["$lease.alone", True]}]}""",
        new="pass",
        harm="An innocent run fails for the death that another run of its worker has caused.",
    ),
    _suspect_bug(
        name="convicted-one-worker-too-late",
        file=_RECOVERY,
        old="""is_convicted: Expression = {"$gte": [crashes, max_crashes]}""",
        new="""is_convicted: Expression = {"$gt": [crashes, max_crashes]}""",
        harm="A run kills one more worker than `max_crashes` allows.",
    ),
    _suspect_bug(
        name="suspect-enters-beside-other-runs",
        file=_SOLITUDE,
        old="while (len(self._active_runs) > 1 or self._left) and not self._must_stop(active):",
        new="while False:",
        harm="A suspect is marked as alone while other runs of its worker go on, so one of them may convict it.",
    ),
    _suspect_bug(
        name="suspect-enters-beside-a-handler-that-goes-on",
        file=_SOLITUDE,
        old="(len(self._active_runs) > 1 or self._left)",
        new="(len(self._active_runs) > 1)",
        harm="A suspect runs beside a handler that outlived its timeout, and is convicted for what that one does.",
        beyond_explorer="The explorer's handlers are coroutines, which end when they are stopped. Only a thread goes on.",
    ),
    _suspect_bug(
        name="suspect-alone-is-not-stored",
        file=_SOLITUDE,
        old="""        if not self._must_stop(active):
            await self._mark_alone(active)
""",
        new="""        if not self._must_stop(active):
            active.is_alone = True
""",
        harm="A run that kills its workers is never convicted, because no recovery finds that it ran alone.",
    ),
    _suspect_bug(
        name="claim-beside-a-suspect-goes-on",
        file=_SOLITUDE,
        old="""        if self._suspect is not None:
            active.release_requested = True  # its claim""",
        new="""        if self._suspect is not None:
            pass  # its claim""",
        harm="A run whose claim was under way when the suspect was claimed enters its handlers, and the suspect waits for all its steps.",
        beyond_explorer="Only time is lost: the suspect waits for the steps of a run that was claimed in the moment before it.",
    ),
    _suspect_bug(
        name="runs-beside-a-suspect-go-on",
        file=_SOLITUDE,
        old="other.release_requested = other.release_requested or other is not active",
        new="pass",
        harm="A suspect waits for all steps of the other runs of its worker instead of the present ones.",
    ),
    _suspect_bug(
        name="claims-go-on-beside-a-suspect",
        file=_DEMAND,
        old="""        if self.state != "ready" or self._gate == "closed" or self._suspect is not None:
            return 0""",
        new="""        if self.state != "ready" or self._gate == "closed":
            return 0""",
        harm="A worker that holds a suspect claims more runs, so that the suspect is never alone.",
        beyond_explorer="A schedule has few runs. Once they have ended, the suspect is alone. An endless stream of runs prevents that.",
    ),
    _suspect_bug(
        name="suspect-that-is-claimed-again-is-forgotten",
        file=_DEMAND,
        old="            self._suspect = suspect\n",
        new="            self._suspect = self._suspect if self._suspect == suspect else None\n",
        harm="A worker that had lost a suspect, and holds it again, takes further suspects and releases them, without a pause.",
    ),
    _suspect_bug(
        name="all-suspects-are-claimed-together",
        file=_DEMAND,
        old="return Chosen(suspects[:1], None)",
        new="return Chosen(suspects, None)",
        harm="Two suspects run in one worker, and one is convicted for the other.",
        beyond_explorer="The engine releases the second suspect before it enters a handler (solitude.py): only time is lost.",
    ),
    _suspect_bug(
        name="result-does-not-end-the-count-of-crashes",
        file="streamline_pool/domain/transitions.py",
        old="""if document["crashes"] or document["failures"]:""",
        new="if False:",
        harm="Workers that a run lost at earlier steps convict a later step, and attempts of earlier steps use up its retries.",
        likely=("unit/domain/test_transitions.py", "conformance/test_engine_leases.py", "conformance/test_engine_retries.py"),
    ),
)
