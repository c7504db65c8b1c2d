"""Tables have the same columns in every row, whatever the cells hold."""

from __future__ import annotations

import re

import pytest

from streamline_pool.supervisor.cli.tables import print_table, size


def test_columns_are_aligned_and_can_be_split_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """A run id or an error may hold anything: a line break or two spaces in a cell would shift the columns of that row."""
    print_table(("RUN", "STATUS", "ERROR"), [("a", "done", ""), ("b  c", None, "two\nlines\x1b[31m"), ("längst", "failed", 7)])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "RUN     STATUS  ERROR",
        "a       done    -",
        "b c     -       two lines [31m",
        "längst  failed  7",
    ]
    assert [len(re.split(r" {2,}", line)) for line in lines] == [3, 3, 3, 3]


def test_wide_and_combining_characters_count_as_a_terminal_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("A", "B"), [("日本", "x"), ("e\N{COMBINING ACUTE ACCENT}", "x")])
    assert capsys.readouterr().out.splitlines() == ["A     B", "日本  x", "e\N{COMBINING ACUTE ACCENT}     x"]


def test_a_table_without_rows_has_its_headings(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("A", "B"), [])
    assert capsys.readouterr().out == "A  B\n"


@pytest.mark.parametrize(
    ("count", "text"), [(None, "-"), (0, "0 MiB"), (37 * 2**20, "37 MiB"), (4096 * 2**20, "4096 MiB"), (20 * 2**30, "20 GiB")]
)
def test_sizes_are_for_people(count: int | None, text: str) -> None:
    assert size(count) == text
