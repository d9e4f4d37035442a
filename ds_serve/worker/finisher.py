"""Waits for launched steps, so that the thread that launches need not.

Knows no tensor and no plan. Used by local.py and cluster.py.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Protocol

from ds_serve.messages import StepResult


class Finishable(Protocol):
    """A step that was launched (launched.py)."""

    def finish(self) -> StepResult | None:
        """Waits for the step: its result, on the rank that answers."""


class Finisher:
    """Takes launched steps' results to deliver, in their order; where steps run ahead, on its own thread.

    take() and close() are for the launching thread. Without ahead take() raises what a step raises; with it
    fail gets that, on the finisher's thread, and what was launched after it has no result.
    """

    def __init__(
        self, ahead: bool, deliver: Callable[[StepResult], None], fail: Callable[[BaseException], None]
    ) -> None:
        self._deliver, self._fail = deliver, fail
        self._thread = None
        if ahead:
            self._launched: queue.SimpleQueue[Finishable | None] = queue.SimpleQueue()
            self._thread = threading.Thread(target=self._run, name="ds-serve-finisher", daemon=True)
            self._thread.start()

    def take(self, launched: Finishable | None) -> None:
        """None: a plan without rows, which has no result."""
        if launched is None:
            return
        if self._thread is None:
            self._finish(launched)
        else:
            self._launched.put(launched)

    def close(self) -> None:
        """Waits for what was launched. May be called twice."""
        if self._thread is not None and self._thread.is_alive():
            self._launched.put(None)
            self._thread.join()

    def _run(self) -> None:
        try:
            while (launched := self._launched.get()) is not None:
                self._finish(launched)
        except BaseException as error:
            self._fail(error)

    def _finish(self, launched: Finishable) -> None:
        result = launched.finish()
        if result is not None:
            self._deliver(result)
