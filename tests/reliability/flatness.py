"""Decides whether a measured series is flat. Owns the bounds and their arithmetic; it reads no process and no file.

A series is a list of points `(runs that had ended, value)`. What happens during the first fifth of the runs is warm-up and is not
judged: caches fill, threads and connections are made as they are needed. The rest is cut into thirds. A series is not flat if both of
these hold: its slope is above the bound, and the median of its last third is above that of its first third by more than a slope at the
bound would give. One high reading, or one step up and down again, moves neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

__all__ = ["COUNT_RISE_MAX", "MEMORY_SLOPE_MAX_MIB", "WARM_UP_SHARE", "Verdict", "judge", "judge_all"]

WARM_UP_SHARE = 0.2
MEMORY_SLOPE_MAX_MIB = 0.5
"""Per 100 000 runs and process. A process that grows at this rate needs 200 000 000 runs for one gibibyte."""

JUDGED_RUNS = 200_000
"""A soak of fewer runs has no verdict: until each process has done everything once, it makes threads and takes memory."""

COUNT_RISE_MAX = 2.0
"""Descriptors, threads, sockets and connections: between the medians of the first and the last third.

The driver opens a connection when all others are busy and closes one that broke, so a reading differs from the next by one or two."""

_PER_RUNS = 100_000
_BUCKETS = 60

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was found of one series. Memory is in MiB."""

    name: str  # process and quantity, such as "worker 1 uss_mib"
    flat: bool
    thirds: tuple[float, float, float]  # medians
    slope: float  # per 100 000 runs

    def document(self) -> dict[str, Any]:
        """As stored in the result."""
        thirds = [round(value, 3) for value in self.thirds]
        return {"name": self.name, "flat": self.flat, "thirds": thirds, "slope_per_100k_runs": round(self.slope, 4)}


def judge(name: str, points: Sequence[Point]) -> Verdict:
    """The verdict on one series. A name that ends with `_mib` is judged as memory, every other as a count.

    ValueError if less than nine points are left after the warm-up: a third of fewer than three has no median worth its name.
    """
    last = max((runs for runs, _ in points), default=0)
    judged = [point for point in points if point[0] > last * WARM_UP_SHARE]
    if len(judged) < 9:
        raise ValueError(f"{name}: {len(judged)} readings after the warm-up; at least 9 are needed: more runs, or a shorter interval")
    start, width = judged[0][0], (last - judged[0][0]) / 3
    thirds = [[value for runs, value in judged if _third(runs, start, width) == number] for number in range(3)]
    first, second, third = (median(values) if values else judged[0][1] for values in thirds)
    slope = _slope(_bucketed(judged)) * _PER_RUNS
    if name.endswith("_mib"):
        rise_max = MEMORY_SLOPE_MAX_MIB * 2 * width / _PER_RUNS  # the middles of the first and last third are two widths apart
        flat = slope <= MEMORY_SLOPE_MAX_MIB or third - first <= rise_max
    else:
        flat = slope <= 0 or third - first < COUNT_RISE_MAX
    return Verdict(name=name, flat=flat, thirds=(first, second, third), slope=slope)


def judge_all(series: Mapping[str, Sequence[Point]]) -> list[Verdict]:
    """The verdicts on all series, in their order."""
    return [judge(name, points) for name, points in series.items()]


def _third(runs: float, start: float, width: float) -> int:
    return min(2, int((runs - start) / width)) if width else 0


def _bucketed(points: Sequence[Point]) -> list[Point]:
    """At most 60 points: the medians of as many parts, so that the slope takes a bounded time."""
    size = -(-len(points) // _BUCKETS)
    parts = [points[at : at + size] for at in range(0, len(points), size)]
    return [(median(runs for runs, _ in part), median(value for _, value in part)) for part in parts]


def _slope(points: Sequence[Point]) -> float:
    """The median of the slopes between all pairs of points (Theil and Sen): a few wild readings do not move it."""
    slopes = [(v2 - v1) / (r2 - r1) for at, (r1, v1) in enumerate(points) for r2, v2 in points[at + 1 :] if r2 > r1]
    return median(slopes) if slopes else 0.0
