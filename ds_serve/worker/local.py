"""The one rank of this process, behind the engine's Ranks protocol: a thread that runs plans in order.

The engine plans the next step while this thread runs the last. The thread also builds its worker: OpenMP
keeps a team for each thread that starts parallel regions, and once there are more threads in teams than
cores, waiting ones sleep at every barrier, which costs a small model's step half as much again. Knows nothing
of what a plan does. Used by rank.py.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Protocol

from ds_serve.messages import StepPlan, StepResult


class _Steps(Protocol):
    def step(self, plan: StepPlan) -> StepResult: ...


class LocalRank:
    """submit() and collect() for one engine thread. A step that raises makes its collect() raise.

    build runs on the rank's thread; the constructor waits for it and raises what it raises.
    """

    def __init__(self, build: Callable[[], _Steps]) -> None:
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(build,), name="ds-serve-rank", daemon=True)
        self._thread.start()
        self.worker = self._next()

    def submit(self, plan: StepPlan) -> None:
        self._plans.put(plan)

    def collect(self) -> StepResult:
        return self._next()

    def close(self) -> None:
        self._plans.put(None)
        self._thread.join()

    def _next(self):
        result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def _run(self, build: Callable[[], _Steps]) -> None:
        try:
            worker = build()
            self._results.put(worker)
            while (plan := self._plans.get()) is not None:
                self._results.put(worker.step(plan))
        except BaseException as error:
            self._results.put(error)
