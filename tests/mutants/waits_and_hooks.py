"""Mutants of waits, sleeps, deadlines, answers and hooks."""

from __future__ import annotations

from .mutant import Edit, Mutant, mutants_of

__all__ = ["MUTANTS"]

_ANSWERS = "streamline_pool/protocol/answers.py"
_INBOX = "streamline_pool/protocol/inbox.py"
_WAITS = "streamline_pool/domain/waits.py"
_DRIVER = "streamline_pool/engine/run_driver.py"
_COMMITS = "streamline_pool/protocol/commits.py"
_RUN_CONTROL = "streamline_pool/client/run_control.py"
_WAITING = """waiting = {"stepId": step_id, "status": _WAITING, "gen": gen, "waitingFor.type": {"$in": list(_BY_A_PERSON)}}"""
_LATER_ANSWER = """        document = yield from _reading_valid_run(workflow_id, run_id)
        if answered_step(document, answer_id) is None:
            raise InvalidStateError(
                f"run {run_id}: step"""

_wait_bug = mutants_of(
    "waits",
    "conformance/test_waits.py",
    "conformance/test_hostile_races.py",
    "conformance/test_control_meets_holders.py",
    "simulation/test_faults_waiting_runs.py",
    kinds="wait,waits,hook,event",
)
_hook_bug = mutants_of(
    "hooks",
    "conformance/test_hooks.py",
    "conformance/test_hostile_answers.py",
    "conformance/test_hostile_races.py",
    "simulation/test_faults_control_operations.py",
    kinds="hook,hooks",
)
_clock_bug = mutants_of(
    "clocks",
    "conformance/test_clocks.py",
    "conformance/test_engine_retries.py",
    "conformance/test_waits.py",
    "conformance/test_control_meets_holders.py",
    "conformance/test_testing_kit.py",
    kinds="sleep,retry,wait,event",
)

_WAIT_MUTANTS = (
    _wait_bug(
        name="waits-have-one-generation",
        file=_WAITS,
        old="""gen = document.get("waitGen", 0) + 1""",
        new="gen = 1",
        harm="A late copy of an answer ends a later wait.",
        explorer=("--kinds", "wait"),
    ),
    _wait_bug(
        name="answer-without-generation",
        file=_ANSWERS,
        old='''"status": _WAITING, "gen": gen, "waitingFor.type": {"$in"''',
        new='''"status": _WAITING, "waitingFor.type": {"$in"''',
        harm="An answer to an earlier wait of a step, before a rewind, ends its present wait.",
        explorer=("--kinds", "wait"),
    ),
    _wait_bug(
        name="answer-is-accepted-late",
        file=_ANSWERS,
        old=_WAITING,
        new="""waiting = {"stepId": step_id}""",
        harm="An answer ends a step that does not wait any more or not yet, in the middle of its handler.",
    ),
    _wait_bug(
        name="answer-leaves-no-id",
        file=_INBOX,
        old="""    "answer": "$_item.id",
""",
        new="",
        harm="A caller whose reply was lost takes its own answer for that of another, and reports a failure.",
    ),
    _wait_bug(
        name="answer-whose-reply-was-lost-is-refused",
        file=_RUN_CONTROL,
        old=_LATER_ANSWER,
        new=_LATER_ANSWER.replace("if answered_step(document, answer_id) is None:", "if True:"),
        harm="A caller is told that its answer was refused, although it counts.",
    ),
    _wait_bug(
        name="answer-of-unknown-outcome-is-repeated-as-new",
        file=_RUN_CONTROL,
        old=_LATER_ANSWER,
        new="""        document = yield from _reading_valid_run(workflow_id, run_id)
        again = _current_step(document)
        if again is not None and again["status"] == StepStatus.WAITING:
            return (yield from _answering_wait(services, workflow_id, document, answer))
"""
        + _LATER_ANSWER.split("\n", 1)[1],
        harm="An answer whose reply was lost, or which came second, also ends the next wait of the run.",
    ),
    _wait_bug(
        name="answer-revives-a-cancelled-run",
        file=_ANSWERS,
        old='''query = {**live_run(workflow_id, run_id), "currentStepId"''',
        new='''query = {"_id": run_id, "currentStepId"''',
        harm="An answer that comes after a cancel makes the run go on.",
    ),
    _wait_bug(
        name="answer-keeps-the-lease",
        file=_INBOX,
        old="""        "lease": _on_hit("$$REMOVE", "$lease"),
""",
        new="",
        harm="The worker that claimed the run for its deadline writes its timeout over the answer, and the run is due and leased.",
    ),
    _wait_bug(
        name="answer-does-not-raise-the-token",
        file=_INBOX,
        old="""        "token": _on_hit(plus_one("$token"), "$token"),
""",
        new="",
        harm="A holder whose release is in doubt takes the answer for its own write.",
    ),
    _wait_bug(
        name="answer-makes-a-paused-run-due",
        file=_INBOX,
        old=""""wakeAt": _on_hit({"$cond": [IS_PAUSED, "$$REMOVE", "$$NOW"]}, "$wakeAt"),""",
        new=""""wakeAt": _on_hit("$$NOW", "$wakeAt"),""",
        harm="A paused run that is answered has a `wakeAt`, although it is paused.",
    ),
    _wait_bug(
        name="answer-to-a-paused-run-plans-nothing",
        file=_INBOX,
        old=""""pausedWakeAt": _on_hit({"$cond": [IS_PAUSED, "$$NOW", "$$REMOVE"]}, "$pausedWakeAt"),""",
        new=""""pausedWakeAt": _on_hit("$$REMOVE", "$pausedWakeAt"),""",
        harm="A paused run that was answered is never due again after `resume`.",
    ),
    _wait_bug(
        name="answer-is-an-expression",
        file=_INBOX,
        old=""""_item": {"$literal": dict(item)}}""",
        new=""""_item": dict(item)}""",
        harm="An answer with a dollar sign is evaluated by the server, and may read any field of the run.",
    ),
    _wait_bug(
        name="wait-does-not-take-what-arrived",
        file=_COMMITS,
        old="    if change.unless_arrived is not None:",
        new="    if False:",
        harm="An answer or event that comes between the handler and its wait stays in the inbox, and the run waits for ever.",
    ),
    _wait_bug(
        name="item-of-the-inbox-is-taken-twice",
        file=_COMMITS,
        old="    if change.takes:",
        new="    if False:",
        harm="One event ends two waits of a run.",
        explorer=("--kinds", "events,event"),
    ),
    _wait_bug(
        name="wait-takes-every-event-of-its-name",
        file="streamline_pool/domain/waits.py",
        old="""takes=(*change.takes, {"id": item.get("id")}))""",
        new="""takes=(*change.takes, {"name": item["name"]} if "name" in item else {"id": item.get("id")}))""",
        harm="Two events came before their waits. The first wait takes both, and the second waits for ever.",
        explorer=("--kinds", "events"),
        likely=("conformance/test_events_durable.py", "conformance/test_waits.py"),
    ),
    _wait_bug(
        name="waiting-step-is-entered",
        file=_DRIVER,
        old="""if document["steps"][place]["status"] == StepStatus.WAITING.value:""",
        new="if False:",
        harm="A handler that ended in a wait or a sleep is entered again when its time has come.",
    ),
    _wait_bug(
        name="parked-run-loses-its-deadline",
        file=_WAITS,
        old="""else waiting_for.get("expiresAt")
    return make_change(document, ChangeKind.PARK""",
        new="""else None
    return make_change(document, ChangeKind.PARK""",
        harm="A wait with a timeout that was claimed too early, or searched, never ends by its timeout.",
    ),
    _wait_bug(
        name="wait-loses-its-deadline",
        file=_WAITS,
        old="""wake_at=waiting_for.get("expiresAt"), releases=True, unless_arrived=unless""",
        new="wake_at=None, releases=True, unless_arrived=unless",
        harm="A wait never ends by its timeout.",
    ),
)

_CLOCK_MUTANTS = (
    _clock_bug(
        name="sleep-ends-early",
        file=_WAITS,
        old="""return change._replace(kind=ChangeKind.WAKE, not_before=document["steps"][place]["waitingFor"]["resumeAt"])""",
        new="return change._replace(kind=ChangeKind.WAKE)",
        harm="A run that is claimed while it sleeps, after a resume or a recovery, ends its sleep at once.",
    ),
    _clock_bug(
        name="sleep-ends-by-the-hosts-clock",
        file=_DRIVER,
        old="            return waits.wake(document, place, self._store.now())",
        new="""            if waiting_for["resumeAt"] > self._env.clock.now():
                return waits.park(document, place)
            return waits.wake(document, place, self._store.now())._replace(not_before=None)""",
        harm="A host whose clock is ahead ends sleeps early.",
    ),
    _clock_bug(
        name="timeout-comes-early",
        file=_WAITS,
        old="""return change._replace(kind=ChangeKind.WAKE, not_before=waiting_for["expiresAt"])""",
        new="return change._replace(kind=ChangeKind.WAKE)",
        harm="A worker whose idea of the server's time is ahead times a wait out early.",
        explorer=("--kinds", "event,wait"),
    ),
    _clock_bug(
        name="timeout-by-the-hosts-clock",
        file=_DRIVER,
        old="""now, expires_at = self._store.now(), waiting_for.get("expiresAt")""",
        new="""now, expires_at = self._env.clock.now(), waiting_for.get("expiresAt")""",
        also=(
            Edit(
                _DRIVER,
                "return waits.time_out(document, place, now)",
                "return waits.time_out(document, place, now)._replace(not_before=None)",
            ),
        ),
        harm="A host whose clock is ahead times waits out early.",
    ),
    _clock_bug(
        name="worker-decides-that-a-claimed-wait-goes-on",
        file=_DRIVER,
        old="(just_claimed or expires_at <= now)",
        new="(expires_at <= now)",
        harm="A worker whose reading of the server's clock is slow parks and claims a run again, until its reading comes to the deadline.",
        likely=("conformance/test_clocks.py",),
        explorer=("--kinds", "event,wait"),
    ),
    _clock_bug(
        name="commit-does-not-ask-the-servers-clock",
        file=_COMMITS,
        old="    if change.not_before is not None:",
        new="    if False:",
        harm="Sleeps and deadlines end when a worker thinks so.",
    ),
    _clock_bug(
        name="sleep-is-planned-by-the-hosts-clock",
        file="streamline_pool/engine/run_writer.py",
        old="return Moment(self._store.now(), ",
        new="return Moment(self._env.clock.now(), ",
        harm="On a host whose clock is off by an hour, every sleep and back-off is an hour too long or too short.",
    ),
)

_HOOK_MUTANTS = (
    _hook_bug(
        name="hook-answers-any-token",
        file=_ANSWERS,
        old=""""hooks": {"$elemMatch": {"hash": token_hash, "gen": gen}}}""",
        new=""""hooks": {"$elemMatch": {"gen": gen}}}""",
        harm="The database accepts an answer by a token of another hook.",
    ),
    _hook_bug(
        name="hook-of-any-wait",
        file=_ANSWERS,
        old=""""hooks": {"$elemMatch": {"hash": token_hash, "gen": gen}}}""",
        new=""""hooks": {"$elemMatch": {"hash": token_hash}}}""",
        harm="A token of an earlier wait is accepted for a later one.",
        equivalent="A token's hash is in one hook, whose `gen` never changes, and the caller has read it there.",
    ),
    _hook_bug(
        name="hook-without-the-waits-generation",
        file=_ANSWERS,
        old="""waiting = {"status": _WAITING, "gen": gen, "waitingFor.type": "webhook"}""",
        new="""waiting = {"status": _WAITING, "waitingFor.type": "webhook"}""",
        harm="A late copy of an answer by token ends a later wait of the step.",
        equivalent="A wait ends its step, and a rewind removes its hooks. So the hooks of a waiting step are those of this very wait.",
    ),
    _hook_bug(
        name="hooks-are-stored-unhashed",
        file="streamline_pool/engine/hooks.py",
        old="return hashlib.sha256(token.encode()).digest()",
        new="return token.encode()",
        harm="A reader of the database can answer every open hook.",
    ),
    _hook_bug(
        name="hook-outlives-its-expiry",
        file=_ANSWERS,
        old="    if expires_at is not None:",
        new="    if False:",
        harm="A token is accepted after its time.",
    ),
    _hook_bug(
        name="early-answer-counts-twice",
        file=_ANSWERS,
        old="""        "inbox": {"$not": {"$elemMatch": {"stepId": step_id, "gen": gen}}},
""",
        new="",
        harm="Two bearers of one token are both told that their answer counts.",
    ),
    _hook_bug(
        name="early-answer-to-any-wait",
        file=_ANSWERS,
        old="""        "waitGen": gen - 1,
""",
        new="",
        harm="An answer to a hook whose wait is over is kept for a later one, and its bearer is told that it counts.",
        equivalent="A wait ends its step, and a rewind removes its hooks. So a step that can be entered has not waited since its hooks.",
    ),
    _hook_bug(
        name="hook-revives-a-cancelled-run",
        file=_ANSWERS,
        old="""        **live_run(None, run_id),
""",
        new="""        "_id": run_id,
""",
        harm="An answer by token that comes after a cancel makes the run go on.",
    ),
    _hook_bug(
        name="hook-of-the-next-attempt-ends-the-earlier-token",
        file="streamline_pool/engine/active_run.py",
        old="""lambda: [*self.document["steps"][self.place].get("hooks", ()), hook]""",
        new="lambda: [hook]",
        harm="A token that was sent to a person is refused after a retry of its step.",
    ),
)

MUTANTS: tuple[Mutant, ...] = (*_WAIT_MUTANTS, *_CLOCK_MUTANTS, *_HOOK_MUTANTS)
