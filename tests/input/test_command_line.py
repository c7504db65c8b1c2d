"""Any arguments to any sub-command: one of the documented exit codes, never a traceback, whether the database answers or not."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from cli_in_process import DOCUMENTED, command_process, invoked
from cli_shell import SHOP
from hostile_values import TEXTS, VALUES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamline_pool import Streamline, ValidationError
from streamline_pool.protocol.plain_json import json_text
from streamline_pool.supervisor.cli.main import cli

NOWHERE = "mongodb://127.0.0.1:1/?serverSelectionTimeoutMS=1"
LEFT_OUT = {
    "chaos": "starts pools and servers and breaks them; tested by test_cli_chaos.py",
    "demo": "starts a server and runs for long",
    "watch": "waits for the end of a run",
    "--embedded": "starts a server",
    "--wait": "waits for the end of a run",
    "--app": "imports any module of this process; tested by test_cli.py",
    "--print-config": "tested by test_configuration.py",
}


def commands(group: click.Group, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*above, name))
        elif name not in LEFT_OUT:
            yield (*above, name), command


COMMANDS = dict(commands(cli))

TYPED = [
    *TEXTS[:-1], "", "-", "--", "-1", "0", "nan", "inf", "1e400", "9" * 400, "1" * 30, "@", "@/", "@shop.py", "@no such file", "x" * 101,
    "known", "orders", "reserve", "ask", "\udcff", "[" * 2_000, "null", "2026-02-31", "0001-01-01", "9999-12-31T23:59-12:00", "a=b", "=",
    "a.$b=1", "a=[1]", "1d", "status", "context.a.b", '"\\ud800"',
]  # fmt: skip
words = st.one_of(st.sampled_from(TYPED), st.text(max_size=6)).filter(lambda text: "\0" not in text)


@st.composite
def invocations(draw: st.DrawFn) -> list[str]:
    """The words of one invocation: a sub-command, most of its arguments, some of its options."""
    path = draw(st.sampled_from(sorted(COMMANDS)))
    typed = list(path)
    for parameter in COMMANDS[path].params:
        if isinstance(parameter, click.Argument):
            typed += draw(st.lists(words, min_size=1, max_size=1)) if draw(st.integers(0, 9)) else []
            continue
        chosen = draw(st.integers(0, 4)) == 0
        flags = [flag for flag in (*parameter.opts, *parameter.secondary_opts) if flag not in LEFT_OUT and flag != "--mongodb-uri"]
        if chosen and flags:
            flag = draw(st.sampled_from(flags))
            typed += [flag] if getattr(parameter, "is_flag", False) else [flag, draw(words)]
    return typed + (draw(st.lists(words, max_size=1)) if draw(st.integers(0, 9)) == 0 else [])


def check(typed: list[str], environ: dict[str, str]) -> None:
    done = invoked(typed, environ, stdin=typed[-1])
    assert "Traceback" not in done.err, (typed, done.err)
    assert "crash" not in done.err.split("\n")[0], (typed, done.err)
    assert done.code in DOCUMENTED, (typed, done)
    if done.code == 0 and "--json" in typed and "--help" not in typed:
        json.loads(done.out)
    if done.code != 0:
        assert done.err or done.out, (typed, done)  # `check` and `doctor` answer by their report


@pytest.fixture
def environ(app: Streamline, mongodb_uri: str, database: str, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The variables of a command on the test's database, which has some runs, in a folder with an application."""
    (tmp_path / "shop.py").write_text(SHOP)
    for workflow_id, run_id in (("orders", "known"), ("asking", "$set")):
        workflow = app.workflow(workflow_id, steps={"reserve" if workflow_id == "orders" else "ask": lambda ctx: ctx.wait("?")})
        workflow.execute(workflow.start(VALUES, run_id=run_id, tags=TEXTS, user_id="$$NOW").id)
    with command_process(tmp_path):
        yield {"STREAMLINE_MONGODB_URI": mongodb_uri, "STREAMLINE_DATABASE": database, "STREAMLINE_APP": "shop:app"}
    sys.modules.pop("shop", None)


@pytest.mark.parametrize("there", [True, False], ids=["there", "not there"])
@pytest.mark.parametrize("examples", [25, pytest.param(1_500, marks=[pytest.mark.slow, pytest.mark.timeout(900)])], ids=str)
@pytest.mark.slow
def test_any_arguments_end_with_a_documented_exit_code_and_no_traceback(environ: dict[str, str], there: bool, examples: int) -> None:
    """A traceback tells a user nothing; an exit code that is not documented tells a script something wrong."""
    used = environ if there else environ | {"STREAMLINE_MONGODB_URI": NOWHERE}

    @settings(max_examples=examples, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(invocations())
    def run(typed: list[str]) -> None:
        check(typed, used)

    run()


def test_every_command_says_what_it_does_and_refuses_what_it_does_not_know(environ: dict[str, str]) -> None:
    for path in COMMANDS:
        assert invoked([*path, "--help"], environ).code == 0
        assert invoked([*path, "--no-such-option"], environ).code == 2


AWKWARD: dict[str, list[str]] = {
    "deep JSON": ["start", "orders", "--input", "[" * 300 + "]" * 300],
    "a number beyond 64 bits": ["start", "orders", "--input", str(2**64 - 1)],
    "a surrogate in JSON": ["start", "orders", "--input", '"\\ud800"'],
    "a reference in JSON": ["start", "orders", "--input", '{"$ref": "c", "$id": 1}'],
    "an id that is not UTF-8": ["runs", "show", "\udcff"],
    "a folder as a file": ["runs", "resume", "known", "--payload", "@/"],
    "an age beyond the calendar": ["runs", "list", "--since", "999999999d"],
    "a filter by an operator": ["runs", "list", "--context", "$where=1"],
    "a number that is not whole": ["cleanup", "--days", "nan"],
    "a name with a line break": ["systemd", "--name", "a\nb"],
    "a user with a line break": ["systemd", "--user", "root\nExecStart=/bin/false"],
    "an index of a wrong path": ["init-db", "--index", "context..x"],
    "a priority beyond 32 bits": ["start", "orders", "--priority", "9" * 30],
}


def test_an_awkward_argument_is_refused_in_words(environ: dict[str, str]) -> None:
    for name, typed in AWKWARD.items():
        done = invoked(typed, environ)
        assert done.code == 2, (name, done)
        assert done.err.startswith("Error: "), (name, done)


def test_ages_that_no_run_has_are_taken(environ: dict[str, str], app: Streamline) -> None:
    for days in ("1e308", "9" * 300, "1e9"):
        assert invoked(["cleanup", "--days", days], environ).code == 0
    assert app.cleanup_old_runs(10**400) == 0
    with pytest.raises(ValidationError):
        app.workflow("later", steps={"one": lambda ctx: None}).start(start_at=10**400)


def test_what_is_typed_as_json_is_stored_as_it_is(environ: dict[str, str], app: Streamline) -> None:
    """`--input` and `--payload` are doors like any other."""
    kinds = ("an update operator", "an expression", "a removal", "a filter", "dotted keys", "an empty key", "extended JSON", "texts")
    value: Any = {kind: VALUES[kind] for kind in kinds}
    text = json_text(value)
    started = json.loads(invoked(["start", "orders", "--input", "-", "--json"], environ, stdin=text).out)
    assert started["input"] == json.loads(text) == app.runs.find_one({"_id": started["_id"]})["input"]
    assert invoked(["runs", "resume", "known", "--payload", "-"], environ, stdin=text).code == 0
    shown = json.loads(invoked(["runs", "show", "known", "--json"], environ).out)
    assert shown["steps"][0]["output"] == json.loads(text)
