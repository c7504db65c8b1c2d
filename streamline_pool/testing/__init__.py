"""The kit for users' own tests: real workers on a real MongoDB, in the test's process, with a clock that jumps.

Owns `TestKit` and its pytest fixtures. In the top-level conftest.py: `pytest_plugins = ["streamline_pool.testing"]`.
It must never be imported by code that runs in production.
"""

import contextlib

from .kit import SERVER_VARIABLE, TestKit

with contextlib.suppress(ImportError):  # without pytest there is only the kit
    from .fixtures import streamline as streamline
    from .fixtures import streamline_server as streamline_server

__all__ = ["SERVER_VARIABLE", "TestKit"]
