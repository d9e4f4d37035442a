"""The figures of one run: counts, rates, latencies at the usual points, failures by kind.

Knows records and arithmetic. Latencies are of good requests only, in seconds; interrupted requests count
neither as good nor as failed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ds_serve.bench.records import INTERRUPTED, Record

POINTS = ("mean", "p50", "p90", "p99", "p99.9", "max")
METRICS = ("ttft", "tpot", "itl", "e2e", "late")


class Summary:
    """Of these records, all within so many seconds. Without stream_timed tpot and itl are not measured."""

    def __init__(self, records: Sequence[Record], seconds: float, *, stream_timed: bool = True) -> None:
        self.seconds = seconds
        self.good = [record for record in records if record.good]
        self.interrupted = sum(record.kind == INTERRUPTED for record in records)
        self.failures = Counter(r.kind for r in records if r.kind and r.kind != INTERRUPTED)
        self.examples = {r.kind: r.detail for r in reversed(records) if r.kind in self.failures}
        self.prompts = sum(record.prompts for record in self.good)
        self.output_tokens = sum(record.output_tokens for record in self.good)
        usages = [record.usage for record in self.good if record.usage is not None]
        self.counted = len(usages)
        self.input_tokens = sum(usage.prompt for usage in usages)
        self.cached_tokens = sum(usage.cached for usage in usages)
        self.host_cached_tokens = sum(usage.host_cached for usage in usages)
        self.samples = _samples(self.good, stream_timed)

    @property
    def failed(self) -> int:
        return self.failures.total()

    @property
    def success(self) -> float:
        """Share of requests that ended well; NaN where none ended."""
        ended = len(self.good) + self.failed
        return len(self.good) / ended if ended else float("nan")

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that the server had cached; NaN where it counts none."""
        return self.cached_tokens / self.input_tokens if self.input_tokens else float("nan")

    def rate(self, amount: float) -> float:
        """amount a second."""
        return amount / self.seconds if self.seconds > 0 else float("nan")

    def figure(self, metric: str, stat: str = "") -> float:
        """A latency at mean, max or pXX; rps, tps (output tokens), success. NaN: not measured."""
        match metric:
            case "rps":
                return self.rate(len(self.good))
            case "tps":
                return self.rate(self.output_tokens)
            case "success":
                return self.success
        values = self.samples[metric]
        if not len(values):
            return float("nan")
        match stat:
            case "mean":
                return float(np.mean(values))
            case "max":
                return float(np.max(values))
        return float(np.percentile(values, float(stat.removeprefix("p"))))

    def points(self, metric: str) -> dict[str, float]:
        """The latency at POINTS, in seconds; empty where it was not measured."""
        if not len(self.samples[metric]):
            return {}
        return {point: self.figure(metric, point) for point in POINTS}

    def plain(self) -> dict[str, Any]:
        """All of it as JSON values; latencies in milliseconds."""
        return {
            "seconds": self.seconds,
            "requests": {
                "good": len(self.good),
                "failed": self.failed,
                "interrupted": self.interrupted,
                "success": self.success,
                "failures": dict(self.failures),
                "examples": self.examples,
            },
            "rates": {
                "requests_per_s": self.rate(len(self.good)),
                "prompts_per_s": self.rate(self.prompts),
                "output_tokens_per_s": self.rate(self.output_tokens),
                "input_tokens_per_s": self.rate(self.input_tokens),
                "total_tokens_per_s": self.rate(self.input_tokens + self.output_tokens),
            },
            "tokens": {
                "input": self.input_tokens,
                "output": self.output_tokens,
                "cached": self.cached_tokens,
                "host_cached": self.host_cached_tokens,
                "hit_rate": self.hit_rate,
                "requests_counted_by_usage": self.counted,
                "requests_counted_by_pieces": len(self.good) - self.counted,
            },
            "latency_ms": {
                metric: {point: 1000 * value for point, value in self.points(metric).items()}
                for metric in METRICS
            },
        }


def _samples(good: list[Record], stream_timed: bool) -> dict[str, np.ndarray]:
    values: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for record in good:
        values["e2e"].append(record.e2e)
        values["late"].append(record.lateness)
        if record.ttft is not None:
            values["ttft"].append(record.ttft)
        if stream_timed:
            values["itl"].extend(record.gaps)
            if record.tpot is not None:
                values["tpot"].append(record.tpot)
    return {metric: np.array(each) for metric, each in values.items()}
