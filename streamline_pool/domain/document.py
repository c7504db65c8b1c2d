"""The stored form of a run, as types: which fields a run document has, and what each may hold.

Owns field names and their types, for the type checker. At run time these are plain dicts that another program may have
changed: `protocol/run_document.py` checks a document once per claim, before anything relies on these types.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, NotRequired, TypedDict

__all__ = [
    "RUN_FIELDS",
    "Fields",
    "HookDocument",
    "InboxItem",
    "LeaseDocument",
    "RunDocument",
    "StepDocument",
    "UserFields",
    "WaitDocument",
]

Fields = dict[str, Any]
"""Field names (or paths) to values that a write sets; not a whole document."""


class WaitDocument(TypedDict):
    """What a step waits for: `waitingFor`."""

    type: str  # "human" | "webhook" | "timer" | "event"
    reason: NotRequired[str]
    resumeAt: NotRequired[datetime]  # of a timer
    eventName: NotRequired[str]  # of an event
    data: NotRequired[Any]  # for the person who is to answer
    expiresAt: NotRequired[datetime]  # when the wait ends without an answer


class HookDocument(TypedDict):
    """One hook that a step has registered."""

    hash: bytes  # of the token
    gen: int  # the wait it answers, see `StepDocument.gen`
    reason: str
    expiresAt: NotRequired[datetime]


class StepDocument(TypedDict):
    """One element of `steps`."""

    stepId: str
    kind: NotRequired[str]  # "main", or of its calls (domain/journal.py); absent: a declared step
    status: str  # a StepStatus
    attempts: int  # entries into the handler, those of lost workers included
    failures: NotRequired[int]  # failed attempts of a call
    startedAt: NotRequired[datetime | None]  # entry of the latest attempt
    endedAt: NotRequired[datetime]
    durationMs: NotRequired[int]
    output: NotRequired[Any]  # once done; a marker when the value is in a file
    error: NotRequired[Mapping[str, Any]]  # {code, message, type} of the last failed attempt
    retryAfter: NotRequired[datetime]  # the earliest next attempt while backing off
    waitingFor: NotRequired[WaitDocument]
    gen: NotRequired[int]  # number of this wait in the run; an answer names it
    answer: NotRequired[Any]  # id of the answer or event that ended the wait
    hooks: NotRequired[list[HookDocument]]
    checkpoint: NotRequired[Any]
    decided: NotRequired[bool]  # its condition was evaluated and allowed the entry


class LeaseDocument(TypedDict):
    """The exclusive right to advance the run: `lease`. Absent while no process holds the run."""

    id: str  # of the claim; new at every claim
    owner: str  # worker "host:pid:nonce"; never reused
    token: int  # the run's token at this claim
    expiresAt: datetime  # by the server's clock
    alone: NotRequired[bool]  # True: a suspect that its holder runs beside no other run; absent: not so


class InboxItem(TypedDict, total=False):
    """One element of `inbox`: an event or an answer that came before the run waited for it."""

    id: str
    name: str  # of an event
    stepId: str  # of an answer to a hook ...
    gen: int  # ... and the wait it answers
    data: Any
    at: datetime  # when it arrived, by the server's clock


class UserFields(TypedDict):
    """The part of a stored run that users query and index."""

    _id: str
    workflowId: str
    version: str
    status: str  # a RunStatus
    steps: list[StepDocument]
    currentStepId: str | None  # None once every step has ended
    context: dict[str, Any]
    input: Any
    output: Any  # the last step's output once done
    error: Mapping[str, Any] | None  # {code, message, type, stepId, traceback} once failed
    createdAt: datetime
    updatedAt: datetime
    startedAt: datetime | None
    endedAt: datetime | None
    paused: bool
    userId: str | None
    tags: list[str]
    meta: Mapping[str, Any] | None
    priority: int  # higher is claimed first
    queue: str
    idempotencyKey: NotRequired[str]
    cancelReason: NotRequired[str | None]
    pauseReason: NotRequired[str | None]


RUN_FIELDS = frozenset(UserFields.__annotations__)
"""Names of these fields."""


class RunDocument(UserFields):
    """A run as stored in `<prefix>runs`: also the fields that the engine schedules by."""

    startId: NotRequired[str]  # id of the start that stored the run; never changed; absent in runs of earlier versions
    lane: str  # "queue/workflow/version": what a worker claims from
    slot: int  # 0..15: spreads the claims of many workers over the queue
    wakeAt: NotRequired[datetime]  # from when the run may be claimed; absent while it is leased, paused or waiting for an answer
    pausedWakeAt: NotRequired[datetime]  # `wakeAt` while paused
    lease: NotRequired[LeaseDocument]
    token: int  # fencing token: +1 whenever the right to the run changes, never reset
    rev: int  # +1 with every write of a holder
    acts: int  # +1 with every control operation
    lastAct: NotRequired[str]  # id of the last control operation
    actIds: NotRequired[list[str]]  # ids of the last few
    waitGen: int  # +1 with every wait
    crashes: int  # workers lost at the current step
    failures: int  # failed attempts at the current step
    rewinds: NotRequired[int]  # how often results were dropped: by a rewind, or by a new generation
    generation: NotRequired[int]  # how often a durable function has continued as new
    awaits: NotRequired[str]  # name of the event that the run waits for
    inbox: NotRequired[list[InboxItem]]
    seen: NotRequired[list[Any]]  # ids of broadcast events that the run has had
    bornAt: NotRequired[Any]  # the server's logical time of the insert
