"""Times one kernel, or one call, as it would run inside an engine; and the lines that tell of it.

Device times are of calls inside a replayed CUDA graph, over inputs that do not fit in the cache together; on
a CPU (dry runs) calls are timed as they are. Used by gpu_kernels.py and its parts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_model import Ceilings

CACHE_BYTES = 256 * 2**20  # of inputs that take turns: several times the L2
REPLAYS = 9


@dataclass(frozen=True)
class Line:
    """What was timed, and what it took; floor is the least that the device allows, in microseconds too."""

    what: str
    us: float
    floor: float | None = None
    note: str = ""

    def text(self) -> str:
        share = "" if self.floor is None else f"{self.us / self.floor:6.2f} x floor {self.floor:.1f}"
        return f"{self.what:44}{self.us:10.1f} us {share:24} {self.note}".rstrip()


@dataclass(frozen=True)
class Clock:
    """Times on one device whose ceilings were measured."""

    device: torch.device
    ceilings: Ceilings

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def copies(self, num_bytes: int, most: int = 32) -> int:
        """How many inputs of a size must take turns so that none is found in the cache."""
        return min(most, max(2, -(-CACHE_BYTES // num_bytes))) if self.on_gpu else 2

    def floor_us(self, num_bytes: float, flops: float = 0.0) -> float:
        return max(num_bytes / self.ceilings.copy, flops / self.ceilings.flops) * 1e6

    def us(self, call: Callable[[int], object], calls: int) -> float:
        """Microseconds on the device of call(i), i below `calls` in turn; median of replays."""
        if not self.on_gpu:
            return self.host_us(lambda: [call(index) for index in range(calls)]) / calls
        graph = self.graph(call, calls)
        for _ in range(2):
            graph.replay()
        return self.event_us(graph.replay) / calls

    def graph(self, call: Callable[[int], object], calls: int) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for index in range(calls):
                call(index)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for index in range(calls):
                call(index)
        return graph

    def event_us(self, work: Callable[[], object]) -> float:
        found = []
        for _ in range(REPLAYS):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            work()
            ended.record()
            ended.synchronize()
            found.append(began.elapsed_time(ended) * 1e3)
        return statistics.median(found)

    def host_us(self, work: Callable[[], object], rounds: int = 15) -> float:
        """Microseconds that the caller waits for work, with nothing else on the device; median."""
        found = []
        for _ in range(rounds + 3):
            self.wait()
            began = time.perf_counter()
            work()
            found.append((time.perf_counter() - began) * 1e6)
        self.wait()
        return statistics.median(found[3:])

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
