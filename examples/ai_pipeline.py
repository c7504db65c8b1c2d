"""A model writes a text. Checks score it. A person reviews it if a score is low.

The model is `FakeModel`, so that the example runs anywhere. Replace it by the client of your provider.

    python examples/ai_pipeline.py
    streamline-pool --app examples.ai_pipeline:app --embedded   # a pool that executes such runs

Uses the server in STREAMLINE_MONGODB_URI, or else a private one that ends with the program.
"""

from __future__ import annotations

import asyncio
from functools import partial

from streamline_pool import Context, NonRetriableError, Run, Streamline, embedded, execute_parallel

__all__ = ["FakeModel", "app", "article", "main"]


class ModelOverloadedError(Exception):
    """The provider is busy; another attempt may succeed."""


class FakeModel:
    """Stands for a language model. Every third request fails because it is overloaded."""

    def __init__(self) -> None:
        self.requests = 0

    async def complete(self, prompt: str) -> str:
        """A text about the prompt, after a moment."""
        self.requests += 1
        await asyncio.sleep(0.01)
        if self.requests % 3 == 0:
            raise ModelOverloadedError("come back later")
        return f"[{prompt}] Much has been said about it."

    async def score(self, aspect: str, text: str) -> float:
        """How good a text is in one aspect, from 0 to 1."""
        await asyncio.sleep(0.01)
        return 0.9 if aspect != "facts" else 0.4


model = FakeModel()
app = Streamline()
article = app.workflow("article", defaults={"retries": 5, "retry_delay": 0.05, "timeout": 60})


@article.step
async def outline(ctx: Context) -> list[str]:
    topic = str(ctx.input["topic"]).strip()
    if not topic:
        raise NonRetriableError("a topic is needed")  # another attempt would fail, too
    return [f"{topic}: {part}" for part in ("beginnings", "today", "outlook")]


@article.step
async def write(ctx: Context) -> str:
    parts: list[str] = ctx.get_checkpoint() or []
    for heading in ctx.get_output("outline")[len(parts) :]:
        parts.append(await model.complete(heading))
        ctx.checkpoint(parts)  # a later attempt does not request (and pay) these parts again
    return "\n".join(parts)


@article.step
async def check(ctx: Context) -> dict[str, float]:
    aspects = ["style", "facts", "tone"]
    scores = await execute_parallel([partial(model.score, aspect, ctx.get_output("write")) for aspect in aspects], timeout=30)
    return dict(zip(aspects, scores, strict=True))


def is_doubtful(ctx: Context, run: Run) -> bool:
    return bool(min(run.step("check").output.values()) < 0.5)


@article.step(condition=is_doubtful)
async def review(ctx: Context) -> None:
    ctx.wait("check the article", {"scores": ctx.get_output("check")})


@article.step
async def publish(ctx: Context) -> str:
    reviewed = ctx.get_output("review")
    return f"published {len(ctx.get_output('write').splitlines())} paragraphs" + (f", reviewed by {reviewed['by']}" if reviewed else "")


def main() -> int:
    with embedded.serving(app):
        run = article.start({"topic": "bridges"})
        while run.step("review").status != "waiting":  # a pool would make the next attempts by itself
            run = article.execute(run.id)
        print(
            f"the run is {run.status} for a review; writing took {run.step('write').attempts} attempts, scores {run.step('check').output}"
        )
        article.resume(run.id, {"by": "Ann"})
        run = article.execute(run.id)
        print(f"the run is {run.status}: {run.output}; the model was asked {model.requests} times for 3 paragraphs")
        return 0 if run.status == "done" else 1


if __name__ == "__main__":
    raise SystemExit(main())
