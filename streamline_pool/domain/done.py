"""The result of a call that has done its work when it returns. Owns that one value; knows nothing of what the calls do."""

from __future__ import annotations

from collections.abc import Generator

__all__ = ["DONE", "Done"]


class Done:
    """What `ctx.set`, `emit`, `log`, `heartbeat` and `checkpoint` return: no value, as None is, but `await` on it gives None.

    So a handler that is rewritten from the Node library may keep its `await`. It is false, and it is stored as None.
    """

    __slots__ = ()

    def __await__(self) -> Generator[None, None, None]:
        return
        yield

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "None"


DONE = Done()
"""The only object of its class."""
