"""The shape of the code, read from its source: which package may import which, who may touch what, how long a file may get."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINES_MAX = 500

# A package imports only from packages above it in this table: type-checking imports count, and imports in functions do, too.
LAYERS = {
    "domain": "what a run is and which moves it may make; pure",
    "config": "settings and environment",
    "protocol": "every operation on the database, as data",
    "storage": "performs operations; the only importer of PyMongo",
    "events": "what happened, published to subscribers",
    "engine": "drives one run that is held",
    "client": "what applications hold",
    "worker": "decides which runs to hold",
    "embedded": "a private server",
    "testing": "the kit for users' tests",
    "demo": "an application to try the pool with, and the program around it",
    "chaos": "faults on two pools of its own, and a judgement",
    "supervisor": "processes, pipes, signals, the command",
}
# The same within `supervisor`, for its packages and the modules beside them.
SUPERVISOR_LAYERS = ["log_stream", "logs", "ipc", "steward", "worker_process", "pool", "cli"]
# Public import paths that own nothing: each may import from every layer of `streamline_pool` but `supervisor`.
FACADES = {"streamline_pool", "streamline_pool.errors", "streamline_pool.settings"}

ALLOWED_ENTROPY = {"streamline_pool.config.env", "streamline_pool.embedded.server", "streamline_pool.embedded.watcher"}
# `embedded` talks to a server of its own before there is a client: a handful of commands, encoded by hand.
ALLOWED_DRIVER = {
    "streamline_pool.storage.base": {"pymongo", "bson"},
    "streamline_pool.storage.driver_errors": {"pymongo", "bson"},
    "streamline_pool.storage.store": {"pymongo"},
    "streamline_pool.storage.target": {"pymongo"},
    "streamline_pool.protocol.codec": {"bson"},
    "streamline_pool.protocol.plain_json": {"bson"},
    "streamline_pool.embedded.wire": {"bson"},
    "streamline_pool.chaos.wire": {"bson"},  # the proxy replaces addresses in the server's replies
}
# Public in spite of the underscore: the standard library's names, which would otherwise collide with users' fields.
PUBLIC_UNDERSCORES = {"_exit", "_replace", "_asdict", "_fields"}
# The driver offers no public way to ask which clients are open; forking with one is unsafe.
ALLOWED_PRIVATE = {"streamline_pool.storage.store": {"_clients", "_opened", "_closed"}}


@dataclass(frozen=True)
class Module:
    """One source file under its importable name."""

    name: str
    path: Path
    tree: ast.Module
    is_package: bool

    @property
    def layer(self) -> str:
        """`engine` for streamline_pool.engine.leases; "" for a facade."""
        return "" if self.name in FACADES else self.name.split(".")[1]


def _modules() -> Iterator[Module]:
    folders = {"streamline_pool": ROOT / "streamline_pool", "streamline_pool.supervisor": ROOT / "supervisor"}
    for prefix, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            inner = path.relative_to(folder).with_suffix("").parts
            if prefix == "streamline_pool" and inner[0] == "supervisor":
                continue  # the link, which Python 3.13 follows
            parts = [prefix, *(inner[:-1] if inner[-1] == "__init__" else inner)]
            yield Module(".".join(parts), path, ast.parse(path.read_text(), str(path)), inner[-1] == "__init__")


MODULES = {module.name: module for module in _modules()}


def every_module(rule: Callable[[Module], None]) -> Callable[[], None]:
    """A test of one rule over all modules, which names every offender at once: a thousand small tests would cost ten seconds."""

    @functools.wraps(rule)
    def test() -> None:
        complaints = []
        for module in MODULES.values():
            try:
                rule(module)
            except AssertionError as exc:
                complaints.append(str(exc).partition("\n")[0])
        assert not complaints, "\n".join(complaints)

    del test.__wrapped__  # or pytest would read the rule's parameter as a fixture
    return test


def imported(module: Module) -> Iterator[str]:
    """The absolute name of everything that is imported anywhere in the file: modules, and names that are no modules."""
    package = module.name if module.is_package else module.name.rpartition(".")[0]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def ours(module: Module) -> set[str]:
    """Names of the modules of ours that a module imports. Importing a name from a package counts as importing the package."""
    found = set()
    for name in imported(module):
        target = name if name in MODULES else name.rpartition(".")[0]
        if target in MODULES and target != module.name:
            found.add(target)
    return found


def test_every_package_has_its_place_in_the_order() -> None:
    assert {module.layer for module in MODULES.values()} - {""} == set(LAYERS)
    assert {name.split(".")[2] for name in MODULES if name.startswith("streamline_pool.supervisor.")} == set(SUPERVISOR_LAYERS)


@every_module
def test_a_module_imports_only_from_packages_below_it(module: Module) -> None:
    """An upward import makes two packages one: neither can be understood, tested or replaced alone."""
    order = list(LAYERS)
    for name in ours(module):
        layer = MODULES[name].layer
        if not module.layer:
            assert layer != "supervisor", f"{module.name} is imported by every user, and {name} belongs to the command"
        elif not layer:
            # The root package is what users import. Inside, a name is imported from the module that defines it.
            assert module.layer in ("supervisor", "testing", "demo", "chaos"), f"{module.name} imports the facade {name}"
        else:
            assert order.index(layer) <= order.index(module.layer), f"{module.name} imports {name}, which lies above it"


@every_module
def test_a_module_of_the_supervisor_imports_only_from_those_below_it(module: Module) -> None:
    """As above, for the packages within `supervisor`."""
    place = _supervisor_place(module.name)
    for name in ours(module):
        below = _supervisor_place(name)
        assert place is None or below is None or below <= place, f"{module.name} imports {name}, which lies above it"


def _supervisor_place(name: str) -> int | None:
    parts = name.split(".")
    return SUPERVISOR_LAYERS.index(parts[2]) if len(parts) > 2 and parts[1] == "supervisor" else None


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Modules in a circle are one module in several files."""
    graph = {name: {found for found in ours(module) if found not in FACADES} for name, module in MODULES.items()}
    while free := [name for name, needs in graph.items() if not needs or not any(name in others for others in graph.values())]:
        graph = {name: needs - set(free) for name, needs in graph.items() if name not in free}
    assert not graph, f"these import each other in circles: {graph}"


@every_module
def test_every_package_says_what_it_owns_and_what_it_must_never_do(module: Module) -> None:
    if module.is_package and module.name not in FACADES:
        text = ast.get_docstring(module.tree) or ""
        assert "Owns" in text, f"{module.name} does not say what it owns"
        assert "must never" in text, f"{module.name} does not say what it must never do"


@every_module
def test_every_module_says_what_is_public(module: Module) -> None:
    if (module.is_package and module.name not in FACADES and len(module.tree.body) == 1) or module.path.name == "__main__.py":
        return  # a package without names of its own; a program
    listed = [node for node in module.tree.body if isinstance(node, ast.Assign | ast.AnnAssign) and "__all__" in _targets(node)]
    assert len(listed) == 1, f"{module.name} has no __all__"
    names = ast.literal_eval(ast.unparse(listed[0].value or ast.List([])))
    missing = set(names) - {name for node in ast.walk(module.tree) for name in _defined(node)}
    assert not missing, f"{module.name}.__all__ names {missing}, which it does not define"


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    return [ast.unparse(target) for target in (node.targets if isinstance(node, ast.Assign) else [node.target])]


def _defined(node: ast.AST) -> list[str]:
    match node:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
            return [name]
        case ast.ImportFrom(names=names):
            return [alias.asname or alias.name for alias in names]
    return []


@every_module
def test_clocks_and_entropy_are_read_by_env_alone(module: Module) -> None:
    """A hidden clock cannot be jumped, hidden chance cannot be repeated."""
    if module.name in ALLOWED_ENTROPY or module.layer in ("supervisor", "demo", "chaos"):
        return  # they time real processes; the pure parts of the supervisor take `now` as an argument
    found = {name.split(".")[0] for name in imported(module)} & {"time", "random", "uuid", "secrets"}
    calls = [ast.unparse(node.func) for node in ast.walk(module.tree) if isinstance(node, ast.Call)]
    found |= {call for call in calls if call in ("os.urandom", "datetime.now", "datetime.utcnow", "datetime.today")}
    assert not found, f"{module.name} uses {found}"


@every_module
def test_pymongo_is_touched_by_storage_alone(module: Module) -> None:
    """A module that calls the driver has to know the driver's errors, too."""
    found = {name.split(".")[0] for name in imported(module)} & {"pymongo", "bson", "gridfs"}
    assert found <= ALLOWED_DRIVER.get(module.name, set()), f"{module.name} imports {found}"


@every_module
def test_no_module_reaches_into_the_private_parts_of_another(module: Module) -> None:
    """A private name that other modules use cannot be changed by the one who owns it. A class shares those of its base class."""
    own = {name for shared in (module, *_modules_of_bases(module)) for node in ast.walk(shared.tree) for name in _private_names(node)}
    used = {node.attr for node in ast.walk(module.tree) if isinstance(node, ast.Attribute) and _is_private(node.attr)}
    foreign = used - own - PUBLIC_UNDERSCORES - ALLOWED_PRIVATE.get(module.name, set())
    assert not foreign, f"{module.name} uses {foreign} of other modules"


def _modules_of_bases(module: Module) -> list[Module]:
    """The modules of ours, other than this one, that define the base classes of its classes, and the bases of those."""
    bases = {
        base.id for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef) for base in node.bases if isinstance(base, ast.Name)
    }
    places = {name.rpartition(".")[0] for name in imported(module) if name.rpartition(".")[2] in bases}
    found = [MODULES[place] for place in sorted(places) if place in MODULES]
    return found + [above for each in found for above in _modules_of_bases(each)]


def _private_names(node: ast.AST) -> list[str]:
    """Private names that this node defines: functions, classes, fields, `self._x = …`, and `__slots__`."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
            return [name]
        case ast.AnnAssign(target=ast.Name(id=name)) | ast.Name(id=name, ctx=ast.Store()):
            return [name]
        case ast.Constant(value=str(name)):
            return [name]
    return []


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@every_module
def test_no_module_is_longer_than_a_reader_can_hold(module: Module) -> None:
    lines = len(module.path.read_text().splitlines())
    assert lines <= LINES_MAX, f"{module.name} has {lines} lines"
