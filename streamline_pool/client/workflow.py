"""A workflow as its users hold it: declare steps, start runs, look at them, act on them from outside.

Owns the client's procedures, each written once as a generator of operations and driven by PyMongo's synchronous or
asyncio API (store.py); `x` and `x_async` are twins of one procedure.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar, cast, overload

from streamline_pool.domain.definition import Definition, Handler, StepDefinition, check_id, check_queue, check_version, make_step
from streamline_pool.domain.document import RunDocument
from streamline_pool.domain.errors import InvalidStateError, StoreUnavailableError, ValidationError, WorkflowNotFoundError
from streamline_pool.domain.model import TERMINAL, Run, RunStatus, seconds
from streamline_pool.protocol import run_lifecycle, signals
from streamline_pool.protocol.codec import check_payload, check_text
from streamline_pool.protocol.run_document import SLOTS, as_stored, check_run_id, make_context, new_run, parse_run
from streamline_pool.storage.procedures import AwaitSignal, Procedure

from .run_control import cancelling_run, getting_run, making_run, pausing_run, reading_run, resuming_run, rewinding_run

if TYPE_CHECKING:
    from .app import Streamline

__all__ = ["Workflow", "sync_and_async"]

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound="Driven")

_DUPLICATE_KEY = 11000
_INSERT_MAX = 1_000  # runs in one command; measured: no gain beyond
_INSERT_BYTES_MAX = 8 * 1024 * 1024
_DELAY_MAX_S = 100 * 365 * 86400.0
_SLOW_INSERT_S = 0.2  # well within what a worker waits for a run that was announced
_COMMIT_GUESS_S = 0.3  # when a run that was started in a transaction is looked for; the sweep finds it if that was too early


class Driven(Protocol):
    """Something whose procedures can be driven both ways."""

    def _drive(self, procedure: Procedure[T], session: Any) -> T: ...

    async def _drive_async(self, procedure: Procedure[T], session: Any) -> T: ...


def sync_and_async(
    procedure: Callable[Concatenate[S, P], Procedure[T]],
) -> tuple[Callable[Concatenate[S, P], T], Callable[Concatenate[S, P], Awaitable[T]]]:
    """The synchronous and the asyncio method of one procedure."""

    @functools.wraps(procedure)
    def call(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._drive(procedure(self, *args, **kwargs), kwargs.get("session"))

    @functools.wraps(procedure)
    async def call_async(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._drive_async(procedure(self, *args, **kwargs), kwargs.get("session"))

    name = procedure.__name__.removeprefix("_proc_")
    # Also the procedure's: Python names it to callers who misspell an argument.
    procedure.__name__, procedure.__qualname__ = name, procedure.__qualname__.replace("_proc_", "")
    for method, public in ((call, name), (call_async, f"{name}_async")):
        method.__name__, method.__qualname__ = public, procedure.__qualname__.replace(name, public)
    return cast("tuple[Callable[Concatenate[S, P], T], Callable[Concatenate[S, P], Awaitable[T]]]", (call, call_async))


class Workflow:
    """A named sequence of steps. Made by `app.workflow(...)`; frozen by the first `start` or by a pool."""

    def __init__(
        self,
        app: Streamline,
        workflow_id: str,
        *,
        version: str,
        queue: str,
        defaults: Mapping[str, Any],
        make_context: Callable[[Any], Any] | None,
        steps: Sequence[StepDefinition],
    ) -> None:
        self.app = app
        self.id = check_id(workflow_id, "workflow id")
        self.version = check_version(workflow_id, version)
        self.queue = check_queue(queue)
        self._defaults = dict(defaults)
        self._make_context = make_context
        self._steps: list[StepDefinition] = list(steps)
        self._definition: Definition | None = None

    def __repr__(self) -> str:
        return f"<Workflow {self.id} {self.version}: {', '.join(step.id for step in self._steps)}>"

    @property
    def steps(self) -> tuple[str, ...]:
        """The step ids, in order."""
        return tuple(step.id for step in self._steps)

    @property
    def definition(self) -> Definition:
        """The frozen definition. No step can be added once it has been asked for; ValidationError if there is none."""
        if self._definition is None:
            self._definition = Definition(
                workflow_id=self.id, version=self.version, queue=self.queue, steps=tuple(self._steps), make_context=self._make_context
            )
        return self._definition

    @overload
    def step(self, handler: Handler, /) -> Handler: ...

    @overload
    def step(self, step_id: str | None = None, /, **options: Any) -> Callable[[Handler], Handler]: ...

    def step(self, target: Any = None, /, **options: Any) -> Any:
        """Add a step: `@wf.step`, `@wf.step("id", retries=5)` or `@wf.step(retries=5)`. The id defaults to the function's name."""
        if callable(target):
            self._add(getattr(target, "__name__", None), target, {})
            return target

        def decorate(handler: Handler) -> Handler:
            self._add(target if target is not None else getattr(handler, "__name__", None), handler, options)
            return handler

        return decorate

    def _add(self, step_id: Any, handler: Handler, options: Mapping[str, Any]) -> None:
        if self._definition is not None:
            raise ValidationError(f"workflow {self.id}: step {step_id!r} comes too late; steps are frozen by the first start or by a pool")
        step = make_step(self.id, step_id, handler, {**self._defaults, **options})
        if step.id in self.steps:
            raise ValidationError(f"workflow {self.id}: two steps have the id {step.id!r}; give one of them another")
        self._steps.append(step)

    # --- starting --------------------------------------------------------------------------------------------------

    def _proc_start(
        self,
        input: Any = None,
        meta: Mapping[str, Any] | None = None,
        *,
        run_id: str | None = None,
        idempotency_key: str | None = None,
        priority: int = 0,
        queue: str | None = None,
        start_at: datetime | timedelta | float | None = None,
        user_id: str | None = None,
        tags: Sequence[str] = (),
        session: Any = None,
    ) -> Procedure[Run]:
        """Store a run and make it claimable; durable on return.

        `start_at`: an aware instant, or a delay in seconds or as a timedelta. With an `idempotency_key` that this
        workflow has used already, the stored run is returned, whoever stored it. With a `session` in a transaction,
        the run exists only if that commits; a conflict with another transaction is PyMongo's own error, so that
        `with_transaction` tries again. Raises ValidationError before anything is stored, InvalidStateError when
        `run_id` exists.
        """
        _ = self.definition  # refused before anything is connected, if it cannot work
        yield from self.app._ensuring(session)
        make = self._maker(meta, priority, queue, start_at, user_id, tags)
        document = make(input, run_id, idempotency_key)
        runs = yield from self._insert([document], looked_up=session is not None)
        return runs[0]

    start, start_async = sync_and_async(_proc_start)

    def _proc_start_many(
        self,
        inputs: Sequence[Any],
        meta: Mapping[str, Any] | None = None,
        *,
        idempotency_keys: Sequence[str] | None = None,
        priority: int = 0,
        queue: str | None = None,
        start_at: datetime | timedelta | float | None = None,
        user_id: str | None = None,
        tags: Sequence[str] = (),
        session: Any = None,
    ) -> Procedure[list[Run]]:
        """`start` for each input, in few commands. Every input is checked before the first is stored."""
        inputs = list(inputs)
        keys: Sequence[str | None] = [None] * len(inputs) if idempotency_keys is None else list(idempotency_keys)
        if len(keys) != len(inputs):
            raise ValidationError(f"start_many: {len(inputs)} inputs, but {len(keys)} idempotency_keys; give one for each input")
        yield from self.app._ensuring(session)
        make = self._maker(meta, priority, queue, start_at, user_id, tags)
        documents = [make(input, None, key) for input, key in zip(inputs, keys, strict=True)]
        return (yield from self._insert(documents, looked_up=session is not None))

    start_many, start_many_async = sync_and_async(_proc_start_many)

    def _maker(
        self,
        meta: Mapping[str, Any] | None,
        priority: int,
        queue: str | None,
        start_at: datetime | timedelta | float | None,
        user_id: str | None,
        tags: Sequence[str],
    ) -> Callable[[Any, str | None, str | None], tuple[RunDocument, int]]:
        """Check what all runs of a call share; yields a function that makes one document and tells its size."""
        definition, env = self.definition, self.app.env
        if type(priority) is not int or not -1_000_000 <= priority <= 1_000_000:
            raise ValidationError(f"start: priority {priority!r} is not a whole number within ±1 000 000")
        if meta is not None and not isinstance(meta, Mapping):
            raise ValidationError(f"start: meta must be a mapping, not {type(meta)}")
        check_payload(meta, "meta")
        if isinstance(tags, str) or not isinstance(tags, Iterable):
            raise ValidationError(f"start: tags must be a sequence of texts, not {tags!r}")
        tags = [check_text(tag, "start: tags") for tag in tags]
        if user_id is not None:
            check_text(user_id, "start: user_id")
        queue = self.queue if queue is None else check_queue(queue)
        now = self.app._server_now()
        due_at = _due_at(start_at, now)

        def make(input: Any, run_id: str | None, key: str | None) -> tuple[RunDocument, int]:
            check_payload(input, "input")
            context = make_context(definition.make_context, input, f"workflow {self.id}")
            check_payload(context, "context")
            document = new_run(
                definition,
                run_id=check_run_id(run_id) if run_id is not None else env.new_id(),
                input=input,
                context=context,
                meta=meta,
                idempotency_key=None if key is None else _check_key(key),
                priority=priority,
                queue=queue,
                due_at=due_at,
                user_id=user_id,
                tags=tags,
                slot=int(env.random() * SLOTS),
                now=now,
                control_id=env.new_id(),
            )
            return as_stored(document)

        return make

    def _insert(self, made: list[tuple[RunDocument, int]], *, looked_up: bool) -> Procedure[list[Run]]:
        """Insert documents, given with their sizes; those whose key or id is taken are replaced by what is stored.

        `looked_up`: ask for taken keys first, because a duplicate key would abort the caller's transaction.
        """
        sizes = {id(document): size for document, size in made}
        documents = [document for document, _ in made]
        stored: dict[int, RunDocument] = {}
        if looked_up:
            stored = yield from self._find_by_key(dict(enumerate(documents)))
        missing = [(index, document) for index, document in enumerate(documents) if index not in stored]
        since = documents[0]["createdAt"] if documents else self.app._server_now()
        for chunk in _chunks(missing, sizes):
            now = self.app._server_now()
            _space_out([document for _, document in chunk], since, now)
            since = now
            stored.update((yield from self._insert_chunk(chunk, in_transaction=looked_up)))
        return [parse_run(stored.get(index, document)) for index, document in enumerate(documents)]

    def _insert_chunk(self, chunk: list[tuple[int, RunDocument]], *, in_transaction: bool) -> Procedure[dict[int, RunDocument]]:
        """Insert some documents and have a worker rung. Yields what is stored in the place of those that were refused."""
        asked_at = self.app.env.clock.monotonic()
        single = chunk[0][1] if len(chunk) == 1 else None
        early = single is not None and single["status"] == RunStatus.RUNNING.value and not in_transaction
        if early:
            # On its way the ring overtakes the insert by a moment at most, and a worker waits as long: half a round trip won.
            yield from self._ring_for(chunk, timedelta(0))
        errors = yield run_lifecycle.insert_runs([document for _, document in chunk])
        if not early or self.app.env.clock.monotonic() - asked_at > _SLOW_INSERT_S:
            yield from self._ring_for(chunk, timedelta(seconds=_COMMIT_GUESS_S if in_transaction else 0))
        taken: dict[int, RunDocument] = {}
        for error in errors:
            if error.get("code") != _DUPLICATE_KEY:
                raise StoreUnavailableError(f"insert_runs: MongoDB refuses: {error.get('errmsg')}", transient=False)
            index, document = chunk[error["index"]]
            taken[index] = document
        return (yield from self._resolve_taken(taken))

    def _ring_for(self, chunk: list[tuple[int, RunDocument]], later: timedelta) -> Procedure[None]:
        first = chunk[0][1]
        run_id = first["_id"] if len(chunk) == 1 else None
        yield from self.app._signalling("due", wakeAt=first["wakeAt"] + later, lane=first["lane"], runId=run_id, count=len(chunk))

    def _find_by_key(self, documents: Mapping[int, RunDocument]) -> Procedure[dict[int, RunDocument]]:
        keys = [document["idempotencyKey"] for document in documents.values() if "idempotencyKey" in document]
        if not keys:
            return {}
        found = {document["idempotencyKey"]: document for document in (yield run_lifecycle.get_runs_by_key(self.id, keys))}
        return {index: found[doc["idempotencyKey"]] for index, doc in documents.items() if doc.get("idempotencyKey") in found}

    def _resolve_taken(self, taken: Mapping[int, RunDocument]) -> Procedure[dict[int, RunDocument]]:
        """The stored documents behind refused inserts: the key's owner, or our own insert whose reply was lost."""
        if not taken:
            return {}
        resolved = yield from self._find_by_key(taken)
        for index, document in taken.items():
            if index in resolved:
                continue
            found = yield run_lifecycle.get_run(None, document["_id"])
            if not found or found[0].get("lastAct") != document["lastAct"]:
                run_id = document["_id"]
                raise InvalidStateError(
                    f"start: a run with id {run_id!r} exists already; choose another id, leave it out, or use an idempotency key",
                    run_id=run_id,
                )
            resolved[index] = found[0]
        return resolved

    # --- reading and acting ----------------------------------------------------------------------------------------

    def _proc_get(self, run_id: str) -> Procedure[Run | None]:
        """The run as stored now, or None. Another workflow's run is as if it did not exist."""
        return (yield from getting_run(self.app, self.id, run_id))

    get, get_async = sync_and_async(_proc_get)

    def _proc_cancel(self, run_id: str, *, reason: str | None = None) -> Procedure[Run]:
        """Refuse all further progress, wherever the run is; its handler's `ctx.signal` fires. A terminal run is returned unchanged."""
        return (yield from cancelling_run(self.app, self.id, run_id, reason))

    cancel, cancel_async = sync_and_async(_proc_cancel)

    def _proc_pause(self, run_id: str, *, reason: str | None = None) -> Procedure[Run]:
        """Start no further step until `resume`; the step in progress is finished and stored. A terminal run is returned unchanged."""
        return (yield from pausing_run(self.app, self.id, run_id, reason))

    pause, pause_async = sync_and_async(_proc_pause)

    def _proc_resume(self, run_id: str, payload: Any = None) -> Procedure[Run]:
        """Answer the wait that the run is in: the payload becomes the step's output. A paused run is only un-paused.

        Of two concurrent answers one wins. InvalidStateError: the other; a run that waits for nobody's answer; a payload
        for a paused run.
        """
        return (yield from resuming_run(self.app, self.id, run_id, payload))

    resume, resume_async = sync_and_async(_proc_resume)

    def _proc_rewind_to(self, run_id: str, step_id: str) -> Procedure[Run]:
        """Bring that step and all later ones back to pending and the run into the queue, whatever it is doing now.

        InvalidStateError: it was cancelled, or has not come to that step yet. StepNotFoundError: it has no such step.
        """
        return (yield from rewinding_run(self.app, self.id, run_id, step_id))

    rewind_to, rewind_to_async = sync_and_async(_proc_rewind_to)

    def _proc_wait_for(
        self, run_id: str, *, timeout: float | timedelta | None = None, poll_interval: float | timedelta = 1.0
    ) -> Procedure[Run]:
        """The run once it is terminal; the built-in TimeoutError otherwise. Woken by push; `poll_interval` is the ceiling."""
        clock = self.app.env.clock
        until = None if timeout is None else clock.monotonic() + seconds(timeout, "wait_for: timeout", zero_ok=True)
        poll_s = seconds(poll_interval, "wait_for: poll_interval")
        if until is not None:
            # The time is cut into equal pieces, so that the last look is at its end and not after it.
            left_s = max(0.001, until - clock.monotonic())
            poll_s = left_s / math.ceil(left_s / poll_s)
        check_run_id(run_id)
        yield from self.app._ensuring(None)
        tail = signals.signals_since(self.app._server_now() - timedelta(seconds=2), kind="ended", runs=run_id)
        while True:
            document = yield from reading_run(self.id, run_id)
            run = parse_run(document)
            if run.status in TERMINAL:
                return (yield from making_run(document))
            if until is not None and clock.monotonic() >= until:
                raise TimeoutError(f"run {run_id} is still {run.status} after {timeout} s, at step {run.current_step_id}")
            yield AwaitSignal(tail, poll_s)

    wait_for, wait_for_async = sync_and_async(_proc_wait_for)

    def execute(self, run_id: str) -> Run:
        """Claim the run and drive it here to its next stop: terminal, wait, sleep, back-off or pause.

        A run that cannot be claimed now is returned as stored, at once.
        """
        return self.app._loop_thread().call(self.execute_async(run_id))

    async def execute_async(self, run_id: str) -> Run:
        """See `execute`."""
        await self.app.store_async().ensure()
        runner = self.app._runner()
        with runner.caller():
            run = await self.get_async(run_id)
            if run is None:
                raise WorkflowNotFoundError(f"workflow {self.id}: no run {run_id!r}", run_id=run_id)
            if run.version != self.version or not await runner.execute(run_id):
                return run
            return await self.get_async(run_id) or run

    def shutdown(self, *, timeout: float | timedelta = 30.0) -> None:
        """Let local executions finish their steps in flight, for `timeout` seconds, then stop them. All runs are given back."""
        self.app._shutdown(seconds(timeout, "shutdown: timeout", zero_ok=True))

    async def shutdown_async(self, *, timeout: float | timedelta = 30.0) -> None:
        """See `shutdown`."""
        await self.app._shutdown_async(seconds(timeout, "shutdown: timeout", zero_ok=True))

    def _drive(self, procedure: Procedure[T], session: Any) -> T:
        return self.app._drive(procedure, session)

    async def _drive_async(self, procedure: Procedure[T], session: Any) -> T:
        return await self.app._drive_async(procedure, session)


def _check_key(key: object) -> str:
    if not isinstance(key, str) or not 1 <= len(key) <= 500:
        raise ValidationError(f"idempotency_key {key!r}: a key is text of 1 to 500 characters")
    return check_text(key, "idempotency_key")


def _due_at(start_at: datetime | timedelta | float | None, now: datetime) -> datetime:
    if start_at is None:
        return now
    if isinstance(start_at, datetime):
        if start_at.tzinfo is None:
            raise ValidationError(f"start: start_at {start_at!r} has no time zone; use an aware datetime such as datetime.now(UTC)")
        moment = start_at.astimezone(UTC)
        return moment.replace(microsecond=moment.microsecond // 1000 * 1000)
    delay_s = seconds(start_at, "start: start_at", zero_ok=True)
    if delay_s > _DELAY_MAX_S:
        raise ValidationError(f"start: start_at lies {delay_s:g} seconds ahead, which is more than a hundred years")
    return now + timedelta(milliseconds=round(delay_s * 1000))


def _space_out(documents: list[RunDocument], since: datetime, now: datetime) -> None:
    """Spread the `wakeAt` of runs that are due at once over the time it took to make them, in the order of the inputs.

    So claims follow that order, and a look can start behind those that are claimed, which it cannot among equals
    (lookout.py says why it should).
    """
    step = max(timedelta(0), now - since) / len(documents)
    for place, document in enumerate(documents):
        if document["status"] == RunStatus.RUNNING.value:
            moment = since + step * place
            document["wakeAt"] = moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def _chunks(items: list[tuple[int, RunDocument]], sizes: Mapping[int, int]) -> list[list[tuple[int, RunDocument]]]:
    """Split for `insert`, by count and by bytes."""
    chunks: list[list[tuple[int, RunDocument]]] = []
    room = 0
    for item in items:
        size = sizes[id(item[1])]
        if not chunks or len(chunks[-1]) >= _INSERT_MAX or size > room:
            chunks.append([])
            room = _INSERT_BYTES_MAX
        chunks[-1].append(item)
        room -= size
    return chunks
