"""Mutants of leases and durability: renewal, self-fencing, the check before an entry, majority reads and writes."""

from __future__ import annotations

from .mutant import Mutant, mutants_of

__all__ = ["MUTANTS"]

_LEASES = "streamline_pool/engine/leases.py"
_COMMITS = "streamline_pool/protocol/commits.py"
_CLAIMING = "streamline_pool/worker/claiming.py"
_bug = mutants_of(
    "leases",
    "conformance/test_fence.py",
    "conformance/test_renewal.py",
    "conformance/test_engine_leases.py",
    "conformance/test_claimed_again.py",
    "conformance/test_engine_cancel.py",
)
_durability_bug = mutants_of("durability", "conformance/test_durability.py", "conformance/test_seams.py")

MUTANTS: tuple[Mutant, ...] = (
    _bug(
        name="renewal-without-lease-id",
        file=_COMMITS,
        old="""query = {"_id": {"$in": list(run_ids)}, "lease.id": {"$in": list(lease_ids)}}""",
        new="""query = {"_id": {"$in": list(run_ids)}}""",
        harm="A worker that has lost a run extends the lease of its successor, or makes half a lease for a run that has none.",
    ),
    _bug(
        name="renewal-by-claim",
        file=_COMMITS,
        old="""query = {"_id": {"$in": list(run_ids)}, "lease.id": {"$in": list(lease_ids)}}""",
        new="""query = {"lease.id": {"$in": list(lease_ids)}}""",
        harm="A run of the same claim whose driver has ended by a defect is held for as long as the worker lives.",
        explorer=("--kinds", "large"),
    ),
    _bug(
        name="renewal-by-owner",
        file=_LEASES,
        old="""            renewed, refused = await update_many(""",
        new="""            owners = [active.document["lease"]["owner"] for active in active_runs]
            renewal.body["updates"][0]["q"] = {"lease.owner": {"$in": owners}}
            renewed, refused = await update_many(""",
        harm="A claim of unknown outcome is renewed for ever, and its run is never entered and never recovered.",
    ),
    _bug(
        name="leases-are-not-renewed",
        file=_LEASES,
        old="""due = [active for active in self._held.values() if active.deadline <= renew_before or active.renew_now]""",
        new="due: list[ActiveRun] = []",
        harm="Every step that takes longer than a lease is aborted, and started again elsewhere.",
    ),
    _bug(
        name="one-renewed-lease-stands-for-all",
        file=_LEASES,
        old="""            found = [] if renewed == len(active_runs)""",
        new="""            renewed = len(active_runs) if renewed else 0
            found = [] if renewed == len(active_runs)""",
        harm="A worker with several runs never sees that one was cancelled or recovered, and lets its handler go on.",
    ),
    _bug(
        name="lost-lease-counts-as-renewed",
        file=_LEASES,
        old="if renewed == len(active_runs) or lease_id_of(document) == active.lease_id:",
        new="if True:",
        harm="The handler of a run that was recovered goes on beside that of its successor.",
    ),
    _bug(
        name="unanswered-renewal-counts-as-renewed",
        file=_LEASES,
        old="""            log.warning("renew_failed", extra={"runs": len(active_runs), "error": str(exc)})
            return
""",
        new="""            log.warning("renew_failed", extra={"runs": len(active_runs), "error": str(exc)})
            renewed, refused, found = len(active_runs), {}, []
""",
        harm="A worker without a database lets its handlers go on after their leases have ended, beside those of their successors.",
    ),
    _bug(
        name="run-that-is-lost-goes-on",
        file=_LEASES,
        old="""            active.abort(active.lost)
""",
        new="",
        harm="The handler of a cancelled or recovered run goes on to its end.",
    ),
    _bug(
        name="no-self-fence",
        file=_LEASES,
        old="if active.deadline <= too_late and active.in_user_code:",
        new="if False:",
        harm="A handler whose lease cannot be renewed goes on beside that of its successor.",
    ),
    _bug(
        name="self-fence-after-the-lease",
        file=_LEASES,
        old="_SAFETY = 0.9",
        new="_SAFETY = 2.0",
        harm="A handler is stopped only when its lease has ended, and another worker may be in it.",
    ),
    _bug(
        name="self-fence-waits-for-the-renewal",
        file=_LEASES,
        old="""            await self._env.async_sleep(self._tick_s)
            too_late""",
        new="""            await self._env.async_sleep(self._tick_s)
            await self._check(list(self._held.values()))
            too_late""",
        harm="A database that does not answer delays the check of the clock, so handlers outlive their leases.",
    ),
    _bug(
        name="self-fence-is-counted-from-the-renewals-answer",
        file=_LEASES,
        old="active.deadline = max(active.deadline, deadline)",
        new="active.deadline = max(active.deadline, self.deadline())",
        harm="After a slow renewal a handler goes on beyond the end of its lease.",
    ),
    _bug(
        name="self-fence-is-counted-from-the-named-claims-answer",
        file=_CLAIMING,
        old="""        if document is not None:
            self._engine.admit(document, deadline)""",
        new="""        if document is not None:
            self._engine.admit(document, self._engine.leases.deadline())""",
        harm="After a slow claim a handler goes on beyond the end of its lease.",
    ),
    _bug(
        name="self-fence-is-counted-from-the-batch-claims-answer",
        file=_CLAIMING,
        old="""        for document in documents:
            self._engine.admit(document, deadline)""",
        new="""        for document in documents:
            self._engine.admit(document, self._engine.leases.deadline())""",
        harm="After a slow claim of many runs their handlers go on beyond the ends of their leases.",
    ),
    _bug(
        name="no-deadline-check-before-an-entry",
        file="streamline_pool/engine/run_driver.py",
        old="if not self._has_lease(active):",
        new="if False:",
        harm="A worker that was frozen enters a handler after its lease has ended, beside its successor.",
    ),
    _bug(
        name="no-deadline-check-on-the-thread",
        file="streamline_pool/engine/attempt.py",
        old="""    if not may_enter():
        return Outcome(Kind.TOO_LATE, None)
""",
        new="",
        harm="A worker that was frozen after it had passed a handler to a thread enters it after its lease has ended.",
        beyond_explorer="The handlers of the explorer are `async def`.",
    ),
    _durability_bug(
        name="writes-are-not-majority",
        file="streamline_pool/storage/requests.py",
        old="""{"w": "majority", "j": True}""",
        new="""{"w": 1, "j": True}""",
        harm="A fail-over rolls back a start, an answer or a result that was acknowledged.",
    ),
    _durability_bug(
        name="writes-are-not-journaled",
        file="streamline_pool/storage/requests.py",
        old="""{"w": "majority", "j": True}""",
        new="""{"w": "majority", "j": False}""",
        harm="A power failure of the members undoes what was acknowledged.",
    ),
    _durability_bug(
        name="unacknowledged-majority-is-success",
        file="streamline_pool/storage/requests.py",
        old="    if failed:",
        new="    if False:",
        harm="A write that is applied on one member only counts as durable, and a fail-over undoes it.",
    ),
    _durability_bug(
        name="decisions-are-read-locally",
        file="streamline_pool/storage/base.py",
        old="""concern = None if in_transaction(session) else ReadConcern("majority")""",
        new="""concern = None if in_transaction(session) else ReadConcern("local")""",
        harm="A worker acts on a claim or a commit that it has read, and that a fail-over then undoes.",
        explorer=("--kinds", "chain"),
    ),
    _durability_bug(
        name="decisions-are-read-from-a-secondary",
        file="streamline_pool/storage/base.py",
        old="read_concern=concern, read_preference=ReadPreference.PRIMARY)",
        new="read_concern=concern, read_preference=ReadPreference.SECONDARY_PREFERRED)",
        harm="A read after a shortfall shows a state from before the write, so a stored commit counts as lost.",
    ),
)
