"""Draws the soak's series as one SVG file, by hand. Owns the drawing; it judges nothing and reads no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from .flatness import WARM_UP_SHARE, Point

__all__ = ["draw"]

_WIDTH, _PANEL_HEIGHT, _LEFT, _TOP, _GAP, _LEGEND = 820, 170, 60, 34, 56, 150
_COLOURS = ("#1b6ca8", "#e07a1f", "#3a8f4d", "#a33f8d", "#555555", "#c23b3b")


def draw(panels: Mapping[str, Mapping[str, Sequence[Point]]]) -> str:
    """One panel for each title, with a line for each name in it. The horizontal axis is the number of ended runs."""
    height = _TOP + len(panels) * (_PANEL_HEIGHT + _GAP)
    runs_max = max((runs for lines in panels.values() for points in lines.values() for runs, _ in points), default=1) or 1
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for number, (title, lines) in enumerate(panels.items()):
        body += _panel(title, lines, _TOP + number * (_PANEL_HEIGHT + _GAP), runs_max)
    return "\n".join([*body, "</svg>", ""])


def _panel(title: str, lines: Mapping[str, Sequence[Point]], top: int, runs_max: float) -> list[str]:
    value_max = _round_up(max((value for points in lines.values() for _, value in points), default=1))
    right, bottom = _WIDTH - _LEGEND, top + _PANEL_HEIGHT

    def x(runs: float) -> float:
        return _LEFT + runs / runs_max * (right - _LEFT)

    def y(value: float) -> float:
        return bottom - value / value_max * _PANEL_HEIGHT

    warm_up = x(runs_max * WARM_UP_SHARE) - _LEFT
    drawn = [
        f'<text x="{_LEFT}" y="{top - 10}" font-size="13" fill="#222222">{escape(title)}</text>',
        f'<rect x="{_LEFT}" y="{top}" width="{warm_up:.1f}" height="{_PANEL_HEIGHT}" fill="#eeeeee"/>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        value, runs = value_max * share, runs_max * share
        drawn += [
            f'<path d="M{_LEFT} {y(value):.1f}H{right}" stroke="#dddddd"/>',
            f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end" fill="#444444">{value:g}</text>',
            f'<text x="{x(runs):.1f}" y="{bottom + 16}" text-anchor="middle" fill="#444444">{runs:,.0f}</text>',
        ]
    for number, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(f"{x(runs):.1f},{y(value):.1f}" for runs, value in points)
        drawn += [
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
            f'<text x="{right + 12}" y="{top + 14 + 16 * number}" fill="{colour}">{escape(name)}</text>',
        ]
    return drawn


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 8, 20, 40, 80, … above the value, so that four grid lines have short labels."""
    step = 1.0
    while True:
        for factor in (1, 2, 4, 8):
            if step * factor >= value:
                return step * factor
        step *= 10
