"""The steward's start: reach the database, and make there what the engine needs.

Owns which failures end the pool at its start, and which are waited for.
"""

from __future__ import annotations

import logging
from typing import Any

from streamline_pool.domain.errors import StoreUnavailableError, WorkflowError
from streamline_pool.protocol import run_lifecycle, signals
from streamline_pool.supervisor.ipc.messages import STORE_UNREACHABLE_EXIT, BootFailed
from streamline_pool.supervisor.steward.duty import DutyTools

__all__ = ["connect"]

log = logging.getLogger("streamline_pool")


async def connect(tools: DutyTools) -> BootFailed | None:
    """Reach the database, however long that takes once the pool has run; a returned `BootFailed` ends the pool."""
    failures = 0
    while True:
        try:
            facts = await _prepare(tools)
        except StoreUnavailableError as exc:
            if tools.boot.first:
                return BootFailed(exit_code=STORE_UNREACHABLE_EXIT, message=exc.message)
            failures += 1
            await tools.pause(failures)
            continue
        except WorkflowError as exc:
            return BootFailed(exit_code=2, message=exc.message)
        log.info("server", extra={key: facts[key] for key in ("version", "topology", "database")})
        if facts["topology"] == "standalone":
            log.warning("standalone_server", extra={"advice": "no replica set: a crash of the server can lose acknowledged work"})
        return None


async def _prepare(tools: DutyTools) -> dict[str, Any]:
    store = tools.store
    await store.run(run_lifecycle.server_info())
    facts = await store.facts()
    await store.ensure()
    # A tail of an empty capped collection ends at once, again and again; one signal prevents that.
    await store.run(signals.send_signal("host", store.now(), host=tools.boot.host_id))
    return facts
