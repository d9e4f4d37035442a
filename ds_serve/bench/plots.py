"""report.png: latency distributions and a timeline of one run, or the figures of a sweep over its levels.

Knows matplotlib, which is imported here only; the figures are summary.py's and the records' own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of a backend without a display)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ds_serve.bench.measure import Run
    from ds_serve.bench.records import Record

_TITLES = {
    "ttft": "time to the first token",
    "tpot": "time per output token",
    "itl": "time between pieces",
    "e2e": "whole request",
}
_INK, _FAINT, _RED = "#1f2933", "#9aa5b1", "#c81e1e"
_COLORS = {"ttft": "#1864ab", "tpot": "#2b8a3e", "itl": "#5f3dc4", "e2e": "#d9480f"}
_MARKED = (50, 90, 99)
_MAX_POINTS = 20_000
_SLICES = 120
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _FAINT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}


def draw_run(path: Path, title: str, done: Run) -> None:
    """Two rows of distributions, then throughput and running requests over time."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplot_mosaic(
            [["ttft", "tpot"], ["itl", "e2e"], ["tokens", "tokens"], ["running", "running"]],
            figsize=(11, 12),
            layout="constrained",
        )
        figure.suptitle(f"{title}\n{_headline(done)}", fontsize=11, x=0.01, ha="left")
        for metric in _TITLES:
            _distribution(axes[metric], metric, done.summary.samples[metric])
        _throughput(axes["tokens"], done)
        _running(axes["running"], done)
        axes["running"].sharex(axes["tokens"])
        figure.savefig(path, dpi=120)
        plt.close(figure)


def draw_sweep(path: Path, parameter: str, steps: list[tuple[float, Run]], best: float | None) -> None:
    """Throughput, and each latency goal beside its limit, over the levels that were tried."""
    steps = sorted(steps, key=lambda step: step[0])
    levels = [level for level, _ in steps]
    latencies = [i for i, v in enumerate(steps[0][1].verdicts) if v.goal.metric in _TITLES]
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            1 + len(latencies),
            1,
            figsize=(9, 3.2 * (1 + len(latencies))),
            layout="constrained",
            squeeze=False,
        )
        _curve(axes[0, 0], levels, [done.summary.figure("rps") for _, done in steps], _COLORS["ttft"])
        axes[0, 0].set_title("requests/s that succeeded")
        if parameter == "rate":
            axes[0, 0].plot(levels, levels, color=_FAINT, linestyle=":", label="offered")
            axes[0, 0].legend(loc="upper left")
        for place, index in enumerate(latencies, 1):
            goal = steps[0][1].verdicts[index].goal
            values = [1000 * done.verdicts[index].value for _, done in steps]
            _curve(axes[place, 0], levels, values, _COLORS[goal.metric])
            axes[place, 0].axhline(1000 * goal.limit, color=_RED, linewidth=1, linestyle="--")
            axes[place, 0].set_title(f"{goal.stat} of {_TITLES[goal.metric]}, ms (goal: {goal.text})")
            measured = [value for value in values if value == value]
            if measured and max(measured) > 50 * min(measured):
                axes[place, 0].set_yscale("log")
                axes[place, 0].yaxis.set_major_formatter(_plain)
                axes[place, 0].yaxis.set_minor_formatter("")
            else:
                axes[place, 0].set_ylim(bottom=0)
        for axis in axes[:, 0]:
            axis.set_xlabel(parameter + (", requests/s" if parameter == "rate" else ", requests at a time"))
            if best is not None:
                axis.axvline(best, color=_COLORS["tpot"], linewidth=1, label=f"highest good: {best:g}")
                axis.legend(loc="upper left")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _headline(done: Run) -> str:
    figures, failed = done.summary, done.summary.failed
    return (
        f"{len(figures.good):,} requests good, {failed:,} failed in {figures.seconds:.1f} s   "
        f"{figures.figure('rps'):,.1f} requests/s   {figures.figure('tps'):,.0f} output tokens/s"
    )


def _distribution(axis: Axes, metric: str, values: np.ndarray) -> None:
    """The share of samples up to each latency, with p50, p90 and p99 marked."""
    axis.set_title(f"{_TITLES[metric]}, ms")
    if not len(values):
        axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes, color=_FAINT)
        axis.set_axis_off()
        return
    milliseconds = np.sort(values) * 1000
    shares = np.arange(1, len(values) + 1) / len(values) * 100
    kept = np.unique(np.linspace(0, len(values) - 1, min(len(values), _MAX_POINTS)).astype(int))
    axis.step(milliseconds[kept], shares[kept], where="post", color=_COLORS[metric], linewidth=1.5)
    axis.fill_between(milliseconds[kept], shares[kept], step="post", color=_COLORS[metric], alpha=0.08)
    marks = [f"p{mark}  {np.percentile(milliseconds, mark):,.1f}" for mark in _MARKED]
    for mark in _MARKED:
        axis.plot(np.percentile(milliseconds, mark), mark, "o", color=_COLORS[metric], markersize=4)
    marks += [f"max  {milliseconds[-1]:,.1f}", f"of {len(values):,}"]
    axis.text(0.98, 0.05, "\n".join(marks), ha="right", va="bottom", transform=axis.transAxes, fontsize=8)
    low, high = max(milliseconds[0], 1e-3), max(milliseconds[-1], 2e-3)
    if high / low > 50:
        axis.set_xscale("log")
        axis.set_xlim(left=max(low, np.percentile(milliseconds, 1) / 3, 0.01))
        axis.xaxis.set_major_formatter(_plain)
    axis.set_ylim(0, 102)
    axis.set_ylabel("% of samples")


def _throughput(axis: Axes, done: Run) -> None:
    """Output tokens a second where the run streamed, else requests a second."""
    started, seconds = done.load.started, max(done.load.ended - done.load.started, 1e-9)
    good = [record for record in done.load.records if record.good]
    edges = np.linspace(0, seconds, min(_SLICES, max(10, len(good))) + 1)
    moments, weights = _token_moments(good)
    counts, _ = np.histogram(moments - started, edges, weights=weights)
    axis.stairs(counts / np.diff(edges), edges, color=_COLORS["tpot"], fill=True, alpha=0.35)
    axis.stairs(counts / np.diff(edges), edges, color=_COLORS["tpot"], linewidth=1.2)
    axis.set_title("output tokens/s over time")
    axis.set_xlim(0, seconds)


def _token_moments(good: list[Record]) -> tuple[np.ndarray, np.ndarray]:
    """When tokens came, and how many at each moment. A request that did not stream gives all at its end."""
    moments, weights = [], []
    for record in good:
        times = record.times or [record.end]
        moments += times
        weights += [record.output_tokens / len(times)] * len(times)
    return np.array(moments), np.array(weights)


def _running(axis: Axes, done: Run) -> None:
    """How many requests were open; each failure is a cross at its time."""
    started = done.load.started
    sent = [record for record in done.load.records if record.sent]
    ends = [record.end or done.load.ended for record in sent]
    changes = np.concatenate([[record.sent - started for record in sent], np.array(ends) - started])
    order = np.argsort(changes, kind="stable")
    steps = np.concatenate([np.ones(len(sent)), -np.ones(len(sent))])[order]
    axis.step(changes[order], np.cumsum(steps), where="post", color=_INK, linewidth=1)
    failures = [record.end - started for record in done.load.records if record.kind in done.summary.failures]
    if failures:
        height = np.interp(failures, changes[order], np.cumsum(steps))
        axis.plot(failures, height, "x", color=_RED, markersize=5, label=f"{len(failures):,} failed")
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1))
    axis.set_title("running requests over time")
    axis.set_xlabel("seconds from the start")
    axis.set_ylim(bottom=0)


def _curve(axis: Axes, levels: list[float], values: list[float], color: str) -> None:
    axis.plot(levels, values, "o-", color=color, markersize=4)
    if levels[-1] / levels[0] > 8:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(_plain)


def _plain(value: float, _: int) -> str:
    return f"{value:g}"
