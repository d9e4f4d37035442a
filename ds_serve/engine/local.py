"""The engine in the caller's own process: the loop on a thread, answers through callbacks.

Used by the pipeline, the benchmarks and tests. Knows no tensor and no text.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from ds_serve.engine.loop import Closed, EngineLoop, Ranks
from ds_serve.engine.scheduler import Scheduler
from ds_serve.messages import (
    Abort,
    EngineInfo,
    EngineMessage,
    FrontMessage,
    Output,
    Request,
    Stats,
    StatsQuery,
    Unpin,
)

IDLE_WAIT_S = 1.0

OnOutput = Callable[[Output], None]


class EngineDeadError(RuntimeError):
    """The engine has ended; the message says why."""


class _QueueInbox:
    """An inbox that any thread may put into. It waits for IDLE_WAIT_S at most."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[FrontMessage | None] = queue.SimpleQueue()
        self.put = self._queue.put

    def receive(self, wait: bool) -> list[FrontMessage]:
        messages = []
        try:
            while True:
                message = self._queue.get(block=wait and not messages, timeout=IDLE_WAIT_S)
                if message is None:
                    raise Closed
                messages.append(message)
        except queue.Empty:
            return messages


class LocalEngine:
    """submit, abort and stats from any thread. Every submitted request gets exactly one last Output."""

    def __init__(self, scheduler: Scheduler, ranks: Ranks, info: EngineInfo) -> None:
        self.info = info
        self.scheduler = scheduler
        self._callbacks: dict[str, OnOutput] = {}
        self._stats: queue.SimpleQueue[Stats | None] = queue.SimpleQueue()
        self._stats_lock = threading.Lock()
        self._lock = threading.Lock()  # guards _callbacks and _ended together
        self._ended: str | None = None
        self._inbox = _QueueInbox()
        self._loop = EngineLoop(scheduler, ranks, self._inbox, self._deliver)
        self._thread = threading.Thread(target=self._run, name="ds-serve-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_output: OnOutput) -> None:
        """Queue a request. on_output runs on the engine's thread: it must be short and must not raise.

        Raises EngineDeadError after close() or a failure, ValueError for an id that is in use.
        """
        with self._lock:
            if self._ended is not None:
                raise EngineDeadError(self._ended)
            if request.id in self._callbacks:
                raise ValueError(f"request id {request.id} is in use")
            self._callbacks[request.id] = on_output
        self._inbox.put(request)

    def abort(self, request_id: str) -> None:
        """End a request; its last Output says "abort", unless it has ended already."""
        self._inbox.put(Abort(id=request_id))

    def unpin(self, cache_key: str, salt: str = "") -> None:
        """Release what a request pinned under this key and salt; unknown keys are fine."""
        self._inbox.put(Unpin(cache_key=cache_key, salt=salt))

    def stats(self) -> Stats:
        """Gauges and totals, taken between two steps. Raises EngineDeadError."""
        with self._stats_lock:
            if self._ended is not None:
                raise EngineDeadError(self._ended)
            self._inbox.put(StatsQuery())
            stats = self._stats.get()
        if stats is None:
            raise EngineDeadError(self._ended)
        return stats

    def close(self) -> None:
        """End the loop after the step in flight. Requests still open end with an error."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        reason = "the engine was closed"
        try:
            self._loop.run()
        except BaseException as error:
            reason = f"the engine failed: {type(error).__name__}: {error}"
        finally:
            with self._lock:
                self._ended = reason
                callbacks, self._callbacks = self._callbacks, {}
            for request_id, on_output in callbacks.items():
                on_output(Output(id=request_id, finish_reason="error", error=reason))
            self._stats.put(None)

    def _deliver(self, messages: list[EngineMessage]) -> None:
        for message in messages:
            if isinstance(message, Stats):
                self._stats.put(message)
            elif isinstance(message, Output):
                ended = message.finish_reason is not None
                # An unknown id is a request whose end was delivered already.
                callback = self._callbacks.pop(message.id, None) if ended else self._callbacks.get(message.id)
                if callback is not None:
                    callback(message)
