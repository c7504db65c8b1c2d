"""Text that does not compress, of any size: what steps with an output return, and what raw writers write instead."""

from __future__ import annotations

import base64
import functools
import random

__all__ = ["text_of"]

_POOL_BYTES = 1024 * 1024


@functools.cache
def _pool() -> str:
    """One text of which each output is a part. It is random, so that the server's compression finds no repetition in an output."""
    return base64.b64encode(random.Random(1).randbytes(_POOL_BYTES * 3 // 4)).decode()


def text_of(size: int) -> str:
    """So many characters, one byte each, that are a different part of the pool at each call; at most 512 KiB."""
    start = random.randrange(_POOL_BYTES - size)
    return _pool()[start : start + size]
