"""Several tasks at once in a step: it asks six suppliers for a price, three at a time. Two of them fail.

    python examples/parallel.py                             # one run, executed in this process
    streamline-pool --app examples.parallel:app --embedded  # a pool that executes such runs

The suppliers are invented: each answers after a while, fails, or hangs. Uses the server in
STREAMLINE_MONGODB_URI, or else a private one that ends with the program.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from functools import partial
from typing import Any

from streamline_pool import Context, Settings, Streamline, embedded, execute_parallel, execute_parallel_sync

__all__ = ["app", "main", "purchase"]

SUPPLIERS = {"alder": 31.0, "birch": 29.5, "cedar": 30.0, "dogwood": None, "elm": "hangs", "fir": 33.0}
CARRIERS = {"by land": 0.3, "by air": 0.05}  # seconds until they answer

app = Streamline()
purchase = app.workflow("purchase")


@purchase.step
async def ask(ctx: Context) -> dict[str, Any]:
    """Asks all suppliers, at most three at once, with half a second for each. A supplier that fails makes no offer."""
    settled = await execute_parallel([partial(offer_of, name) for name in SUPPLIERS], mode="all_settled", concurrency=3, timeout=0.5)
    offers = {name: one.value for name, one in zip(SUPPLIERS, settled, strict=True) if one.ok}
    return {"offers": offers, "failed": {name: repr(one.error) for name, one in zip(SUPPLIERS, settled, strict=True) if not one.ok}}


@purchase.step
def ship(ctx: Context) -> dict[str, Any]:
    """A `def` handler. The carrier that answers first gets the order. Blocking calls are fine: they run on threads."""
    offers = ctx.get_output("ask")["offers"]
    supplier = min(offers, key=offers.get)
    carrier = execute_parallel_sync([partial(call_carrier, name) for name in CARRIERS], mode="race")
    return {"supplier": supplier, "price": offers[supplier], "carrier": carrier}


async def offer_of(name: str) -> float:
    answer = SUPPLIERS[name]
    await asyncio.sleep(60 if answer == "hangs" else 0.05)
    if not isinstance(answer, float):
        raise ConnectionError(f"{name} does not answer")
    return answer


def call_carrier(name: str) -> str:
    threading.Event().wait(CARRIERS[name])  # a blocking call of some library
    return name


def main() -> int:
    with contextlib.ExitStack() as stack:
        if not os.environ.get("STREAMLINE_MONGODB_URI"):
            server = stack.enter_context(embedded.start(None))
            app.configure(Settings(mongodb_uri=server.uri))
        stack.enter_context(app)
        run = purchase.execute(purchase.start().id)
        asked = run.step("ask")
        print(f"asked {len(SUPPLIERS)} suppliers in {asked.duration:.1f} s; {len(asked.output['offers'])} made an offer")
        for name, error in asked.output["failed"].items():
            print(f"  {name}: {error}")
        print(f"run {run.id} is {run.status}: {run.output}")
        return 0 if run.status == "done" else 1


if __name__ == "__main__":
    raise SystemExit(main())
