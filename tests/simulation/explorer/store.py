"""The stores of an actor: every operation of the product passes through the world, which decides when and whether it happens.

Owns the way of an operation from the product's store to the world. What the product sends is made by its own code: commands
with their write concern, queries with their read concern, errors by its own translation.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from pymongo import ReadPreference

from streamline_pool.config.env import Env
from streamline_pool.protocol.operations import Command, Find, Op, Signal, Tail
from streamline_pool.storage.base import StoreBase
from streamline_pool.storage.procedures import Procedure
from streamline_pool.storage.requests import command_result
from streamline_pool.storage.store import AsyncStore, Store
from streamline_pool.storage.target import DatabaseTarget

from .ledger import Violation

if TYPE_CHECKING:
    from .actors import Actor
    from .world import World

__all__ = ["ExplorerAsyncStore", "ExplorerStore", "Request"]

T = TypeVar("T")


class Request:
    """One operation that an actor has sent."""

    def __init__(self, actor: Actor, op: Command | Find, document: dict[str, Any] | None, by_majority: bool) -> None:
        self.actor = actor
        self.owner = actor.owner  # the incarnation that sent it
        self.call = actor.call  # the client's call that it belongs to; None for workers and stewards
        self.op = op
        self.document = document  # of a command
        self.by_majority = by_majority
        self.future: asyncio.Future[Any] | None = None  # None: no reply is awaited (a late copy, a dead sender)
        self.leases: dict[str, Any] = {}  # run id -> the lease that was stored when this was sent
        self.driven = frozenset(() if actor.engine is None else actor.engine.active_runs.held)  # runs that the sender drove
        self.hold = 0  # so many other operations come first

    @property
    def name(self) -> str:
        return self.op.name

    @property
    def writes(self) -> bool:
        return isinstance(self.op, Command) and self.op.writes

    def copy(self) -> Request:
        """The same request once more, whose reply is not awaited."""
        copy = Request(self.actor, self.op, self.document, self.by_majority)
        copy.owner, copy.call, copy.leases, copy.driven = self.owner, self.call, self.leases, self.driven
        return copy

    def half(self, share: int) -> Request:
        """The part of this write that the server performs before it is lost: one of `share` of its statements or runs, or all of one."""
        copy = self.copy()
        updates = list((self.document or {}).get("updates", ()))
        if len(updates) > 1:
            copy.document = {**(self.document or {}), "updates": updates[: -(-len(updates) // share)]}
        elif updates and isinstance(updates[0]["q"].get("_id"), dict) and "$in" in updates[0]["q"]["_id"]:
            ids = updates[0]["q"]["_id"]["$in"]
            query = {**updates[0]["q"], "_id": {"$in": ids[: -(-len(ids) // share)]}}
            copy.document = {**(self.document or {}), "updates": [{**updates[0], "q": query}]}
        return copy

    def answer(self, reply: Any) -> None:
        if self.future is not None and not self.future.done():
            self.future.set_result(reply)

    def fail(self, error: Exception) -> None:
        if self.future is not None and not self.future.done():
            self.future.set_exception(error)


def _request(store: StoreBase, actor: Actor, op: Command | Find) -> Request:
    if isinstance(op, Command):
        document = store.command_arguments(op, None)["command"]
        concern = document.get("writeConcern", {})
        if op.writes and op.collection == "runs" and concern.get("j") is not True:
            actor.world.fail(Violation(f"{op.name} does not wait for the journal"))
        return Request(actor, op, document, concern.get("w") == "majority")
    collection = store.cursor(op, None).collection
    if collection.read_preference != ReadPreference.PRIMARY:
        actor.world.fail(Violation(f"{op.name} is read from a secondary, which may lag behind what its reader has written"))
    return Request(actor, op, None, collection.read_concern.level == "majority")


class ExplorerAsyncStore(AsyncStore):
    """The asyncio store of an actor."""

    def __init__(self, where: DatabaseTarget, env: Env, world: World, actor: Actor) -> None:
        StoreBase.__init__(self, where, env, world.server.client)
        self._world = world
        self._actor = actor
        self._ensured = True  # the explorer has made what the engine needs
        now = env.clock.monotonic()
        self.clock.read(world.server.now() + timedelta(seconds=actor.clock_error_s), now, now)

    async def run(self, op: Op, session: Any = None) -> Any:
        """See `AsyncStore.run`."""
        with self.errors_of(op.name, session):
            if isinstance(op, Signal):
                self._world.signals.send(dict(op.document))
                return None
            reply = await self._world.request(_request(self, self._actor, op))
            return command_result(op, reply) if isinstance(op, Command) else reply

    async def tail(self, tail: Tail, wait_s: float = 15.0) -> AsyncGenerator[dict[str, Any] | None, None]:
        """See `AsyncStore.tail`."""
        with self._world.signals.reader(dict(tail.match)) as reader:
            while True:
                try:
                    yield await asyncio.wait_for(reader.get(), wait_s)
                except TimeoutError:
                    yield None

    async def close(self) -> None:
        """The connection is the world's."""


class ExplorerStore(Store):
    """The blocking store of an actor, by which handlers on the event loop store their checkpoints."""

    def __init__(self, where: DatabaseTarget, env: Env, world: World, actor: Actor) -> None:
        StoreBase.__init__(self, where, env, world.server.client)
        self._world = world
        self._actor = actor

    def run(self, op: Op, session: Any = None) -> Any:
        """See `Store.run`."""
        with self.errors_of(op.name, session):
            if isinstance(op, Signal):
                self._world.signals.send(dict(op.document))
                return None
            reply = self._world.request_blocking(_request(self, self._actor, op))
            return command_result(op, reply) if isinstance(op, Command) else reply

    def drive_within(self, seconds: float, procedure: Procedure[T]) -> T:
        """See `Store.drive_within`. The seconds are virtual, so the driver must not measure them."""
        return self._drive(self.begin(procedure, None, seconds), None)

    def close(self) -> None:
        """The connection is the world's."""
