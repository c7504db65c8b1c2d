"""Renders docs/reliability.md from the stored results and the list of promises. Owns the page's text; it measures nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import plot, results
from .flatness import COUNT_RISE_MAX, JUDGED_RUNS, MEMORY_SLOPE_MAX_MIB, WARM_UP_SHARE
from .promises import CLOCKS, NOT_TRIED, PROMISES

__all__ = ["PAGE", "PLOT", "render", "render_plot", "write"]

PAGE = results.ROOT / "docs" / "reliability.md"
PLOT = results.ROOT / "docs" / "reliability-soak.svg"

_NOT_MEASURED = "Not measured."
_INTRO = """# Reliability

What is promised, how it was attacked, and what was found. This page is made by one command from results that were measured; nothing in
it is written by hand beside them:

```console
$ make reliability
```

That measures every part. On two cores the explorer takes a quarter of an hour, the nemesis ten minutes, the soak half an hour, and the
mutants a day (`--mutant-tables` takes tables of `make mutants` in their place).
`make reliability RELIABILITY_ARGS="--part soak --runs 200000"` measures one part, here in ten minutes, and
`make reliability RELIABILITY_ARGS="--part page"` only makes this page from the results that are stored in `tests/reliability/results`.
A part without a result says "Not measured."
"""


def write(page: Path = PAGE, drawing: Path = PLOT) -> None:
    """Write the page, and the plot if the soak was measured."""
    page.write_text(render(), "utf-8")
    drawn = render_plot()
    if drawn is not None:
        drawing.write_text(drawn, "utf-8")


def render(folder: Path = results.FOLDER) -> str:
    """The page, from the results in `folder`."""
    sections = [
        _INTRO,
        _promises(),
        _part("explorer", "Explorer", _EXPLORER, _explorer, folder),
        _part("nemesis", "Nemesis", _NEMESIS, _nemesis, folder),
        _part("mutants", "Mutants", _MUTANTS, _mutants, folder),
        _clocks(),
        _part("soak", "Soak", _SOAK, _soak, folder),
        _not_tried(),
    ]
    return "\n".join(sections)


def render_plot(folder: Path = results.FOLDER) -> str | None:
    """The plot of the soak; None if it was not measured."""
    stored = results.load("soak", folder)
    if stored is None:
        return None
    series: Mapping[str, Any] = stored["result"]["series"]
    panels = {
        "USS of each process, MiB": _of("uss_mib", series),
        "Descriptors of each process": _of("descriptors", series),
        "Threads of each process": _of("threads", series),
        "Connections at the server": {"all clients": series["server connections"]},
    }
    return plot.draw(panels)


def _of(quantity: str, series: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removesuffix(f" {quantity}"): points for name, points in series.items() if name.endswith(f" {quantity}")}


# --- sections ------------------------------------------------------------------------------------------------------

_EXPLORER = """The real procedures of two workers, a steward and several clients, on a real server, one database operation at a time,
in an order that a seeded scheduler chooses. Before or after any operation it may crash an actor, delay it beyond its lease, lose a
reply, or jump a clock. After each schedule the invariants are checked from the database and from a ledger of handler entries and
acknowledged calls. `.venv/bin/python -m tests.simulation.explorer` makes it."""

_NEMESIS = """A pool under load over every capability, on a server of its own, while faults are made. Every effect is in an external
ledger. `streamline-pool chaos` makes it; [what counts](how-to/chaos.md) as lost, wedged, duplicate and recovered stands there. Recovery
is 0.00 s where the runs that a fault hit went on while it lasted."""

_MUTANTS = """Defects that are planted on purpose, one at a time. A proof that does not find them proves nothing. A cell is the seconds
until that detector found the mutant; "no" means that it did not, and an empty cell that it was not tried. A mutant that changes nothing
that can be observed is an *equivalent*, with its argument."""

_SOAK = f"""A pool of real processes and one client, on a private server: plain steps, retries, sleeps of milliseconds, waits that are
answered, hooks, events to one and to all, pause and resume, rewind, cancel, checkpoints, parallel tasks, large outputs, idempotent
starts, streams, and clean-ups all the time. The first {WARM_UP_SHARE:.0%} of the runs are warm-up, and
fewer than {JUDGED_RUNS:,} runs have no verdict. Memory is flat if it grows by at most
{MEMORY_SLOPE_MAX_MIB:g} MiB for 100 000 runs and process; descriptors, threads, sockets and connections are flat if the median of the
last third is less than {COUNT_RISE_MAX:g} above that of the first third. The USS of processes that were forked rises slowly, with time and
not with runs, while pages that they shared since the fork are copied: that memory was there before, and *anonymous* memory does not
count it again. The anonymous memory of the supervisor rises by some 3 MiB in the first million runs: Python keeps up to 2 000 freed
tuples of each length from 1 to 20 until its next full garbage collection, and the supervisor makes no garbage. That is 5 MiB at most."""


def _part(part: str, title: str, about: str, body: Any, folder: Path) -> str:
    stored = results.load(part, folder)
    if stored is None:
        return f"## {title}\n\n{about}\n\n{_NOT_MEASURED}\n"
    measured = stored["measured"]
    note = f"Measured on {measured['date']} at commit `{measured['commit']}`: {measured['machine']}."
    return "\n\n".join([f"## {title}", about, note, *body(stored["result"])]) + "\n"


def _promises() -> str:
    rows = [(p.promise, p.fault, ", ".join(f"`{test}`" for test in p.tests)) for p in PROMISES]
    about = (
        "The promises of [guarantees](explanation/guarantees.md), which lists more tests for each operation, and the invariants of "
        "[architecture](architecture.md), section 5. A test checks that every test that is named here exists."
    )
    return "\n\n".join(["## Promises", about, _table(("promise", "fault", "tests"), rows)]) + "\n"


def _explorer(result: Mapping[str, Any]) -> list[str]:
    violations = result["violations"]
    count = violations if isinstance(violations, int) else len(violations)
    summary = (
        f"{result['schedules']:,} schedules with {result['operations']:,} operations in {result['seconds']:,.0f} s "
        f"({result['per_second']:,.0f} a second). Violations: **{count}**."
    )
    faults = sorted(result["faults"].items())
    return [summary, _table(("fault", "times"), [(name, f"{times:,}") for name, times in faults])]


def _nemesis(result: Mapping[str, Any]) -> list[str]:
    summary = (
        f"{result['runs']:,} runs in {result['seconds']:,.0f} s: lost **{result['lost']}**, wedged **{result['wedged']}**, duplicates "
        f"**{result['duplicates']}**; recovery p50 {_seconds(result['recovery_p50_s'])}, p99 {_seconds(result['recovery_p99_s'])}."
    )
    columns = ("name", "times", "lost", "wedged", "duplicates", "recovery_p50_s", "recovery_p99_s")
    rows = [[_seconds(fault[c]) if c.endswith("_s") else str(fault[c]) for c in columns] for fault in result["faults"]]
    table = _table(("fault", "times", "lost", "wedged", "duplicates", "recovery p50", "recovery p99"), rows)
    left_out = [f"- {name}: {why}" for name, why in result["left_out"].items()]
    return [summary, table, *(["Left out, because this machine could not make them:", "\n".join(left_out)] if left_out else [])]


def _mutants(result: Sequence[Mapping[str, Any]]) -> list[str]:
    detectors = list(dict.fromkeys(detector for mutant in result for detector in mutant["found"]))
    equivalents = [mutant for mutant in result if mutant["equivalent"] and not _is_found(mutant)]
    others = [mutant for mutant in result if mutant not in equivalents]  # an equivalent that was found is none
    found = sum(map(_is_found, others))
    summary = f"{len(result)} mutants: {found} found, {len(equivalents)} equivalent, **{len(others) - found}** not found."
    rows = [[f"`{m['name']}`", m["topic"], m["harm"], *(_found(m, detector) for detector in detectors)] for m in others]
    parts = [summary, _table(("mutant", "topic", "harm", *detectors), rows)]
    beyond = [(f"`{m['name']}`", m["beyond_explorer"]) for m in result if m.get("beyond_explorer")]
    if beyond:
        parts.append(_table(("not for the explorer", "why none of its schedules can show it"), beyond))
    if equivalents:
        parts.append(_table(("equivalent", "why it changes nothing"), [(f"`{m['name']}`", m["argument"]) for m in equivalents]))
    return parts


def _is_found(mutant: Mapping[str, Any]) -> bool:
    return any(seconds is not None for seconds in mutant["found"].values())


def _found(mutant: Mapping[str, Any], detector: str) -> str:
    if detector not in mutant["found"]:
        return ""
    seconds = mutant["found"][detector]
    return "no" if seconds is None else _seconds(seconds)


def _clocks() -> str:
    about = "The server's clock decides. Clocks of hosts are corrected by the offset that was measured to it, or are not used at all."
    rows = [(what, f"`{test}`") for what, test in CLOCKS]
    return "\n\n".join(["## Clocks that jump", about, _table(("what holds", "test"), rows)]) + "\n"


def _soak(result: Mapping[str, Any]) -> list[str]:
    not_flat, wrong = result["not_flat"], result["wrong"]
    summary = (
        f"{result['runs']:,} runs in {result['seconds'] / 60:,.0f} minutes ({result['runs_per_second']:,.0f} a second), "
        f"{result['workers']} workers. Runs or calls with a wrong result: **{len(wrong)}**. "
    )
    if result.get("is_judged", True):
        summary += f"Series that are not flat: **{', '.join(not_flat) if not_flat else 'none'}**."
    else:
        summary += f"No verdict: that takes {JUDGED_RUNS:,} runs, because processes still warm up before."
    rows = [
        (v["name"], *(f"{third:,.2f}" for third in v["thirds"]), f"{v['slope_per_100k_runs']:+.2f}", "yes" if v["flat"] else "**no**")
        for v in result["verdicts"]
    ]
    seen = ", ".join(f"{name} {times:,}" for name, times in sorted(result["seen"].items()))
    return [
        summary,
        "![What each process held, over the runs](reliability-soak.svg)",
        "The grey part is warm-up. Medians of the thirds after it, and the slope for 100 000 runs:",
        _table(("series", "first third", "second third", "last third", "slope", "flat"), rows),
        f"Done meanwhile, runs by workflow and calls by kind: {seen}.",
    ]


def _not_tried() -> str:
    return "\n".join(["## What was not tried", "", *(f"- {what}" for what in NOT_TRIED), ""])


# --- text ----------------------------------------------------------------------------------------------------------


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A bar would end the cell, and a line break the table."""
    return str(text).replace("|", "\\|").replace("\n", " ")
