"""`python -m tests.simulation.explorer`: play schedules, and report the first that breaks a promise.

Exit code 0: no violation. 1: a violation, which is shrunk and told. 2: wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

from streamline_pool import embedded

from .schedule import Played, play, shrink, tell
from .server import Server
from .side_by_side import playing
from .workload import NAMED_KINDS


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.explorer", description=__doc__)
    parser.add_argument("--schedules", type=_positive, default=1_000, help="how many (default 1000)")
    parser.add_argument("--seed", type=int, default=1, help="of the first schedule; the next ones count up (default 1)")
    parser.add_argument("--replay", action="store_true", help="play the schedule of --seed alone, and tell it")
    parser.add_argument("--keep-going", action="store_true", help="go on after a violation")
    parser.add_argument("--no-shrink", action="store_true", help="report a violation as it was found")
    parser.add_argument("--processes", type=int, default=1, help="how many play side by side (default 1)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--kinds", default="", metavar="A,B", help=f"of the first workflow: {', '.join(NAMED_KINDS)} (default: any but code)"
    )
    options = parser.parse_args()
    options.kinds = tuple(kind for kind in options.kinds.split(",") if kind)
    if not set(options.kinds) <= set(NAMED_KINDS):
        parser.error(f"there is no kind {', '.join(set(options.kinds) - set(NAMED_KINDS))}")
    with embedded.start(None) as mongod, closing(Server(mongod.uri, "explorer")) as server:
        return _replay(server, mongod.uri, options) if options.replay else _explore(server, mongod.uri, options)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def _replay(server: Server, uri: str, options: argparse.Namespace) -> int:
    played = play(server, uri, options.seed, kinds=options.kinds)
    print(tell(played))
    return int(played.violation is not None)


def _explore(server: Server, uri: str, options: argparse.Namespace) -> int:
    began = time.monotonic()
    faults: Counter[str] = Counter()
    count = operations = entries = 0
    violations: list[str] = []
    seeds = range(options.seed, options.seed + options.schedules)
    with playing(server, uri, seeds, options.kinds, options.processes) as schedules:
        for played in schedules:
            count += 1
            faults.update(played.faults)
            operations += played.operations
            entries += played.entries
            if played.violation is not None:
                violations.append(f"seed {played.seed}: {played.violation}")
                print(violations[-1], flush=True)
                if not options.keep_going:
                    _report(server, uri, played, shrinks=not options.no_shrink)
                    break
    seconds = time.monotonic() - began
    figures = {
        "schedules": count, "seconds": round(seconds, 1), "per_second": round(count / seconds, 1), "operations": operations,
        "entries": entries, "faults": dict(faults.most_common()), "violations": violations,
    }  # fmt: skip
    speed = f"{seconds:.1f} s ({count / seconds:.1f} per second)"
    print(f"{count} schedules in {speed}, {operations} operations, {sum(faults.values())} injected faults")
    print(f"{len(violations)} broke a promise" if violations else "no violation")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1))
    return int(bool(violations))


def _report(server: Server, uri: str, played: Played, *, shrinks: bool) -> None:
    print(tell(shrink(server, uri, played) if shrinks else played))
    kinds = f" --kinds {','.join(played.kinds)}" if played.kinds else ""
    print(f"replay it: python -m tests.simulation.explorer --replay --seed {played.seed}{kinds}")


if __name__ == "__main__":
    sys.exit(main())
