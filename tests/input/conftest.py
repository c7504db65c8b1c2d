"""Fixtures of the tests of input."""

from __future__ import annotations

import pytest
from parked_runs import Waiting

from streamline_pool import Streamline


@pytest.fixture
def waiting(app: Streamline) -> Waiting:
    """A workflow whose runs wait in the way that their input names."""
    return Waiting(app)
