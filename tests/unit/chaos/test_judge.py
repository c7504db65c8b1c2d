"""The judge of the nemesis finds what it is there to find: each case has one run, with one thing wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from streamline_pool.chaos.acts import Acts
from streamline_pool.chaos.audit import Audit, Story
from streamline_pool.chaos.judge import Verdict, judge
from streamline_pool.chaos.overlaps import Circumstances, Strike, Suspension

PLACES = {"first": 0, "ask": 1, "end": 2}


def entry(step: str, *, generation: int = 0, at: float = 0.0, pid: int = 1, **seen: Any) -> dict[str, Any]:
    key = f"r:{step}:{generation}" if generation else f"r:{step}"
    more = {"place": PLACES[step], "last": step == "end", "early_s": 0.0}
    return {"kind": "entry", "run": "r", "step": step, "key": key, "at": at, "pid": pid, "seen": seen, **more}


def left(step: str, *, at: float, pid: int = 1) -> dict[str, Any]:
    return {"kind": "exit", "run": "r", "step": step, "key": f"r:{step}", "at": at, "pid": pid, "end": "returned"}


def result(nonce: str) -> dict[str, str]:
    return {"nonce": nonce}


@dataclass
class Case:
    """One run of the kind `human`, which was answered and has ended well, until a test changes that."""

    story: Story = field(default_factory=lambda: Story("r", "human_0", status="done", inserted=1, deleted=9, deleted_as="done"))
    acts: Acts = field(default_factory=Acts)
    ledger: list[dict[str, Any]] = field(
        default_factory=lambda: [entry("first"), entry("ask", first=result("1")), entry("end", first=result("1"), ask={"act": "a1"})]
    )
    others: list[Story] = field(default_factory=list)
    stored: Mapping[str, Any] = field(default_factory=dict)
    around: Circumstances = field(default_factory=Circumstances)

    def __post_init__(self) -> None:
        self.act("start")
        self.act("answer", payload="a1")

    def act(self, kind: str, *, payload: str | None = None, **more: Any) -> None:
        act = self.acts.begin(kind, "r", payload)
        for name, value in more.items():
            setattr(act, name, value)
        self.acts.end(act, "ok")

    def judged(self) -> Verdict:
        audit = SimpleNamespace(stories={story.run_id: story for story in [self.story, *self.others]})
        return judge(cast(Audit, audit), self.acts, self.ledger, self.stored, self.around)


def test_a_run_whose_calls_all_had_their_effect_has_no_finding() -> None:
    verdict = Case().judged()

    assert verdict.all() == {}
    assert verdict.checked["answers"] == 1
    assert verdict.checked["acknowledged starts"] == 1


def never_stored(case: Case) -> None:
    case.story.run_id = "another"


def gone_while_live(case: Case) -> None:
    case.story.status, case.story.deleted = "running", None


def deleted_too_soon(case: Case) -> None:
    case.story.deleted_as = "waiting"


def failed(case: Case) -> None:
    case.story.status = case.story.deleted_as = "failed"


def no_last_entry(case: Case) -> None:
    case.ledger.pop()


def result_missing(case: Case) -> None:
    for one in case.ledger[1:]:
        one["seen"]["first"] = None


def output_damaged(case: Case) -> None:
    for one in case.ledger[1:]:
        one["seen"]["first"] = {"nonce": "1", "blob": "damaged"}


def answer_unseen(case: Case) -> None:
    case.ledger[2]["seen"]["ask"] = {"act": "another"}


def see(case: Case, output: dict[str, Any]) -> None:
    """Every later handler sees this output of the first step."""
    for one in case.ledger[1:]:
        one["seen"]["first"] = output


def event_unseen(case: Case) -> None:
    case.act("event", payload="e1")


def another_event_seen(case: Case) -> None:
    case.act("event", payload="e1")
    see(case, {"act": "of no client"})


def cancel_without_effect(case: Case) -> None:
    case.act("cancel", status="cancelled")


def rewind_without_effect(case: Case) -> None:
    case.act("rewind", generation=1)


def checkpoint_gone(case: Case) -> None:
    case.ledger[1] |= {"found": 2, "at": 1.0}
    case.ledger.append({"kind": "checkpoint", "run": "r", "key": "r:ask", "n": 4, "at": 0.5, "pid": 1})


def end_unexplained(case: Case) -> None:
    case.story.unexplained = ["done without endedAt"]


def test_of_two_events_one_is_enough_also_if_its_own_call_got_no_answer() -> None:
    case = Case()
    case.acts.end(case.acts.begin("event", "r", "e1"), "unknown")
    case.act("event", payload="e2")
    see(case, {"act": "e1"})
    assert not case.judged().all()


@pytest.mark.parametrize(
    "spoil",
    [
        *(never_stored, gone_while_live, deleted_too_soon, failed, no_last_entry, result_missing, output_damaged),
        *(answer_unseen, event_unseen, another_event_seen, cancel_without_effect, rewind_without_effect, checkpoint_gone, end_unexplained),
    ],
)
def test_what_is_lost_is_found(spoil: Callable[[Case], None]) -> None:
    """A judgement that finds nothing proves nothing unless it would have found this."""
    case = Case()
    spoil(case)
    verdict = case.judged()

    assert list(verdict.lost) == ["r"] or (spoil is never_stored and "r" in verdict.lost)
    assert not verdict.doubled


def two_results(case: Case) -> None:
    case.ledger[2]["seen"]["first"] = result("2")


def accepted_twice(case: Case) -> None:
    case.story.accepted, case.story.doubled = Counter({"0": 2}), ["step 0 done 2 times"]


def key_used_twice(case: Case) -> None:
    case.story.key = "human_0/k"
    case.others = [Story("earlier", "human_0", key="human_0/k", status="done", inserted=0, deleted=5, deleted_as="done")]
    case.ledger += [{**entry("end"), "run": "earlier"}]


def changed_after_its_end(case: Case) -> None:
    case.story.doubled = ["it was done, and changed once more: ['rev']"]


def entered_again(case: Case) -> None:
    case.story.done_at[0, "0"] = 5.0
    case.ledger.append(entry("first", at=6.0, pid=2))


def two_at_once(case: Case) -> None:
    case.ledger = [entry("first", at=5.0), left("first", at=9.0), entry("first", at=6.0, pid=2), entry("end", at=10.0, ask={"act": "a1"})]
    case.ledger[3]["seen"]["first"] = result("1")


@pytest.mark.parametrize("spoil", [two_results, accepted_twice, key_used_twice, changed_after_its_end, entered_again, two_at_once])
def test_what_is_doubled_is_found(spoil: Callable[[Case], None]) -> None:
    """Two accepted results of one step, or two runs of one idempotency key, are the worst that a storm could hide."""
    case = Case()
    spoil(case)
    verdict = case.judged()

    assert list(verdict.doubled) == ["r"]
    assert not verdict.lost


def test_a_rewind_gives_a_step_a_second_result_and_makes_an_answer_void() -> None:
    """Both are what a rewind is for, so neither is a finding."""
    case = Case()
    case.act("rewind", generation=1)
    case.ledger[2:] = [
        entry("first", generation=1),
        entry("ask", generation=1, first=result("2")),
        entry("end", generation=1, first=result("2"), ask={"act": "a2"}),
    ]
    case.act("answer", payload="a2")

    assert case.judged().all() == {}


@pytest.mark.parametrize(("entered_at", "found"), [([11.0, 21.0, 22.0], 0), ([11.0, 12.0, 21.0], 1)])
def test_a_second_handler_that_is_entered_during_a_pause_is_found(entered_at: list[float], found: int) -> None:
    """The first is allowed: its step was granted before the pause."""
    case = Case()
    case.act("pause", paused=True)
    case.acts.by_run["r"][-1].returned_at = 10.0
    case.act("resume", called_at=20.0)
    for one, at in zip(case.ledger, entered_at, strict=True):
        one["at"] = at

    assert len(case.judged().early) == found


def test_a_run_that_is_left_is_stuck_and_an_early_entry_is_found() -> None:
    case = Case()
    case.story.status, case.story.deleted = "waiting", None
    case.stored = {"r": {"_id": "r", "status": "running", "currentStepId": "ask", "steps": []}}
    case.ledger[0]["early_s"] = 0.5
    verdict = case.judged()

    assert list(verdict.wedged) == ["r"]
    assert list(verdict.early) == ["r"]
    assert not verdict.lost


def test_what_a_suspended_process_does_when_it_continues_is_no_finding() -> None:
    """Its handler is still inside while another worker has the run; the fence takes care of what it writes."""
    case = Case()
    two_at_once(case)
    case.around.suspensions.append(Suspension(1, 1.0, 8.0))

    assert case.judged().all() == {}


def test_a_handler_that_waits_in_a_call_of_the_engine_cannot_be_stopped_and_is_no_finding() -> None:
    """The call refuses when it returns, so the handler changes nothing more."""
    case = Case()
    two_at_once(case)
    case.ledger[1]["end"] = "LeaseLostError"

    assert case.judged().all() == {}


@pytest.mark.parametrize(("blocked_from", "doubled"), [(5.5, 0), (7.5, 1)])
def test_a_handler_that_waits_in_a_call_of_the_engine_until_it_gives_up_cannot_be_stopped(blocked_from: float, doubled: int) -> None:
    """Replies are lost, and `ctx.checkpoint` waits for one for longer than the lease. A call after the second entry is no excuse."""
    case = Case()
    two_at_once(case)
    case.ledger[1]["end"] = "StoreUnavailableError"
    case.ledger.append({"kind": "blocks", "at": blocked_from, "run": case.ledger[1]["run"], "key": case.ledger[1]["key"], "pid": 1})

    assert len(case.judged().doubled) == doubled


@pytest.mark.parametrize(("end", "doubled"), [("CancelledError", 0), ("returned", 1)])
def test_a_handler_whose_event_loop_is_blocked_by_another_one_cannot_be_stopped(end: str, doubled: int) -> None:
    """An `async def` handler of another run waits in `ctx.checkpoint` for a database that does not answer. Threads go on meanwhile."""
    case = Case()
    two_at_once(case)
    case.ledger[1]["end"] = end
    other = {"run": "other", "key": "other:count", "pid": 1}
    case.ledger += [{"kind": "blocks", "at": 5.5, **other}, {"kind": "exit", "at": 8.9, "end": "LeaseLostError", **other}]

    assert len(case.judged().doubled) == doubled


def test_the_handler_that_a_rewind_aborts_may_still_be_inside() -> None:
    case = Case()
    case.act("rewind", generation=1)
    case.ledger = [entry("first", at=5.0), left("first", at=9.0), entry("first", at=6.0, pid=2, generation=1), entry("end", at=10.0)]
    case.ledger[3]["seen"] = {"first": result("1"), "ask": {"act": "a1"}}

    assert not case.judged().doubled


@pytest.mark.parametrize(
    ("crashed", "lost"),
    [
        ([(1, 5.0), (2, 6.0), (3, 20.0)], 0),  # two died, the third was cut off a moment ago
        ([(1, 5.0), (2, 6.0)], 1),
        ([(1, 5.0), (2, 6.0), (9, 20.0)], 1),  # nothing had happened to the third
        ([(1, 5.0), (2, 6.0), (3, 99.0)], 1),  # long ago
    ],
)
def test_a_run_may_fail_only_after_faults_hit_as_many_of_its_holders_as_convict_it(crashed: list[tuple[int, float]], lost: int) -> None:
    case = Case()
    failed(case)
    case.story.code, case.story.crashed, case.around.dead = "WORKER_CRASHED", crashed, {1, 2}
    case.around.strikes, case.around.lease_s = [Strike(frozenset({3}), 10.0, 16.0)], 2.0

    assert len(case.judged().lost) == lost


WAITS = {"_id": "r", "status": "waiting", "currentStepId": "ask"}
HUMAN = {"steps": [{"stepId": "ask", "waitingFor": {"type": "human"}}]}
EVENT = {"steps": [{"stepId": "ask", "waitingFor": {"type": "event", "eventName": "e"}}]}


@pytest.mark.parametrize(
    ("document", "call", "wedged"),
    [
        (WAITS | HUMAN, "", 0),
        (WAITS | HUMAN, "answer", 1),
        (WAITS | HUMAN | {"wakeAt": 1}, "", 1),  # it waits with a deadline, which needs no one
        (WAITS | EVENT, "", 0),
        (WAITS | EVENT, "event", 1),
        (WAITS | HUMAN | {"paused": True}, "pause", 0),
        (WAITS | HUMAN | {"paused": True}, "resume", 1),
        (WAITS | HUMAN | {"status": "sleeping"}, "", 1),
    ],
)
def test_a_run_is_wedged_only_if_nothing_that_it_waits_for_is_missing(document: dict[str, Any], call: str, wedged: int) -> None:
    """The nemesis answers nothing after the last fault, so some runs wait rightly. Those whose call was acknowledged do not."""
    case = Case(acts=Acts())
    case.acts.by_run.clear()
    case.act("start")
    if call:
        case.act(call)
    case.story.status, case.story.deleted, case.ledger = document["status"], None, case.ledger[:2]
    case.stored = {"r": document}

    assert len(case.judged().wedged) == wedged
