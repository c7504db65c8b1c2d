"""How long to wait before something that failed is tried again. Owns the one formula; every caller names its own bounds."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Backoff", "jittered"]

_DOUBLINGS_MAX = 30  # 2.0**1100, after hours of failures, is no float


class Backoff(NamedTuple):
    """Exponential back-off with jitter: the pause doubles with each failure in a row, up to a ceiling."""

    base_s: float  # the pause after the first failure is up to twice this
    ceiling_s: float

    def delay_s(self, failures: int, chance: float) -> float:
        """Seconds to pause after so many failures in a row (at least 1); `chance` is uniform in [0, 1).

        Half of the pause is random ("equal jitter"), so that processes that failed together do not return together.
        """
        return jittered(min(self.base_s * 2.0 ** min(failures, _DOUBLINGS_MAX), self.ceiling_s), chance)


def jittered(pause_s: float, chance: float) -> float:
    """Between half of `pause_s` and all of it; `chance` is uniform in [0, 1)."""
    return pause_s * (0.5 + chance / 2)
