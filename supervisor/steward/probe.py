"""Duty: after a failed operation, and while the circuit is not closed, try an operation that costs nothing.

Owns the probe alone. The supervisor's breaker (pool/circuit_breaker.py) decides what a result means.
"""

from __future__ import annotations

import asyncio

from streamline_pool.domain.backoff import jittered
from streamline_pool.domain.errors import WorkflowError
from streamline_pool.protocol import run_lifecycle
from streamline_pool.supervisor.ipc.messages import CircuitState, Probe
from streamline_pool.supervisor.steward.duty import DutyTools

__all__ = ["Prober"]

PROBE_TIMEOUT_S = 2.0  # a guess: a database that takes longer for a ping is no database to claim from
PROBE_PAUSE_S = 0.7  # half a second on average


class Prober:
    """Sleeps until a duty doubts the database, then probes until the database answers and the circuit is closed."""

    def __init__(self, tools: DutyTools) -> None:
        self._tools = tools
        self._circuit: CircuitState = "closed"

    def on_circuit(self, state: CircuitState) -> None:
        """The supervisor's breaker changed."""
        self._circuit = state
        if state != "closed":
            self._tools.doubtful.set()
        if state != "half-open":
            self._tools.publish(f"scheduler:circuit-{state}")

    async def run(self) -> None:
        while True:
            await self._tools.doubtful.wait()
            self._tools.doubtful.clear()
            while not (await self._probe() and self._circuit == "closed"):
                await asyncio.sleep(jittered(PROBE_PAUSE_S, self._tools.env.random()))

    async def _probe(self) -> bool:
        try:
            await self._tools.run(run_lifecycle.server_info(), PROBE_TIMEOUT_S)
        except WorkflowError as exc:
            self._tools.send_latest(Probe(ok=False, error=exc.message))
            return False
        self._tools.send_latest(Probe(ok=True))
        return True
