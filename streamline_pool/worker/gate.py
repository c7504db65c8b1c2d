"""What the circuit breaker allows a worker to claim. Owns the type alone: the breaker decides, the worker applies it."""

from __future__ import annotations

from typing import Literal

__all__ = ["GateState"]

GateState = Literal["open", "closed", "one"]
"""open: claim freely | closed: claim nothing | one: claim one batch, to see whether the database answers."""
