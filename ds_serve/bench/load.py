"""Drives the load: which request is sent when, in a closed or an open loop, until enough or interrupted.

Knows time and tasks, no HTTP (client.py sends) and no figures (summary.py).
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count, islice
from time import perf_counter

from ds_serve.bench.records import INTERRUPTED, Record

Send = Callable[[Record, bytes], Awaitable[None]]
Body = Callable[[int], bytes]


class WarmUpFailed(Exception):
    """No request of the warm-up succeeded; says why the last did not."""


class Load:
    """One measured run. records has every request that was sent, in order; started is perf_counter's time."""

    def __init__(self, send: Send, body: Body, *, prompts_each: int = 1) -> None:
        self._send, self._body, self._prompts_each = send, body, prompts_each
        self.records: list[Record] = []
        self.running = 0
        self.done = 0
        self.failed = 0
        self.started = 0.0
        self.ended = 0.0
        self.interrupted = False

    async def closed(self, concurrency: int, requests: int | None, duration: float | None = None) -> None:
        """concurrency at a time, until so many were sent or seconds have passed; waits for the last."""
        indexes = iter(range(requests) if requests is not None else count())
        await self._measured(self._closed(concurrency, indexes, duration))

    async def open(
        self, times: Iterable[float], requests: int | None, duration: float | None, at_once: int | None
    ) -> None:
        """One request at each time from the start, at most at_once running; later ones are then sent late."""
        await self._measured(self._open(islice(times, requests), duration, at_once))

    async def warm_up(self, requests: int, concurrency: int) -> None:
        """Sends requests of negative numbers that leave no record. Raises WarmUpFailed where all fail."""
        load = Load(self._send, lambda index: self._body(-1 - index), prompts_each=self._prompts_each)
        await load.closed(concurrency, requests)
        self.interrupted = load.interrupted
        if not load.interrupted and load.failed == requests:
            last = load.records[-1]
            raise WarmUpFailed(f"all {requests} warm-up requests failed: {last.kind}: {last.detail}")

    async def _measured(self, driving: Awaitable[None]) -> None:
        self.started = perf_counter()
        task = asyncio.ensure_future(driving)
        with _on_interrupt(task):
            try:
                await task
            except asyncio.CancelledError:
                if not task.cancelled():
                    raise
                self.interrupted = True
        self.ended = perf_counter()

    async def _closed(self, concurrency: int, indexes: Iterator[int], duration: float | None) -> None:
        async def work() -> None:
            for index in indexes:
                if duration is not None and perf_counter() - self.started >= duration:
                    return
                body = self._body(index)
                await self._one(Record(index, self._prompts_each, perf_counter()), body)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())

    async def _open(self, times: Iterator[float], duration: float | None, at_once: int | None) -> None:
        room = asyncio.Semaphore(at_once) if at_once is not None else None

        async def work(record: Record, body: bytes) -> None:
            if room is None:
                return await self._one(record, body)
            async with room:
                await self._one(record, body)

        async with asyncio.TaskGroup() as group:
            for index, at in enumerate(times):
                if duration is not None and at >= duration:
                    return
                body = self._body(index)
                record = Record(index, self._prompts_each, self.started + at)
                await asyncio.sleep(max(0.0, record.intended - perf_counter()))
                group.create_task(work(record, body))

    async def _one(self, record: Record, body: bytes) -> None:
        self.records.append(record)
        self.running += 1
        try:
            await self._send(record, body)
        finally:
            self.running -= 1
            self.done += 1
            self.failed += not record.good and record.kind != INTERRUPTED


@contextmanager
def _on_interrupt(task: asyncio.Task) -> Iterator[None]:
    """Ctrl-C cancels the task; a second one ends the program as usual."""
    loop = asyncio.get_running_loop()

    def cancel() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        task.cancel()

    with suppress(ValueError, RuntimeError, NotImplementedError):  # only the main thread has signals
        loop.add_signal_handler(signal.SIGINT, cancel)
    try:
        yield
    finally:
        with suppress(ValueError, RuntimeError, NotImplementedError):
            loop.remove_signal_handler(signal.SIGINT)
