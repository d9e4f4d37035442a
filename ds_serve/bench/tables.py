"""A run's figures as text for a terminal.

Knows wording and columns; the figures are summary.py's. run.py prints what it returns.
"""

from __future__ import annotations

import math

from ds_serve.bench.accounts import TOTALS
from ds_serve.bench.records import INTERRUPTED
from ds_serve.bench.slo import Verdict
from ds_serve.bench.summary import POINTS, Summary

_NAMES = {
    "ttft": "first token",
    "tpot": "per output token",
    "itl": "between pieces",
    "e2e": "whole request",
    "late": "sent late by",
}


def summary_table(summary: Summary, *, open_loop: bool, accounts: dict[str, float] | None) -> str:
    parts = [_counts(summary), _rates(summary), _latencies(summary, open_loop)]
    if accounts is not None:
        shown = [f"{TOTALS[name]} {_number(value)}" for name, value in accounts.items() if value]
        parts.append(f"server: {', '.join(shown) or 'nothing computed'}")
    return "\n\n".join(part for part in parts if part)


def verdict_lines(verdicts: list[Verdict]) -> str:
    return "\n".join(map(str, verdicts))


def sweep_table(parameter: str, steps: list[tuple[float, Summary, list[Verdict]]]) -> str:
    """A line for each level that was tried, in rising order."""
    goals = [verdict.goal for verdict in steps[0][2]]
    head = [parameter, "requests/s", "output tok/s", "success", *(goal.text for goal in goals), ""]
    rows = [head]
    for level, summary, verdicts in sorted(steps, key=lambda step: step[0]):
        row = [f"{level:g}", f"{summary.figure('rps'):,.2f}", f"{summary.figure('tps'):,.1f}"]
        row += [_percent(summary.success), *(verdict.shown() for verdict in verdicts)]
        rows.append([*row, "good" if all(verdict.met for verdict in verdicts) else "broken"])
    return _aligned(rows)


def _counts(summary: Summary) -> str:
    ended = len(summary.good) + summary.failed
    lines = [
        f"{ended:,} requests in {summary.seconds:.2f} s: {len(summary.good):,} good "
        f"({_percent(summary.success)}), {summary.failed:,} failed"
        + (f", {summary.interrupted:,} {INTERRUPTED}" if summary.interrupted else "")
    ]
    for kind, number in summary.failures.most_common():
        detail = summary.examples[kind]
        lines.append(f"  {kind}: {number:,}" + (f" (such as: {detail})" if detail else ""))
    return "\n".join(lines)


def _rates(summary: Summary) -> str:
    if not summary.good:
        return ""
    rows = [["requests/s", f"{summary.figure('rps'):,.1f}"]]
    if summary.prompts != len(summary.good):
        rows.append(["prompts/s", f"{summary.rate(summary.prompts):,.1f}"])
    by_pieces = len(summary.good) - summary.counted
    note = "" if not by_pieces else f"  (pieces, not tokens, for {by_pieces:,} requests: no usage came)"
    rows.append(["output tokens/s", f"{summary.figure('tps'):,.1f}{note}"])
    if summary.counted:
        rows.append(["input tokens/s", f"{summary.rate(summary.input_tokens):,.1f}"])
        both = summary.input_tokens + summary.output_tokens
        rows.append(["total tokens/s", f"{summary.rate(both):,.1f}"])
        cached = f"{summary.cached_tokens:,} of {summary.input_tokens:,} ({_percent(summary.hit_rate)})"
        host = f", {summary.host_cached_tokens:,} from host" if summary.host_cached_tokens else ""
        rows.append(["cached prompt tokens", cached + host])
    return "\n".join(f"{name:<22}{value}" for name, value in rows)


def _latencies(summary: Summary, open_loop: bool) -> str:
    rows = [["ms", *POINTS]]
    for metric, name in _NAMES.items():
        points = summary.points(metric)
        if points and (open_loop or metric != "late"):
            rows.append([name, *(_ms(points[point]) for point in POINTS)])
    return _aligned(rows) if len(rows) > 1 else ""


def _ms(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:,.2f}" if abs(value) < 10 else f"{value:,.1f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def _percent(share: float) -> str:
    return "none" if math.isnan(share) else f"{100 * share:.2f} %"


def _aligned(rows: list[list[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    )
