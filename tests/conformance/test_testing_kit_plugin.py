"""The kit as users install it: as a plugin of pytest, and without pytest."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from streamline_pool.testing import SERVER_VARIABLE
from support import eventually, present

REPOSITORY = Path(__file__).resolve().parents[2]


def project(folder: Path) -> Path:
    """Writes the application, the conftest and the tests that docs/how-to/test-workflows.md shows."""
    text = (REPOSITORY / "docs/how-to/test-workflows.md").read_text("utf-8")
    for name, block in re.findall(r"^```python\n# ([\w.]+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        (folder / name).write_text(block)
    return folder


def run_pytest(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("STREAMLINE_", "PYTEST_"))}
    environ |= {"PYTHONPATH": str(REPOSITORY), **variables}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", "-q", *words]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=50)


@pytest.mark.slow
def test_the_project_of_the_documentation_passes_on_a_private_server_and_leaves_nothing(tmp_path: Path) -> None:
    """The documented project must work for users: without warnings, with all fixtures, and without a server left behind."""
    folder = project(tmp_path)
    with (folder / "test_orders.py").open("a") as tests:
        tests.write("\n\ndef test_where(streamline_server):\n    Path('uri').write_text(streamline_server)\n\n\nfrom pathlib import Path\n")
    done = run_pytest(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout
    port = int(present(re.search(r":(\d+)/", (folder / "uri").read_text()))[1])

    def is_gone() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) != 0

    eventually(is_gone)


@pytest.mark.slow
def test_processes_of_xdist_share_the_named_server_and_leave_no_database(tmp_path: Path, mongodb_uri: str) -> None:
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        before = set(client.list_database_names())
        done = run_pytest(project(tmp_path), "-n", "2", **{SERVER_VARIABLE: mongodb_uri})
        assert done.returncode == 0, done.stdout + done.stderr
        assert "5 passed" in done.stdout
        assert {name for name in set(client.list_database_names()) - before if name.startswith("streamline_test_")} == set()


def test_without_a_server_the_error_says_how_to_get_one(tmp_path: Path) -> None:
    folder = project(tmp_path)
    with (folder / "conftest.py").open("a") as conftest:
        conftest.write("\n\nimport sys\n\nsys.modules['fiftyone'] = None  # as if the extra were not installed\n")
    done = run_pytest(folder, PATH=str(folder))
    assert done.returncode == 1
    assert "pip install '.[testing]'" in done.stdout and SERVER_VARIABLE in done.stdout
    assert "Traceback" not in done.stdout


def test_the_kit_works_without_pytest(tmp_path: Path, mongodb_uri: str) -> None:
    """pytest is no dependency. Users of unittest can use the kit, too."""
    program = tmp_path / "plain.py"
    program.write_text(
        "import sys\n"
        "sys.modules['pytest'] = None  # as if it were not installed\n"
        "from streamline_pool import Streamline\n"
        "from streamline_pool.testing import TestKit\n"
        "app = Streamline('mongodb://127.0.0.1:1')\n"
        "flow = app.workflow('flow', steps={'only': lambda ctx: 1})\n"
        f"with TestKit({mongodb_uri!r}) as kit:\n"
        "    print(kit.run(kit.use(app).workflows['flow']).status)\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-X", "dev", "-W", "error", program], env=environ, capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)
