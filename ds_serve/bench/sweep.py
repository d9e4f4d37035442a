"""Searches the highest level of load at which all goals hold.

Knows numbers and a question ("is this level good?"), no HTTP; run.py asks the server.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

PRECISION = 0.1  # stop halving once the lowest bad level is within this part of the highest good one

_FORMS = "rate=1:64, rate=1,2,4, concurrency=1:64 or concurrency=1,2,4"


@dataclass(frozen=True)
class Levels:
    """The levels to try: a range to search (bounds), or a list in rising order."""

    parameter: Literal["rate", "concurrency"]
    values: tuple[float, ...]
    search: bool

    @classmethod
    def parse(cls, text: str) -> Levels:
        """'rate=1:64', 'concurrency=1,2,4'. Raises ValueError for others."""
        match = re.fullmatch(r"(rate|concurrency)=([\d.]+(?::[\d.]+|(?:,[\d.]+)*))", text)
        if match is None:
            raise ValueError(f"{text!r} is no sweep: write {_FORMS}")
        search = ":" in match[2]
        try:
            values = tuple(float(value) for value in re.split("[:,]", match[2]))
        except ValueError:
            raise ValueError(f"{text!r} is no sweep: write {_FORMS}") from None
        if values[0] <= 0 or any(a >= b for a, b in zip(values, values[1:], strict=False)):
            raise ValueError(f"{text!r}: levels must be above 0 and rise")
        if match[1] == "concurrency" and any(value != int(value) for value in values):
            raise ValueError(f"{text!r}: whole numbers only")
        return cls(match[1], values, search)

    def __str__(self) -> str:
        return f"{self.parameter}={(':' if self.search else ',').join(f'{v:g}' for v in self.values)}"


async def highest_good(levels: Levels, is_good: Callable[[float], Awaitable[bool]]) -> float | None:
    """The highest level found good, or None. A list ends at its first bad level.

    A range is doubled from its lower bound until a level is bad or the upper bound is good, and then halved
    between the two until they are within PRECISION of each other (whole numbers for a concurrency).
    """
    good = None
    for level in levels.values if not levels.search else _doubling(*levels.values):
        if not await is_good(level):
            break
        good = level
    else:
        return good
    if not levels.search or good is None:
        return good
    whole, bad = levels.parameter == "concurrency", level
    while bad - good > max(1 if whole else 0, PRECISION * good):
        middle = (good + bad) // 2 if whole else (good + bad) / 2
        if await is_good(middle):
            good = middle
        else:
            bad = middle
    return good


def _doubling(low: float, high: float) -> list[float]:
    levels = [low]
    while levels[-1] < high:
        levels.append(min(2 * levels[-1], high))
    return levels
