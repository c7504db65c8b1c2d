"""Hook tokens: created in a handler, and parsed when a caller answers with one.

Owns the form of a token and its hash. A token names its run, so the run is found without an index. It carries a secret of
192 random bits; only the hash of the token is stored. Whether a token is valid is decided by the filter in protocol/answers.py.
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
    """A way for another program to answer the next `ctx.wait` of a step, once. Every holder of the token can answer, so keep it secret."""

    token: str  # the argument of `app.resume_hook`; of `A-Z a-z 0-9 _ - . ~`, so it needs no quoting in a URL
    path: str  # "/hooks/" and the token, for web applications


def create_hook(ctx: Context, reason: str, *, expires_in: float | timedelta | None = None) -> Hook:
    """Create a token by which this step's next `ctx.wait` can be answered, once, from any process. Needs no `await`.

    reason: what the answer is about; stored with the wait.
    expires_in: seconds or a timedelta, after which the token is refused; None: never. The wait itself goes on.

    The token is registered before this returns, so an answer that comes before the wait is kept for it. The token ends
    with its wait. Raises InvalidStateError for a second hook in the same attempt, and LeaseLostError when this worker no
    longer holds the run.
    """
    expires_s = None if expires_in is None else seconds(expires_in, "create_hook: expires_in")
    token = register_hook(ctx, reason, expires_s)
    return Hook(token, f"/hooks/{token}")


def make_token(run_id: str, secret: str) -> str:
    """The token of a run: the run id and the secret. The id is encoded if it has characters that a URL cannot contain."""
    if _PLAIN.fullmatch(run_id):
        return f"{run_id}.{secret}"
    return f"~{base64.urlsafe_b64encode(run_id.encode()).decode().rstrip('=')}.{secret}"


def run_id_of(token: Any) -> str:
    """The id of the run that a token names. HookTokenError for text that has not the form of a token."""
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
    """The stored form of a token. The secret is long and random, so a plain hash cannot be reversed by guessing."""
    return hashlib.sha256(token.encode()).digest()
