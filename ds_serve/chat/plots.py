"""Lines over the last minutes as SVG in HTML, which follows the page's theme and width and is redrawn unseen.

Knows numbers and drawing; the Engine tab calls it, looks.py has the colours.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

_WIDTH, _HEIGHT = 300, 100  # of the drawing; the page stretches it


class Series(NamedTuple):
    """A line: its name, and (second, value) in time's order."""

    name: str
    points: Sequence[tuple[float, float]]


def plot(title: str, lines: Sequence[Series], span_s: float, top: float | None = None) -> str:
    """A plot of the last span_s seconds; its height is top, or what the lines need."""
    newest = max((line.points[-1][0] for line in lines if line.points), default=0.0)
    highest = max((value for line in lines for _, value in line.points), default=0.0)
    top = top or nice(highest)
    drawn = "".join(
        f'<polyline class="line-{index}" points="{_points(line.points, newest, span_s, top)}"/>'
        for index, line in enumerate(lines)
    )
    legend = "".join(
        f'<span class="key-{index}">{html.escape(line.name)} {_last(line)}</span>'
        for index, line in enumerate(lines)
    )
    return (
        f'<figure class="plot"><figcaption><b>{html.escape(title)}</b>{legend}</figcaption>'
        f'<div class="area"><small>{top:g}</small>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{html.escape(title)}">{drawn}</svg></div>'
        f'<div class="axis"><small>{span_s / 60:g} min ago</small><small>now</small></div></figure>'
    )


def nice(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... at or above value; 1 for what is below."""
    if value <= 1:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 5, 10) if power * step >= value)


def _points(points: Sequence[tuple[float, float]], newest: float, span_s: float, top: float) -> str:
    return " ".join(
        f"{_WIDTH * (1 + (at - newest) / span_s):.1f},{_HEIGHT * (1 - min(value, top) / top):.1f}"
        for at, value in points
        if newest - at <= span_s
    )


def _last(line: Series) -> str:
    return f"{line.points[-1][1]:,.0f}" if line.points else ""
