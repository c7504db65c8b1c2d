"""`--json` on stored documents: plain JSON, whatever BSON types they hold."""

from __future__ import annotations

import re
from typing import Any

import bson
from bson.decimal128 import Decimal128
from bson.regex import Regex
from bson.timestamp import Timestamp
from cli_shell import Shell

from streamline_pool import Streamline


def test_no_document_shows_a_value_as_python_writes_it(shell: Shell, app: Streamline) -> None:
    """A script that feeds `--json` to jq cannot parse `Timestamp(…)`."""
    typed: dict[str, Any] = {
        "timestamp": Timestamp(1_700_000_000, 3),
        "id": bson.ObjectId(),
        "pattern": Regex("^a", "i"),
        "price": Decimal128("0.10"),
        "blob": b"\x00",
    }
    flow = app.workflow("typed", steps={"only": lambda ctx: 1})
    run = flow.start(typed)
    shown = shell("runs", "show", run.id, "--json")
    listed = shell("runs", "list", "--json")
    table = shell("runs", "show", run.id)
    for done in (shown, listed, table):
        assert done.returncode == 0, done.stderr
        assert not re.search(r"(Timestamp|ObjectId|Regex|Decimal128|Binary|datetime\w*)\(", done.stdout), done.stdout
    stored = shell.json("runs", "show", run.id)
    assert set(stored["bornAt"]) == {"t", "i"}
    assert stored["input"] == {
        "timestamp": {"t": 1_700_000_000, "i": 3},
        "id": str(typed["id"]),
        "pattern": {"pattern": "^a", "options": "i"},
        "price": "0.10",
        "blob": "AA==",
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", stored["createdAt"])
