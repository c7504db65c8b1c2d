"""The application of the demonstration: one run per Python file, `read` -> `parse` -> `save`. What pools import.

Owns what is counted in a file. The demonstration around it is in program.py.
"""

from __future__ import annotations

import ast
import threading
import warnings
from pathlib import Path
from typing import Any

from streamline_pool import Context, Streamline

__all__ = ["COUNTED", "app", "count_source", "index", "saved"]

warnings.filterwarnings("ignore", category=SyntaxWarning)  # the tests of the library contain doubtful code on purpose

app = Streamline()
# One attempt: a lost worker uses up none, and any other failure must be visible.
index = app.workflow("stdlib-index", defaults={"retries": 1})

parsing = threading.Lock()  # in CPython 3.11 `ast.parse` fails when several threads call it at once; the GIL allows only one anyway

COUNTED = ("files", "bytes", "lines", "functions", "classes", "imports", "unparsable")
"""What is counted in each file. The totals are compared."""


@index.step
def read(ctx: Context) -> bytes:
    """The bytes of the file. They are stored as the output, some 30 MB in total. So a `parse` that is repeated by another
    worker after a crash gets the same bytes, even if the file has changed."""
    return Path(ctx.input["path"]).read_bytes()


@index.step
def parse(ctx: Context) -> dict[str, int]:
    """CPU-bound, so a `def`: it runs on a thread and does not block the worker's event loop."""
    return count_source(ctx.get_output("read"))


@index.step
def save(ctx: Context) -> None:
    """One document per run. After a crash between this write and that of the engine, the next worker saves again, under
    the same key."""
    document = {"path": ctx.input["path"], "run": ctx.run_id, **ctx.get_output("parse")}
    saved().update_one({"_id": ctx.idempotency_key}, {"$setOnInsert": document}, upsert=True)


def count_source(source: bytes) -> dict[str, int]:
    """The counts of one file. Some files of the library are no Python 3 on purpose; they count as unparsable."""
    counts = dict.fromkeys(COUNTED, 0) | {"files": 1, "bytes": len(source), "lines": len(source.splitlines())}
    try:
        with parsing:
            tree = ast.parse(source)  # detects the encoding itself
    except (SyntaxError, ValueError):
        return counts | {"unparsable": 1}
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                counts["functions"] += 1
            case ast.ClassDef():
                counts["classes"] += 1
            case ast.Import() | ast.ImportFrom():
                counts["imports"] += len(node.names)
    return counts


def saved() -> Any:
    """The collection of results, in the same database as the runs."""
    return app.runs.database["files"]
