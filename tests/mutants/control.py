"""Mutants of the control operations: cancel, pause, resume and rewind, and of what a holder stores under a pause."""

from __future__ import annotations

from .mutant import Edit, Mutant, mutants_of

__all__ = ["MUTANTS"]

_CONTROL = "streamline_pool/protocol/control.py"
_COMMITS = "streamline_pool/protocol/commits.py"
_RUN_CONTROL = "streamline_pool/client/run_control.py"
_TRANSITIONS = "streamline_pool/domain/transitions.py"
_bug = mutants_of(
    "control",
    "conformance/test_group_commit.py",
    "conformance/test_hostile_races.py",
    "conformance/test_control_meets_holders.py",
    "conformance/test_control_matrix.py",
    "simulation/test_faults_control_operations.py",
)
_pause_bug = mutants_of(
    "pause",
    "conformance/test_pause.py",
    "conformance/test_control_meets_holders.py",
    "unit/domain/test_transitions.py",
    "conformance/test_hostile_races.py",
)

_CONTROL_MUTANTS = (
    _bug(
        name="pause-without-acts",
        file=_CONTROL,
        old=""""paused": NOT_PAUSED, **_unchanged_since(acts)}""",
        new=""""paused": NOT_PAUSED}""",
        harm="A late copy of a pause that was undone since pauses the run again, for ever.",
        explorer=("--kinds", "chain,wait"),
    ),
    _bug(
        name="resume-without-acts",
        file=_CONTROL,
        old=""""paused": True, **_unchanged_since(acts)}""",
        new=""""paused": True}""",
        harm="A late copy of a resume ends a later pause.",
        explorer=("--kinds", "chain,wait"),
    ),
    _bug(
        name="rewind-without-acts",
        file=_CONTROL,
        old="""        **_unchanged_since(acts),
""",
        new="",
        harm="A late copy of a rewind discards what the run has done since.",
    ),
    _bug(
        name="ids-of-calls-are-not-kept",
        file=_RUN_CONTROL,
        old="""if after.get("lastAct") == control_id or (isinstance(kept, list) and control_id in kept):""",
        new="if False:",
        harm="A control operation whose reply was lost is decided again, and takes effect twice.",
    ),
    _bug(
        name="only-the-id-of-the-last-call-is-kept",
        file=_CONTROL,
        old=""""actIds": {"$slice": [{"$concatArrays": [earlier, [{"$literal": control_id}]]}, -CONTROL_IDS_KEPT]},""",
        new=""""actIds": [{"$literal": control_id}],""",
        harm="A call whose reply was lost, and which another call has followed, is decided again.",
        explorer=("--kinds", "wait"),
    ),
    _bug(
        name="cancel-whose-reply-was-lost-is-not-announced",
        file=_RUN_CONTROL,
        old="""if found.get("lastAct") != control_id:""",
        new="if True:",
        harm="No subscriber and no holder learns of a cancel whose reply was lost, until the next renewal.",
        likely=("simulation/test_faults_control_operations.py", "conformance/test_engine_cancel.py", "conformance/test_hostile_races.py"),
        explorer=("--kinds", "chain"),
    ),
    _bug(
        name="cancel-of-an-ended-run",
        file=_CONTROL,
        old="""change_one("cancel_run", {**live_run(workflow_id, run_id), **_unchanged_since(acts)}, """,
        new="""change_one("cancel_run", {"_id": run_id, **_unchanged_since(acts)}, """,
        harm="A run that is done, and whose caller has its result, is cancelled afterwards.",
        likely=("conformance/test_engine_cancel.py", "conformance/test_control_matrix.py"),
    ),
    _bug(
        name="cancel-without-acts",
        file=_CONTROL,
        old="""change_one("cancel_run", {**live_run(workflow_id, run_id), **_unchanged_since(acts)}, """,
        new="""change_one("cancel_run", live_run(workflow_id, run_id), """,
        harm="A late copy of a cancel that met an ended run cancels the run after a rewind.",
        explorer=("--kinds", "chain"),
    ),
    _bug(
        name="cancel-keeps-the-lease",
        file=_CONTROL,
        old="""        "lease": "$$REMOVE",
        "wakeAt": "$$REMOVE",
""",
        new="""        "wakeAt": "$$REMOVE",
""",
        harm="The holder of a cancelled run stores its result, and the run goes on.",
    ),
    _bug(
        name="cancel-does-not-raise-the-token",
        file=_CONTROL,
        old="""        "token": plus_one("$token"),
        **_control_fields(control_id),
        # As it was""",
        new="""        **_control_fields(control_id),
        # As it was""",
        harm="A holder whose release is in doubt takes a cancel for its own write.",
    ),
    _bug(
        name="rewind-does-not-raise-the-token",
        file=_CONTROL,
        old='''        "token": plus_one("$token"),
        "wakeAt"''',
        new='''        "wakeAt"''',
        harm="A holder whose release is in doubt takes a rewind for its own write, and publishes a result that was discarded.",
    ),
    _bug(
        name="rewind-keeps-the-lease",
        file=_CONTROL,
        old='''        "lease": "$$REMOVE",
        "token"''',
        new='''        "token"''',
        harm="The handler that was at work before a rewind stores its result into the rewound run.",
        likely=("conformance/test_rewind.py", "conformance/test_control_meets_holders.py"),
    ),
    _bug(
        name="rewind-keeps-answers",
        file=_CONTROL,
        old="""{"$filter": {"input": INBOX, "as": "item", "cond": is_kept}}""",
        new="INBOX",
        harm="An answer to a wait before the rewind ends the wait after it.",
    ),
    _bug(
        name="idempotency-key-of-an-attempt",
        file="streamline_pool/engine/run_context.py",
        old="""key = f"{self._document['_id']}:{self.step_id}\"""",
        new="""key = f"{self._document['_id']}:{self.step_id}:{self.attempt}\"""",
        harm="A payment provider charges once for each attempt of a step.",
        likely=("conformance/test_engine_retries.py", "unit/engine/test_context.py", "conformance/test_rewind.py"),
    ),
    _bug(
        name="rewind-keeps-the-idempotency-key",
        file=_CONTROL,
        old="""{**sets, "rewinds": plus_one("$rewinds")}""",
        new="sets",
        harm="A payment provider takes the step after a rewind for a repetition of the one before it.",
        likely=("conformance/test_rewind.py", "conformance/test_node_readme_operations.py", "unit/engine/test_context.py"),
    ),
    _bug(
        name="rewind-keeps-the-count-of-crashes",
        file=_CONTROL,
        old='''        "crashes": 0,
        "failures": 0,
        "inbox"''',
        new='''        "inbox"''',
        harm="A run that was rewound after a conviction is a suspect for ever, and has no attempts left.",
        likely=("conformance/test_rewind.py", "conformance/test_suspects.py"),
    ),
    _bug(
        name="rewind-ends-a-pause",
        file=_CONTROL,
        old="""        "wakeAt": {"$cond": [IS_PAUSED, "$$REMOVE", "$$NOW"]},
""",
        new="""        "wakeAt": "$$NOW",
""",
        harm="A paused run that is rewound gets a `wakeAt`, although it stays paused.",
    ),
    _bug(
        name="rewind-of-a-cancelled-run",
        file=_CONTROL,
        old=""""status": {"$nin": NOT_REWINDABLE_TEXTS},""",
        new=""""status": {"$exists": True},""",
        harm="A rewind that races a cancel revives the run, although the cancel was acknowledged.",
        likely=("conformance/test_hostile_races.py", "conformance/test_rewind.py", "simulation/test_faults_control_operations.py"),
        also=(
            # `acts` alone would refuse the rewind: a cancel raises it.
            Edit(
                _CONTROL,
                """        **_unchanged_since(acts),
""",
                "",
            ),
        ),
    ),
)

_PAUSE_MUTANTS = (
    _pause_bug(
        name="pause-is-not-in-the-commit-filter",
        file=_COMMITS,
        old=""""paused": True if paused else NOT_PAUSED}""",
        new="""**({"paused": True} if paused else {})}""",
        harm="The next step of a paused run is started by the commit of the one before, again and again.",
    ),
    _pause_bug(
        name="pause-is-not-in-the-filter-under-a-pause",
        file=_COMMITS,
        old=""""paused": True if paused else NOT_PAUSED}""",
        new="""**({} if paused else {"paused": NOT_PAUSED})}""",
        harm="A run that was resumed before its holder's write has only a `pausedWakeAt`, and is never due again.",
    ),
    _pause_bug(
        name="pause-takes-the-lease",
        file=_CONTROL,
        old="""        "pausedWakeAt": "$wakeAt",
""",
        new="""        "pausedWakeAt": "$wakeAt",
        "lease": "$$REMOVE",
""",
        harm="The result of the step in progress is discarded by a pause, and the run is never due again.",
    ),
    _pause_bug(
        name="pause-forgets-wake-at",
        file=_CONTROL,
        old="""        "pausedWakeAt": "$wakeAt",
""",
        new="",
        harm="A run that was due when it was paused is never due again after `resume`.",
    ),
    _pause_bug(
        name="pause-ends-a-wait",
        file=_TRANSITIONS,
        old="""        case ChangeKind.WAKE | ChangeKind.WAIT_ANSWERED:
            return make_change(document, ChangeKind.RELEASE, {}, {}, wake_at=now, releases=True)
""",
        new="""        case ChangeKind.WAKE | ChangeKind.WAIT_ANSWERED:
            return without_next_start(document, change, now)._replace(not_before=None) if len(change.steps) == 2 else change
""",
        harm="A deadline or an event ends the wait of a run that is paused.",
        explorer=("--kinds", "wait,sleep"),
    ),
    _pause_bug(
        name="run-ends-under-a-pause",
        file=_TRANSITIONS,
        old="""        case ChangeKind.FINISH:
            if not change.steps:""",
        new="""        case ChangeKind.FINISH:
            return change
            if not change.steps:""",
        harm="A paused run ends, though its operator paused it to rewind or to look at it first.",
    ),
    _pause_bug(
        name="next-step-starts-under-a-pause",
        file=_TRANSITIONS,
        old="return change if change.releases else without_next_start(document, change, now)",
        new="return change",
        harm="A run goes on step by step although it is paused.",
    ),
    _pause_bug(
        name="paused-wait-is-not-searched",
        file=_TRANSITIONS,
        old="""return change._replace(wake_at=now, releases=True)  # the next holder still has to search for broadcasts""",
        new="""return change._replace(releases=True)""",
        harm="A run that begins to wait for an event under a pause misses the events to all that came before, and waits for ever.",
    ),
    _pause_bug(
        name="result-under-a-pause-plans-nothing",
        file=_COMMITS,
        old="""        if change.wake_at is not None:
            sets[wake_field] = change.wake_at""",
        new="""        if change.wake_at is not None and wake_field == "wakeAt":
            sets[wake_field] = change.wake_at""",
        harm="A run whose step ended under a pause is never due again after `resume`.",
    ),
    _pause_bug(
        name="entry-that-a-pause-prevented-is-counted",
        file=_TRANSITIONS,
        old="""steps = {place: _not_started(step, 1) for place, step in change.steps.items()}""",
        new="""steps = {place: _not_started(step, 0) for place, step in change.steps.items()}""",
        harm="`ctx.attempt` counts an entry that did not take place.",
        explorer=("--kinds", "choice"),
    ),
    _pause_bug(
        name="resume-moves-a-leased-run",
        file=_CONTROL,
        old=""""wakeAt": {"$cond": [free, {"$ifNull": ["$pausedWakeAt", "$$REMOVE"]}, "$$REMOVE"]},""",
        new=""""wakeAt": {"$cond": [free, {"$ifNull": ["$pausedWakeAt", "$$REMOVE"]}, "$$NOW"]},""",
        harm="A run that is resumed while a worker holds it is claimed by a second worker.",
    ),
    _pause_bug(
        name="resume-forgets-wake-at",
        file=_CONTROL,
        old=""""wakeAt": {"$cond": [free, {"$ifNull": ["$pausedWakeAt", "$$REMOVE"]}, "$$REMOVE"]},""",
        new=""""wakeAt": "$$REMOVE",""",
        harm="A run is never due again after `resume`.",
    ),
)

MUTANTS: tuple[Mutant, ...] = (*_CONTROL_MUTANTS, *_PAUSE_MUTANTS)
