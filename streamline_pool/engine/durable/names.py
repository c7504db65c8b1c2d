"""The names of the calls of one entry into a durable function: numbered in the order of its code, and found among what is stored.

Owns who may make a call, and under which name. Called on the function's own thread, or in its tasks.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from typing import Any

from streamline_pool.domain import journal
from streamline_pool.domain.document import RunDocument
from streamline_pool.domain.errors import InvalidStateError, NonDeterminismError, PayloadTooLargeError
from streamline_pool.protocol.codec import check_text

from .call_attempt import current_context

__all__ = ["CallNames", "User", "current_names", "current_user"]

current_names: contextvars.ContextVar[CallNames | None] = contextvars.ContextVar("streamline_pool_current_names", default=None)
"""The names of the durable function that runs."""

User = asyncio.Task[Any] | threading.Thread


class CallNames:
    """One for each entry. Each method raises what its call cannot be made for: ValidationError, InvalidStateError and the like."""

    def __init__(self, document: RunDocument) -> None:
        self._run_id = str(document["_id"])
        self._stored_kinds = {step["stepId"]: step.get("kind") for step in document["steps"][1:]}
        self._uses: dict[tuple[str, bool], int] = {}  # by name, for groups apart
        self._users: dict[tuple[str, bool], User] = {}  # who used a name, and goes on
        self._made: set[str] = set()
        self._new = 0  # names of this entry that are not stored
        self._lock = threading.Lock()
        self.owner: User | None = None  # the task or the thread of the function
        self.is_shared = False  # other tasks or threads have made calls

    @property
    def not_made(self) -> list[str]:
        """The names that are stored, and that this entry has not used, in the order of their first start."""
        return [name for name in self._stored_kinds if name not in self._made]

    @property
    def is_past_the_stored(self) -> bool:
        """Whether this entry has used the last of the stored names. An earlier one that it has not used was removed from the code."""
        return next((name in self._made for name in reversed(self._stored_kinds)), True)

    @property
    def is_called_beside(self) -> bool:
        """Whether the running task is another one than the function's own. False for a function that is a `def`."""
        return isinstance(self.owner, asyncio.Task) and asyncio.current_task() is not self.owner

    def forget_users(self) -> None:
        """The function has ended. Its tasks know this object: a circle would keep the run in memory."""
        self.owner = None
        self._users.clear()

    def check_alone(self, name: str) -> None:
        """The caller is the function itself, not one of several tasks."""
        if current_user() is not self.owner:
            raise self._invalid(
                f"ctx.patched({name!r}) within a task beside others would be answered by chance; ask before they begin", name
            )

    def has_made(self, name: object) -> bool:
        """Whether this entry has used the name."""
        return name in self._made

    def call(self, name: object, kind: str, where: str) -> str:
        """The name under which a call is stored: the n-th use of a name is `name#n` from the second on."""
        base = journal.check_name(name, where)
        check_text(base, where)
        return self._named(base, kind)

    def event(self, event_name: str) -> str:
        """The name of a wait for an event that has none of its own."""
        return self._named(journal.event_name(event_name), "event")

    def group(self, name: object, count: int, where: str) -> list[str]:
        """The names of a group of steps: `name[0]`, `name[1]`, …"""
        base = journal.check_name(name, where)
        check_text(base, where)
        self.check_caller(base)
        base = journal.numbered(base, self._count_use(base, is_group=True))
        names = [f"{base}[{place}]" for place in range(count)]
        for each in names:
            self._check_kind(each, "step")
        return names

    def _named(self, base: str, kind: str) -> str:
        self.check_caller(base)
        name = journal.numbered(base, self._count_use(base))
        self._check_kind(name, kind)
        return name

    def check_caller(self, name: str) -> None:
        """The caller is the function of this run, and not within another call of it."""
        names, inside = current_names.get(), current_context.get()
        if names is None:
            text = f"the call {name!r} was made by code that does not know its run; start a thread as asyncio.to_thread does, in a copy of"
            raise self._invalid(f"{text} the context: contextvars.copy_context().run", name)
        if names is not self:
            raise self._invalid(f"its ctx was used for the call {name!r} by the durable function of another run", name)
        if inside is not None:
            raise self._invalid(f"the call {name!r} was made within the call {inside.step_id!r}; make it beside that one", name)

    def _count_use(self, base: str, *, is_group: bool = False) -> int:
        user, key = current_user(), (base, is_group)
        self.is_shared = self.is_shared or user is not self.owner
        with self._lock:
            use = self._uses[key] = self._uses.get(key, 0) + 1
            earlier = self._users.get(key, user)
            is_other = earlier is not user and (not earlier.done() if isinstance(earlier, asyncio.Task) else earlier.is_alive())
            self._users[key] = earlier if is_other else user
        if is_other:
            text = f"the name {base!r} is used by two tasks at once, so chance would number their calls; give each its own name"
            raise self._invalid(text, base)
        return use

    def _check_kind(self, name: str, kind: str) -> None:
        """If the call is stored, then as one of this kind. Else there is room for one more."""
        self._made.add(name)
        if name not in self._stored_kinds:
            self._new += 1
            if self._new + len(self._stored_kinds) > journal.CALLS_MAX:
                raise PayloadTooLargeError(
                    f"run {self._run_id}: it makes more than {journal.CALLS_MAX} calls, the most that one generation may make; "
                    "let a long loop end with ctx.continue_as_new(input)"
                )
            return
        stored = self._stored_kinds[name]
        if stored != kind:
            raise NonDeterminismError(
                f"run {self._run_id}: the call {name!r} is stored as a {stored}, and the code calls it as a {kind}; "
                "give a call that is new another name, or give changed code a new version",
                run_id=self._run_id,
                step_id=name,
            )

    def _invalid(self, text: str, name: str) -> InvalidStateError:
        return InvalidStateError(f"run {self._run_id}: {text}", run_id=self._run_id, step_id=name)


def current_user() -> User:
    """The task, or the thread without one, that runs this code."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return threading.current_thread()
    assert task is not None, "the code of an event loop's user runs in a task"
    return task
