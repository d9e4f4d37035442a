"""The engine's loop: messages in, plans out to the ranks, results in, outputs out.

Keeps several steps in flight, so that planning hides behind the device's work. Knows its ranks and its front
only by the two protocols below; knows no tensor, no socket and no text. Run by local.py and ipc.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from ds_serve.engine.scheduler import Scheduler
from ds_serve.messages import (
    Abort,
    CopyResult,
    EngineMessage,
    FrontMessage,
    Output,
    Request,
    Shutdown,
    Stats,
    StatsQuery,
    StepPlan,
    StepResult,
    Unpin,
)


class Ranks(Protocol):
    """The workers, all ranks as one. Steps' results come in the order of the plans, copies' in any order."""

    def submit(self, plan: StepPlan) -> None:
        """Start a plan's copies and its step; returns at once."""

    def collect(self) -> StepResult | CopyResult:
        """The oldest step's result, or what one rank says of copies; waits for either.

        Raises what the step or the copy raised.
        """

    def check(self) -> None:
        """Raises if a rank has failed; called while nothing is in flight, at least every second."""

    def busy_s(self) -> list[float]:
        """Seconds that each pipeline stage has computed, first stage first."""

    def close(self) -> None:
        """Let the ranks end. May be called twice."""


class Inbox(Protocol):
    """Where the front's messages arrive."""

    def receive(self, wait: bool) -> Sequence[FrontMessage]:
        """What has arrived; with wait, blocks until something has, or some time has gone by.

        Raises Closed once the front is gone.
        """


class Closed(Exception):
    """The front is gone: nobody waits for an answer any more."""


class EngineLoop:
    """Runs on one thread until the front closes or a step fails."""

    def __init__(
        self,
        scheduler: Scheduler,
        ranks: Ranks,
        inbox: Inbox,
        deliver: Callable[[list[EngineMessage]], None],
        clock: Callable[[], float] = time.monotonic,
        stopwatch: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.scheduler = scheduler
        self._ranks = ranks
        self._inbox = inbox
        self._deliver = deliver
        self._clock = clock
        self._stopwatch = stopwatch
        self._plan_s = self._wait_s = self._update_s = 0.0  # this thread's time, as in Stats
        self._active_s = 0.0  # with a step in flight, until the last time that none was
        self._active_since: float | None = None
        self._is_idle = False  # nothing in flight, and the last turn found nothing to plan

    def run(self) -> None:
        """Serve until the front closes. A rank's failure ends every open request, then is raised on."""
        failure = None
        try:
            while True:
                self.turn()
        except Closed:
            pass
        except BaseException as error:
            failure = error
            reason = f"the engine failed: {type(error).__name__}: {error}"
            self._deliver(self.scheduler.fail_all(reason))
            raise
        finally:
            self._close_ranks(failure)

    def _close_ranks(self, failure: BaseException | None) -> None:
        """Ranks that failed may not close either: that goes with the failure as a note, not in its place."""
        try:
            self._ranks.close()
        except Exception as error:
            if failure is None:
                raise
            failure.add_note(f"closing the ranks failed too: {type(error).__name__}: {error}")

    def turn(self) -> None:
        """Take in messages, plan what may be planned, and take in one result."""
        scheduler, stopwatch = self.scheduler, self._stopwatch
        started = stopwatch()
        messages = self._inbox.receive(wait=self._is_idle)
        if self._is_idle:
            started = stopwatch()  # it slept until now
        if messages:
            self._answer(messages)
        if self._is_idle:
            self._ranks.check()
        while scheduler.can_plan and (plan := scheduler.schedule()) is not None:
            if plan.rows and self._active_since is None:
                self._active_since = self._clock()
            self._ranks.submit(plan)
        planned = stopwatch()
        self._plan_s += planned - started
        in_flight = scheduler.num_in_flight or scheduler.num_copying
        if in_flight:
            result = self._ranks.collect()
            collected = stopwatch()
            self._wait_s += collected - planned
            outputs = self._take_in(result)
            if outputs:
                self._deliver(outputs)
            self._update_s += stopwatch() - collected
        elif scheduler.num_open:
            raise RuntimeError(f"{scheduler.num_open} requests are open and no step can be planned")
        # After a result there may be something to plan, if only stores: idle is who had nothing to wait for.
        self._is_idle = not in_flight

    def _take_in(self, result: StepResult | CopyResult) -> list[Output]:
        if isinstance(result, CopyResult):
            self.scheduler.copied(result)
            return []
        if self.scheduler.num_in_flight == 1:
            self._active_s = self._active()
            self._active_since = None
        return self.scheduler.update(result)

    def _answer(self, messages: Sequence[FrontMessage]) -> None:
        answers: list[EngineMessage] = []
        for message in messages:
            answer: Output | EngineMessage | None
            match message:
                case Request():
                    answer = self.scheduler.add(message)
                case Abort():
                    answer = self.scheduler.abort(message.id)
                case Unpin():
                    answer = self.scheduler.unpin(message.cache_key, message.salt)
                case StatsQuery():
                    answer = self._stats()
                case Shutdown():
                    raise Closed
            if answer is not None:
                answers.append(answer)
        if answers:
            self._deliver(answers)

    def _stats(self) -> Stats:
        return msgspec.structs.replace(
            self.scheduler.stats(),
            active_s=self._active(),
            stage_busy_s=self._ranks.busy_s(),
            plan_s=self._plan_s,
            wait_s=self._wait_s,
            update_s=self._update_s,
        )

    def _active(self) -> float:
        """Seconds with at least one step in flight, until now."""
        since = self._active_since
        return self._active_s if since is None else self._active_s + self._clock() - since
