"""The shortest useful workflow: two steps. The second uses the output of the first.

    python examples/hello_world.py                              # one run, executed in this process
    streamline-pool --app examples.hello_world:app --embedded   # a pool that executes such runs

Uses the server in STREAMLINE_MONGODB_URI, or else a private one that ends with the program.
"""

from __future__ import annotations

from streamline_pool import Context, Streamline, embedded

__all__ = ["app", "hello", "main"]

app = Streamline()
hello = app.workflow("hello")


@hello.step
def compose(ctx: Context) -> str:
    return f"Hello, {ctx.input['name']}!"


@hello.step
async def measure(ctx: Context) -> dict[str, object]:
    greeting = ctx.get_output("compose")
    return {"greeting": greeting, "characters": len(greeting)}


def main() -> int:
    with embedded.serving(app):
        run = hello.start({"name": "world"})  # stored: from now on, any pool can claim it
        run = hello.execute(run.id)  # or this process executes it
        print(f"run {run.id} is {run.status}: {run.output}")
        return 0 if run.status == "done" else 1


if __name__ == "__main__":
    raise SystemExit(main())
