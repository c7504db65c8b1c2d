"""Finds the user's `Streamline` object from `module:attribute`.

Owns every way in which that can fail, each with a message that says what to do next. A message shows no traceback of this
package, and only the user's lines of the user's code. Imports nothing else of the command.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from streamline_pool.client.app import Streamline
from streamline_pool.client.workflow import Workflow
from streamline_pool.config.settings import redact_text
from streamline_pool.domain.errors import WorkflowError

__all__ = ["AppImportError", "import_app"]

_FRAMES_SHOWN = 6
"""Enough to see the user's call chain; the last one is where it happened. A guess."""


class AppImportError(Exception):
    """The application cannot be loaded; the text is for the user, who can fix it."""


def import_app(path: str) -> tuple[Streamline, list[str]]:
    """The application at `path` ("shop.flows:app"), and the names of the threads that importing it started.

    The current folder is first on `sys.path`. `:attribute` may be dotted, may name a function without arguments that
    returns the application, and may be left out when the module has exactly one. Raises AppImportError.
    """
    module_name, _, attribute = path.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    threads_before = set(threading.enumerate())
    module = _import_module(module_name, attribute, Path(folder))
    found = _attribute(module, attribute, path) if attribute else _only_app(module)
    app = found if isinstance(found, Streamline) else _from_factory(found, module, path)
    return app, sorted(thread.name for thread in threading.enumerate() if thread not in threads_before)


def _import_module(name: str, attribute: str, folder: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        missing = exc.name or ""
        if name == missing or name.startswith(missing + "."):
            raise AppImportError(_no_such_module(name, attribute, missing, folder)) from None
        where = _user_frames(exc)
        raise AppImportError(
            f"{name} needs the module {missing!r}, which is not installed here.\n{where}"
            f"Install it into this environment ({sys.prefix}), or run the command of the environment that has it."
        ) from None
    except SyntaxError as exc:
        raise AppImportError(_syntax_error(name, exc)) from None
    except SystemExit as exc:
        raise AppImportError(
            f"{name} called sys.exit({exc.code!r}) while it was imported.\n{_user_frames(exc)}"
            'Put what runs the program under: if __name__ == "__main__":'
        ) from None
    except Exception as exc:  # noqa: BLE001 -- the user's module may raise anything
        raise AppImportError(_raised(f"importing {name}", exc)) from None


def _no_such_module(name: str, attribute: str, missing: str, folder: Path) -> str:
    local = sorted(
        {entry.stem for entry in folder.glob("*.py") if entry.stem.isidentifier() and not entry.stem.startswith("__")}
        | {entry.name for entry in folder.iterdir() if entry.is_dir() and (entry / "__init__.py").exists()}
    )
    top = name.partition(".")[0]
    lines = [f"there is no module {missing!r} (searched {folder} first, then the places that Python searches)."]
    near = difflib.get_close_matches(top, local, n=1)
    if near and near[0] != top:
        lines.append(f"Did you mean {near[0]}{name[len(top) :]}{':' + attribute if attribute else ''}?")
    elif (folder / top).is_dir() and missing != top:
        lines.append(f"The folder {top} is there, but it has no {missing.rpartition('.')[2]}.py.")
    elif local:
        shown = ", ".join(local[:8]) + (", …" if len(local) > 8 else "")
        lines.append(f"Modules in this folder: {shown}.")
    else:
        lines.append("This folder has no Python modules: change to the folder of your project and try again.")
    return " ".join(lines)


def _attribute(module: ModuleType, attribute: str, path: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            owner = module.__name__ if found is module else f"{type(found).__name__} in {path}"
            raise AppImportError(f"{owner} has no attribute {part!r}. {_candidates(module)}") from None
    return found


def _only_app(module: ModuleType) -> Streamline:
    names = _app_names(module)
    distinct = {id(getattr(module, name)) for name in names}
    if len(distinct) != 1:
        raise AppImportError(f"say which attribute of {module.__name__} to use, as {module.__name__}:NAME. {_candidates(module)}")
    app: Streamline = getattr(module, names[0])
    return app


def _from_factory(found: Any, module: ModuleType, path: str) -> Streamline:
    if isinstance(found, Workflow):
        raise AppImportError(f"{path} is the workflow {found.id!r}; name the Streamline object it was defined on. {_candidates(module)}")
    if not callable(found) or inspect.isclass(found):
        raise AppImportError(f"{path} is {_described(found)}, not a Streamline object. {_candidates(module)}")
    if inspect.iscoroutinefunction(found):
        raise AppImportError(f"{path} is an async function; the application must be made without awaiting anything.")
    if _required(found):
        raise AppImportError(f"{path} is a function that needs arguments ({', '.join(_required(found))}); a factory is called without any.")
    try:
        made = found()
    except Exception as exc:  # noqa: BLE001 -- so may the user's factory
        raise AppImportError(_raised(f"calling {path}()", exc)) from None
    except SystemExit as exc:
        raise AppImportError(f"{path}() called sys.exit({exc.code!r}).\n{_user_frames(exc)}") from None
    if not isinstance(made, Streamline):
        raise AppImportError(f"{path}() returned {_described(made)}, not a Streamline object.")
    return made


def _required(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some C callables have no signature; the call will show
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [item.name for item in parameters if item.default is inspect.Parameter.empty and item.kind not in variadic]


def _app_names(module: ModuleType) -> list[str]:
    return sorted(name for name, value in vars(module).items() if isinstance(value, Streamline))


def _candidates(module: ModuleType) -> str:
    names = _app_names(module)
    if names:
        return "Streamline objects there: " + ", ".join(f"{module.__name__}:{name}" for name in names) + "."
    where = getattr(module, "__file__", None) or "built in"
    return f"There is no Streamline object in {module.__name__} ({where}); make one with: app = Streamline()"


def _described(value: Any) -> str:
    return f"the class {value.__qualname__}" if inspect.isclass(value) else f"a {type(value).__name__}"


def _syntax_error(name: str, exc: SyntaxError) -> str:
    lines = [f"{name} cannot be read: {exc.msg} ({exc.filename or name}:{exc.lineno or '?'})"]
    if exc.text:
        text = exc.text.rstrip("\n")
        stripped = text.lstrip()
        lines.append(f"    {stripped}")
        if exc.offset and exc.offset > len(text) - len(stripped):
            lines.append("    " + " " * (exc.offset - 1 - (len(text) - len(stripped))) + "^")
    return "\n".join(lines)


def _raised(doing: str, exc: BaseException) -> str:
    """What the user's code raised. An error of this package needs no type name; the frames show where."""
    text = str(exc) if isinstance(exc, WorkflowError) else f"{type(exc).__name__}: {exc}"
    return f"{doing} failed: {redact_text(text)}\n{_user_frames(exc)}".rstrip("\n")


def _user_frames(exc: BaseException) -> str:
    """The last lines of the traceback that belong neither to the import machinery nor to this package."""
    command = str(Path(__file__).resolve().parent)
    package = str(Path(inspect.getfile(Streamline)).resolve().parent)
    frames = [
        entry
        for entry in traceback.extract_tb(exc.__traceback__)
        if not entry.filename.startswith("<frozen")
        and entry.filename != importlib.__file__
        and not _within(entry.filename, command, package)
    ]
    shown = [f"  {_short(entry.filename)}:{entry.lineno} in {entry.name}: {entry.line or ''}" for entry in frames[-_FRAMES_SHOWN:]]
    return redact_text("".join(line.rstrip(": ") + "\n" for line in shown))


def _within(filename: str, *folders: str) -> bool:
    resolved = str(Path(filename).resolve())
    return any(resolved.startswith(folder + os.sep) for folder in folders)


def _short(filename: str) -> str:
    try:
        return str(Path(filename).relative_to(Path.cwd()))
    except ValueError:
        return filename
