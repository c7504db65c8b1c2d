"""`python -m tests.mutants`: apply each mutant to a copy of the tree, and show which detectors find it.

The exit status is 1 if a mutant that is a bug was found by no detector that ran, or if the tree without a mutant is not green.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from .catalogue import MUTANTS, named, tenth
from .copies import ROOT, Copy, copied, workshop
from .detectors import DETECTORS, Finding, Search, Verdict, detect
from .mutant import Mutant
from .report import Row, as_json, has_failed, line, summary


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the mutants and what each would do, and run nothing")
    parser.add_argument("--names", metavar="A,B", help="only these mutants")
    parser.add_argument("--parts", metavar="A,B", help="only the mutants of these parts of the protocol")
    parser.add_argument("--tenth", metavar="today|N", help="only every tenth mutant: the N-th (0 to 9), or the one of this day of the year")
    parser.add_argument("--detectors", metavar="A,B", default="explorer,quick", help=f"of {', '.join(DETECTORS)} (default: %(default)s)")
    parser.add_argument("--likely-only", action="store_true", help="run only the test files that are likely to find a mutant")
    parser.add_argument("--until-found", action="store_true", help="run no further detector over a mutant that one has found")
    parser.add_argument("--no-control", action="store_true", help="do not run the detectors over the tree without a mutant first")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the table to this file, too, after each mutant")
    parser.add_argument("--limit", metavar="S", type=float, default=900.0, help="seconds for one detector (default: %(default)g)")
    parser.add_argument("--schedules", metavar="N", type=int, default=2_000, help="of the explorer (default: %(default)s)")
    parser.add_argument("--seed", metavar="N", type=int, default=1, help="of the explorer and the nemesis (default: %(default)s)")
    parser.add_argument("--nemesis-seconds", metavar="S", type=float, default=40.0, help="of faults (default: %(default)g)")
    options = parser.parse_args(arguments)
    try:
        options.chosen = choose(options.names, options.parts, options.tenth)
    except KeyError as exc:
        parser.error(f"there is no {exc.args[0]!r}; --list shows what there is")
    options.detectors = options.detectors.split(",")
    for detector in options.detectors:
        if detector not in DETECTORS:
            parser.error(f"there is no detector {detector!r}, only {', '.join(DETECTORS)}")
    if "explorer" in options.detectors and not options.list and not (ROOT / "tests/simulation/explorer").is_dir():
        parser.error("this tree has no tests/simulation/explorer; choose other --detectors")
    return options


def choose(names: str | None, parts: str | None, part_of_ten: str | None) -> list[Mutant]:
    """The mutants that the options name. Raises KeyError for what does not exist."""
    chosen = list(MUTANTS) if names is None else named(names.split(","))
    if parts is not None:
        for part in parts.split(","):
            if part not in {mutant.part for mutant in MUTANTS}:
                raise KeyError(part)
        chosen = [mutant for mutant in chosen if mutant.part in parts.split(",")]
    if part_of_ten is None:
        return chosen
    if part_of_ten != "today" and part_of_ten not in "0123456789":
        raise KeyError(part_of_ten)
    number = datetime.now(UTC).timetuple().tm_yday if part_of_ten == "today" else int(part_of_ten)
    return tenth(chosen, number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Yields the exit status."""
    options = parse(arguments)
    if options.list:
        for mutant in options.chosen:
            print(f"{mutant.name} [{mutant.part}]: {mutant.harm}{' (equivalent)' if mutant.equivalent else ''}")
        return 0
    search = Search(
        likely_only=options.likely_only,
        limit_s=options.limit,
        schedules=options.schedules,
        seed=options.seed,
        nemesis_s=options.nemesis_seconds,
    )
    with workshop() as shop:
        return run(options, search, shop)


def examine(copy: Copy, subjects: Sequence[Mutant], options: argparse.Namespace, search: Search) -> dict[str, Finding]:
    """What the detectors find in a copy."""
    findings: dict[str, Finding] = {}
    for detector in options.detectors:
        if detector == "explorer" and len(subjects) == 1 and subjects[0].beyond_explorer is not None:
            continue  # the reason is in the table
        findings[detector] = detect(copy, detector, subjects, search)
        if options.until_found and findings[detector].verdict is Verdict.FOUND:
            break
    return findings


def run(options: argparse.Namespace, search: Search, shop: Path) -> int:
    """Examine the tree as it is, then each mutant. Yields the exit status."""
    rows: list[Row] = []
    for mutant in [*([] if options.no_control else [None]), *options.chosen]:
        with copied(mutant, shop) as copy:
            subjects = options.chosen if mutant is None else [mutant]
            rows.append(Row(mutant, examine(copy, subjects, options, search)))
        print(line(rows[-1]), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(as_json(rows), indent=1) + "\n")
        if mutant is None and has_failed(rows):
            print("the tree without a mutant is not green, so no detector shows anything", file=sys.stderr)
            return 1
    print(summary(rows))
    return int(has_failed(rows))


if __name__ == "__main__":
    sys.exit(main())
