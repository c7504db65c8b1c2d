"""All faults, and what they need of the machine. Owns the list and the reasons why a fault is left out."""

from __future__ import annotations

from collections.abc import Iterable

from streamline_pool.chaos.stage import Fault

from . import clock, database, network, processes, resources

__all__ = ["CATALOGUE", "chosen", "left_out"]

CATALOGUE: tuple[Fault, ...] = (
    *processes.FAULTS,
    *network.FAULTS,
    *database.FAULTS,
    *clock.FAULTS,
    *resources.FAULTS,
)


def chosen(names: Iterable[str] | None) -> list[Fault]:
    """The faults of those names, by default all. KeyError with the first name that there is not."""
    by_name = {fault.name: fault for fault in CATALOGUE}
    return list(CATALOGUE) if names is None else [by_name[name] for name in names]


def left_out(fault: Fault, missing: dict[str, str]) -> str:
    """Why the fault cannot happen here; "" if it can. `missing`: what this machine and database lack, with the words for it."""
    return "; ".join(missing[need] for need in sorted(fault.needs) if need in missing)
