"""Judges from three witnesses: the clients' acts, the handlers' ledger, and the audit of what the database accepted. Owns the rules.

lost: a run whose start was acknowledged, and which has neither ended nor is stored; a run that was deleted before its end, that
failed though its handlers do not, or that ended without its last handler; a handler that was entered without the result of an
earlier step, or with an older checkpoint than one that was durable; an acknowledged answer or event that no later step of the run
has seen, an acknowledged cancel after which the run has another end, an acknowledged rewind after which no handler was entered; an
ended run that does not say when it ended, or why it failed. A call does not count if a later or simultaneous cancel or rewind of the
same run may have made it void. A call that the database did not answer may have happened or not, and counts neither way.

wedged: a run that is stored and has not ended after the settling time, though nothing that it waits for is missing. What may be
missing is an answer, an event or a resume that no client has made, or whose call was not acknowledged.

doubled: a step's result that the database accepted twice without a rewind in between; a run that changed after its end; two entries
of one generation of a run that see different results of one step; a handler that was entered after the result of its step was
durable; two handlers of one run at the same time, though the worker of the first could have stopped it (overlaps.py); two runs that
were stored with one idempotency key at the same time.

early: a handler that was entered before the end of its run's sleep, before `start_at`, or during a pause. The one handler whose step
was granted before the pause may still be entered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from .acts import Act, Acts
from .audit import ENDED, Audit, Story
from .ledger import Note
from .overlaps import Circumstances, Visit, blocked_loops, entered_after_durable, generation, overlapping, visits
from .workload import FAILS

__all__ = ["Verdict", "judge", "missing_act"]


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


def judge(
    audit: Audit, acts: Acts, ledger: Iterable[Note], stored: Mapping[str, Mapping[str, Any]], around: Circumstances | None = None
) -> Verdict:
    """Compare the witnesses. `stored`: the runs that are stored and have not ended, after the settling time."""
    verdict, around = Verdict(), around or Circumstances()
    ledger = list(ledger)
    around.blocked += blocked_loops(ledger)
    notes: dict[str, list[Note]] = defaultdict(list)
    for note in ledger:
        if note["kind"] in ("entry", "exit", "checkpoint"):
            notes[note["run"]].append(note)
            verdict.checked["ledger notes"] += 1
    inside = {run_id: visits(of_run) for run_id, of_run in notes.items()}
    entries = {run_id: [visit.entry for visit in of_run] for run_id, of_run in inside.items()}
    for run_id, of_acts in list(acts.by_run.items()):
        _judge_start(verdict, audit, run_id, acts, stored)
        story = audit.stories.get(run_id)
        if story is not None:
            _judge_acts(verdict, story, acts, of_acts, entries.get(run_id, []))
    for run_id, story in list(audit.stories.items()):
        _judge_story(verdict, story, entries.get(run_id, []), around)
        _judge_times(verdict, story, inside.get(run_id, []), around)
        _judge_checkpoints(verdict, run_id, notes.get(run_id, []))
    _judge_keys(verdict, audit)
    for run_id, document in stored.items():
        _judge_stored(verdict, run_id, document, acts)
    return verdict


def _judge_stored(verdict: Verdict, run_id: str, document: Mapping[str, Any], acts: Acts) -> None:
    """A run that has not ended may only wait for what no client has done."""
    lacking = missing_act(document, acts)
    if lacking:
        verdict.checked[f"runs that wait for {lacking}"] += 1
    else:
        where = f"{document['status']} at {document.get('currentStepId')}{', paused' if document.get('paused') else ''}"
        verdict.wedged[run_id].append(f"{where}, and nothing that it waits for is missing")


def missing_act(document: Mapping[str, Any], acts: Acts) -> str:
    """What the run waits for and no client has done; "" if there is nothing. An unknown outcome counts as not done."""
    run_id = document["_id"]
    of_run = acts.by_run.get(run_id, [])
    if document.get("paused"):
        pauses = [act for act in of_run if act.kind == "pause" and act.outcome != "refused"]
        resumed = [act for act in of_run if act.kind == "resume" and act.outcome == "ok" and not act.paused]
        last_pause = max((act.begun for act in pauses), default=-1)
        return "a resume" if last_pause > max((act.ended for act in resumed), default=-1) or (not resumed and pauses) else ""
    if document["status"] != "waiting" or document.get("wakeAt") is not None:
        return ""
    waiting = next((step.get("waitingFor") for step in document["steps"] if step["stepId"] == document.get("currentStepId")), None) or {}
    if waiting.get("type") == "event":
        return "" if acts.has_event(run_id) else "an event"
    answers = [act for act in of_run if act.kind == "answer" and act.outcome == "ok"]
    return "" if any(not acts.overridden(act) for act in answers) else "an answer"


def _judge_start(verdict: Verdict, audit: Audit, run_id: str, acts: Acts, stored: Mapping[str, Any]) -> None:
    if not acts.has_started(run_id):
        return
    verdict.checked["acknowledged starts"] += 1
    story = audit.stories.get(run_id)
    if story is None:
        verdict.lost[run_id].append("its start was acknowledged, and it was never stored")
    elif story.live and run_id not in stored:
        verdict.lost[run_id].append(f"it was {story.status}, and is not stored any more")


def _judge_story(verdict: Verdict, story: Story, entries: list[Note], around: Circumstances) -> None:
    """What must hold for every run, whether its start was acknowledged or not."""
    if story.deleted is not None and story.deleted_as not in ENDED:
        verdict.lost[story.run_id].append(f"it was deleted while {story.deleted_as}")
    verdict.lost[story.run_id] += story.unexplained
    if story.status == "failed" and story.kind != FAILS and not _convicted(story, around):
        verdict.lost[story.run_id].append(f"it failed ({story.code}), and none of its handlers fails for good")
    if story.status == "done":
        verdict.checked["done runs"] += 1
        if story.kind == FAILS:
            verdict.lost[story.run_id].append("it is done without the result of a step that always fails")
        elif not any(entry["last"] for entry in entries):
            verdict.lost[story.run_id].append("it is done, and its last handler was never entered")
    verdict.doubled[story.run_id] += story.doubled
    _judge_entries(verdict, story, entries, around)
    for findings in (verdict.lost, verdict.doubled):
        if not findings[story.run_id]:
            del findings[story.run_id]


def _convicted(story: Story, around: Circumstances) -> bool:
    """So many of its holders died, or were cut off for longer than their lease, that the engine had to take it for the cause."""
    enough = len(story.crashed) >= around.crashes_max
    return story.code == "WORKER_CRASHED" and enough and all(around.excuse(pid, at) for pid, at in story.crashed)


def _judge_times(verdict: Verdict, story: Story, inside: list[Visit], around: Circumstances) -> None:
    found = [*entered_after_durable(story, inside, around), *overlapping(inside, around)]
    if found:
        verdict.doubled[story.run_id] += found


def _judge_checkpoints(verdict: Verdict, run_id: str, notes: list[Note]) -> None:
    """An entry finds at least the checkpoint that was durable before it."""
    for entry in (note for note in notes if note["kind"] == "entry" and "found" in note):
        durable = [note["n"] for note in notes if note["kind"] == "checkpoint" and note["key"] == entry["key"] and note["at"] < entry["at"]]
        verdict.checked["checkpoints"] += len(durable)
        if max(durable, default=0) > entry["found"]:
            verdict.lost[run_id].append(f"{entry['step']}: checkpoint {max(durable)} was durable, found {entry['found']}")


def _judge_entries(verdict: Verdict, story: Story, entries: list[Note], around: Circumstances) -> None:
    """Each entry sees a result of every earlier step, and entries of one generation see the same ones."""
    accepted: dict[tuple[int, str], Any] = {}
    for entry in entries:
        if entry["early_s"] > around.clock_margin_s:
            verdict.early[story.run_id].append(f"{entry['step']} was entered {entry['early_s']:.3f} s early")
        for step, output in entry["seen"].items():
            verdict.checked["results seen"] += 1
            if output is None and not _may_be_empty(step):
                verdict.lost[story.run_id].append(f"{entry['step']} was entered without the result of {step}")
            if isinstance(output, Mapping) and output.get("blob") == "damaged":
                verdict.lost[story.run_id].append(f"the large output of {step} is damaged")
            known = accepted.setdefault((generation(entry), step), output)
            if known != output:
                verdict.doubled[story.run_id].append(f"{step} has two results: {known} and {output}")


def _may_be_empty(step: str) -> bool:
    return step in ("nap", "skipped")  # the output of a sleep, and of a step that was skipped


def _judge_acts(verdict: Verdict, story: Story, acts: Acts, of_run: list[Act], entries: list[Note]) -> None:
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
            if not any(generation(entry) >= act.generation for entry in entries):
                verdict.lost[story.run_id].append(f"no handler was entered after its rewind number {act.generation}")
        if act.kind == "pause" and act.paused:
            _judge_pause(verdict, act, of_run, entries)


def _judge_pause(verdict: Verdict, pause: Act, of_run: list[Act], entries: list[Note]) -> None:
    """One handler may still be entered after a pause has returned: that of the step which was granted before."""
    verdict.checked["pauses"] += 1
    until = min((act.called_at for act in of_run if act.kind == "resume" and act.begun > pause.begun), default=float("inf"))
    entered = [entry for entry in entries if pause.returned_at < entry["at"] < until]
    if len(entered) > 1:
        verdict.early[pause.run_id].append(f"{len(entered)} handlers were entered while it was paused")


def _outputs(entries: list[Note]) -> Iterator[Mapping[str, Any]]:
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
