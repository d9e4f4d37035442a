"""This process's rank behind the engine's Ranks protocol: a thread that runs plans in order.

The engine plans the next step while this thread runs the last. The thread also builds its worker: OpenMP
keeps a team for each thread that starts parallel regions, and once there are more threads in teams than
cores, waiting ones sleep at every barrier, which costs a small model's step half as much again. LocalRank is
one rank alone; LeadRank is rank 0 of several, and speaks for all. Knows nothing of what a plan does. Used by
rank.py.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from ds_serve.messages import StepPlan, StepResult
from ds_serve.parallel.control import Controller, Progress
from ds_serve.parallel.wire import Close

END_S = 5.0  # how long the last step may take when ranks are told to end


class _Steps(Protocol):
    def step(self, plan: StepPlan) -> StepResult | None: ...


class LocalRank:
    """submit() and collect() for one engine thread. A step that raises makes its collect() raise.

    build(progress) runs on the rank's thread; the constructor waits for it and raises what it raises.
    """

    def __init__(self, build: Callable[[Progress], _Steps]) -> None:
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        self._progress = Progress()
        self._start(build)

    def _start(self, build: Callable[[Progress], _Steps]) -> None:
        self._thread = threading.Thread(target=self._run, args=(build,), name="ds-serve-rank", daemon=True)
        self._thread.start()
        self.worker = self.collect()

    def submit(self, plan: StepPlan) -> None:
        self._plans.put(plan)

    def collect(self):
        """The oldest step's result (the first time: the worker). Raises what the step raised."""
        result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def check(self) -> None:
        """One rank alone fails in its steps only, and these are collected."""

    def busy_s(self) -> list[float]:
        return [self._progress.busy_s]

    def close(self) -> None:
        self._plans.put(None)
        self._thread.join()

    def _run(self, build: Callable[[Progress], _Steps]) -> None:
        try:
            worker = build(self._progress)
            self._deliver(worker)
            while (plan := self._plans.get()) is not None:
                result = worker.step(plan)
                if result is not None:
                    self._deliver(result)
        except BaseException as error:
            self._fail(error)

    def _deliver(self, result: object) -> None:
        self._results.put(result)

    def _fail(self, error: BaseException) -> None:
        self._results.put(error)


class LeadRank(LocalRank):
    """Rank 0 of several: plans go to all ranks, results come from the one that samples.

    A failure of any rank is raised by collect() and check() as the controller's RankFailure.
    """

    def __init__(self, build: Callable[[Progress], _Steps], controller: Controller) -> None:
        self._controller = controller
        self._plans = queue.SimpleQueue()
        self._results = controller.results
        self._progress = controller.progress
        self._num_in_flight = 0
        self.closed = False
        self._start(build)

    def submit(self, plan: StepPlan) -> None:
        self._num_in_flight += 1
        self._controller.send(plan)
        self._plans.put(plan)

    def collect(self):
        result = super().collect()
        self._num_in_flight -= isinstance(result, StepResult)
        return result

    def check(self) -> None:
        self._controller.check()

    def busy_s(self) -> list[float]:
        return self._controller.stage_busy_s()

    def close(self) -> None:
        """Ends this engine's plans on all ranks, after its steps in flight; after a failure, at once."""
        if self.closed:
            return
        self.closed = True
        self._plans.put(None)
        self._controller.send(Close())
        deadline = time.monotonic() + END_S
        while (self._thread.is_alive() or self._num_in_flight) and time.monotonic() < deadline:
            if self._controller.failed:
                return
            with contextlib.suppress(queue.Empty):  # the next engine must not find this one's results
                self._results.get(timeout=0.05)
                self._num_in_flight -= 1

    def _deliver(self, result: object) -> None:
        if isinstance(result, StepResult):
            self._controller.landed()
        super()._deliver(result)

    def _fail(self, error: BaseException) -> None:
        self._controller.report(error)
