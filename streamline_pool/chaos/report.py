"""What the nemesis found, as figures, as a table and as text for people. Owns the form of the report, which `--json` writes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .nemesis import Outcome
from .stage import percentile
from .workload import FAILING_STEPS

__all__ = ["document", "is_clean", "table"]

_SHOWN = 50  # findings in the report


def document(outcome: Outcome, left_out: dict[str, str]) -> dict[str, Any]:
    """The report as one document."""
    verdict, audit, load = outcome.verdict, outcome.audit, outcome.load
    everything: list[float] = []
    faults: dict[str, Any] = {}
    for name in [fault.name for fault in outcome.plan.faults]:
        faults[name], seconds = _of_fault(outcome, name)
        everything += seconds
    return {
        **{"lost": len(verdict.lost), "wedged": len(verdict.wedged), "duplicates": len(verdict.doubled), "early": len(verdict.early)},
        **{"recovery_p50_s": _round(percentile(everything, 0.5)), "recovery_p99_s": _round(percentile(everything, 0.99))},
        "untrue_exit_codes": outcome.untrue_exits,
        "audit_complete": outcome.audited,
        **{"seed": outcome.plan.seed, "seconds": outcome.plan.seconds, "lease_s": outcome.plan.lease_s},
        **{"settled_s": round(outcome.settled_s, 1), "runs": len(audit.stories), "ends": dict(audit.ended), "deleted": audit.deleted},
        "faults": faults,
        "left_out": left_out,
        "no_turn": _without_turn(outcome, faults),
        **{"calls": dict(sorted(load.acts.counts.items())), "aimed": dict(load.aimed), "cleaned": dict(load.cleaned)},
        "entered_again": _entered_again(outcome),
        "checked": dict(verdict.checked),
        "audit_interruptions": dict(audit.interruptions),
        "endings": [f"host {end.host} {end.how}: {end.code}" for host in outcome.hosts for end in host.endings],
        "findings": [f"{run_id}: {'; '.join(reasons)}" for run_id, reasons in list(verdict.all().items())[:_SHOWN]],
    }


def _without_turn(outcome: Outcome, faults: dict[str, Any]) -> dict[str, str]:
    """Why a fault has not happened; also of one that has happened at another time."""
    found_nothing = {turn.fault: turn.no_turn for turn in outcome.turns if turn.no_turn}
    return {**{name: "the time was over" for name, row in faults.items() if not row["turns"]}, **found_nothing}


def _entered_again(outcome: Outcome) -> int:
    """How often a handler was entered once more, though its workflow does not let it fail. Allowed, and the price of most faults."""
    keys = Counter(note["key"] for note in outcome.notes if note["kind"] == "entry" and note["step"] not in FAILING_STEPS)
    return sum(count - 1 for count in keys.values())


def _of_fault(outcome: Outcome, name: str) -> tuple[dict[str, Any], list[float]]:
    turns = [turn for turn in outcome.turns if turn.fault == name and not turn.no_turn]
    seconds: list[float] = []
    never, affected = 0, set[str]()
    for turn in turns:
        found, not_yet = turn.recoveries(outcome.audit)
        seconds += found
        never += not_yet
        affected |= turn.affected
    verdict = outcome.verdict
    found_in = {"lost": verdict.lost, "wedged": verdict.wedged, "duplicates": verdict.doubled}
    return {
        "turns": len(turns),
        "affected": len(affected),
        "never_went_on": never,
        **{key: sum(run_id in affected for run_id in runs) for key, runs in found_in.items()},
        **{"recovery_p50_s": _round(percentile(seconds, 0.5)), "recovery_p99_s": _round(percentile(seconds, 0.99))},
    }, seconds


def _round(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _has_happened(report: dict[str, Any]) -> bool:
    """Some fault had a turn."""
    return any(row["turns"] for row in report["faults"].values())


def is_clean(report: dict[str, Any]) -> bool:
    """No rule was broken, some fault has happened, and the witnesses are complete."""
    counts = sum(report[name] for name in ("lost", "wedged", "duplicates", "early"))
    return counts == 0 and _has_happened(report) and not report["untrue_exit_codes"] and bool(report["audit_complete"])


def table(report: dict[str, Any]) -> list[str]:
    """One row per fault, then the totals and the findings."""
    columns = ("fault", "turns", "runs hit", "lost", "wedged", "duplicates", "p50", "p99")
    rows: list[tuple[str, ...]] = [columns]
    for name, row in report["faults"].items():
        counts = (row["turns"], row["affected"], row["lost"], row["wedged"], row["duplicates"])
        rows.append((name, *map(str, counts), _seconds(row["recovery_p50_s"]), _seconds(row["recovery_p99_s"])))
    totals = (
        sum(row["turns"] for row in report["faults"].values()),
        sum(row["affected"] for row in report["faults"].values()),
        report["lost"],
        report["wedged"],
        report["duplicates"],
    )
    rows.append(("all", *map(str, totals), _seconds(report["recovery_p50_s"]), _seconds(report["recovery_p99_s"])))
    widths = [max(len(row[place]) for row in rows) for place in range(len(columns))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in rows
    ]
    lines += [f"{report['runs']} runs, with {sum(report['ends'].values())} ends: a run that is rewound ends again"]
    lines += [f"left out: {name}: {reason}" for name, reason in report["left_out"].items()]
    lines += [f"no turn: {name}: {reason}" for name, reason in report["no_turn"].items()]
    lines += [] if _has_happened(report) else ["no fault has happened, so nothing was tried"]
    lines += [f"early: {report['early']}"] if report["early"] else []
    lines += [f"untrue exit code: {text}" for text in report["untrue_exit_codes"]]
    lines += [] if report["audit_complete"] else ["the change stream could not be read to its end, so the judgement is incomplete"]
    lines += [f"finding: {text}" for text in report["findings"]]
    return lines


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"
