"""Mutants of starts: idempotency keys, ids, unknown outcomes, the time of the first claim."""

from __future__ import annotations

from .mutant import Mutant, mutants_of

__all__ = ["MUTANTS"]

_STARTING = "streamline_pool/client/starting.py"
_bug = mutants_of(
    "starting",
    "conformance/test_starting_races.py",
    "conformance/test_engine_starting.py",
    "simulation/test_faults_control_operations.py",
)

MUTANTS: tuple[Mutant, ...] = (
    _bug(
        name="key-is-not-unique",
        file="streamline_pool/protocol/engine_indexes.py",
        old="    unique=True,\n",
        new="    unique=False,\n",
        harm="Two clients that start a run with one key at the same time start two runs.",
    ),
    _bug(
        name="key-belongs-to-all-workflows",
        file="streamline_pool/protocol/engine_indexes.py",
        old="""key={"workflowId": 1, "idempotencyKey": 1},""",
        new="""key={"idempotencyKey": 1},""",
        harm="A key that another workflow has used refuses a start.",
    ),
    _bug(
        name="key-finds-the-run-of-any-workflow",
        file="streamline_pool/protocol/run_lifecycle.py",
        old="""query = {"workflowId": workflow_id, "idempotencyKey": {"$in": list(keys)}}""",
        new="""query = {"idempotencyKey": {"$in": list(keys)}}""",
        harm="A start gets the run of another workflow that has the same key.",
    ),
    _bug(
        name="start-takes-another-clients-run",
        file=_STARTING,
        old="""if found[0].get("startId") != run.document["startId"]:""",
        new="if False:",
        harm="A start with a chosen id reports success for a run that another client has started with another input.",
    ),
    _bug(
        name="start-of-unknown-outcome-is-a-failure",
        file=_STARTING,
        old="""if found[0].get("startId") != run.document["startId"]:""",
        new="if True:",
        harm="A start whose reply was lost fails although its run is stored, and its caller starts a second one.",
    ),
    _bug(
        name="start-ignores-what-was-refused",
        file=_STARTING,
        old="""    taken = [chunk[error["index"]] for error in errors]
""",
        new="""    taken: list[NewRun] = []
""",
        harm="A start with a used key reports a run that is not stored.",
    ),
    _bug(
        name="scheduled-run-is-due-at-once",
        file="streamline_pool/protocol/run_document.py",
        old="""        "wakeAt": due_at,
""",
        new="""        "wakeAt": now,
""",
        harm="A run with a start time is started at once.",
        explorer=("--kinds", "chain"),
    ),
    _bug(
        name="start-in-a-transaction-is-outside-of-it",
        file="streamline_pool/storage/base.py",
        old="""return {"command": document, "codec_options": _COMMAND_CODEC, "session": session}""",
        new="""return {"command": document, "codec_options": _COMMAND_CODEC}""",
        harm="A run that was started in a transaction exists although the transaction was aborted.",
        beyond_explorer="The explorer has no transactions.",
        likely=("conformance/test_engine_starting.py", "conformance/test_starting_races.py"),
    ),
)
