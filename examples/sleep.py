"""A reminder after a while. The sleep is stored in the database, not kept in a process, so it survives every restart.

    python examples/sleep.py
    streamline-pool --app examples.sleep:app --embedded   # a pool that executes such runs

Uses the server in STREAMLINE_MONGODB_URI, or else a private one that ends with the program.
"""

from __future__ import annotations

from streamline_pool import Context, Streamline, embedded

__all__ = ["app", "main", "reminder"]

app = Streamline()
reminder = app.workflow("reminder")


@reminder.step
def welcome(ctx: Context) -> str:
    return f"welcome, {ctx.input['name']}"


@reminder.step
def let_time_pass(ctx: Context) -> None:
    ctx.sleep(ctx.input["seconds"])  # half a second here; 30 days cost no more


@reminder.step
def remind(ctx: Context) -> str:
    return f"{ctx.input['name']}, are you still there?"


def main() -> int:
    with embedded.serving(app):
        run = reminder.execute(reminder.start({"name": "Ann", "seconds": 0.5}).id)
        waits = run.step("let_time_pass").waiting_for
        assert waits is not None, "it sleeps"
        print(f"{run.step('welcome').output}; the run is {run.status} until {waits['resumeAt']:%H:%M:%S}")
        while not run.is_terminal:  # a pool would continue it by itself when it is due
            run = reminder.execute(run.id)
        print(f"the run is {run.status}: {run.output}")
        return 0 if run.status == "done" else 1


if __name__ == "__main__":
    raise SystemExit(main())
