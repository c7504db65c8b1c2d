"""Workflow and step declarations: checked when they are made, immutable once they are frozen.

Owns the limits on ids, options and shapes; a definition that exists is sound. Knows nothing of storage.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from .errors import StepNotFoundError, ValidationError
from .model import RetryPolicy, seconds

__all__ = [
    "MAIN",
    "Declaration",
    "Definition",
    "Handler",
    "StepDefinition",
    "check_defaults",
    "check_id",
    "check_queue",
    "check_version",
    "is_coroutine_function",
    "make_step",
    "make_steps",
    "queue_of",
    "retry_policy",
]

Handler = Callable[[Any], Any]
"""A step's function: takes `ctx`, is `def` or `async def`. What it returns is the step's output.

Users' handlers are typed more narrowly, by client/step_options.py, which knows `Context`.
"""

_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
_QUEUE = re.compile(r"[A-Za-z0-9_.:-]{1,100}")
_RETRIES_MAX = 20
MAIN = "main"
"""The id of the only step of a durable function; its `kind` in a stored run is the same word."""

_CONDITIONS = ("condition", "skip_if", "run_if")
_OPTIONS = ("retries", "timeout", "retry_delay", "retry_backoff")
_MAIN_OPTIONS = ("retries", "retry_delay", "retry_backoff")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDefinition:
    """One step: its handler and how it is attempted."""

    id: str
    handler: Handler
    is_async: bool  # an `async def`: runs on the worker's loop; otherwise on a thread
    retry: RetryPolicy
    timeout_s: float | None  # per attempt; None: no limit
    condition: Callable[[Any, Any], Any] | None = None  # (ctx, run) -> truthy: enter the step
    skip_if: Callable[[Any], Any] | None = None  # (ctx) -> truthy: skip the step
    run_if: Callable[[Any], Any] | None = None  # (ctx) -> truthy: enter the step

    @property
    def is_conditional(self) -> bool:
        """True if a condition decides whether the step is entered."""
        return not (self.condition is None and self.skip_if is None and self.run_if is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """A whole workflow. `index` maps a step id to its place; steps run in the order of `steps`."""

    workflow_id: str
    version: str
    queue: str  # where its runs go unless `start(queue=)` says otherwise
    steps: tuple[StepDefinition, ...]
    make_context: Callable[[Any], Any] | None  # input -> context; None: a mapping input is copied
    is_durable: bool = False  # a durable function: its one step is `MAIN`, and the calls that it makes follow that step in a run
    index: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        check_id(self.workflow_id, "workflow id")
        check_queue(self.queue)
        check_version(self.workflow_id, self.version)
        if not self.steps:
            how = f"add at least one with @{self.workflow_id}.step or steps=, or a durable function with @{self.workflow_id}.main"
            raise ValidationError(f"workflow {self.workflow_id}: it has no steps; {how}")
        object.__setattr__(self, "index", {step.id: place for place, step in enumerate(self.steps)})

    @property
    def lane(self) -> str:
        """The lane of runs that stay on the workflow's own queue; see `lane_of`."""
        return self.lane_of(self.queue)

    def lane_of(self, queue: str) -> str:
        """What a worker must have to claim a run: queue, workflow and version in one value.

        Neither a queue nor a workflow id can hold a slash, so the three parts stay apart.
        """
        return f"{queue}/{self.workflow_id}/{self.version}"

    def step_at(self, place: int) -> StepDefinition:
        """The step at that place of a run. A durable function's calls belong to its one step."""
        return self.steps[0 if self.is_durable else place]

    def step(self, step_id: str) -> StepDefinition:
        """The step with that id. StepNotFoundError names the steps there are."""
        place = self.index.get(step_id)
        if place is None:
            known = ", ".join(self.index)
            raise StepNotFoundError(f"workflow {self.workflow_id}: no step {step_id!r}; its steps are {known}", step_id=step_id)
        return self.steps[place]


class Declaration:
    """A workflow while its steps are still being added. `freeze` makes the `Definition`, once.

    Every mistake is a ValidationError at the call that makes it. A declaration with `steps` is frozen from the start.
    """

    def __init__(
        self,
        workflow_id: str,
        *,
        version: str = "1.0.0",
        queue: str = "default",
        make_context: Callable[[Any], Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
        steps: Mapping[str, Any] | None = None,
    ) -> None:
        if make_context is not None and not callable(make_context):
            raise ValidationError(f"workflow {workflow_id}: context= must be a function of the input, not {make_context!r}")
        if steps is not None and not isinstance(steps, Mapping):
            raise ValidationError(f"workflow {workflow_id}: steps= must map step ids to handlers, not {type(steps)}")
        self.workflow_id = check_id(workflow_id, "workflow id")
        self._defaults = dict(check_defaults(workflow_id, {} if defaults is None else defaults))
        self._steps = list(make_steps(workflow_id, steps or {}, self._defaults))
        self.version = check_version(workflow_id, version)
        self.queue = check_queue(queue)
        self._make_context = make_context
        self._definition: Definition | None = None
        self._is_durable = False
        if steps is not None:
            self.freeze()

    @property
    def step_ids(self) -> tuple[str, ...]:
        """The ids of the steps so far, in order."""
        return tuple(step.id for step in self._steps)

    def add(self, step_id: Any, handler: Handler, options: Mapping[str, Any]) -> None:
        """Add a step behind the others. `options` override the defaults."""
        if self._is_durable:
            raise ValidationError(f"workflow {self.workflow_id}: it has a main, and takes no step {step_id!r}; call ctx.step in main")
        if self._definition is not None:
            raise ValidationError(
                f"workflow {self.workflow_id}: step {step_id!r} comes too late; steps are frozen by the first start or by a pool"
            )
        step = make_step(self.workflow_id, step_id, handler, {**self._defaults, **options})
        if step.id in self.step_ids:
            raise ValidationError(f"workflow {self.workflow_id}: two steps have the id {step.id!r}; give one of them another")
        self._steps.append(step)

    def set_main(self, handler: Handler, options: Mapping[str, Any]) -> None:
        """Make the workflow a durable function. `options`: retries (1 if not given), retry_delay, retry_backoff."""
        if self._is_durable:
            raise ValidationError(f"workflow {self.workflow_id}: it has a main already")
        if self._steps:
            known = ", ".join(self.step_ids)
            raise ValidationError(f"workflow {self.workflow_id}: it has steps ({known}) and can have no main; keep one of the two")
        for name in options:
            if name not in _MAIN_OPTIONS:
                raise ValidationError(f"main of {self.workflow_id}: unknown option {name!r}; the options are {', '.join(_MAIN_OPTIONS)}")
        step = make_step(self.workflow_id, MAIN, handler, {"retries": 1, **options})
        self._steps, self._is_durable = [step], True
        self.freeze()

    def freeze(self) -> Definition:
        """The definition. From now on no step can be added. Raises ValidationError, and freezes nothing, without steps."""
        if self._definition is None:
            self._definition = Definition(
                workflow_id=self.workflow_id,
                version=self.version,
                queue=self.queue,
                steps=tuple(self._steps),
                make_context=self._make_context,
                is_durable=self._is_durable,
            )
        return self._definition


def make_steps(workflow_id: str, steps: Mapping[str, Any], defaults: Mapping[str, Any]) -> Sequence[StepDefinition]:
    """Steps from a mapping of id to handler or `(handler, options)`, in its order. Raises ValidationError."""
    made = []
    for step_id, value in steps.items():
        handler, options = value if isinstance(value, tuple) and len(value) == 2 else (value, {})
        if not isinstance(options, Mapping):
            raise ValidationError(f"step {workflow_id}.{step_id}: the options beside a handler must be a mapping, not {type(options)}")
        made.append(make_step(workflow_id, step_id, handler, {**defaults, **options}))
    return made


def make_step(workflow_id: str, step_id: str, handler: object, options: Mapping[str, Any]) -> StepDefinition:
    """A checked step. `options` are the step options of the public API. Raises ValidationError, also for any other name."""
    where = f"step {workflow_id}.{check_id(step_id, f'workflow {workflow_id}: step id')}"
    for name in options:
        if name not in _OPTIONS and name not in _CONDITIONS:
            raise ValidationError(f"{where}: unknown option {name!r}; the options are {', '.join(_OPTIONS + _CONDITIONS)}")
    if not callable(handler):
        raise ValidationError(f"{where}: the handler must be a function of one argument (ctx), not {handler!r}")
    _check_takes_one(where, handler)
    for name in _CONDITIONS:
        if options.get(name) is not None and not callable(options[name]):
            raise ValidationError(f"{where}: {name} must be a function, not {options[name]!r}")
    timeout = options.get("timeout")
    return StepDefinition(
        id=step_id,
        handler=handler,
        is_async=is_coroutine_function(handler),
        retry=retry_policy(where, options),
        timeout_s=None if timeout is None else seconds(timeout, f"{where}: timeout"),
        **{name: options.get(name) for name in _CONDITIONS},
    )


def retry_policy(where: str, options: Mapping[str, Any]) -> RetryPolicy:
    """How often and after which delays is attempted what has these step options. Raises ValidationError."""
    retries = options.get("retries", 3)
    if isinstance(retries, bool) or not isinstance(retries, int) or not 1 <= retries <= _RETRIES_MAX:
        raise ValidationError(f"{where}: retries counts attempts and is a whole number from 1 to {_RETRIES_MAX}, not {retries!r}")
    backoff = options.get("retry_backoff", "exponential")
    named = backoff in ("exponential", "linear", "fixed") if isinstance(backoff, str) else False
    if not named and (isinstance(backoff, (bool, str)) or not isinstance(backoff, (int, float)) or not 0 < backoff < float("inf")):
        raise ValidationError(f'{where}: retry_backoff is "exponential", "linear", "fixed" or a multiplier above 0, not {backoff!r}')
    delay: float | timedelta = options.get("retry_delay", 1.0)
    return RetryPolicy(attempts_max=retries, delay_s=seconds(delay, f"{where}: retry_delay", zero_ok=True), backoff=backoff)


def _check_takes_one(where: str, handler: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(handler)
    except (TypeError, ValueError):
        return  # some built-ins have no signature to check
    try:
        signature.bind(object())
    except TypeError:
        raise ValidationError(f"{where}: the handler is called with one argument, ctx; its signature is {signature}") from None


def is_coroutine_function(handler: Callable[..., Any]) -> bool:
    """Whether a call of it gives a coroutine, without calling it. False for a `def` or lambda that returns one."""
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(handler, "__call__", None))  # noqa: B004 -- objects with an async __call__


# --- checks of single values -------------------------------------------------------------------------------------------


def check_id(value: object, what: str) -> str:
    """`value` if it matches `[A-Za-z0-9_-]{1,100}`; a ValidationError naming `what` otherwise."""
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise ValidationError(f"{what} {value!r}: an id is 1 to 100 of the characters A-Z a-z 0-9 _ -", value=repr(value))
    return value


def queue_of(lane: str) -> str:
    """The queue of a lane; see `Definition.lane_of`."""
    return lane.partition("/")[0]


def check_queue(value: object) -> str:
    """`value` if it can name a queue; a ValidationError otherwise."""
    if not isinstance(value, str) or not _QUEUE.fullmatch(value):
        raise ValidationError(f"queue {value!r}: a queue is 1 to 100 of the characters A-Z a-z 0-9 _ . : -", value=repr(value))
    return value


def check_version(workflow_id: str, version: object) -> str:
    """`version` if it is text of 1 to 100 characters; a ValidationError otherwise."""
    if not isinstance(version, str) or not 1 <= len(version) <= 100:
        raise ValidationError(f"workflow {workflow_id}: version {version!r} is not text of 1 to 100 characters")
    return version


def check_defaults(workflow_id: str, defaults: object) -> Mapping[str, Any]:
    """`defaults` if they are step options; a ValidationError otherwise. Conditions belong to single steps."""
    if not isinstance(defaults, Mapping):
        raise ValidationError(f"workflow {workflow_id}: defaults= must map step options to values, not {type(defaults)}")
    for name in _CONDITIONS:
        if name in defaults:
            raise ValidationError(f"workflow {workflow_id}: {name} cannot be a default; give it to the steps that need it")
    make_step(workflow_id, "defaults", lambda _ctx: None, defaults)  # checked here, not at the first step
    return defaults
