"""A newsletter, from collecting to sending: many sources at once, a person's approval, a time to send, each reader once.

    python examples/newsletter.py
    streamline-pool --app examples.newsletter:app --embedded   # a pool that executes such runs

Uses the server in STREAMLINE_MONGODB_URI, or else a private one that ends with the program.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from streamline_pool import Context, Streamline, embedded, execute_parallel_sync, is_timeout

__all__ = ["app", "main", "newsletter"]

SOURCES = {"weather": "sun on Friday", "sports": "we won", "science": "water found"}

app = Streamline()
newsletter = app.workflow("newsletter", defaults={"retries": 5, "retry_delay": 0.1})


def read(source: str) -> str:
    """Stands for a request to some service."""
    return f"{source}: {SOURCES[source]}"


@newsletter.step
def collect(ctx: Context) -> list[str]:
    return list(execute_parallel_sync([partial(read, source) for source in SOURCES], concurrency=2, timeout=10))


@newsletter.step
def draft(ctx: Context) -> str:
    return "\n- ".join(["Dear readers,", *ctx.get_output("collect")])


@newsletter.step
def approval(ctx: Context) -> None:
    ctx.wait("read the draft", {"text": ctx.get_output("draft")}, timeout=2 * 86400)


def is_approved(ctx: Context) -> bool:
    answer = ctx.get_output("approval")
    return not is_timeout(answer) and bool(answer["approved"])


@newsletter.step(run_if=is_approved)
def until_it_is_time(ctx: Context) -> None:
    ctx.sleep(ctx.input["send_in_s"])


@newsletter.step(run_if=is_approved)
def send(ctx: Context) -> list[str]:
    sent: list[str] = ctx.get_checkpoint() or []
    for reader in ctx.input["readers"][len(sent) :]:
        deliver(reader, ctx.get_output("draft"), key=f"{ctx.idempotency_key}:{reader}")
        sent.append(reader)
        ctx.checkpoint(sent)  # after a crash, the next attempt continues with the next reader
    return sent


OUTBOX: dict[str, str] = {}


def deliver(reader: str, text: str, *, key: str) -> None:
    """Stands for a mail service with idempotency keys: it sends one mail per key."""
    OUTBOX.setdefault(key, f"to {reader}: {text}")


def main() -> int:
    with embedded.serving(app):
        readers = [f"reader-{number}@example.org" for number in range(1, 4)]
        run = newsletter.execute(newsletter.start({"readers": readers, "send_in_s": 0.3}, tags=["weekly"]).id)
        asked: dict[str, Any] = dict(run.step("approval").waiting_for or {})
        print(f"the run is {run.status}; a person is asked to {asked['reason']}:\n{asked['data']['text']}")
        newsletter.resume(run.id, {"approved": True})
        while not run.is_terminal:  # a pool would continue it by itself when it is due
            run = newsletter.execute(run.id)
        print(f"the run is {run.status}: sent to {', '.join(run.output)}")
        return 0 if run.status == "done" and len(OUTBOX) == len(readers) else 1


if __name__ == "__main__":
    raise SystemExit(main())
