"""Steps that have been launched and whose results are not yet on the host.

A device runs behind the thread that launches: the next step goes to it before anybody has read this one's
tokens. A Launched is read by the finisher, and earlier by the launching thread where a grammar must know a
token. On a CPU a launched step is a finished one. Knows no plan, no model and no queue of requests. Made by
the worker.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Protocol

import torch
from deepspeed.accelerator import get_accelerator

from ds_serve.messages import StepResult
from ds_serve.parallel.control import Progress
from ds_serve.worker.constraint import Constraints
from ds_serve.worker.sampled import SampleOutput, ScoreOutput


class _Timer(Protocol):
    """When a step computes. begin() and end() on the launching thread, the others on any."""

    def begin(self) -> None: ...

    def waiting(self) -> contextlib.AbstractContextManager:
        """Inside it the step waits for another rank, which is not computing."""

    def end(self) -> None: ...

    def is_over(self) -> bool: ...

    def wait(self) -> None: ...

    def seconds(self) -> float:
        """Of computing; once it is over."""


def timer(device: torch.device) -> _Timer:
    return _HostTimer() if device.type == "cpu" else _DeviceTimer()


class _HostTimer:
    """What is launched has been computed."""

    def begin(self) -> None:
        self._began, self._waited, self._ended = time.perf_counter(), 0.0, None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def end(self) -> None:
        self._ended = time.perf_counter()

    def is_over(self) -> bool:
        return self._ended is not None

    def wait(self) -> None:
        """It is over."""

    def seconds(self) -> float:
        return self._ended - self._began - self._waited


class _DeviceTimer:
    """Marks in the launching thread's stream."""

    def __init__(self) -> None:
        # blocking: who waits sleeps, and leaves its core to the thread that launches
        self._began, self._ended = (
            get_accelerator().Event(enable_timing=True, blocking=True) for _ in range(2)
        )

    def begin(self) -> None:
        self._began.record()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        yield
        self._began.record()  # the stream gets here when the other rank's data have come

    def end(self) -> None:
        self._ended.record()

    def is_over(self) -> bool:
        return self._ended.query()

    def wait(self) -> None:
        self._ended.synchronize()

    def seconds(self) -> float:
        return self._began.elapsed_time(self._ended) / 1000


class Launched:
    """One step. Its methods wait for the device.

    drawn and scored are what started() gave, None where this rank draws nothing; tells: whether this rank is
    the one that answers.
    """

    def __init__(
        self,
        step: int,
        timer: _Timer,
        progress: Progress,
        drawn: SampleOutput | None,
        scored: ScoreOutput | None,
        tells: bool,
    ) -> None:
        self._step, self._timer, self._progress = step, timer, progress
        self._drawn, self._scored, self._tells = drawn, scored, tells

    @property
    def is_over(self) -> bool:
        """Whether the device is done with it. Does not wait."""
        return self._timer.is_over()

    def token_ids(self) -> list[int]:
        """What was drawn, row by row, as StepResult has it."""
        self._timer.wait()
        return self._drawn.to_host()[0]

    def finish(self) -> StepResult | None:
        """The result, on the rank that answers. To be called once, in the order of the steps."""
        self._timer.wait()
        self._progress.busy_s += self._timer.seconds()
        if self._progress.step == self._step:
            self._progress.phase = "idle"
        if not self._tells:
            return None
        token_ids, logprobs = ([], []) if self._drawn is None else self._drawn.to_host()
        return StepResult(
            step=self._step,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=[] if self._scored is None else self._scored.to_host(),
        )


class Untold:
    """Which drawn tokens a grammar has not heard of: those of launched steps, unknown on the host so far.

    For the launching thread.
    """

    def __init__(self, constraints: Constraints) -> None:
        self._constraints = constraints
        self._steps: deque[tuple[Launched, dict[int, int]]] = deque()

    def add(self, launched: Launched, slots: list[int]) -> None:
        """launched draws a token for each of slots."""
        rows = {slot: row for row, slot in enumerate(slots) if self._constraints.holds(slot)}
        if rows:
            self._steps.append((launched, rows))

    def forget(self, slot: int) -> None:
        """A new sequence takes the slot."""
        for _, rows in self._steps:
            rows.pop(slot, None)

    def tell(self, wait: bool) -> bool:
        """Tells the constraints what has been drawn. With wait all of it; else whether that was all."""
        while self._steps:
            launched, rows = self._steps[0]
            if not wait and not launched.is_over:
                return False
            token_ids = launched.token_ids()
            # An invalid token stands in as 0 until its request ends.
            self._constraints.append(list(rows), [max(token_ids[row], 0) for row in rows.values()])
            self._steps.popleft()
        return True
