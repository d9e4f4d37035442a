"""Goals: 'p99_ttft=200ms' as a limit on one figure of a summary.

Knows the names of figures and their units; what they are is summary.py's. A latency must be at most its
limit, a throughput or success rate at least.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Protocol

LATENCIES = ("ttft", "tpot", "itl", "e2e")
RATES = ("tps", "rps", "success")

_FORMS = (
    "p99_ttft=200ms, mean_tpot=30ms or max_e2e=2s (ttft, tpot, itl or e2e at mean, max or a percentile), "
    "tps=2000, rps=50 or success=99.9%"
)
_GOAL = re.compile(
    r"(?:(?P<stat>mean|max|p\d{1,2}(?:\.\d+)?)_)?(?P<metric>[a-z0-9]+)=(?P<number>\d+(?:\.\d*)?)(?P<unit>ms|s|%)?"
)


class Figures(Protocol):
    def figure(self, metric: str, stat: str) -> float:
        """Seconds, a rate, or a share; NaN where nothing was measured."""


@dataclass(frozen=True)
class Goal:
    """A limit. stat is mean, max or pXX for latencies, '' for rates; limit in s, 1/s, or as a share."""

    text: str
    metric: str
    stat: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Goal:
        """Raises ValueError, naming --slo, for what is no goal."""
        match = _GOAL.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"--slo: {text!r} is no goal: write {_FORMS}")
        stat, metric, unit = match["stat"] or "", match["metric"], match["unit"] or ""
        limit = float(match["number"])
        if metric in LATENCIES:
            if not stat or unit not in ("ms", "s"):
                raise ValueError(f"--slo: {text!r}: a latency needs a statistic and ms or s: write {_FORMS}")
            limit = limit / 1000 if unit == "ms" else limit
        elif metric in RATES:
            if stat or unit != ("%" if metric == "success" else ""):
                raise ValueError(
                    f"--slo: {text!r}: write {metric}={'99.9%' if metric == 'success' else '50'}"
                )
            limit = limit / 100 if metric == "success" else limit
        else:
            raise ValueError(f"--slo: {text!r} names no figure: write {_FORMS}")
        return cls(text.strip(), metric, stat, limit)

    def judge(self, figures: Figures) -> Verdict:
        value = figures.figure(self.metric, self.stat)
        good = value <= self.limit if self.metric in LATENCIES else value >= self.limit
        return Verdict(self, value, good and not math.isnan(value))


@dataclass(frozen=True)
class Verdict:
    """What was measured, in seconds, 1/s or as a share, and whether it is good enough."""

    goal: Goal
    value: float
    met: bool

    def __str__(self) -> str:
        return f"{self.goal.text} {'met' if self.met else 'MISSED'}: measured {self.shown()}"

    def shown(self) -> str:
        """The measured value with its unit."""
        if math.isnan(self.value):
            return "nothing"
        if self.goal.metric in LATENCIES:
            return f"{1000 * self.value:,.1f} ms"
        return f"{100 * self.value:.2f} %" if self.goal.metric == "success" else f"{self.value:,.1f}"
