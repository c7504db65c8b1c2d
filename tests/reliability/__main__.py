"""`python -m tests.reliability [--part NAME]`: measure the parts, store their results, and make docs/reliability.md.

The exit status is 1 if a part left no result, or if the soak found something.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from . import page
from .parts import PARTS, PartFailedError
from .results import measured_here, store


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument(
        "--part", choices=[*PARTS, "page", "all"], default="all", help="what to measure; page: nothing (default: %(default)s)"
    )
    parser.add_argument("--schedules", type=int, default=20_000, help="of the explorer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the explorer and the soak (default: %(default)s)")
    parser.add_argument("--nemesis-minutes", type=int, default=10, help="how long its faults go on (default: %(default)s)")
    parser.add_argument(
        "--mutant-tables",
        metavar="FILE",
        nargs="+",
        type=Path,
        help="tables that `python -m tests.mutants --json` has made, in the place of a run of all mutants, which takes a day",
    )
    parser.add_argument("--runs", type=int, default=1_000_000, help="of the soak (default: %(default)s)")
    parser.add_argument("--minutes", type=int, default=1440, help="of the soak: then it starts no more runs (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="of the soak (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between two readings of the soak (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, store, render. A part that fails does not stop the others."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, _interrupt)  # so that SIGTERM, too, ends every process that was started
    failed = False
    for part in PARTS if options.part == "all" else [options.part]:
        if part == "page":
            continue
        measured = measured_here()
        try:
            result = PARTS[part](options)
        except PartFailedError as exc:
            print(f"{part}: {exc}", file=sys.stderr, flush=True)
            failed = True
            continue
        except KeyboardInterrupt:
            return 130
        print(f"{part}: stored in {store(part, result, measured)}", file=sys.stderr, flush=True)
        failed |= part == "soak" and _found(result)
    page.write()
    return int(failed)


def _found(result: Any) -> bool:
    for what in ("wrong", "not_flat"):
        for line in result[what]:
            print(f"soak: {what}: {line}", file=sys.stderr, flush=True)
    return bool(result["wrong"] or result["not_flat"])


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
