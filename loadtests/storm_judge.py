"""Judges the storm from three witnesses: the clients' acts, the handlers' ledger, and the audit of what the database accepted.

The module docstring of storm.py says what lost, wedged and doubled mean.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from .storm_app import FAILS
from .storm_audit import ENDED, Audit, Story
from .storm_load import Act, Acts

__all__ = ["Verdict", "judge"]

Entry = Mapping[str, Any]  # of the ledger; see storm_app.py


@dataclass(slots=True)
class Verdict:
    """Run ids, each with the reasons."""

    lost: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    wedged: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    doubled: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    early: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    checked: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # what was compared, so that zero is not for want of looking

    def all(self) -> dict[str, list[str]]:
        """Every run with a finding."""
        found: dict[str, list[str]] = defaultdict(list)
        for name in ("lost", "wedged", "doubled", "early"):
            for run_id, reasons in getattr(self, name).items():
                found[run_id] += [f"{name}: {reason}" for reason in reasons]
        return found


def judge(audit: Audit, acts: Acts, ledger: Iterable[Entry], stored: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """Compare the witnesses. `stored`: the runs that are stored and have not ended, after the drain."""
    verdict = Verdict()
    entries: dict[str, list[Entry]] = defaultdict(list)
    for entry in ledger:
        entries[entry["run"]].append(entry)
        verdict.checked["ledger entries"] += 1
    for run_id, of_run in list(acts.by_run.items()):
        _judge_start(verdict, audit, run_id, of_run, stored)
        story = audit.stories.get(run_id)
        if story is not None:
            _judge_acts(verdict, story, acts, of_run, entries[run_id])
    for run_id, story in audit.stories.items():
        _judge_story(verdict, story, entries[run_id], stored)
    _judge_keys(verdict, audit)
    for run_id, document in stored.items():
        verdict.wedged[run_id].append(f"{document['status']} at {document.get('currentStepId')}, and nothing changes any more")
    return verdict


def _judge_start(verdict: Verdict, audit: Audit, run_id: str, acts: list[Act], stored: Mapping[str, Any]) -> None:
    if not any(act.kind == "start" and act.outcome == "ok" for act in acts):
        return
    verdict.checked["acknowledged starts"] += 1
    story = audit.stories.get(run_id)
    if story is None:
        verdict.lost[run_id].append("its start was acknowledged, and it was never stored")
    elif story.live and run_id not in stored:
        verdict.lost[run_id].append(f"it was {story.status}, and is not stored any more")


def _judge_story(verdict: Verdict, story: Story, entries: list[Entry], stored: Mapping[str, Any]) -> None:
    """What must hold for every run, whether its start was acknowledged or not."""
    if story.deleted is not None and story.deleted_as not in ENDED:
        verdict.lost[story.run_id].append(f"it was deleted while {story.deleted_as}")
    if story.status == "failed" and story.kind != FAILS:
        verdict.lost[story.run_id].append("it failed, and none of its handlers fails for good")
    if story.status == "done":
        verdict.checked["done runs"] += 1
        if story.kind == FAILS:
            verdict.lost[story.run_id].append("it is done without the result of a step that always fails")
        elif not any(entry["last"] for entry in entries):
            verdict.lost[story.run_id].append("it is done, and its last handler was never entered")
    verdict.doubled[story.run_id] += story.doubled
    _judge_entries(verdict, story, entries)
    for findings in (verdict.lost, verdict.doubled):
        if not findings[story.run_id]:
            del findings[story.run_id]


def _judge_entries(verdict: Verdict, story: Story, entries: list[Entry]) -> None:
    """Each entry sees a result of every earlier step, and entries of one generation see the same ones."""
    accepted: dict[tuple[int, str], Any] = {}
    for entry in entries:
        if "fault" in entry:
            found = verdict.early if "early" in entry["fault"] else verdict.lost
            found[story.run_id].append(f"{entry['step']}: {entry['fault']}")
        for step, output in entry["seen"].items():
            verdict.checked["results seen"] += 1
            if output is None and not _may_be_empty(story, step):
                verdict.lost[story.run_id].append(f"{entry['step']} was entered without the result of {step}")
            if isinstance(output, Mapping) and output.get("blob") == "damaged":
                verdict.lost[story.run_id].append(f"the large output of {step} is damaged")
            known = accepted.setdefault((_generation(entry), step), output)
            if known != output:
                verdict.doubled[story.run_id].append(f"{step} has two results: {known} and {output}")


def _may_be_empty(story: Story, step: str) -> bool:
    return step in ("nap", "skipped")  # the output of a sleep, and of a step that was skipped


def _generation(entry: Entry) -> int:
    """How often the run had been rewound; see `ctx.idempotency_key`."""
    parts = entry["key"].split(":")
    return int(parts[2]) if len(parts) > 2 else 0


def _judge_acts(verdict: Verdict, story: Story, acts: Acts, of_run: list[Act], entries: list[Entry]) -> None:
    """Each acknowledged call has its effect, unless a later cancel or rewind of the same run made it void."""
    payloads = {output["act"] for output in _outputs(entries) if "act" in output}
    events = [act for act in of_run if act.kind == "event"]
    if story.status == "done" and any(act.outcome == "ok" and not acts.overridden(act) for act in events):
        verdict.checked["runs with an event"] += 1
        if not any(act.payload in payloads for act in events):
            verdict.lost[story.run_id].append("no event that was acknowledged has reached it")
    for act in of_run:
        if act.outcome == "corrupted" and story.deleted is None:  # a run that is deleted while it is read loses its files, too
            verdict.lost[story.run_id].append(f"{act.kind}: {act.status}")
        if act.outcome != "ok":
            continue
        if act.kind == "answer" and story.status == "done" and not acts.overridden(act):
            verdict.checked["answers"] += 1
            if act.payload not in payloads:
                verdict.lost[story.run_id].append(f"the acknowledged answer {act.payload} was never seen")
        if act.kind == "cancel" and act.status == "cancelled":
            verdict.checked["cancels"] += 1
            if story.status != "cancelled":
                verdict.lost[story.run_id].append(f"its cancel was acknowledged, and it is {story.status}")
        if act.kind == "rewind" and story.status in ("done", "failed"):
            verdict.checked["rewinds"] += 1
            if not any(_generation(entry) >= act.generation for entry in entries):
                verdict.lost[story.run_id].append(f"no handler was entered after its rewind number {act.generation}")
        if act.kind == "pause" and act.paused:
            _judge_pause(verdict, act, of_run, entries)


def _judge_pause(verdict: Verdict, pause: Act, of_run: list[Act], entries: list[Entry]) -> None:
    """One handler may still be entered after a pause has returned: that of the step which was granted before."""
    verdict.checked["pauses"] += 1
    until = min((act.called_at for act in of_run if act.kind == "resume" and act.begun > pause.begun), default=float("inf"))
    entered = [entry for entry in entries if pause.returned_at < entry["at"] < until]
    if len(entered) > 1:
        verdict.early[pause.run_id].append(f"{len(entered)} handlers were entered while it was paused")


def _outputs(entries: list[Entry]) -> Iterator[Mapping[str, Any]]:
    for entry in entries:
        yield from (output for output in entry["seen"].values() if isinstance(output, Mapping))


def _judge_keys(verdict: Verdict, audit: Audit) -> None:
    """Of one workflow and idempotency key, at most one run is stored at any time."""
    by_key: dict[str, list[Story]] = defaultdict(list)
    for story in audit.stories.values():
        if story.key is not None:
            by_key[story.key].append(story)
    verdict.checked["idempotency keys"] = len(by_key)
    for key, stories in by_key.items():
        stories.sort(key=lambda story: story.inserted)
        for earlier, later in pairwise(stories):
            if earlier.deleted is None or earlier.deleted > later.inserted:
                verdict.doubled[later.run_id].append(f"{earlier.run_id} was stored with the same key {key}")
