"""An order as one function: a loop over its boxes, an approval in the middle, a payment that is tried again, and a retry after a failure.

    python examples/order_as_code.py
    streamline-pool --app examples.order_as_code:app --embedded   # a pool that executes such runs

A box cannot be packed at first, so the order fails there. It is retried, and goes on at that box: no other box is packed twice.
Uses the server in STREAMLINE_MONGODB_URI, or else a private one that ends with the program.
"""

from __future__ import annotations

from typing import Any

from streamline_pool import DurableContext, Streamline, current_step, embedded, is_timeout

__all__ = ["app", "main", "order"]

app = Streamline()
order = app.workflow("order-as-code")
packed: list[str] = []  # what the warehouse has done; another system, for which this list stands
broken = ["lamp-2"]  # boxes that cannot be packed at first


async def reserve(item: str, count: int) -> list[str]:
    return [f"{item}-{number + 1}" for number in range(count)]


def pack(box: str) -> str:
    if box in broken:
        broken.remove(box)
        raise ValueError(f"{box} is broken")
    packed.append(box)
    return f"{box} is packed"


def pay(amount: int) -> str:
    step = current_step()
    if step.attempt == 1:
        raise ConnectionError("the bank does not answer")
    return f"{amount} paid, reference {step.idempotency_key.partition(':')[2]}"  # the same key in every attempt


@order.main
async def run_order(ctx: DurableContext) -> dict[str, Any]:
    boxes = await ctx.step("reserve", reserve, ctx.input["item"], ctx.input["count"])
    for box in boxes:
        await ctx.step(f"pack {box}", pack, box, retries=1)
    answer = await ctx.wait("approve the order", {"boxes": len(boxes)}, timeout=86_400)
    if is_timeout(answer) or not answer["approved"]:
        return {"boxes": boxes, "paid": None}
    return {"boxes": boxes, "paid": await ctx.step("pay", pay, 20 * len(boxes), retry_delay=0.1)}


def main() -> int:
    with embedded.serving(app):
        run = order.execute(order.start({"item": "lamp", "count": 3}).id)
        error = run.error or {}
        print(f"run 1 is {run.status} at {error.get('stepId')}: {packed} are packed")
        order.retry(run.id)  # the call that failed has fresh attempts; what is stored is not done again
        run = order.execute(run.id)
        print(f"run 1 is {run.status} at {run.current_step_id}: {packed} are packed, each once")
        order.resume(run.id, {"approved": True})
        while not run.is_terminal:  # a pool would continue it by itself when it is due
            run = order.execute(run.id)
        print(f"run 1 is {run.status}: {run.output}")
        return 0 if run.status == "done" and packed == ["lamp-1", "lamp-2", "lamp-3"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
