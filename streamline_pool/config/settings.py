"""Every setting of the pool: its meaning, its legal values, and the source of its value.

Owns the names of all options (`--max-rss` is `STREAMLINE_MAX_RSS` is `max-rss` in a file) and their precedence:
flag > environment > file > code of the application > default. The entry point resolves them once into the frozen `Settings`
and passes that down. Only `read_files` does I/O. This module imports no application, prints nothing and chooses no exit code.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from streamline_pool.domain.errors import ValidationError

from . import parsing as values
from .parsing import redact_text, redact_uri

__all__ = [
    "DEFAULT_MONGODB_URI",
    "OPTIONS",
    "ConfigFile",
    "Option",
    "Resolved",
    "SettingError",
    "Settings",
    "Source",
    "read_files",
    "redact_text",
    "redact_uri",
    "resolve",
]

DEFAULT_MONGODB_URI = "mongodb://127.0.0.1:27017/streamline"
"""Where `mongod` listens by default."""

_IDLE_BEAT_MAX_S = 5.0  # a guess: rarer beats save nothing that can be measured


class SettingError(ValidationError):
    """A setting has an illegal value. `origin` says where to correct it: "flag", "environment", "file" or "code"."""

    def __init__(self, message: str, *, option: str = "", origin: str = "code", **context: Any) -> None:
        super().__init__(message, option=option, origin=origin, **context)
        self.option = option
        self.origin = origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How one pool, or one program that uses the engine, behaves. Raises SettingError for an illegal value. Never changed."""

    mongodb_uri: str = field(default=DEFAULT_MONGODB_URI, repr=False)
    """Connection string. May hold a password, so it is not in `repr`; show it through `redact_uri` only."""
    database: str | None = None
    """Database name; None: the one in the URI, else `streamline`."""
    collection_prefix: str = "workflow_"
    """Put before `runs`, `hosts`, … to name the collections. The default is that of streamline, whose data is thereby found."""
    app: str | None = None
    """The application as `module:attribute`; None: not given (only the pool and `check` need it)."""
    workers: int = 1
    """Worker processes, 1..1024. The command's default is `auto`: one per CPU that it may use, because handlers hold the GIL."""
    concurrency: int = 200
    """Active runs per worker, 1..10000. Measured: two full group commits overlap with 200, and never with 100."""
    queues: tuple[str, ...] = ()
    """Queues to work on; empty: every queue of the application's workflows."""
    embedded: bool = False
    """Start a private mongod under `.streamline/` and use it instead of `mongodb_uri`."""
    burst: bool = False
    """Stop when no run is claimable and no run is active."""
    drain_timeout_s: float = 30.0
    """Seconds that running steps have to finish after SIGTERM. Users of Kubernetes and systemd expect 30 or more."""
    log_format: Literal["text", "json"] = "text"
    """One line per event for people, or one JSON object per line for machines."""
    log_level: str = "info"
    """Least severe level that is logged: debug, info, warning, error or critical."""
    health_port: int | None = None
    """TCP port of the health endpoint, 0..65535 (0: any free one); None: no endpoint."""
    health_host: str = "127.0.0.1"
    """Address or name on which the health endpoint listens. Its answers need no password, so the default is this machine alone."""
    max_rss_bytes: int | None = None
    """Resident memory above which a worker is drained and replaced; None: no limit."""
    max_runs_per_worker: int | None = None
    """Runs after which a worker is drained and replaced; None: no limit."""
    lease_s: float = 30.0
    """Seconds that the runs of a dead host wait for another host. A guess: three renewals, each ten seconds, may fail."""
    stall_timeout_s: float = 30.0
    """Seconds without a heartbeat of its event loop after which a worker is killed. A guess: as long as the lease."""
    max_crashes: int = 3
    """Workers that are lost at one step of a run before the run fails with WORKER_CRASHED. One may be chance, three are not."""
    restart_budget: int = 10
    """Crash restarts per minute; with one more the pool exits with code 1. A guess: a crash loop exceeds it within seconds."""
    sweep_interval_s: float = 6.0
    """Seconds between polls for due runs that no signal announced. Derived: a fifth of the lease."""
    beat_interval_s: float = 1.0
    """Seconds between heartbeats of a worker. Derived: at most a fifth of the stall timeout, so that four may be late."""

    @property
    def idle_beat_interval_s(self) -> float:
        """Seconds between heartbeats of a process that is idle and has nothing new to report. A stall is noticed no later for it.

        Derived: at most a fifth of the stall timeout, so that four may be late; not more than five seconds.
        """
        return max(self.beat_interval_s, min(_IDLE_BEAT_MAX_S, self.stall_timeout_s / 5))

    def __post_init__(self) -> None:
        for option in OPTIONS:
            value = getattr(self, option.field)
            if value is None and option.optional:
                continue
            try:
                option.check(value)
            except ValueError as exc:
                raise SettingError(f"{option.field}: {exc}", option=option.name) from None
        if self.beat_interval_s >= self.stall_timeout_s:
            raise SettingError(
                f"beat-interval ({self.beat_interval_s:g} s) must be shorter than stall-timeout ({self.stall_timeout_s:g} s), "
                "or healthy workers would be killed",
                option="beat-interval",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One setting as a user gives it. It has the same name in all places."""

    name: str  # "max-rss", so --max-rss, STREAMLINE_MAX_RSS, max-rss (or max_rss) in a file
    field: str  # the field of Settings it fills
    parse: Callable[[Any], Any]  # text or TOML value -> field value; ValueError says what was expected
    check: Callable[[Any], Any]  # field value -> field value; ValueError likewise
    optional: bool = False  # "none" removes the value of a weaker source
    kind: Literal["value", "flag", "list"] = "value"

    @property
    def env(self) -> str:
        """The environment variable."""
        return "STREAMLINE_" + self.name.upper().replace("-", "_")


def _number(name: str, field_name: str, low: int, high: int, *, optional: bool = False) -> Option:
    check = values.whole(low, high)
    return Option(name=name, field=field_name, parse=lambda raw: check(values.integer(raw)), check=check, optional=optional)


def _duration(name: str, field_name: str, low: float) -> Option:
    check = values.seconds(low)
    return Option(name=name, field=field_name, parse=lambda raw: check(values.duration(raw)), check=check)


def _text(name: str, field_name: str, check: Callable[[Any], Any], *, optional: bool = False) -> Option:
    return Option(name=name, field=field_name, parse=check, check=check, optional=optional)


def _flag(name: str, field_name: str) -> Option:
    return Option(name=name, field=field_name, parse=values.boolean, check=values.is_boolean, kind="flag")


_WORKERS = values.whole(1, 1024)
_BYTES = values.whole(1, 2**62)

OPTIONS: tuple[Option, ...] = (
    _text("app", "app", values.app_path, optional=True),
    _text("mongodb-uri", "mongodb_uri", values.mongodb_uri),
    _text("database", "database", values.database_name, optional=True),
    _text("collection-prefix", "collection_prefix", values.collection_prefix),
    _flag("embedded", "embedded"),
    Option(name="workers", field="workers", parse=lambda raw: _WORKERS(values.integer(raw)), check=_WORKERS),
    _number("concurrency", "concurrency", 1, 10_000),
    Option(name="queue", field="queues", parse=values.names, check=values.are_names, kind="list"),
    _flag("burst", "burst"),
    _duration("drain-timeout", "drain_timeout_s", 0.0),
    _text("log-format", "log_format", values.one_of("text", "json")),
    _text("log-level", "log_level", values.one_of("debug", "info", "warning", "error", "critical")),
    _number("health-port", "health_port", 0, 65_535, optional=True),
    _text("health-host", "health_host", values.bind_host),
    Option(name="max-rss", field="max_rss_bytes", parse=lambda raw: _BYTES(values.size(raw)), check=_BYTES, optional=True),
    _number("max-runs-per-worker", "max_runs_per_worker", 1, 2**53, optional=True),
    _duration("lease", "lease_s", 0.1),
    _duration("stall-timeout", "stall_timeout_s", 0.1),
    _number("max-crashes", "max_crashes", 1, 1000),
    _number("restart-budget", "restart_budget", 0, 100_000),
    _duration("sweep-interval", "sweep_interval_s", 0.01),
    _duration("beat-interval", "beat_interval_s", 0.01),
)
"""All settings, in the order in which `--help` and `--print-config` show them."""

_BY_NAME = {option.name: option for option in OPTIONS}


@dataclass(frozen=True, slots=True)
class Source:
    """The source of a value."""

    kind: Literal["flag", "environment", "file", "code", "default"]
    where: str  # "--workers", "STREAMLINE_WORKERS", "pyproject.toml [tool.streamline-pool]", "shop:app", "" for default


DEFAULT = Source("default", "")


@dataclass(frozen=True, slots=True)
class Resolved:
    """The settings of one process and the source of each, by option name."""

    settings: Settings
    sources: Mapping[str, Source]

    def source(self, name: str) -> Source:
        """The source of option `name` ("max-rss")."""
        return self.sources.get(name, DEFAULT)

    def with_code(self, given: Mapping[str, Any], where: str) -> Resolved:
        """The same, with the values that the application gives in code (by option name) in place of defaults.

        None: the code gives no value. `where` names the application for messages.
        """
        changed = {name: value for name, value in given.items() if value is not None and self.source(name).kind == "default"}
        source = Source("code", where)
        return Resolved(
            settings=_made(self.settings, {name: (value, source) for name, value in changed.items()}),
            sources={**self.sources, **dict.fromkeys(changed, source)},
        )


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The settings of one file, as TOML holds them."""

    label: str  # for messages: "streamline-pool.toml"
    entries: Mapping[str, Any]


def read_files(folder: Path) -> list[ConfigFile]:
    """The configuration files in `folder`, strongest first. Missing files are skipped. Raises SettingError for a broken one."""
    own = _read_toml(folder / "streamline-pool.toml")
    shared = _read_toml(folder / "pyproject.toml")
    found = [] if own is None else [ConfigFile("streamline-pool.toml", own)]
    tools = (shared or {}).get("tool")
    table = tools.get("streamline-pool") if isinstance(tools, dict) else None
    if table is not None:
        if not isinstance(table, dict):
            raise SettingError("pyproject.toml: tool.streamline-pool must be a table", origin="file")
        found.append(ConfigFile("pyproject.toml [tool.streamline-pool]", table))
    return found


def _read_toml(path: Path) -> dict[str, Any] | None:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise SettingError(f"{path.name}: cannot be read: {exc.strerror or exc}", origin="file") from None
    except (ValueError, RecursionError) as exc:  # also a number with more digits, or deeper lists, than Python reads
        raise SettingError(f"{path.name}: is not valid TOML: {redact_text(str(exc))}", origin="file") from None


def resolve(
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    files: Sequence[ConfigFile] = (),
    *,
    cpus: int = 1,
) -> Resolved:
    """Settings from `flags` (option name -> given value, None: not given), then `environ`, then `files` in order.

    `cpus` is the value of `workers = auto`, the default. An environment variable that is empty counts as not set. Raises
    SettingError, whose `origin` distinguishes a mistyped flag from a bad file or environment.
    """
    chosen: dict[str, tuple[Any, Source]] = {}
    layers = [*(_file_layer(file) for file in reversed(files)), _environ_layer(environ), _flag_layer(flags)]
    for layer in layers:  # weakest first, so that the strongest source decides
        for option, raw, source in layer:
            chosen[option.name] = (_parsed(option, raw, source, cpus), source)
    derived = {"workers": (cpus, DEFAULT)} | _derived_intervals(chosen)
    return Resolved(
        settings=_made(Settings(), derived | chosen),
        sources={option.name: chosen[option.name][1] if option.name in chosen else DEFAULT for option in OPTIONS},
    )


_Layer = Iterable[tuple[Option, Any, Source]]


def _flag_layer(flags: Mapping[str, Any]) -> _Layer:
    for name, raw in flags.items():
        if raw is not None and raw != ():
            yield _BY_NAME[name], raw, Source("flag", f"--{name}")


def _environ_layer(environ: Mapping[str, str]) -> _Layer:
    for option in OPTIONS:
        raw = environ.get(option.env, "")
        if raw.strip():
            yield option, raw.strip(), Source("environment", option.env)


def _file_layer(file: ConfigFile) -> _Layer:
    for key, raw in file.entries.items():
        option = _BY_NAME.get(key.replace("_", "-"))
        if option is None:
            near = difflib.get_close_matches(key.replace("_", "-"), _BY_NAME, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "known keys: " + ", ".join(_BY_NAME)
            raise SettingError(f"{file.label}: unknown key {key!r}; {hint}", option=key, origin="file")
        yield option, raw, Source("file", file.label)


def _parsed(option: Option, raw: Any, source: Source, cpus: int) -> Any:
    """The field value of `raw`. The SettingError names the place, the value and what was expected."""
    word = raw.strip().lower() if isinstance(raw, str) else None
    if option.optional and word == "none":
        return None
    if option.name == "workers" and word == "auto":
        return cpus
    try:
        return option.parse(raw)
    except ValueError as exc:
        place = f"{source.where}: {option.name}" if source.kind == "file" else source.where
        raise SettingError(f"{place}: {exc}", option=option.name, origin=source.kind) from None


def _derived_intervals(chosen: Mapping[str, tuple[Any, Source]]) -> dict[str, tuple[Any, Source]]:
    """The intervals of sweeps and heartbeats become shorter with the lease or the stall timeout, unless they are set themselves."""
    base = Settings()
    lease_s = chosen["lease"][0] if "lease" in chosen else base.lease_s
    stall_s = chosen["stall-timeout"][0] if "stall-timeout" in chosen else base.stall_timeout_s
    return {
        "sweep-interval": (min(base.sweep_interval_s, lease_s / 5), DEFAULT),
        "beat-interval": (min(base.beat_interval_s, stall_s / 5), DEFAULT),
    }


def _made(base: Settings, chosen: Mapping[str, tuple[Any, Source]]) -> Settings:
    """`base` with the `chosen` values. Two values that contradict each other count as an error of the stronger source."""
    try:
        return replace(base, **{_BY_NAME[name].field: value for name, (value, _) in chosen.items()})
    except SettingError as exc:
        kinds = {chosen[name][1].kind for name in ("beat-interval", "stall-timeout") if name in chosen}
        origin = next((kind for kind in ("flag", "environment", "file") if kind in kinds), "code")
        raise SettingError(exc.message, option=exc.option, origin=origin) from None


assert {option.field for option in OPTIONS} == {item.name for item in fields(Settings)}, "a setting without an option, or the reverse"
