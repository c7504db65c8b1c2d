"""Any text as a setting, in every place: valid settings, or one line that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_in_process import command_process, invoked
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamline_pool.config.settings import OPTIONS, ConfigFile, SettingError, Settings, read_files, resolve

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")  # Hypothesis, of the strategies

NAMES = [option.name for option in OPTIONS]
HUGE = "9" * 400

# What an argument or a variable can hold: Python gives bytes that are not UTF-8 as lone surrogates.
NEARLY = [
    "0", "-1", HUGE, "1e400", "nan", "inf", f"{HUGE}GiB", f"{HUGE}d", "٣", "²", "1_0", "none", "auto", "true", "a,b", ",", "x" * 200,
    "mongodb://", "mongodb://h:²", "mongodb://[", "mongodb://u:\udcff@h", "mongodb://a@b@c", "mongodb://h/\udcff", "mongodb+srv://\udcff",
    "\udcff", "$", "system.", "a:b:c", "a.b:c", "::1%x",
]  # fmt: skip
typed = st.one_of(st.sampled_from(NEARLY), st.text(st.characters(exclude_characters="\0"), max_size=12))
toml_values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(typed, st.integers(), st.just(2**2000), st.floats(), st.booleans(), st.dates(), st.times(), st.datetimes()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(typed, inner, max_size=2)),
    max_leaves=4,
)
some_settings = st.dictionaries(st.sampled_from(NAMES), typed, max_size=3)


def check_refusal(error: SettingError, origins: set[str]) -> None:
    """One line, which names the place and repeats no long value; the origin decides the exit code."""
    assert "\n" not in error.message, error.message
    assert error.origin in origins, error.origin
    assert 0 < len(error.message) < 1_500, error.message
    error.message.encode("utf-8", "backslashreplace")


def check_resolved(flags: dict[str, Any], environ: dict[str, str], files: list[ConfigFile]) -> bool:
    """True: accepted."""
    try:
        resolved = resolve(flags, environ, files)
    except SettingError as exc:
        check_refusal(exc, {"flag", "environment", "file"})
        return False
    assert isinstance(resolved.settings, Settings)
    assert all(resolved.source(name).kind in ("flag", "environment", "file", "default") for name in NAMES)
    return True


def check_anywhere(flags: dict[str, str], environ: dict[str, str], entries: dict[str, Any]) -> None:
    variables = {option.env: environ[option.name] for option in OPTIONS if option.name in environ}
    check_resolved({name: (value,) if name == "queue" else value for name, value in flags.items()}, variables, [ConfigFile("f", entries)])


entries = st.dictionaries(st.one_of(st.sampled_from(NAMES), typed), toml_values, max_size=3)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(some_settings, some_settings, entries)
@example({}, {}, {"lease": 2**2000})
@example({"max-rss": f"{HUGE}GiB"}, {}, {})
@example({}, {"database": "\udcff"}, {})
def test_any_setting_is_valid_or_refused_in_one_line(flags: dict[str, str], environ: dict[str, str], given_in_file: dict[str, Any]) -> None:
    """A traceback at the start tells an operator nothing, and one from a worker restarts it for ever."""
    check_anywhere(flags, environ, given_in_file)


@pytest.mark.slow
@settings(max_examples=1_000, deadline=None)
@given(some_settings, some_settings, entries)
def test_any_setting_is_valid_or_refused_in_one_line_long(flags: dict[str, str], environ: dict[str, str], in_file: dict[str, Any]) -> None:
    """As above, with many more."""
    check_anywhere(flags, environ, in_file)


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_takes_every_awkward_text_or_refuses_it(name: str) -> None:
    env = next(option.env for option in OPTIONS if option.name == name)
    accepted = [
        text
        for text in NEARLY
        if check_resolved({name: (text,) if name == "queue" else text}, {}, [])
        + check_resolved({}, {env: text}, [])
        + check_resolved({}, {}, [ConfigFile("f", {name: text})])
    ]
    assert len(accepted) < len(NEARLY)


@pytest.mark.parametrize("name", NAMES)
def test_a_number_with_more_digits_than_python_writes_is_refused(name: str) -> None:
    """TOML has such numbers in hexadecimal, and the error text shows what was found."""
    assert not check_resolved({}, {}, [ConfigFile("f", {name: 2**20_000})])


BROKEN_FILES = {
    "not TOML": b"workers = \n",
    "not UTF-8": b"\xff\xfe",
    "a number that is too long for Python": b"workers = " + b"1" * 5000,
    "nested too deep": b"queue = " + b"[" * 5000,
    "a NUL": b"workers = 1\0",
    "keys twice": b"workers = 1\nworkers = 2",
    "a date that does not exist": b"workers = 2026-02-31",
    "tables": b"[workers]\nx = 1\n[tool.streamline-pool]\n[tool]",
}


@pytest.mark.parametrize("content", BROKEN_FILES.values(), ids=BROKEN_FILES)
@pytest.mark.parametrize("name", ["streamline-pool.toml", "pyproject.toml"])
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    try:
        files = read_files(tmp_path)
    except SettingError as exc:
        check_refusal(exc, {"file"})
        assert name in exc.message
    else:
        assert not check_resolved({}, {}, files) or not any(file.entries for file in files)


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=60), st.builds(lambda key, value: f"{key} = {value!r}".encode(errors="surrogateescape"), typed, toml_values)
    )
)
def test_any_bytes_in_a_file_are_settings_or_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "streamline-pool.toml").write_bytes(content)
    try:
        files = read_files(folder)
    except SettingError as exc:
        check_refusal(exc, {"file"})
    else:
        check_resolved({}, {}, files)


def check_command(text: str, names: list[str]) -> None:
    for option in OPTIONS:
        if option.name in names:
            done = invoked(["--print-config", "--json"], {option.env: text})
            assert "Traceback" not in done.err, (option.name, done.err)
            assert done.code in (0, 78), (option.name, done)
            if done.code == 0:
                assert json.loads(done.out)["workers"]
            else:
                assert done.err.count("\n") == 1, done.err


@pytest.mark.parametrize("text", ["mongodb://h/\udcff", "\udcff", f"{HUGE}GiB", "none"], ids=ascii)
def test_the_command_says_it_in_one_line_too(tmp_path: Path, text: str) -> None:
    """What `resolve` accepts must also survive what the command does with it, such as hiding the password."""
    with command_process(tmp_path):
        check_command(text, ["mongodb-uri", "database", "max-rss", "app"])


@pytest.mark.slow
def test_the_command_says_it_in_one_line_for_every_setting_and_text(tmp_path: Path) -> None:
    """As above, with all of them."""
    with command_process(tmp_path):
        for text in NEARLY:
            check_command(text, NAMES)
