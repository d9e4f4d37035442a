"""The one rank of this process, behind the engine's Ranks protocol: a thread that runs plans in order.

The engine plans the next step while this thread runs the last. Knows nothing of what a plan does.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from ds_serve.messages import StepPlan, StepResult


class LocalRank:
    """submit() and collect() for one engine thread. A step that raises makes its collect() raise."""

    def __init__(self, step: Callable[[StepPlan], StepResult], on_start: Callable[[], None] = lambda: None):
        self._step = step
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[StepResult | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(on_start,), name="ds-serve-rank", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        self._plans.put(plan)

    def collect(self) -> StepResult:
        result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        self._plans.put(None)
        self._thread.join()

    def _run(self, on_start: Callable[[], None]) -> None:
        try:
            on_start()
            while (plan := self._plans.get()) is not None:
                self._results.put(self._step(plan))
        except BaseException as error:
            self._results.put(error)
