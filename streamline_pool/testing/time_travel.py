"""Time that a test can set forward: stores that add an offset to the server's time, in both directions.

Owns the offset and the places where it is added: the server's clock as this process knows it, and `$$NOW` in operations.
Everything that depends on either agrees: sleeps, back-off, start times, deadlines, leases, ages. Data is not changed.
Used by kit.py only; a program in production has no such store.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from streamline_pool.config.env import Env
from streamline_pool.protocol.operations import Find, Op, Signal
from streamline_pool.storage.server_clock import ServerClock
from streamline_pool.storage.store import AsyncStore, Store
from streamline_pool.storage.target import DatabaseTarget

__all__ = ["JumpableAsyncStore", "JumpableStore", "Timeline", "shifted"]

Document = dict[str, Any]


class Timeline:
    """The offset to the server's clock. It only grows, so no stored instant is in the future."""

    def __init__(self) -> None:
        self._offset_ms = 0

    @property
    def offset_ms(self) -> int:
        """Whole milliseconds, as the server's dates are."""
        return self._offset_ms

    def advance(self, by: timedelta) -> None:
        """Add `by`, rounded up to milliseconds. Does nothing when `by` is not positive."""
        self._offset_ms += max(0, -(-by // timedelta(milliseconds=1)))


class _JumpableClock(ServerClock):
    def __init__(self, env: Env, timeline: Timeline) -> None:
        super().__init__(env)
        self._timeline = timeline

    def now(self) -> datetime:
        return super().now() + timedelta(milliseconds=self._timeline.offset_ms)


class JumpableStore(Store):
    """A store on a timeline of its own."""

    def __init__(self, where: DatabaseTarget, env: Env, timeline: Timeline) -> None:
        super().__init__(where, env)
        self.clock = _JumpableClock(env, timeline)
        self._timeline = timeline

    def run(self, op: Op, session: Any = None) -> Any:
        """See `Store.run`."""
        return super().run(shifted(op, self._timeline.offset_ms), session)


class JumpableAsyncStore(AsyncStore):
    """A store on a timeline of its own. `before` is awaited before every operation, and may prevent that it is sent.

    The store is closed with its event loop, so a test that uses an app in a loop of its own need not close it.
    """

    def __init__(self, where: DatabaseTarget, env: Env, timeline: Timeline, before: Callable[[Op], Awaitable[None]]) -> None:
        super().__init__(where, env)
        self.clock = _JumpableClock(env, timeline)
        self._timeline = timeline
        self._before = before
        self._closing: AsyncGenerator[None, None] | None = None

    async def run(self, op: Op, session: Any = None) -> Any:
        """See `AsyncStore.run`."""
        if self._closing is None:
            self._closing = self._close_with_the_loop()
            await anext(self._closing)
        await self._before(op)
        return await super().run(shifted(op, self._timeline.offset_ms), session)

    async def _close_with_the_loop(self) -> AsyncGenerator[None, None]:
        # `asyncio.run`, like other code that ends loops cleanly, first closes the generators that are not finished.
        try:
            yield
        finally:
            await super().close()

    async def close(self) -> None:
        """See `AsyncStore.close`."""
        await (self._closing.aclose() if self._closing is not None else super().close())


def shifted(op: Op, offset_ms: int) -> Op:
    """The same operation, for a server whose clock is `offset_ms` ahead of the real one's.

    `$$NOW` is an expression in pipelines and below `$expr` only. Anywhere else (in a plain update, in an inserted
    document, below `$literal`) it is text of a user.
    """
    if not offset_ms or isinstance(op, Signal):
        return op
    now: Document = {"$add": ["$$NOW", offset_ms]}
    if isinstance(op, Find):
        return replace(op, filter=_query(op.filter, now))
    body = dict(op.body)
    match op.verb:
        case "update":
            body["updates"] = [{**each, "q": _query(each["q"], now), "u": _update(each["u"], now)} for each in body["updates"]]
        case "delete":
            body["deletes"] = [{**each, "q": _query(each["q"], now)} for each in body["deletes"]]
        case "findAndModify":
            body["query"] = _query(body.get("query", {}), now)
            if "update" in body:
                body["update"] = _update(body["update"], now)
        case "aggregate":
            body["pipeline"] = [_stage(stage, now) for stage in body["pipeline"]]
        case "find":
            body["filter"] = _query(body.get("filter", {}), now)
        case "count" | "distinct":
            body["query"] = _query(body.get("query", {}), now)
        case _:
            return op
    return replace(op, body=body)


def _query(query: Mapping[str, Any], now: Document) -> Document:
    """In a filter only `$expr`, at the top or below a logical operator, holds an expression."""
    made: Document = {}
    for name, value in query.items():
        match name:
            case "$expr":
                made[name] = _expression(value, now)
            case "$and" | "$or" | "$nor":
                made[name] = [_query(part, now) for part in value]
            case _:
                made[name] = value
    return made


def _update(update: Any, now: Document) -> Any:
    """A list is a pipeline; a mapping is a plain update, which holds data."""
    return [_stage(stage, now) for stage in update] if isinstance(update, Sequence) else update


def _stage(stage: Mapping[str, Any], now: Document) -> Document:
    return {name: _query(value, now) if name == "$match" else _expression(value, now) for name, value in stage.items()}


def _expression(value: Any, now: Document) -> Any:
    if isinstance(value, str):
        return now if value == "$$NOW" else value
    if isinstance(value, Mapping):
        return value if "$literal" in value else {name: _expression(part, now) for name, part in value.items()}
    return [_expression(part, now) for part in value] if isinstance(value, (list, tuple)) else value
