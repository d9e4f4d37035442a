"""Token counts as the command line states them: fixed, a range, or drawn from a distribution.

Knows numbers only. Used by the options and by the prompt sources.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_FORMS = "128 (fixed), 64:256 (uniform), exp:MEAN, normal:MEAN,DEVIATION or lognormal:MEDIAN,SIGMA"
_ARGUMENTS = {"fixed": 1, "uniform": 2, "exp": 1, "normal": 2, "lognormal": 2}


@dataclass(frozen=True)
class Lengths:
    """A distribution of token counts, all at least 1."""

    kind: str
    first: float
    second: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """'128', '64:256', 'exp:128', 'normal:128,20', 'lognormal:128,0.5'. Raises ValueError for others."""
        name, colon, rest = text.partition(":")
        if not colon:
            kind, parts = "fixed", [name]
        elif name in _ARGUMENTS:
            kind, parts = name, rest.split(",")
        else:
            kind, parts = "uniform", [name, rest]
        try:
            numbers = [float(part) for part in parts]
        except ValueError:
            numbers = []
        if len(numbers) != _ARGUMENTS[kind] or not all(map(math.isfinite, numbers)) or numbers[0] < 1:
            raise ValueError(f"{text!r} is no number of tokens: write {_FORMS}")
        if kind in ("fixed", "uniform") and any(number != int(number) for number in numbers):
            raise ValueError(f"{text!r}: whole tokens only")
        if kind == "uniform" and numbers[1] < numbers[0]:
            raise ValueError(f"{text!r}: the range ends before it begins")
        if kind in ("normal", "lognormal") and numbers[1] < 0:
            raise ValueError(f"{text!r}: the deviation must not be negative")
        return cls(kind, *numbers)

    def draw(self, rng: np.random.Generator) -> int:
        """One length."""
        match self.kind:
            case "fixed":
                return int(self.first)
            case "uniform":
                return int(rng.integers(int(self.first), int(self.second) + 1))
            case "exp":
                value = rng.exponential(self.first)
            case "normal":
                value = rng.normal(self.first, self.second)
            case _:
                value = self.first * math.exp(rng.normal(0.0, self.second))
        return max(1, round(value))

    def __str__(self) -> str:
        first, second = f"{self.first:g}", f"{self.second:g}"
        match self.kind:
            case "fixed":
                return first
            case "uniform":
                return f"{first}:{second}"
            case "exp":
                return f"exp:{first}"
        return f"{self.kind}:{first},{second}"
