"""The installed version of this package. Owns the one place that asks for it."""

from __future__ import annotations

from importlib import metadata

__all__ = ["package_version"]


def package_version() -> str:
    """The installed version, such as `0.1.0`. A source tree that was never installed has none: `(not installed)`."""
    try:
        return metadata.version("streamline-pool")
    except metadata.PackageNotFoundError:
        return "(not installed)"
