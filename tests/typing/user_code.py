# pyright: strict
"""Code as users write it, for the type checkers: test_user_code.py runs mypy and pyright on this file.

Each line that ends with the comment "error" must be reported by both, and no other line by either. Never executed.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from streamline_pool import Context, Event, Handler, HookResult, Run, StepDefaults, StepOptions, Streamline, Workflow, create_hook

app = Streamline("mongodb://localhost:27017/shop", database="shop")
orders = app.workflow("orders", defaults={"retries": 3, "timeout": timedelta(seconds=30)}, context=lambda input: {"item": input["item"]})


# --- steps by decorator ------------------------------------------------------------------------------------------------


@orders.step
def reserve(ctx: Context) -> dict[str, int]:
    shelf: str = ctx.context["shelf"]
    ctx.set("reserved", True)
    ctx.log("reserved", shelf=shelf)
    return {"boxes": len(shelf)}


def is_free(ctx: Context) -> bool:
    return bool(ctx.context["free"])


def is_large(ctx: Context, run: Run) -> bool:
    return ctx.attempt == 1 and len(run.steps) > 1


async def is_open(ctx: Context) -> bool:
    return "shop" in ctx.context


@orders.step("charge", retries=5, timeout=10, retry_delay=1.5, retry_backoff="linear", skip_if=is_free, condition=is_large)
async def charge(ctx: Context) -> str:
    return f"receipt for {ctx.idempotency_key}"


@orders.step(retries=5, retry_backoff=1.5, run_if=is_open)
def pack(ctx: Context) -> int:
    reserved: dict[str, int] = ctx.get_output("reserve")
    return reserved["boxes"]


@orders.step("approve")
def approve(ctx: Context) -> None:
    hook = create_hook(ctx, "Please approve", expires_in=timedelta(days=1))
    path: str = hook.path
    ctx.wait("Please approve", {"path": path}, timeout=86_400)


@orders.step
def legacy(ctx: Any) -> Any:
    return ctx.input


@orders.step
async def as_in_node(ctx: Context) -> None:
    await ctx.set("key", 1)
    await ctx.log("text", percent=50)
    await ctx.emit("order:paid", {"total": 1})
    await ctx.heartbeat()
    await ctx.checkpoint({"page": 1})


@orders.step
async def a_wait_narrows_types(ctx: Context) -> str:
    answer: str | None = ctx.get_output("ask")
    if answer is None:
        ctx.wait("Please approve")  # NoReturn; so `await` on it works, and pyright calls it unneeded
    return answer


@orders.step
def reads_the_context(ctx: Context) -> dict[str, Any]:
    whole: dict[str, Any] = ctx.context
    number: int = ctx.context.get("number", 5)
    copied = dict(ctx.context)
    copied["number"] = number
    return {**whole, **ctx.context.copy(), **copied}


@orders.step
def changes_the_context(ctx: Context) -> None:
    ctx.context["number"] = 5  # error
    del ctx.context["number"]  # error
    ctx.context.update(number=5)  # error
    ctx.context.setdefault("number", 5)  # error


def decorated_functions_stay_what_they_are(ctx: Context) -> None:
    boxes: dict[str, int] = reserve(ctx)
    packed: int = pack(ctx)
    wrong_result: str = reserve(ctx)  # error
    wrong_packed: str = pack(ctx)  # error
    reserve(5)  # error
    pack()  # error
    print(boxes, packed, wrong_result, wrong_packed)


async def so_do_coroutine_functions(ctx: Context) -> None:
    receipt: str = await charge(ctx)
    not_awaited: str = charge(ctx)  # error
    print(receipt, not_awaited)


# --- steps that cannot work --------------------------------------------------------------------------------------------


@orders.step  # error
def without_ctx() -> None: ...


@orders.step(retries=2)  # error
def two_arguments(ctx: Context, other: int) -> None:
    print(ctx, other)


@orders.step("wrong-context")  # error
async def another_context(ctx: str) -> None:
    print(ctx)


def bad_options(step: Workflow) -> None:
    step.step(retries="five")  # error
    step.step("a", retry=5)  # error
    step.step("a", retry_backoff="quadratic")  # error
    step.step("a", timeout="10 s")  # error
    step.step("a", skip_if=is_large)  # error
    step.step("a", condition=is_free)  # error
    step.step("a", run_if=True)  # error
    step.step(5)  # error


# --- steps by mapping --------------------------------------------------------------------------------------------------

FAST: StepDefaults = {"retries": 1, "timeout": 2}
PATIENT: StepOptions = {"retries": 20, "retry_delay": timedelta(minutes=1), "skip_if": is_free}

scraper = app.workflow("scraper", steps={"fetch": reserve, "parse": (charge, {"retries": 5}), "save": (pack, PATIENT)}, defaults=FAST)
lambdas = app.workflow("lambdas", steps={"one": lambda ctx: ctx.run_id, "two": (lambda ctx: ctx.attempt, {"timeout": 1.0})})

app.workflow("bad-handler", steps={"a": without_ctx})  # error
app.workflow("bad-value", steps={"a": "reserve"})  # error
app.workflow("bad-options", steps={"a": (reserve, {"retires": 5})})  # error
app.workflow("bad-defaults", defaults={"retries": "5"})  # error
app.workflow("bad-default", defaults={"skip_if": is_free})  # error


def add_steps(workflow: Workflow, handlers: dict[str, Handler], options: StepOptions) -> None:
    for step_id, handler in handlers.items():
        workflow.step(step_id, **options)(handler)


# --- starting and controlling runs -------------------------------------------------------------------------------------


def start_and_read() -> None:
    run: Run = orders.start({"item": "book"}, {"source": "web"}, priority=5, tags=["gift"], start_at=datetime.now(UTC), user_id="u1")
    runs: list[Run] = orders.start_many([{"item": "book"}, {"item": "pen"}], idempotency_keys=["a", "b"])
    found: Run | None = orders.get(run.id)
    ended: Run = orders.wait_for(run.id, timeout=timedelta(minutes=1), poll_interval=0.5)
    answered: HookResult = app.resume_hook("token", {"approved": True})
    woken: int = app.send_event("paid", {"order": 1}, run_id=run.id)
    names: list[str] = app.setup_indexes(tenant_field="context.tenantId", context_fields=["orderId"])
    removed: int = app.cleanup_old_runs(days=timedelta(days=30), dry_run=True)
    print(runs, found, ended.output, answered.run.status, woken, names, removed)

    not_optional: Run = orders.get(run.id)  # error
    number: int = orders.start()  # error
    orders.start(prioritty=5)  # error
    orders.start(priority="high")  # error
    orders.start({"item": "book"}, {"source": "web"}, "id")  # error
    orders.cancel(run.id, "why")  # error
    orders.rewind_to(run.id)  # error
    app.send_event("paid", run="id")  # error
    print(not_optional, number)


async def start_and_read_async() -> None:
    run: Run = await orders.start_async({"item": "book"}, priority=5, session=None)
    runs: list[Run] = await orders.start_many_async([1, 2], tags=("x",))
    found: Run | None = await orders.get_async(run.id)
    woken: int = await app.send_event_async("paid", run_id=run.id)
    await orders.shutdown_async(timeout=5)
    print(runs, found, woken)

    not_awaited: Run = orders.start_async()  # error
    await orders.start_async(prioritty=5)  # error
    print(not_awaited)


def subscribe() -> None:
    def on_completed(event: Event) -> None:
        print(event.name, event.run_id)

    app.events.on("workflow:completed", on_completed)
