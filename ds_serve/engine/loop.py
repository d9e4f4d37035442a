"""The engine's loop: messages in, plans out to the ranks, results in, outputs out.

Keeps several steps in flight, so that planning hides behind the device's work. Knows its ranks and its front
only by the two protocols below; knows no tensor, no socket and no text. Run by local.py and ipc.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ds_serve.engine.scheduler import Scheduler
from ds_serve.messages import (
    Abort,
    EngineMessage,
    FrontMessage,
    Output,
    Request,
    StatsQuery,
    StepPlan,
    StepResult,
)


class Ranks(Protocol):
    """The workers, all ranks as one. Results come back in the order of the plans."""

    def submit(self, plan: StepPlan) -> None:
        """Start a step; returns at once."""

    def collect(self) -> StepResult:
        """The oldest step's result; waits for it. Raises what the step raised."""

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
    ) -> None:
        self.scheduler = scheduler
        self._ranks = ranks
        self._inbox = inbox
        self._deliver = deliver

    def run(self) -> None:
        """Serve until the front closes. A step's failure ends every open request, then is raised on."""
        try:
            while True:
                self.turn()
        except Closed:
            pass
        except BaseException as error:
            reason = f"the engine failed: {type(error).__name__}: {error}"
            self._deliver(self.scheduler.fail_all(reason))
            raise
        finally:
            self._ranks.close()

    def turn(self) -> None:
        """Take in messages, plan what may be planned, and take in one result."""
        scheduler = self.scheduler
        idle = not scheduler.num_open and not scheduler.num_in_flight
        messages = self._inbox.receive(wait=idle)
        if messages:
            self._answer(messages)
        while scheduler.can_plan and (plan := scheduler.schedule()) is not None:
            self._ranks.submit(plan)
        if scheduler.num_in_flight:
            outputs = scheduler.update(self._ranks.collect())
            if outputs:
                self._deliver(outputs)
        elif scheduler.num_open:
            raise RuntimeError(f"{scheduler.num_open} requests are open and no step can be planned")

    def _answer(self, messages: Sequence[FrontMessage]) -> None:
        answers: list[EngineMessage] = []
        for message in messages:
            answer: Output | EngineMessage | None
            match message:
                case Request():
                    answer = self.scheduler.add(message)
                case Abort():
                    answer = self.scheduler.abort(message.id)
                case StatsQuery():
                    answer = self.scheduler.stats()
            if answer is not None:
                answers.append(answer)
        if answers:
            self._deliver(answers)
