"""Mutants of large outputs, clean-up, archive and TTL."""

from __future__ import annotations

from .mutant import Mutant, mutants_of

__all__ = ["MUTANTS"]

_PROTOCOL = "streamline_pool/protocol/retention.py"
_STORAGE = "streamline_pool/storage/retention.py"
_output_bug = mutants_of(
    "outputs",
    "conformance/test_durability.py",
    "conformance/test_outputs_beside_runs.py",
    "conformance/test_large_outputs.py",
    "conformance/test_files.py",
    "simulation/test_faults.py",
    kinds="large",
)
_bug = mutants_of(
    "clean-up",
    "conformance/test_retention_races.py",
    "conformance/test_retention_age.py",
    "conformance/test_archive.py",
    "conformance/test_retention_files.py",
    "conformance/test_outputs_beside_runs.py",
    kinds="chain,large",
)

MUTANTS: tuple[Mutant, ...] = (
    _output_bug(
        name="output-is-stored-after-its-commit",
        file="streamline_pool/engine/run_writer.py",
        old="""        try:
            await self._outputs.put(output)
        except ValidationError as exc:
            return await self.store(active, failed(active.document, active.step, active.place, failure_of(exc), self.moment()))
        active.outputs.add(output.id, output.content)
        # If the commit finds the run lost, the output stays until the run is deleted: an earlier copy of the write may be stored.
        return await self.store(active, decided.change, decided.size)
""",
        new="""        active.outputs.add(output.id, output.content)
        goes_on = await self.store(active, decided.change, decided.size)
        await self._outputs.put(output)
        return goes_on
""",
        harm="A worker that dies between the two writes leaves a run that refers to an output which does not exist.",
    ),
    _output_bug(
        name="output-of-any-run-is-accepted",
        file="streamline_pool/storage/outputs.py",
        old="""if stored.get("runId") != output.document["_id"]:""",
        new="if False:",
        harm="A forged marker reads the output of another run.",
        beyond_explorer="It takes a forged marker, which no code of this package writes.",
    ),
    _output_bug(
        name="half-an-output-is-accepted",
        file="streamline_pool/storage/outputs.py",
        old="""if not isinstance(data, bytes) or int.from_bytes(data[:_PREFIX_BYTES], "little") != len(data):""",
        new="if not isinstance(data, bytes):",
        harm="A damaged output is handed to a handler, or ends the worker's read with an error that names no run.",
        beyond_explorer="It takes a damaged output, which no code of this package writes.",
    ),
    _bug(
        name="ttl-on-live-runs",
        file="streamline_pool/storage/indexes.py",
        old="""key={"endedAt": 1}, partial={"status": {"$in": TERMINAL_TEXTS}}, expire_after_s=after_s)""",
        new="""key={"updatedAt": 1}, expire_after_s=after_s)""",
        harm="The server deletes runs that sleep or wait for longer than `auto_cleanup_days`.",
        beyond_explorer="The server's own thread deletes by TTL indexes, in real time.",
        likely=("conformance/test_indexes.py",),
    ),
    _bug(
        name="clean-up-of-live-runs",
        file=_PROTOCOL,
        old="""condition: Query = {"status": {"$in": TERMINAL_TEXTS}, "$expr": _at_least_ago("$endedAt", age_s)}""",
        new="""condition: Query = {"$expr": _at_least_ago("$createdAt", age_s)}""",
        harm="A clean-up deletes runs that are old and have not ended.",
    ),
    _bug(
        name="clean-up-counts-the-age-from-the-start",
        file=_PROTOCOL,
        old=""""$expr": _at_least_ago("$endedAt", age_s)}""",
        new=""""$expr": _at_least_ago("$createdAt", age_s)}""",
        harm="A clean-up deletes a run that took long and has just ended, before its caller has read the result.",
    ),
    _bug(
        name="clean-up-of-expired-live-runs",
        file=_PROTOCOL,
        old="""return {"status": {"$in": TERMINAL_TEXTS}, "$expr": _at_least_ago("$context.expireAt", 0.0)}""",
        new="""return {"$expr": _at_least_ago("$context.expireAt", 0.0)}""",
        harm="A clean-up deletes a run in the middle of its work, because its context has expired.",
    ),
    _bug(
        name="clean-up-deletes-revived-runs",
        file=_PROTOCOL,
        old="""statement = {"q": {"_id": {"$in": list(run_ids)}, **condition}, "limit": 0}""",
        new="""statement = {"q": {"_id": {"$in": list(run_ids)}}, "limit": 0}""",
        harm="A run that is rewound between the search and the delete is deleted.",
        explorer=("--kinds", "chain"),
    ),
    _bug(
        name="archive-deletes-revived-runs",
        file=_PROTOCOL,
        old="""{"_id": found["_id"], **{name: {"$eq": found.get(name)} for name in IDENTITY}}""",
        new="""{"_id": found["_id"]}""",
        harm="A run that is rewound between its copy and the delete is deleted.",
        explorer=("--kinds", "large"),
    ),
    _bug(
        name="archive-copies-revived-runs",
        file=_PROTOCOL,
        old="""pipeline = [{"$match": {"_id": {"$in": list(run_ids)}, **condition}}, {"$merge": merge}]""",
        new="""pipeline = [{"$match": {"_id": {"$in": list(run_ids)}}}, {"$merge": merge}]""",
        harm="A run that is rewound between the search and its copy is archived in the middle of its work.",
        explorer=("--kinds", "large"),
    ),
    _bug(
        name="late-archive-copy-replaces-a-later-state",
        file=_PROTOCOL,
        old=""""whenMatched": [{"$replaceWith": {"$cond": [is_later_state, "$$new", "$$ROOT"]}}],""",
        new=""""whenMatched": "replace",""",
        harm="The archive has an earlier state of a run than the one that was deleted.",
        beyond_explorer="It takes a copy whose reading and writing lie apart on the server. The explorer performs each command as one.",
    ),
    _bug(
        name="clean-up-drops-outputs-of-stored-runs",
        file=_STORAGE,
        old="""gone = yield from _gone("runs", list(runs))""",
        new="gone = list(runs)",
        harm="A run refers to an output that a clean-up has deleted.",
        beyond_explorer="Only outputs that are a day old are candidates. A schedule takes an hour at most.",
    ),
    _bug(
        name="clean-up-drops-outputs-of-archived-runs",
        file=_STORAGE,
        old="""    gone = yield from _gone(ARCHIVE, gone)
""",
        new="",
        harm="An archived run refers to an output that a clean-up has deleted.",
    ),
    _bug(
        name="clean-up-drops-outputs-of-today",
        file=_STORAGE,
        old="(yield outputs.outputs_of_runs(gone, _ORPHAN_AGE_S))",
        new="(yield outputs.outputs_of_runs(gone))",
        harm="A clean-up during the restore of a database in parts deletes the outputs of runs that are not there yet.",
        beyond_explorer="It takes a database that is restored in parts.",
    ),
    _bug(
        name="clean-up-reads-outputs-after-the-delete",
        file=_STORAGE,
        old="""        owned = yield from _owned_by(run_ids)
        count += yield retention.delete_runs(run_ids, condition)
""",
        new="""        count += yield retention.delete_runs(run_ids, condition)
        owned = yield from _owned_by(run_ids)
""",
        harm="The outputs of a new run with the id of a deleted one may be deleted with it.",
        equivalent="An output is dropped only if no collection has its run afterwards. A run is stored before its outputs.",
    ),
)
