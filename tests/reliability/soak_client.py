"""The one client process of the soak. Owns starting runs, acting on those that wait, and cleaning up those that ended.

Run as `python -m tests.reliability.soak_client PARENT_PID URI DATABASE RUNS SECONDS OPEN SEED`. It prints one JSON document a second:
`ended` (runs that ended and were deleted), `seen` (how often each thing was done, by name) and `wrong` (what must not happen, at most 20
texts). Everything that it remembers of runs is bounded by OPEN, so its own memory must be flat, too.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Mapping
from datetime import timedelta
from typing import Any

from streamline_pool import Streamline, WorkflowError, WorkflowNotFoundError
from streamline_pool.chaos.ending import end_with_parent

from .soak_app import SHARES, define

__all__ = ["Client"]

_BATCH = 20  # runs of one start
_CALLS_MAX = 40  # calls under way at a time
_KEEP = timedelta(seconds=2)  # how long an ended run stays, so that wait_for can read it
_FIND_MAX = 400
_TEND_S = 0.1  # a search for waiting runs reads the whole collection, so it is made seldom
_CLEAN_S = 1.0
_WRONG_MAX = 20
_STREAM_PAUSE_S = 10.0
_ACTED_ON = ["answered", "hooked", "event_one", "paused", "rewound", "cancelled"]
_SHOWN = {"workflowId": 1, "paused": 1, "rewinds": 1, "input": 1, "context.token": 1}


class Client:
    """Feeds a pool with at most `open_max` runs that have not been cleaned up, until `runs` have ended.

    After `seconds` it starts no more, and the soak is over when those that were started have ended.
    """

    def __init__(self, app: Streamline, runs: int, seconds: int, open_max: int, seed: int) -> None:
        self.app, self.runs, self.open_max = app, runs, open_max
        self.started = self.ended = 0
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._feed_until = time.monotonic() + seconds
        self._random = random.Random(seed)
        self._calls = asyncio.Semaphore(_CALLS_MAX)
        self._acted_on: set[str] = set()  # runs with an act under way
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = threading.Event()

    async def serve(self) -> None:
        """Start, act and clean up until all runs have ended."""
        threads = [threading.Thread(target=part, name=part.__name__) for part in (self._clean_up, self._follow_streams)]
        for thread in threads:
            thread.start()
        try:
            await asyncio.gather(self._feed(), self._tend(), self._report())
            await asyncio.gather(*self._tasks)
        finally:
            self._over.set()
            self.app.events.close_streams()
            for thread in threads:
                thread.join()

    @property
    def is_done(self) -> bool:
        """True when every run has ended and is deleted."""
        return self.ended >= self.runs or self._over.is_set()

    def _note_wrong(self, what: str) -> None:
        if len(self.wrong) < _WRONG_MAX:
            self.wrong.append(what)

    # --- starting --------------------------------------------------------------------------------------------------

    async def _feed(self) -> None:
        names, weights = list(SHARES), list(SHARES.values())
        while self.started < self.runs and not self.is_done:
            if time.monotonic() > self._feed_until:
                break
            if self.started - self.ended > self.open_max - _BATCH:
                await asyncio.sleep(0.01)
                continue
            await self._start(self._random.choices(names, weights)[0], min(_BATCH, self.runs - self.started))
        self.runs = self.started

    async def _start(self, kind: str, count: int) -> None:
        workflow, first = self.app.workflows[kind], self.started
        self.started += count
        event = f"all-{first}" if kind == "event_all" else "one"
        inputs = [{"n": n, "event": event} for n in range(first, first + count)]
        keys = [f"key-{n}" for n in range(first, first + count)] if kind == "keyed" else None
        started = await workflow.start_many_async(inputs, idempotency_keys=keys)
        self.seen[kind] += count
        early = self._random.random() < 0.5
        if keys is not None:
            await self._start_again(workflow, started[0].id, inputs[0], keys[0])
        if kind == "event_all":
            self._spawn(self._send_to_all(event, 0.0 if early else 0.3))
        elif kind == "event_one" and early:
            self._spawn(self._send_early([run.id for run in started]))
        elif kind == "plain" and self._random.random() < 0.1:
            self._spawn(self._wait_for_end(started[0].id))

    async def _start_again(self, workflow: Any, run_id: str, given: Any, key: str) -> None:
        """The key must give the stored run. On a busy machine that may have ended and been cleaned up, and then a new one is right."""
        again = await workflow.start_async(given, idempotency_key=key)
        self.seen["started again by key"] += 1
        if again.id == run_id:
            return
        self.started += 1
        if await workflow.get_async(run_id) is not None:
            self._note_wrong(f"{key}: two runs, {again.id} and {run_id}")

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, work: Awaitable[None]) -> None:
        try:
            async with self._calls:
                await work
        except WorkflowError as exc:
            self._note_wrong(f"{type(exc).__name__}: {exc}")

    async def _send_to_all(self, event: str, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        await self.app.send_event_async(event, {"event": event})
        self.seen["event sent to all"] += 1

    async def _send_early(self, run_ids: list[str]) -> None:
        for run_id in run_ids:
            await self._send_to_one(run_id)

    async def _send_to_one(self, run_id: str) -> None:
        try:
            await self.app.send_event_async("one", {"event": "one"}, run_id=run_id)
        except WorkflowNotFoundError:
            return  # the other of two events came first, and the run has ended
        self.seen["event sent to one"] += 1

    async def _wait_for_end(self, run_id: str) -> None:
        try:
            run = await self.app.workflows["plain"].wait_for_async(run_id, timeout=60)
        except WorkflowNotFoundError:
            return  # it was cleaned up first
        self.seen["waited for"] += 1
        if run.status != "done":
            self._note_wrong(f"{run_id} is {run.status}: {run.error}")

    # --- acting on runs that wait ----------------------------------------------------------------------------------

    async def _tend(self) -> None:
        runs = self.app.store_async().collection("runs")
        while not self.is_done:
            asks = {"status": "waiting", "workflowId": {"$in": _ACTED_ON}, "_id": {"$nin": list(self._acted_on)}}
            found = await runs.find(asks, _SHOWN).limit(_FIND_MAX).to_list()
            for run in found:
                self._acted_on.add(run["_id"])
                self._spawn(self._act_on(run))
            await asyncio.sleep(_TEND_S)

    async def _act_on(self, run: Mapping[str, Any]) -> None:
        try:
            await self._act(run["_id"], run)
        finally:
            self._acted_on.discard(run["_id"])

    async def _act(self, run_id: str, run: Mapping[str, Any]) -> None:
        kind, answer = run["workflowId"], {"n": run["input"]["n"]}
        workflow = self.app.workflows[kind]
        if kind == "event_one":
            await self._send_to_one(run_id)
        elif kind == "hooked":
            await self.app.resume_hook_async(run["context"]["token"], answer)
            self.seen["hook answered"] += 1
        elif kind == "cancelled":
            await workflow.cancel_async(run_id, reason="soak")
            self.seen["cancelled by the client"] += 1
        elif kind == "rewound" and not run.get("rewinds"):
            await workflow.rewind_to_async(run_id, "first")
            self.seen["rewound by the client"] += 1
        else:
            if kind == "paused":
                await workflow.pause_async(run_id, reason="soak")
                await workflow.resume_async(run_id)
                self.seen["paused and resumed"] += 1
            await workflow.resume_async(run_id, answer)
            self.seen["answered by the client"] += 1

    # --- cleaning up, following, reporting -------------------------------------------------------------------------

    def _clean_up(self) -> None:
        """A thread: by the synchronous calls. What is deleted has ended, so this is also the count of ended runs."""
        while not self.is_done:
            try:
                self.ended += self.app.cleanup_old_runs(_KEEP)
            except WorkflowError as exc:
                self._note_wrong(f"clean-up: {exc}")
            self.seen["clean-up"] += 1
            self._over.wait(_CLEAN_S)

    def _follow_streams(self) -> None:
        """A thread: subscribe, take twenty events, end; again and again."""
        while not self._over.is_set():
            with self.app.events.stream("workflow:completed") as stream:
                for number, _ in enumerate(stream):
                    if number == 20 or self._over.is_set():
                        self.seen["stream"] += 1
                        break
            self._over.wait(_STREAM_PAUSE_S)

    async def _report(self) -> None:
        deadline, last = time.monotonic() + 120, -1
        while True:
            for run in await self.app.store_async().collection("runs").find({"status": "failed"}).limit(_WRONG_MAX).to_list():
                self._note_wrong(f"{run['workflowId']} {run['_id']} failed: {run.get('error')}")
            print(json.dumps({"ended": self.ended, "seen": self.seen, "wrong": self.wrong}), flush=True)
            if self.is_done:
                return
            if self.ended != last:
                deadline, last = time.monotonic() + 120, self.ended
            elif time.monotonic() > deadline:
                self._note_wrong(f"no run ended for 120 s; {self.started - self.ended} are open")
                self._over.set()
            await asyncio.sleep(1)


def main(uri: str, database: str, runs: int, seconds: int, open_max: int, seed: int) -> None:
    """Serve until all runs have ended."""

    async def serve(app: Streamline) -> None:
        try:
            await Client(app, runs, seconds, open_max, seed).serve()
        finally:
            await app.close_async()

    with define(Streamline(uri, database=database)) as app:
        asyncio.run(serve(app))


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    main(sys.argv[2], sys.argv[3], *(int(argument) for argument in sys.argv[4:8]))
