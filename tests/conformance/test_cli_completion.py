"""Completion in shells: the scripts that the command prints, and what it answers when a shell asks."""

from __future__ import annotations

import shutil

import pytest
from cli_shell import Shell

MARKS = {"bash": "complete -o nosort -F _streamline_pool_completion streamline-pool", "zsh": "#compdef streamline-pool", "fish": "complete"}


@pytest.mark.parametrize("name", MARKS)
def test_each_shell_gets_its_script(offline: Shell, name: str) -> None:
    if name == "bash" and shutil.which("bash") is None:
        pytest.skip("needs bash: click asks it for its version")
    done = offline(_STREAMLINE_POOL_COMPLETE=f"{name}_source")
    assert done.returncode == 0, done.stderr
    assert MARKS[name] in done.stdout
    assert f"_STREAMLINE_POOL_COMPLETE={name}_complete" in done.stdout


@pytest.mark.slow
def test_sub_commands_options_and_values_are_completed(offline: Shell) -> None:
    """A shell asks at every press of the key, so the answer needs neither a database nor the application."""

    def answers(line: str) -> list[str]:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1), "STREAMLINE_APP": "nowhere:app"}
        done = offline(_STREAMLINE_POOL_COMPLETE="bash_complete", **words)
        assert done.returncode == 0, done.stderr
        return [each.partition(",")[2] for each in done.stdout.splitlines()]

    assert answers("streamline-pool runs wa") == ["watch"]
    assert answers("streamline-pool runs list --con") == ["--context"]
    assert answers("streamline-pool runs list --status ca") == ["cancelled"]
