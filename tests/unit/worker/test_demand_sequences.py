"""After any sequence of inputs: no announced work is lost, no place is filled twice, nothing is claimed beside a suspect."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from streamline_pool.worker.demand import Claim, ClaimDue, ClaimFired, ClaimNamed, Demand
from streamline_pool.worker.gate import GateState

MAX_CRASHES = 3
SUSPECT = MAX_CRASHES - 1  # crashes of a run that the next lost worker convicts
RUN_IDS = st.sampled_from([f"r{number}" for number in range(12)])
TIMER_TASKS = 3


class AnyWorker(RuleBasedStateMachine):
    """A worker that claims as the demand says, in a world where each claim brings some of its runs, none, or fails.

    `unclaimed` are the announcements that no claim has followed yet: run ids, or None for any run.
    """

    demand: Demand
    concurrency: int

    @initialize(concurrency=st.sampled_from([1, 2, 8, 17]), started=st.booleans())
    def make(self, concurrency: int, started: bool) -> None:
        self.demand, self.concurrency = Demand(concurrency=concurrency, max_crashes=MAX_CRASHES), concurrency
        self.unclaimed: set[str | None] = {None}  # at its start a worker does not know what is due
        self.active: dict[str, int] = {}  # run id -> crashes
        self.claim: Claim | None = None
        self.timer_claims: list[ClaimFired] = []
        self.poll_pauses = 0  # after polls whose runs could not be claimed; the worker calls `poll_pause_over` for each
        self.pauses = 0  # after failed claims; the worker calls `pause_over` for each
        self.again: list[str] = []  # absent runs, which the worker announces again
        self.suspect: str | None = None  # the suspect that was claimed here, and is active
        self.held, self.gate, self.draining, self.ready = False, "open", False, started
        if started:
            self.demand.start()

    def may_claim(self) -> bool:
        return self.ready and not self.held and not self.draining and self.gate != "closed"

    # --- inputs

    @rule()
    def start(self) -> None:
        self.demand.start()
        self.ready = True

    @rule(run_id=st.none() | RUN_IDS)
    def wake_up(self, run_id: str | None) -> None:
        self.demand.wake_up(run_id)
        self.unclaimed.add(run_id)

    @rule(run_ids=st.lists(RUN_IDS, min_size=1, max_size=6))
    def timers_fired(self, run_ids: list[str]) -> None:
        self.demand.timers_fired(run_ids)
        self.unclaimed.update(run_ids)

    @rule(gate=st.sampled_from(["open", "open", "closed", "one"]))
    def set_gate(self, gate: GateState) -> None:
        self.demand.set_gate(gate)
        self.gate = gate

    @rule(held=st.sampled_from([False, False, True]))
    def hold(self, held: bool) -> None:
        self.demand.hold(held)
        self.held = held

    @rule(chance=st.integers(0, 30))
    def drain(self, chance: int) -> None:
        if chance == 0:
            self.demand.drain()
            self.draining = True

    @precondition(lambda self: self.active)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        run_id = data.draw(st.sampled_from(sorted(self.active)))
        del self.active[run_id]
        self.demand.run_finished(run_id)
        if run_id == self.suspect:
            self.suspect = None
            self.unclaimed.add(None)  # what was left for the suspect can be claimed now, and this is the only event that shows it

    @precondition(lambda self: self.pauses)
    @rule()
    def pause_over(self) -> None:
        self.pauses -= 1
        self.demand.pause_over()

    @precondition(lambda self: self.poll_pauses)
    @rule()
    def poll_pause_over(self) -> None:
        self.poll_pauses -= 1
        self.demand.poll_pause_over()

    @precondition(lambda self: self.again)
    @rule()
    def announce_again(self) -> None:
        self.wake_up(self.again.pop())

    # --- claims

    @precondition(lambda self: self.claim is None)
    @rule()
    def begin(self) -> None:
        self.claim = self.demand.next_claim(len(self.active))
        assert self.claim is None or self.suspect is None
        match self.claim:
            case None:
                self.demand.claims_succeeded()
            case ClaimNamed(run_ids=run_ids):
                assert self.may_claim()
                assert run_ids
                self.unclaimed.difference_update(run_ids)
            case ClaimDue(limit=limit, crashes_below=crashes_below):
                assert self.may_claim()
                assert limit > 0
                self.unclaimed.clear()  # a poll finds whatever is due by now
                if crashes_below is not None:
                    self.unclaimed.add(None)  # all but suspects

    @precondition(lambda self: self.claim is not None)
    @rule(data=st.data(), more=st.booleans())
    def end(self, data: st.DataObject, more: bool) -> None:
        claim, self.claim = self.claim, None
        assert claim is not None
        if data.draw(st.integers(0, 3), label="failure if 0") == 0:
            self.demand.claim_ended(claim, self.active, suspect=self.suspect, failed=True)
            self.fail()
            return
        if isinstance(claim, ClaimNamed):
            self.bring_named(claim.run_ids, claim.crashes_below, data)
        else:
            due = self.due(data, claim.limit)
            rows: list[dict[str, Any]] = [{"_id": run_id, "crashes": crashes} for run_id, crashes in due.items()]
            rows = [row for row in rows if claim.crashes_below is None or row["crashes"] < claim.crashes_below]
            chosen, limit = self.demand.choose(rows)
            assert len(chosen) == len(rows) or limit is None
            won = chosen if data.draw(st.booleans(), label="won") else []
            if more or len(chosen) < len(rows):
                self.unclaimed.add(None)
            self.active.update({row["_id"]: row["crashes"] for row in rows if row["_id"] in won})
            self.suspect = next((run_id for run_id in won if self.active[run_id] >= SUSPECT), self.suspect)
            self.poll_pauses += bool(self.demand.polled(more=more, tried=len(chosen), won=len(won)))
            if self.gate == "one":
                self.gate = "closed"
        self.demand.claim_ended(claim, self.active, suspect=self.suspect)

    @precondition(lambda self: len(self.timer_claims) < TIMER_TASKS)
    @rule()
    def begin_timer_claim(self) -> None:
        claim = self.demand.next_timer_claim(self.active)
        if claim is not None:
            assert self.may_claim()
            assert self.gate == "open"
            assert claim.batch.run_ids
            assert self.suspect is None
            self.unclaimed.difference_update(claim.batch.run_ids)
            self.timer_claims.append(claim)

    @precondition(lambda self: self.timer_claims)
    @rule(data=st.data())
    def end_timer_claim(self, data: st.DataObject) -> None:
        claim = self.timer_claims.pop(data.draw(st.integers(0, len(self.timer_claims) - 1)))
        if data.draw(st.integers(0, 3), label="failure if 0") == 0:
            self.fail()
        else:
            self.bring_named(claim.batch.run_ids, claim.crashes_below, data)
        self.demand.claim_ended(claim, self.active)

    def fail(self) -> None:
        self.demand.claims_failed()
        self.pauses += 1
        self.unclaimed.add(None)

    def due(self, data: st.DataObject, limit: int) -> dict[str, int]:
        found = data.draw(st.dictionaries(RUN_IDS, st.integers(0, SUSPECT), max_size=limit), label="due")
        return {run_id: crashes for run_id, crashes in found.items() if run_id not in self.active}

    def bring_named(self, run_ids: Collection[str], crashes_below: int, data: st.DataObject) -> None:
        won, absent = set(), set()
        for run_id in dict.fromkeys(run_ids):
            if run_id in self.active:
                continue
            crashes, there = data.draw(st.integers(0, SUSPECT)), data.draw(st.booleans())
            if there and crashes < crashes_below:
                won.add(run_id)
                self.active[run_id] = crashes
            elif there or data.draw(st.booleans()):
                absent.add(run_id)
        pauses = self.demand.named_tried(run_ids, absent)
        self.again += pauses
        assert set(pauses) <= absent
        if absent - set(pauses):
            self.unclaimed.add(None)

    # --- what always holds

    @invariant()
    def no_announcement_is_lost(self) -> None:
        if self.unclaimed:
            assert not self.demand.is_idle(len(self.active))
        waits_for_timer_task = self.demand.wants_timer_claim()
        if self.unclaimed and not waits_for_timer_task and not self.pauses and not self.poll_pauses and self.demand.room(len(self.active)):
            assert self.demand.wants_claim(len(self.active))

    @invariant()
    def an_idle_worker_has_room_and_nothing_to_claim(self) -> None:
        if self.demand.is_idle(len(self.active)):
            assert self.may_claim()
            assert not self.unclaimed
            assert self.claim is None
            assert not self.timer_claims
            assert not self.demand.wants_claim(len(self.active))
            assert not self.demand.wants_timer_claim()
            assert len(self.active) < self.concurrency + self.concurrency // 8

    @invariant()
    def no_place_is_filled_twice(self) -> None:
        promised = sum(len(claim.batch.run_ids) for claim in self.timer_claims)
        if isinstance(self.claim, ClaimNamed):
            promised += len(self.claim.run_ids)
        elif isinstance(self.claim, ClaimDue):
            promised += self.claim.limit
        assert len(self.active) + promised <= self.concurrency + self.concurrency // 8

    @invariant()
    def suspects_do_not_share_the_worker(self) -> None:
        assert [run_id for run_id, crashes in self.active.items() if crashes >= SUSPECT] == [self.suspect][: self.suspect is not None]

    @invariant()
    def who_may_not_claim_wants_nothing(self) -> None:
        if not self.may_claim():
            assert self.demand.room(len(self.active)) == 0
            assert not self.demand.wants_claim(len(self.active))


AnyWorker.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyWorker = AnyWorker.TestCase
