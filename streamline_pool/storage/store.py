"""The two stores: they perform operations by PyMongo's synchronous API or by its asyncio API.

Owns the connections and the calls of PyMongo, and nothing that the two have in common (base.py). An operation is plain data
here (protocol/operations.py). A store never repeats a write by itself: the caller knows which of its writes may be repeated.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import nullcontext
from typing import Any, TypeVar

import pymongo
from pymongo import AsyncMongoClient, MongoClient
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.synchronous.client_session import ClientSession

from streamline_pool.config.env import Env
from streamline_pool.domain.errors import WorkflowError
from streamline_pool.protocol.codec import SERVER_TICK, read_document
from streamline_pool.protocol.operations import Find, Op, Signal, Tail
from streamline_pool.protocol.signals import beyond

from .base import DEAD_CURSOR_PAUSE_S, TAIL_AWAIT_S, StoreBase
from .procedures import AwaitSignal, Effect, Procedure, ProcedureRun, Sleep, is_hint
from .target import DatabaseTarget

__all__ = ["AsyncStore", "Store", "open_clients"]

T = TypeVar("T")
_Stored = dict[str, Any]
_Tails = dict[Tail, Generator[_Stored | None, None, None]]
_AsyncTails = dict[Tail, AsyncGenerator[_Stored | None, None]]


def open_clients() -> list[str]:
    """The MongoDB clients that this process has opened and not closed, as text. Forking a process that has one is unsafe."""
    clients: list[Any] = [*MongoClient._clients.values(), *AsyncMongoClient._clients.values()]
    return [str(client.address or client) for client in clients if client._opened and not client._closed]


class Store(StoreBase):
    """Operations by the synchronous API. Connects at the first one."""

    def __init__(self, where: DatabaseTarget, env: Env) -> None:
        self.client: MongoClient[_Stored] = MongoClient(where.uri, tz_aware=True, connect=False, **where.client_options())
        super().__init__(where, env, self.client)

    def run(self, op: Op, session: ClientSession | None = None) -> Any:
        """Run one operation, once. Returns what the operation yields.

        Raises StoreUnavailableError (the outcome of a write is then unknown) or ValidationError for what the server refused.
        """
        with self.errors_of(op.name, session):
            if isinstance(op, Find):
                return list(map(read_document, self.cursor(op, session)))
            if isinstance(op, Signal):
                self.signals_for_hints().insert_one(dict(op.document))
                return None
            return self.read_reply(op, self.database.command(**self.command_arguments(op, session)))

    def drive_within(self, seconds: float, procedure: Procedure[T]) -> T:
        """As `drive`, for callers that may not block for longer. Raises StoreUnavailableError when the time is over.

        One operation gets half of the time, so that a connection that is dead leaves enough to repeat it on another one.
        """
        with pymongo.timeout(seconds):
            return self._drive(self.begin(procedure, None, seconds), None, seconds / 2)

    def drive(self, procedure: Procedure[T], session: ClientSession | None = None) -> T:
        """Run a procedure to its end. Within a transaction no effect is repeated: the owner of the transaction decides that."""
        return self._drive(self.begin(procedure, session), session)

    def _drive(self, run: ProcedureRun[T], session: ClientSession | None, each_s: float | None = None) -> T:
        tails: _Tails = {}
        try:
            while run.effect is not None:
                try:
                    with pymongo.timeout(each_s) if each_s is not None else nullcontext():
                        answer = self._perform(run.effect, session, tails)
                except WorkflowError as exc:
                    run.fail(exc)
                else:
                    run.answer(answer)
            return run.result()
        finally:
            run.close()
            for tail in tails.values():
                tail.close()

    def _perform(self, effect: Effect, session: ClientSession | None, tails: _Tails) -> Any:
        match self.admitted(effect, tails):
            case Sleep(seconds):
                return self.env.sleep(seconds)
            case AwaitSignal(wanted, seconds):
                tail = tails.pop(wanted, None) or self.tail(wanted, seconds)
                signal = next(tail)
                tails[wanted] = tail  # a tail that failed does not come back: the next wait opens a new one
                return signal
            case op:
                return self.run(op, None if is_hint(op) else session)

    def tail(self, tail: Tail, wait_s: float) -> Generator[_Stored | None, None, None]:
        """Matching signals as they are written; None after each `wait_s` seconds without one. Ends only by an error.

        A cursor that the server ends is opened again where it was.
        """
        position = SERVER_TICK
        with self.counted_tail(), self.errors_of("tail_signals"):
            while True:
                with self.tail_cursor(tail, position, wait_s) as cursor:
                    while cursor.alive:
                        found = next(cursor, None)
                        signal = None if found is None else read_document(found)
                        position = position if signal is None else beyond(position, signal)
                        yield signal
                self.env.sleep(min(wait_s, DEAD_CURSOR_PAUSE_S))
                yield None

    def close(self) -> None:
        """Close the connections. The store cannot be used afterwards."""
        self.client.close()


class AsyncStore(StoreBase):
    """Operations by the asyncio API. Belongs to the event loop in which it was made."""

    def __init__(self, where: DatabaseTarget, env: Env) -> None:
        self.client: AsyncMongoClient[_Stored] = AsyncMongoClient(where.uri, tz_aware=True, connect=False, **where.client_options())
        super().__init__(where, env, self.client)

    async def run(self, op: Op, session: AsyncClientSession | None = None) -> Any:
        """Run one operation, once. Returns what the operation yields. Raises as `Store.run` does."""
        with self.errors_of(op.name, session):
            if isinstance(op, Find):
                return list(map(read_document, await self.cursor(op, session).to_list()))
            if isinstance(op, Signal):
                await self.signals_for_hints().insert_one(dict(op.document))
                return None
            return self.read_reply(op, await self.database.command(**self.command_arguments(op, session)))

    async def drive(self, procedure: Procedure[T], session: AsyncClientSession | None = None) -> T:
        """Run a procedure to its end, as `Store.drive` does."""
        run = self.begin(procedure, session)
        tails: _AsyncTails = {}
        try:
            while run.effect is not None:
                try:
                    answer = await self._perform(run.effect, session, tails)
                except WorkflowError as exc:
                    run.fail(exc)
                else:
                    run.answer(answer)
            return run.result()
        finally:
            run.close()
            for tail in tails.values():
                await tail.aclose()

    async def _perform(self, effect: Effect, session: AsyncClientSession | None, tails: _AsyncTails) -> Any:
        match self.admitted(effect, tails):
            case Sleep(seconds):
                return await self.env.async_sleep(seconds)
            case AwaitSignal(wanted, seconds):
                tail = tails.pop(wanted, None) or self.tail(wanted, seconds)
                signal = await anext(tail)
                tails[wanted] = tail  # a tail that failed does not come back: the next wait opens a new one
                return signal
            case op:
                return await self.run(op, None if is_hint(op) else session)

    async def tail(self, tail: Tail, wait_s: float = TAIL_AWAIT_S) -> AsyncGenerator[_Stored | None, None]:
        """Matching signals, as `Store.tail` yields them."""
        position = SERVER_TICK
        with self.counted_tail(), self.errors_of("tail_signals"):
            while True:
                async with self.tail_cursor(tail, position, wait_s) as cursor:
                    while cursor.alive:
                        found = await anext(cursor, None)
                        signal = None if found is None else read_document(found)
                        position = position if signal is None else beyond(position, signal)
                        yield signal
                await self.env.async_sleep(min(wait_s, DEAD_CURSOR_PAUSE_S))
                yield None

    async def ensure(self) -> None:
        """See `ensuring`."""
        await self.drive(self.ensuring())

    async def ensure_again(self) -> None:
        """See `ensuring`. Creates what is missing also when this store has created it before."""
        self._ensured = False
        await self.ensure()

    async def facts(self) -> dict[str, Any]:
        """See `reading_facts`."""
        return await self.drive(self.reading_facts())

    async def sync_clock(self) -> float:
        """See `syncing_clock`."""
        return await self.drive(self.syncing_clock())

    async def close(self) -> None:
        """Close the connections. The store cannot be used afterwards."""
        await self.client.close()
