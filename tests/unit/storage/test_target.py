"""The options of the driver that the engine relies on."""

from __future__ import annotations

from streamline_pool.storage.target import DatabaseTarget


def test_connections_of_a_burst_are_not_kept_for_ever_unless_the_uri_says_so() -> None:
    """A worker would keep up to a hundred connections for the one moment in which it needed them."""
    assert DatabaseTarget("mongodb://127.0.0.1/", None, "workflow_").client_options()["maxIdleTimeMS"] == 300_000
    assert "maxIdleTimeMS" not in DatabaseTarget("mongodb://127.0.0.1/?maxIdleTimeMS=5", None, "workflow_").client_options()
