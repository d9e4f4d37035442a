"""Where a step's time goes on the device: kernels by name, and how long none ran.

A short text, to explain a figure that misses its goal. Knows no engine; gpu_run.py hands it work to watch.
"""

from __future__ import annotations

import re
import time
from collections import Counter

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

LINES = 8
NAME_CHARS = 66


class Watch:
    """torch's profiler between start() and stop(). All threads are seen; without a device operators stand in
    for kernels. The first profiler of a process takes seconds to start: call ready() before."""

    def __init__(self) -> None:
        self._on_device = torch.cuda.is_available()
        # Kernels of all threads are seen anyway.
        everywhere = _ExperimentalConfig(profile_all_threads=not self._on_device)
        activity = ProfilerActivity.CUDA if self._on_device else ProfilerActivity.CPU
        self._profiler = torch.profiler.profile(
            activities=[activity], experimental_config=everywhere, acc_events=True
        )
        self.started = float("inf")  # on time.perf_counter()'s clock

    @classmethod
    def ready(cls) -> None:
        watch = cls()
        watch.start()
        watch.stop()

    def start(self) -> None:
        self._profiler.start()
        self.started = time.perf_counter()

    def stop(self) -> list[tuple[float, float, str]]:
        """(start, end, name) of each kernel, in microseconds."""
        if self._on_device:
            torch.cuda.synchronize()
        self._profiler.stop()
        kind = DeviceType.CUDA if self._on_device else DeviceType.CPU
        return [
            (each.time_range.start, each.time_range.end, each.name)
            for each in self._profiler.events()
            if each.device_type == kind and each.time_range.end > each.time_range.start
        ]


def table(events: list[tuple[float, float, str]], steps: int) -> str:
    """events: (start, end, name) in microseconds. All figures of one step of `steps`."""
    if not events or not steps:
        return f"the profiler saw {len(events)} kernels in {steps} steps"
    total, count = Counter(), Counter()
    for start, end, name in events:
        name = plain(name)
        total[name] += (end - start) / steps
        count[name] += 1
    span = (max(end for _, end, _ in events) - min(start for start, _, _ in events)) / steps
    busy = covered([(start, end) for start, end, _ in events]) / steps
    lines = [
        f"{span / 1e3:.2f} ms from first to last kernel, idle {1 - busy / span:.0%}, "
        f"{len(events) / steps:.0f} kernels"
    ]
    lines += [
        f"{each / 1e3:8.3f} ms {each / span:4.0%} {count[name] / steps:6.1f} x {name}"
        for name, each in total.most_common(LINES)
    ]
    rest = sum(each for _, each in total.most_common()[LINES:])
    if rest:
        lines.append(f"{rest / 1e3:8.3f} ms {rest / span:4.0%}          others")
    return "\n".join(lines)


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    found, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        if end > reached:
            found += end - max(start, reached)
            reached = end
    return found


def plain(name: str) -> str:
    """A kernel's name without its template's arguments and its parameters."""
    name = re.sub(r"^void ", "", name)
    previous = ""
    while previous != name:
        previous, name = name, re.sub(r"<[^<>]*>", "", name)
    return name.split("(")[0].replace("at::native::", "")[:NAME_CHARS]
