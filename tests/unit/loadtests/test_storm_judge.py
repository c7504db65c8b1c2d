"""The judgement of the storm finds what it is there to find: each case is a storm of one run, with one thing wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from loadtests.storm_audit import Audit, Story
from loadtests.storm_judge import Verdict, judge
from loadtests.storm_load import Acts


def entry(step: str, *, generation: int = 0, **seen: Any) -> dict[str, Any]:
    key = f"r:{step}:{generation}" if generation else f"r:{step}"
    return {"run": "r", "step": step, "key": key, "at": 0.0, "seen": seen, "last": step == "end"}


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
        return judge(cast(Audit, audit), self.acts, self.ledger, self.stored)


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


def event_unseen(case: Case) -> None:
    case.act("event", payload="e1")


def cancel_without_effect(case: Case) -> None:
    case.act("cancel", status="cancelled")


def rewind_without_effect(case: Case) -> None:
    case.act("rewind", generation=1)


def checkpoint_gone(case: Case) -> None:
    case.ledger[0]["fault"] = "checkpoint 4 was durable, found 2"


@pytest.mark.parametrize(
    "spoil",
    [
        *(never_stored, gone_while_live, deleted_too_soon, failed, no_last_entry, result_missing, output_damaged),
        *(answer_unseen, event_unseen, cancel_without_effect, rewind_without_effect, checkpoint_gone),
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


@pytest.mark.parametrize("spoil", [two_results, accepted_twice, key_used_twice])
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
    case.stored = {"r": {"status": "waiting", "currentStepId": "ask"}}
    case.ledger[0]["fault"] = "entered 0.500 s early"
    verdict = case.judged()

    assert list(verdict.wedged) == ["r"]
    assert list(verdict.early) == ["r"]
    assert not verdict.lost
