"""Hook tokens: making one within a handler, and reading one that somebody brings back.

Owns the token's form and its hash. A token names its run, so that it is found without an index, and carries a secret
of 192 random bits, of which only the hash is stored; whether it is good is decided by the database's filter (acts.py).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from datetime import timedelta
from typing import Any, NamedTuple

from streamline_pool.domain.errors import HookTokenError
from streamline_pool.domain.model import seconds

from .context import Context, register_hook

__all__ = ["Hook", "create_hook", "hash_token", "make_token", "run_id_of"]

_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,100}")
_TOKEN = re.compile(r"(?P<kind>~)?(?P<run>[A-Za-z0-9_-]{1,600})\.(?P<secret>[A-Za-z0-9_-]{20,100})")


class Hook(NamedTuple):
    """A way to answer the next `ctx.wait` of a step from outside, once. Give the token to nobody else."""

    token: str  # what `app.resume_hook` takes; of `A-Z a-z 0-9 _ - . ~`, so it can stand in an address as it is
    path: str  # "/hooks/" and the token, for web applications


def create_hook(ctx: Context, reason: str, *, expires_in: float | timedelta | None = None) -> Hook:
    """Make a token by which this step's next `ctx.wait` can be answered, once, from any process.

    It is registered before this returns, so an answer that comes before the wait is kept for it. `expires_in` seconds
    later (None: never) it is refused; the wait itself goes on. It dies with its wait. Needs no `await`. Raises
    InvalidStateError for a second hook in the same attempt, LeaseLostError when the run is no longer this worker's.
    """
    expires_s = None if expires_in is None else seconds(expires_in, "create_hook: expires_in")
    token = register_hook(ctx, reason, expires_s)
    return Hook(token, f"/hooks/{token}")


def make_token(run_id: str, secret: str) -> str:
    """The token of a run: its id (encoded, if it holds characters that an address cannot) and the secret."""
    if _PLAIN.fullmatch(run_id):
        return f"{run_id}.{secret}"
    return f"~{base64.urlsafe_b64encode(run_id.encode()).decode().rstrip('=')}.{secret}"


def run_id_of(token: Any) -> str:
    """The run that a token names. HookTokenError for what is no token at all."""
    match = _TOKEN.fullmatch(token) if isinstance(token, str) and len(token) <= 800 else None
    if match is None:
        raise HookTokenError("this is no hook token; pass it exactly as create_hook gave it")
    if match["kind"] is None:
        return match["run"]
    try:
        return base64.b64decode(match["run"] + "=" * (-len(match["run"]) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise HookTokenError("this is no hook token; pass it exactly as create_hook gave it") from None


def hash_token(token: str) -> bytes:
    """What is stored of a token. Its secret is random and long, so a plain hash cannot be guessed back."""
    return hashlib.sha256(token.encode()).digest()
