"""Mutants of the fence: what a lease holder's write must find unchanged, and the token that shows that nothing came between."""

from __future__ import annotations

from .mutant import Mutant, mutants_of

__all__ = ["MUTANTS"]

_bug = mutants_of(
    "fence",
    "conformance/test_fence.py",
    "conformance/test_engine_leases.py",
)
_COMMITS = "streamline_pool/protocol/commits.py"
_COMMIT_QUERY = '''query: Document = {"_id": fence.run_id, "lease.id": fence.lease_id, "rev": fence.rev, "paused"'''
_HELD = """    query = {"_id": fence.run_id, "lease.id": fence.lease_id, "rev": fence.rev}
"""
_SAVE = """    sets = {"rev": fence.rev + 1, "updatedAt": now, f"steps.{place}.{field}": value}
"""
_ALONE = """    return Statement(fence, {"q": query, "u": {"$set": {"rev": fence.rev + 1, "updatedAt": now, "lease.alone": True}}}, size)
"""
_MINIMAL = """    return Statement(fence, {"q": query, "u": update}, len(message) + 600)
"""

MUTANTS: tuple[Mutant, ...] = (
    _bug(
        name="commit-without-lease-id",
        file=_COMMITS,
        old=_COMMIT_QUERY,
        new='''query: Document = {"_id": fence.run_id, "rev": fence.rev, "paused"''',
        harm="A worker that has lost its lease stores its result while another worker holds the run, or after a cancel.",
    ),
    _bug(
        name="commit-without-rev",
        file=_COMMITS,
        old=_COMMIT_QUERY,
        new='''query: Document = {"_id": fence.run_id, "lease.id": fence.lease_id, "paused"''',
        harm="A late copy of a holder's earlier write overwrites what the same holder has stored since.",
    ),
    _bug(
        name="commit-without-fence",
        file=_COMMITS,
        old=_COMMIT_QUERY,
        new='''query: Document = {"_id": fence.run_id, "paused"''',
        harm="Every write of every earlier holder is stored, no matter which worker holds the run now.",
    ),
    _bug(
        name="checkpoint-without-lease-id",
        file=_COMMITS,
        old=_HELD + _SAVE,
        new="""    query = {"_id": fence.run_id, "rev": fence.rev}
"""
        + _SAVE,
        harm="A worker that has lost its lease stores a checkpoint or a hook, and its handler goes on as if it held the run.",
        explorer=("--kinds", "mixed,large"),
    ),
    _bug(
        name="checkpoint-without-rev",
        file=_COMMITS,
        old=_HELD + _SAVE,
        new="""    query = {"_id": fence.run_id, "lease.id": fence.lease_id}
"""
        + _SAVE,
        harm="A late copy of a checkpoint replaces a later checkpoint, and lowers `rev` to that of an earlier write.",
    ),
    _bug(
        name="checkpoint-without-fence",
        file=_COMMITS,
        old=_HELD + _SAVE,
        new="""    query = {"_id": fence.run_id}
"""
        + _SAVE,
        harm="A checkpoint of any earlier holder is stored in the step of the present one.",
    ),
    _bug(
        name="checkpoint-leaves-rev-as-it-is",
        file=_COMMITS,
        old=_SAVE,
        new="""    sets = {"updatedAt": now, f"steps.{place}.{field}": value}
""",
        harm="After a checkpoint the holder names a `rev` that the document does not have, and takes its own run for lost.",
    ),
    _bug(
        name="mark-of-a-suspect-without-fence",
        file=_COMMITS,
        old=_HELD + _ALONE,
        new="""    query = {"_id": fence.run_id}
"""
        + _ALONE,
        harm="A worker that has lost a suspect marks the lease of another worker, or makes one for a run that has none.",
        explorer=("--kinds", "poison"),
    ),
    _bug(
        name="failure-of-a-full-run-without-fence",
        file=_COMMITS,
        old=_HELD + _MINIMAL,
        new="""    query = {"_id": fence.run_id}
"""
        + _MINIMAL,
        harm="A worker that has lost a run whose document was full ends it, although another worker goes on with it.",
        explorer=("--kinds", "retry"),
    ),
)
