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

from ds_serve.messages import CopyResult, StepPlan, StepResult
from ds_serve.parallel.control import Controller, Progress
from ds_serve.parallel.wire import Close
from ds_serve.worker.finisher import Finishable, Finisher

END_S = 5.0  # how long the last step and the last copies may take when ranks are told to end


class _Steps(Protocol):
    """A worker."""

    runs_ahead: bool

    def launch(self, plan: StepPlan) -> Finishable | None: ...

    def close(self) -> None: ...


Build = Callable[[Progress, Callable[[CopyResult], None], Callable[[BaseException], None]], _Steps]


class LocalRank:
    """submit() and collect() for one engine thread. A step or a copy that raises makes a collect() raise.

    build(progress, deliver, fail) runs on the rank's thread; the constructor waits for it and raises what it
    raises. What the worker's other threads bring forth, they hand to deliver or fail.
    """

    def __init__(self, build: Build) -> None:
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        self._progress = Progress()
        self._start(build)

    def _start(self, build: Build) -> None:
        self._thread = threading.Thread(target=self._run, args=(build,), name="ds-serve-rank", daemon=True)
        self._thread.start()
        self.worker = self.collect()

    def submit(self, plan: StepPlan) -> None:
        self._plans.put(plan)

    def collect(self):
        """The next result of a step or of copies (the first time: the worker), of either in their order.
        Raises what a step or a copy raised."""
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

    def _run(self, build: Build) -> None:
        worker = finisher = None
        try:
            worker = build(self._progress, self._deliver, self._fail)
            finisher = Finisher(worker.runs_ahead, self._deliver, self._fail)
            self._deliver(worker)
            while (plan := self._plans.get()) is not None:
                finisher.take(worker.launch(plan))
        except BaseException as error:
            self._fail(error)
        finally:
            if finisher is not None:
                finisher.close()
            if worker is not None:
                worker.close()

    def _deliver(self, result: object) -> None:
        self._results.put(result)

    def _fail(self, error: BaseException) -> None:
        self._results.put(error)


class LeadRank(LocalRank):
    """Rank 0 of several: plans go to all ranks, results come from the one that samples, copies' from each.

    A failure of any rank is raised by collect() and check() as the controller's RankFailure.
    """

    def __init__(self, build: Build, controller: Controller) -> None:
        self._controller = controller
        self._plans = queue.SimpleQueue()
        self._results = controller.results
        self._progress = controller.progress
        self._num_expected = 0  # results of steps and of copies, that are still to come
        self.closed = False
        self._start(build)

    def submit(self, plan: StepPlan) -> None:
        self._num_expected += bool(plan.rows)
        self._num_expected += self._controller.place.world_size * (bool(plan.loads) + bool(plan.stores))
        self._controller.send(plan)
        self._plans.put(plan)

    def collect(self):
        result = super().collect()
        self._num_expected -= isinstance(result, StepResult | CopyResult)
        return result

    def check(self) -> None:
        self._controller.check()

    def busy_s(self) -> list[float]:
        return self._controller.stage_busy_s()

    def close(self) -> None:
        """Ends this engine's plans on all ranks, after what is in flight; after a failure, at once."""
        if self.closed:
            return
        self.closed = True
        self._plans.put(None)
        self._controller.send(Close())
        deadline = time.monotonic() + END_S
        while (self._thread.is_alive() or self._num_expected) and time.monotonic() < deadline:
            if self._controller.failed:
                return
            with contextlib.suppress(queue.Empty):  # the next engine must not find this one's results
                self._results.get(timeout=0.05)
                self._num_expected -= 1

    def _deliver(self, result: object) -> None:
        if isinstance(result, StepResult):
            self._controller.landed()
        super()._deliver(result)

    def _fail(self, error: BaseException) -> None:
        self._controller.report(error)
