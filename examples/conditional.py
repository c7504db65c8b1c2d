"""Steps that run under a condition. The decision is stored with the step, so a crash or a retry does not change it.

    python examples/conditional.py
    streamline-pool --app examples.conditional:app --embedded   # a pool that executes such runs

Uses the server in STREAMLINE_MONGODB_URI, or else a private one that ends with the program.
"""

from __future__ import annotations

from streamline_pool import Context, Run, Streamline, embedded

__all__ = ["app", "main", "order"]

app = Streamline()
order = app.workflow("order")


@order.step
def price(ctx: Context) -> int:
    return int(ctx.input["items"]) * 30


@order.step(skip_if=lambda ctx: ctx.get_output("price") < 100)
def check_for_fraud(ctx: Context) -> str:
    return "looks honest"


@order.step(run_if=lambda ctx: ctx.input["member"])
def discount(ctx: Context) -> None:
    ctx.set("rebate", 5)


def was_checked(ctx: Context, run: Run) -> bool:
    """A condition gets the whole run, with the states of all steps."""
    return run.step("check_for_fraud").status == "done"


@order.step(condition=was_checked)
def thank(ctx: Context) -> str:
    return "a big order: thank you"


@order.step
def charge(ctx: Context) -> int:
    return int(ctx.get_output("price") - ctx.context.get("rebate", 0))


def main() -> int:
    with embedded.serving(app):
        runs = [order.start({"items": items, "member": member}) for items, member in ((1, True), (9, False))]
        for number, started in enumerate(runs, 1):
            run = order.execute(started.id)
            steps = ", ".join(f"{step.step_id} {step.status}" for step in run.steps)
            print(f"run {number} is {run.status}, charged {run.output}: {steps}")
            if run.status != "done":
                return 1
        return 0


if __name__ == "__main__":
    raise SystemExit(main())
