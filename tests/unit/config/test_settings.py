"""Settings: what each value may be, which source wins, and that no password gets out."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamline_pool.config.parsing import has_password, redact_text, redact_uri
from streamline_pool.config.settings import (
    DEFAULT_MONGODB_URI,
    OPTIONS,
    ConfigFile,
    Resolved,
    SettingError,
    Settings,
    Source,
    read_files,
    resolve,
)


def of(name: str, raw: object) -> object:
    """The value of one option given as a flag."""
    field = next(option.field for option in OPTIONS if option.name == name)
    return getattr(resolve({name: raw}, {}).settings, field)


def refusal(flags: dict[str, object] | None = None, environ: dict[str, str] | None = None, *files: ConfigFile) -> SettingError:
    with pytest.raises(SettingError) as caught:
        resolve(flags or {}, environ or {}, files)
    return caught.value


# --- precedence -----------------------------------------------------------------------------------------------------


def test_the_stronger_source_wins_and_is_named() -> None:
    own = ConfigFile("streamline-pool.toml", {"concurrency": 3, "lease": 3})
    shared = ConfigFile("pyproject.toml [tool.streamline-pool]", {"concurrency": 4, "lease": 4, "max-crashes": 4})
    resolved = resolve({"concurrency": "1"}, {"STREAMLINE_CONCURRENCY": "2", "STREAMLINE_RESTART_BUDGET": "2"}, [own, shared])
    assert (resolved.settings.concurrency, resolved.source("concurrency")) == (1, Source("flag", "--concurrency"))
    assert (resolved.settings.restart_budget, resolved.source("restart-budget")) == (2, Source("environment", "STREAMLINE_RESTART_BUDGET"))
    assert (resolved.settings.lease_s, resolved.source("lease")) == (3.0, Source("file", "streamline-pool.toml"))
    assert (resolved.settings.max_crashes, resolved.source("max-crashes").where) == (4, "pyproject.toml [tool.streamline-pool]")
    assert resolved.source("burst") == Source("default", "")


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_option_can_be_given_in_every_place(option: object) -> None:
    """An option that one place does not know would silently keep its default there."""
    raw = {
        "app": "shop:app", "mongodb-uri": "mongodb://h/x", "database": "d", "collection-prefix": "p_", "embedded": "true", "workers": "7",
        "concurrency": "7", "queue": "a,b", "burst": "yes", "drain-timeout": "7s", "log-format": "JSON", "log-level": "DEBUG",
        "health-port": "7", "health-host": "::1", "max-rss": "7MB", "max-runs-per-worker": "7", "lease": "7", "stall-timeout": "7",
        "max-crashes": "7", "restart-budget": "7", "sweep-interval": "7", "beat-interval": "7",
    }[option.name]  # type: ignore[attr-defined]  # fmt: skip
    name, env = option.name, option.env  # type: ignore[attr-defined]
    extra = {"STREAMLINE_STALL_TIMEOUT": "60"} if name == "beat-interval" else {}
    made = [
        resolve({name: raw}, extra).settings,
        resolve({}, {env: raw, **extra}).settings,
        resolve({}, extra, [ConfigFile("f", {name: raw})]).settings,
        resolve({}, extra, [ConfigFile("f", {name.replace("-", "_"): raw})]).settings,
    ]
    assert all(settings == made[0] for settings in made)
    assert made[0] != resolve({}, extra).settings


def test_what_the_code_says_counts_only_where_nothing_else_was_said() -> None:
    said = {"mongodb-uri": "mongodb://code/x", "database": "code", "collection-prefix": None}
    resolved = resolve({"database": "flag"}, {}).with_code(said, "shop:app")
    assert resolved.settings.mongodb_uri == "mongodb://code/x"
    assert resolved.source("mongodb-uri") == Source("code", "shop:app")
    assert resolved.settings.database == "flag"
    assert resolved.settings.collection_prefix == "workflow_"


def test_an_empty_variable_counts_as_not_set() -> None:
    """Compose files and CI set variables to the empty string when they mean to leave them out."""
    resolved = resolve({}, {"STREAMLINE_MONGODB_URI": "", "STREAMLINE_QUEUE": "  "})
    assert resolved.settings.mongodb_uri == DEFAULT_MONGODB_URI
    assert resolved.settings.queues == ()


def test_none_takes_a_limit_of_a_weaker_source_away() -> None:
    file = ConfigFile("f", {"max-rss": "512MB", "health-port": 8080})
    resolved = resolve({"max-rss": "none"}, {}, [file])
    assert resolved.settings.max_rss_bytes is None
    assert resolved.settings.health_port == 8080


def test_auto_means_the_usable_cpus() -> None:
    assert resolve({}, {}, cpus=6).settings.workers == 6
    assert resolve({"workers": "AUTO"}, {}, [ConfigFile("f", {"workers": 2})], cpus=6).settings.workers == 6
    assert resolve({"workers": "3"}, {}, cpus=6).settings.workers == 3


def test_sweeps_and_beats_follow_a_shortened_lease_and_stall_timeout() -> None:
    settings = resolve({"lease": "2", "stall-timeout": "500ms"}, {}).settings
    assert settings.sweep_interval_s == pytest.approx(0.4)
    assert settings.beat_interval_s == pytest.approx(0.1)
    assert resolve({"lease": "2", "sweep-interval": "1"}, {}).settings.sweep_interval_s == 1.0


@pytest.mark.parametrize(
    ("stall", "beat", "idle"), [("30", "1", 5.0), ("10", "1", 2.0), ("1.5", "0.2", 0.3), ("2", "1.5", 1.5), ("600", "9", 9.0)]
)
def test_an_idle_worker_beats_less_often_but_several_times_within_the_stall_timeout(stall: str, beat: str, idle: float) -> None:
    settings = resolve({"stall-timeout": stall, "beat-interval": beat}, {}).settings
    assert settings.idle_beat_interval_s == pytest.approx(idle)


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "expected"),
    [("512", 512), ("512MB", 512_000_000), ("512MiB", 512 << 20), ("512m", 512 << 20), ("1.5 GiB", 3 << 29), (4096, 4096), ("1kb", 1000)],
)
def test_sizes(raw: object, expected: int) -> None:
    assert of("max-rss", raw) == expected


@pytest.mark.parametrize(
    ("raw", "expected"), [("30", 30.0), ("30s", 30.0), ("5m", 300.0), ("1.5", 1.5), ("250ms", 0.25), ("2 h", 7200.0), (0, 0.0), (2.5, 2.5)]
)
def test_durations(raw: object, expected: float) -> None:
    assert of("drain-timeout", raw) == expected


def test_queues_may_be_repeated_and_separated_by_commas() -> None:
    assert of("queue", ("a", "b,c", "a")) == ("a", "b", "c")
    assert resolve({}, {"STREAMLINE_QUEUE": "a, b"}).settings.queues == ("a", "b")
    assert resolve({}, {}, [ConfigFile("f", {"queue": ["a", "b"]})]).settings.queues == ("a", "b")


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("workers", "0"), ("workers", "many"), ("workers", "2.5"), ("workers", 2.0), ("workers", True), ("workers", "1025"),
        ("concurrency", "-1"), ("queue", ("a b",)), ("queue", (" ",)), ("queue", 3), ("drain-timeout", "-1"), ("drain-timeout", "soon"),
        ("drain-timeout", float("nan")), ("drain-timeout", float("inf")), ("lease", "0"), ("lease", "2y"), ("log-format", "xml"),
        ("log-level", "loud"), ("health-port", "70000"), ("max-rss", "0"), ("max-rss", "-5MB"), ("max-rss", "5 apples"), ("burst", "maybe"),
        ("health-host", ""), ("health-host", "[::1]"), ("health-host", "127.0.0.1:80"), ("health-host", "a b"), ("health-host", "-x"),
        ("max-crashes", "0"), ("app", "shop.py:app"), ("app", "my shop:app"), ("app", ":app"), ("app", "shop:"), ("database", "a.b"),
        ("database", ""), ("database", "x" * 64), ("collection-prefix", "system."), ("collection-prefix", "$x"),
        ("mongodb-uri", "localhost:27017"), ("mongodb-uri", "http://h"), ("mongodb-uri", "mongodb://"), ("mongodb-uri", "mongodb://h:99999"),
        ("mongodb-uri", "mongodb://h:port"), ("mongodb-uri", "mongodb://u:p@x@h"), ("mongodb-uri", "mongodb://u:a/b@h"),
        ("mongodb-uri", "mongodb://:27017"), ("mongodb-uri", "mongodb://h,,i"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_its_flag_and_what_was_expected(name: str, raw: object) -> None:
    error = refusal({name: raw})
    assert (error.origin, error.option) == ("flag", name)
    assert error.message.startswith(f"--{name}: ")


@pytest.mark.parametrize(
    "uri", ["mongodb://[::1]:27017,localhost/x", "mongodb://%2Ftmp%2Fm.sock/x", "mongodb+srv://u:p%40@c.example/x?w=1", "mongodb://h"]
)
def test_uris_that_the_driver_takes_pass(uri: str) -> None:
    assert of("mongodb-uri", uri) == uri


def test_beats_rarer_than_the_stall_timeout_are_refused() -> None:
    """Each worker would be killed before its first beat, for ever."""
    error = refusal({"stall-timeout": "5"}, {"STREAMLINE_BEAT_INTERVAL": "6"})
    assert error.origin == "flag"
    assert "beat-interval" in error.message
    assert refusal({"lease": "1"}, {"STREAMLINE_BEAT_INTERVAL": "40"}).origin == "environment"


def test_settings_made_in_code_are_checked_too() -> None:
    with pytest.raises(SettingError, match="workers: expected a number from 1 to 1024, found 0"):
        Settings(workers=0)
    with pytest.raises(FrozenInstanceError):
        Settings().workers = 2  # type: ignore[misc]
    assert {option.field for option in OPTIONS} == {field.name for field in fields(Settings)}


# --- files ----------------------------------------------------------------------------------------------------------


def test_the_own_file_beats_pyproject(tmp_path: Path) -> None:
    (tmp_path / "streamline-pool.toml").write_text('workers = 3\nqueue = ["a", "b"]\n')
    (tmp_path / "pyproject.toml").write_text('[tool.streamline-pool]\nworkers = 4\napp = "shop:app"\n')
    settings = resolve({}, {}, read_files(tmp_path)).settings
    assert (settings.workers, settings.app, settings.queues) == (3, "shop:app", ("a", "b"))


def test_no_files_and_a_foreign_pyproject_are_fine(tmp_path: Path) -> None:
    assert read_files(tmp_path) == []
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert read_files(tmp_path) == []


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool]\nstreamline-pool = 1")
    with pytest.raises(SettingError) as caught:
        read_files(tmp_path)
    assert caught.value.origin == "file"


def test_broken_toml_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "streamline-pool.toml").write_text("workers = \n")
    with pytest.raises(SettingError, match=r"streamline-pool\.toml: is not valid TOML: .*line 1") as caught:
        read_files(tmp_path)
    assert caught.value.origin == "file"


def test_an_unknown_key_names_the_nearest_one() -> None:
    error = refusal({}, {}, ConfigFile("streamline-pool.toml", {"max_runs_per_wrker": 3}))
    assert error.origin == "file"
    assert error.message == "streamline-pool.toml: unknown key 'max_runs_per_wrker'; did you mean max-runs-per-worker?"
    assert "known keys: app, " in refusal({}, {}, ConfigFile("f", {"zzzzzz": 3})).message


def test_a_wrong_value_is_blamed_on_where_it_stands() -> None:
    in_file = refusal({}, {}, ConfigFile("streamline-pool.toml", {"workers": "x"}))
    assert (in_file.origin, in_file.message) == ("file", "streamline-pool.toml: workers: expected a whole number, found 'x'")
    in_environ = refusal({}, {"STREAMLINE_WORKERS": "x"})
    assert (in_environ.origin, in_environ.message) == ("environment", "STREAMLINE_WORKERS: expected a whole number, found 'x'")


# --- passwords ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("mongodb://ann:s3cret@h/x?tls=true", "mongodb://ann:***@h/x?tls=true"),
        ("mongodb+srv://ann:s3cret@h", "mongodb+srv://ann:***@h"),
        ("mongodb://ann@h/x", "mongodb://ann@h/x"),
        ("mongodb://h:27017,i/x", "mongodb://h:27017,i/x"),
        ("mongodb://h/?tlsCertificateKeyFilePassword=s3cret&w=1", "mongodb://h/?tlsCertificateKeyFilePassword=***&w=1"),
        ("mongodb://h/?authMechanismProperties=AWS_SESSION_TOKEN:s3cret", "mongodb://h/?authMechanismProperties=***"),
        ("ann:s3cret@h", "ann:***@h"),
    ],
)
def test_redaction_keeps_what_helps_and_hides_the_password(uri: str, shown: str) -> None:
    assert redact_uri(uri) == shown
    assert has_password(uri) == (uri != shown)


@given(password=st.text(st.sampled_from("ab:/@?#&=%[] "), min_size=1, max_size=12), tail=st.sampled_from(["", "/x", "/x?w=1", ",i:2/x"]))
def test_no_password_survives_redaction_however_malformed_the_uri(password: str, tail: str) -> None:
    """People paste passwords unescaped; the message that says so must not repeat them."""
    secret = f"S{password}T"
    shown = redact_uri(f"mongodb://ann:{secret}@host{tail}")
    assert "S" not in shown
    assert "T" not in shown


def test_text_loses_uris_and_the_password_alone() -> None:
    uri = "mongodb://ann:p%40ssword@h/x"
    text = redact_text(f"cannot parse 'p@ssword' or p%40ssword in {uri}, mongodb+srv://bob:other@i", uri)
    assert text == "cannot parse '***' or *** in mongodb://ann:***@h/x, mongodb+srv://bob:***@i"


def test_neither_errors_nor_repr_show_a_password() -> None:
    error = refusal({"mongodb-uri": "mongodb://ann:s3cr/et@h"})
    assert "s3cr" not in str(error) + repr(error) + str(error.context)
    assert "s3cret" not in repr(Settings(mongodb_uri="mongodb://ann:s3cret@h"))
    assert "s3cret" not in repr(Resolved(Settings(mongodb_uri="mongodb://ann:s3cret@h"), {}))
    assert "s3cret" not in str(refusal({"app": "mongodb://ann:s3cret@h"}))
