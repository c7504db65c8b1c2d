"""The stories of runs with findings, as files for people. Owns their form; why a run has a finding is judge.py's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .audit import Audit
from .clients import Load
from .ledger import Note

__all__ = ["write_stories"]

_RUNS_MAX = 50


def write_stories(folder: Path, found: Mapping[str, Sequence[str]], audit: Audit, load: Load, notes: Sequence[Note], logs: str) -> None:
    """One file for each run of `found` (at most 50), and `pools.log`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pools.log").write_text(logs)
    for run_id, reasons in list(found.items())[:_RUNS_MAX]:
        story = audit.stories.get(run_id)
        acts = sorted(load.acts.by_run.get(run_id, ()), key=lambda act: act.begun)
        of_run = sorted((note for note in notes if note.get("run") == run_id), key=lambda note: float(note["at"]))
        lines = [
            *(run_id, story.workflow_id if story else "never stored", *reasons),
            *("", "calls of clients", *map(str, acts)),
            *("", "changes of the stored run", *(story.trail if story else ())),
            *("", "ledger", *map(str, of_run)),
            *("", "log", *(line for line in logs.splitlines() if run_id in line)),
        ]
        (folder / f"{run_id.replace('/', '_')}.txt").write_text("\n".join(lines))
