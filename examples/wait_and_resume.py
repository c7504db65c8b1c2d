"""A person decides: the run waits, without a worker, until a person answers or the timeout passes.

    python examples/wait_and_resume.py
    streamline-pool --app examples.wait_and_resume:app --embedded   # a pool that executes such runs

Uses the server in STREAMLINE_MONGODB_URI, or else a private one that ends with the program.
"""

from __future__ import annotations

from streamline_pool import Context, Streamline, embedded, is_timeout

__all__ = ["app", "expense", "main"]

app = Streamline()
expense = app.workflow("expense")


@expense.step
def ask(ctx: Context) -> None:
    # Ends this function. The answer, perhaps days later, becomes the output of this step.
    ctx.wait("approve the expense", {"amount": ctx.input["amount"]}, timeout=ctx.input["patience_s"])


@expense.step
def book(ctx: Context) -> str:
    answer = ctx.get_output("ask")
    if is_timeout(answer):
        return "no answer came; the expense is refused"
    return f"booked, approved by {answer['by']}" if answer["approved"] else f"refused by {answer['by']}"


def main() -> int:
    with embedded.serving(app):
        run = expense.execute(expense.start({"amount": 120, "patience_s": 3600}).id)
        waits = run.step("ask").waiting_for
        assert waits is not None, "it has asked"
        print(f"run 1 is {run.status}: a person is asked to {waits['reason']}, {waits['data']}")
        expense.resume(run.id, {"approved": True, "by": "Ann"})  # from any program, on any host
        answered = expense.execute(run.id)
        print(f"run 1 is {answered.status}: {answered.output}")

        run = expense.start({"amount": 9, "patience_s": 0.2})
        while not run.is_terminal:  # a pool would continue it by itself when it is due
            run = expense.execute(run.id)
        print(f"run 2 is {run.status}: {run.output}")
        return 0 if answered.status == run.status == "done" else 1


if __name__ == "__main__":
    raise SystemExit(main())
