"""Mutants of the group commit: which statement has which outcome, and what a lost reply means."""

from __future__ import annotations

from .mutant import Mutant, mutants_of

__all__ = ["MUTANTS"]

_GROUP = "streamline_pool/engine/group_commit.py"
_OUTCOME = "streamline_pool/engine/write_outcome.py"
_WRITER = "streamline_pool/engine/run_writer.py"
_NO_ANSWER = """                self._on_answer(False)
"""
_bug = mutants_of(
    "group commit",
    "unit/engine/test_resolve_write.py",
    "unit/engine/test_after_write.py",
    "conformance/test_group_commit.py",
    "conformance/test_stored_forms.py",
    "conformance/test_engine_leases.py",
    "simulation/test_faults_checkpoints.py",
    "simulation/test_faults.py",
)

MUTANTS: tuple[Mutant, ...] = (
    _bug(
        name="one-match-is-success-for-all",
        file=_GROUP,
        old="""if reply["n"] == len(batch):""",
        new="""if reply["n"]:""",
        harm="A worker goes on with a run that it has lost, because another run of the same command was stored.",
    ),
    _bug(
        name="group-gets-the-outcome-of-its-first",
        file=_GROUP,
        old="outcome = resolve_write(statement, documents.get(statement.fence.run_id))",
        new="outcome = resolve_write(batch[0][0], documents.get(batch[0][0].fence.run_id))",
        harm="One fenced run of a command stops all others of it, or is taken for stored as they are.",
    ),
    _bug(
        name="stored-commit-counts-as-lost",
        file=_OUTCOME,
        old="if released == _releases(statement) else",
        new="if released and _releases(statement) else",
        harm="After a lost reply a worker drops a run that it holds, and the run waits until its lease expires.",
    ),
    _bug(
        name="late-copy-of-an-earlier-form-counts-as-lost",
        file=_OUTCOME,
        old="return FindStored()",
        new="return Lost()",
        harm="A worker drops a run that it holds, because it was paused and resumed meanwhile, and the run waits until its lease expires.",
        explorer=("--kinds", "choice"),
    ),
    _bug(
        name="stored-release-counts-as-lost",
        file=_OUTCOME,
        old="""released = lease_id is None and document.get("token") == fence.token""",
        new="released = False",
        harm="The end of a run whose reply was lost is published by no worker, and the timer of a sleep is not set.",
        explorer=("--kinds", "chain,mixed"),
    ),
    _bug(
        name="release-is-known-without-the-token",
        file=_OUTCOME,
        old="""released = lease_id is None and document.get("token") == fence.token""",
        new="released = lease_id is None",
        harm="A holder takes the cancel or recovery of its run for its own release, and publishes what was discarded.",
        explorer=("--kinds", "retry"),
    ),
    _bug(
        name="lost-lease-is-not-noticed",
        file=_OUTCOME,
        old="holds = lease_id == fence.lease_id",
        new="holds = True",
        harm="A fenced worker takes its successor's write for its own, or repeats its own write for ever.",
    ),
    _bug(
        name="lost-reply-of-a-commit-is-success",
        file=_GROUP,
        old=_NO_ANSWER,
        new="""                self._on_answer(False)
                for _, future in batch:
                    _resolve(future, WriteOutcome.COMMITTED)
                return
""",
        harm="A step begins before its predecessor is durable, with a `rev` that the document may not have.",
    ),
    _bug(
        name="lost-reply-of-a-commit-is-failure",
        file=_GROUP,
        old=_NO_ANSWER,
        new="""                self._on_answer(False)
                for _, future in batch:
                    _resolve(future, WriteOutcome.FENCED)
                return
""",
        harm="Each network error costs all runs in progress a lease, and their steps are entered again though they may be stored.",
    ),
    _bug(
        name="form-that-was-sent-last-counts-as-stored",
        file=_OUTCOME,
        old="        if statement.follows_form:\n            return WriteOutcome.FORM_COMMITTED\n",
        new="",
        harm="When a late copy of another form of the write was stored, the holder publishes an end that the run does not have, or none.",
        explorer=("--kinds", "choice"),
    ),
    _bug(
        name="unknown-checkpoint-is-not-settled",
        file="streamline_pool/engine/active_run.py",
        old="""        if self.unsettled is not None:
            save, self.unsettled""",
        new="""        if False:
            save, self.unsettled""",
        harm="After a checkpoint whose reply was lost, the holder names a wrong `rev`, and takes its own run for lost.",
        explorer=("--kinds", "mixed"),
    ),
    _bug(
        name="done-and-advance-in-two-writes",
        file=_WRITER,
        old="""        await active.saves_done()
        write = self._first_write(active, change)
""",
        new="""        await active.saves_done()
        if change.kind is ChangeKind.ADVANCE and len(change.steps) == 2:
            place, done = next(iter(change.steps.items()))
            if not await self.store(active, change._replace(fields={}, steps={place: done}, events=())):
                return False
        write = self._first_write(active, change)
""",
        harm="A worker that dies between the two writes leaves a run whose current step has ended, which no worker can go on with.",
        likely=("conformance/test_durability.py", "conformance/test_pause.py"),
    ),
    _bug(
        name="drain-starts-the-next-step",
        file=_OUTCOME,
        old="if held.stopping and change.kind is ChangeKind.ADVANCE:",
        new="if False:",
        harm="A worker that drains grants itself the next step, and releases it with a second write.",
        beyond_explorer="It costs a write: the step is released before its handler is entered. No promise is broken.",
    ),
    _bug(
        name="resumed-run-keeps-the-form-for-paused-runs",
        file=_OUTCOME,
        old="return Send(Write(write.decided, write.decided, earlier=write.sent))",
        new="return Send(Write(write.decided, write.change, earlier=write.sent))",
        harm="A run that was resumed while its holder stored a result is released and claimed anew, or loses its sleep.",
        explorer=("--kinds", "chain,retry"),
    ),
    _bug(
        name="timer-that-was-too-early-is-given-up",
        file=_OUTCOME,
        old="""            change = waits.park(held.document, held.place)
            return Send(Write(change, change, earlier=write.sent))
""",
        new="""            return Lost()
""",
        harm="A run that was claimed a moment too early is held by a worker that has forgotten it, until its lease expires.",
        explorer=("--kinds", "sleep,event"),
    ),
)
