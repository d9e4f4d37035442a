"""How busy a pipeline's stages are, by events instead of waiting: a scheduler against stages of given times.

A stage runs the steps in order, each as soon as it is free and the stage before has handed the step on, the
first once the tokens that the step begins with have been drawn. Knows no model; tokens come from a simulated
worker. Used by tests and by the pipeline benchmark.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from simulated import SimulatedWorker

from ds_serve.engine.scheduler import Scheduler
from ds_serve.messages import Request


@dataclass
class StageTimes:
    """Seconds. steps: for each step, when it was planned and its rows' token counts."""

    active_s: float
    busy_s: list[float]
    steps: list[tuple[float, list[int]]] = field(default_factory=list)

    @property
    def utilisation(self) -> list[float]:
        """Of each stage: its busy part of the time with a step in flight."""
        return [busy / self.active_s for busy in self.busy_s]


def linear(floor_s: float, token_s: float) -> Callable[[int], float]:
    """A stage's time for a step: a floor (weights are read once) and a part for each token."""
    return lambda num_tokens: floor_s + token_s * num_tokens


def ideal(num_batches: int, num_stages: int) -> float:
    """Utilisation of equal stages by equal micro-batches that come once: m / (m + p - 1)."""
    return num_batches / (num_batches + num_stages - 1)


def run(
    scheduler: Scheduler,
    arrivals: list[tuple[float, Request]],
    stage_s: Callable[[int], float],
    host_s: float = 0.0,
) -> StageTimes:
    """Run all requests (each from its second on) to their end.

    stage_s gives a step's seconds on each stage from its tokens; host_s is what lies between the last stage's
    end and the next plan on the first: the way there and back, update and schedule.
    """
    limits, cache = scheduler.limits, scheduler.cache
    worker = SimulatedWorker(cache.num_blocks, cache.block_size, limits.max_num_seqs, limits.num_stages)
    free_at = [0.0] * limits.num_stages
    times = StageTimes(0.0, [0.0] * limits.num_stages)
    drawn_at = [0.0] * limits.max_num_seqs  # of each slot's last token
    coming = deque(sorted(arrivals, key=lambda arrival: arrival[0]))
    in_flight: deque = deque()
    now = active_since = 0.0
    while coming or scheduler.num_open or in_flight:
        if not (scheduler.num_open or in_flight):
            now = max(now, coming[0][0])
        while coming and coming[0][0] <= now:
            refused = scheduler.add(coming.popleft()[1])
            assert refused is None, refused
        while scheduler.can_plan and (plan := scheduler.schedule()) is not None:
            active_since = active_since if in_flight else now
            counts = [row.count for row in plan.rows]
            slots = {row.slot for row in plan.rows} - {new.slot for new in plan.new}
            end = max([now, *(drawn_at[slot] for slot in slots)])
            times.steps.append((now, counts))
            for stage in range(limits.num_stages):
                end = free_at[stage] = max(end, free_at[stage]) + stage_s(sum(counts))
                times.busy_s[stage] += stage_s(sum(counts))
            for row in plan.rows:
                drawn_at[row.slot] = end if row.sample else 0.0
            in_flight.append((end, worker.run(plan)))
        end, result = in_flight.popleft()
        now = max(now, end) + host_s
        scheduler.update(result)
        if not in_flight:
            times.active_s += now - active_since
    return times
