"""The stored results of the parts, one JSON file each. Owns their files and the note of where and when each was measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

__all__ = ["FOLDER", "ROOT", "load", "measured_here", "store"]

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent / "results"


def measured_here() -> dict[str, str]:
    """The commit, the date, and the machine. "and changes": the tree held changes that were not committed."""
    commit = _git("rev-parse", "--short=12", "HEAD") or "unknown"
    changed = bool(_git("status", "--porcelain", "--untracked-files=no"))
    memory_gib = psutil.virtual_memory().total / 1024**3
    machine = f"{os.cpu_count()} cores, {memory_gib:.0f} GiB, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return {"commit": commit + (" and changes" if changed else ""), "date": datetime.now(UTC).strftime("%Y-%m-%d"), "machine": machine}


def store(part: str, result: Any, measured: Mapping[str, str], folder: Path = FOLDER) -> Path:
    """Write the result of a part beside the note."""
    path = folder / f"{part}.json"
    path.write_text(json.dumps({"measured": dict(measured), "result": result}, separators=(",", ":")) + "\n", "utf-8")
    return path


def load(part: str, folder: Path = FOLDER) -> dict[str, Any] | None:
    """`{measured, result}` as stored, or None for a part that was not measured."""
    path = folder / f"{part}.json"
    if not path.exists():
        return None
    stored: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return stored


def _git(*arguments: str) -> str:
    """What git prints; nothing outside of a clone."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
