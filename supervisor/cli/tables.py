"""Tables of the command, for people and for pipes. Owns their form; what they hold is in the files of the sub-commands.

A table has one line of headings and one line for each row. Two spaces or more separate the columns, and a cell never holds
two spaces in a row, nor a line break, nor a control character. So `awk -F '  +'` finds the same columns in every row. A table
has the same form on a terminal and in a pipe, and no line is cut to the width of a terminal.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import click

__all__ = ["print_table", "size"]


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print the rows below their headings on standard output. A cell that is None or empty is shown as `-`."""
    for line in _lines([headings, *rows]):
        click.echo(line)


def size(count: int | None) -> str:
    """A number of bytes for people, such as `74 MiB`; `-` for None."""
    if count is None:
        return "-"
    mib = count / 2**20
    return f"{mib:.0f} MiB" if mib < 10_000 else f"{mib / 1024:.0f} GiB"


def _lines(rows: Sequence[Sequence[object]]) -> list[str]:
    """The rows as text. A column is as wide as its widest cell; the last column is not padded."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    return ["  ".join([cell + " " * (wide - _width(cell)) for cell, wide in zip(row, widths, strict=True)]).rstrip() for row in cells]


def _cell(value: object) -> str:
    text = "" if value is None else str(value)
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split()) or "-"


def _width(text: str) -> int:
    """How many places the text takes in a terminal: two for a wide character, none for one that joins the one before it."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(each) else 2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text)
