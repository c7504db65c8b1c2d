"""The shape of the package, read from its source: who may import whom, who may touch what, how long a module may get."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "streamline_pool"
LINES_MAX = 500

# A module imports only from modules to its left. `setting_values` and `settings` know nothing of runs; `embedded` is a leaf.
ORDER = [
    "errors",
    "model",
    "progress",
    "env",
    "setting_values",
    "settings",
    "definition",
    "documents",
    "payloads",
    "transitions",
    "operations",
    "expressions",
    "ops",
    "stream_ops",
    "acts",
    "file_ops",
    "housekeeping_ops",
    "bus",
    "procedures",
    "files",
    "housekeeping",
    "indexes",
    "store",
    "timewarp",
    "tasks",
    "broadcast",
    "stream",
    "multi_update",
    "committer",
    "context",
    "hooks",
    "parallel",
    "cache",
    "attempt",
    "outcomes",
    "flight",
    "leases",
    "engine",
    "local",
    "outside",
    "workflow",
    "sending",
    "client",
    "lookout",
    "alarms",
    "worker",
    "embedded_watcher",
    "embedded",
    "borrowed",
    "testing",
    "__init__",
]

TREES = {path.stem: ast.parse(path.read_text(), str(path)) for path in sorted(PACKAGE.glob("*.py"))}
modules = pytest.mark.parametrize("module", TREES)


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of every import that is executed; relative modules begin with a dot."""
    for_types = [block for block in ast.walk(tree) if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)]
    skipped = {id(node) for block in for_types for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name) for alias in node.names)


@modules
def test_a_module_imports_only_from_modules_below_it(module: str) -> None:
    """A cycle of layers would make every part depend on every other."""
    for source, name in imports(TREES[module]):
        if source.startswith(("streamline_pool", ".")):
            below = source.removeprefix("streamline_pool").strip(".").split(".")[0] or name
            if below in ORDER:
                assert ORDER.index(below) < ORDER.index(module), f"{module} imports {below}, which lies above it"
            assert below != "supervisor", f"{module} imports the supervisor, which is built on top of it"


def test_every_module_has_its_place_in_the_order() -> None:
    assert sorted(TREES) == sorted(ORDER)


@modules
def test_every_module_says_what_is_public(module: str) -> None:
    listed = [node for node in TREES[module].body if isinstance(node, ast.Assign | ast.AnnAssign) and "__all__" in _targets(node)]
    assert len(listed) == 1, f"{module} has no __all__"
    names = ast.literal_eval(ast.unparse(listed[0].value or ast.List([])))
    missing = set(names) - {name for node in ast.walk(TREES[module]) for name in _defined(node)}
    assert not missing, f"{module}.__all__ names {missing}, which it does not define"


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    return [ast.unparse(target) for target in (node.targets if isinstance(node, ast.Assign) else [node.target])]


def _defined(node: ast.AST) -> list[str]:
    match node:
        case (
            ast.ClassDef(name=name)
            | ast.FunctionDef(name=name)
            | ast.AsyncFunctionDef(name=name)
            | ast.AsyncFunctionDef(name=name)
            | ast.Name(id=name, ctx=ast.Store())
        ):
            return [name]
        case ast.ImportFrom(names=names):
            return [alias.asname or alias.name for alias in names]
    return []


@modules
def test_clocks_and_entropy_are_read_by_env_alone(module: str) -> None:
    """A hidden clock cannot be jumped, hidden chance cannot be repeated."""
    if module in ("env", "embedded", "embedded_watcher"):  # the private mongod's watcher belongs to no engine
        return
    found = {source for source, _ in imports(TREES[module])} & {"time", "random", "uuid", "secrets"}
    calls = [ast.unparse(node.func) for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)]
    found |= {call for call in calls if call in ("os.urandom", "datetime.now", "datetime.utcnow", "datetime.today")}
    assert not found, f"{module} uses {found}"


@modules
def test_pymongo_is_touched_by_the_store_alone(module: str) -> None:
    """Whoever calls the driver elsewhere has to know its errors, too."""
    # `embedded` talks to a server of its own before there is a client: a handful of commands, encoded by hand.
    allowed = {"store": {"pymongo", "bson"}, "documents": {"bson"}, "embedded": {"bson"}}.get(module, set())
    found = {source.split(".")[0] for source, _ in imports(TREES[module])} & {"pymongo", "bson", "gridfs"}
    assert found <= allowed, f"{module} imports {found - allowed}"


@modules
def test_no_module_is_longer_than_a_reader_can_hold(module: str) -> None:
    assert len((PACKAGE / f"{module}.py").read_text().splitlines()) <= LINES_MAX
