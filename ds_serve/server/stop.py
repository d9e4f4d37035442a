"""How `ds-serve serve` ends: the first signal drains, a second one ends at once.

Knows the door, the supervisor and uvicorn's server as things to close, in which order. Made by run.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Iterator
from types import FrameType

import uvicorn

from ds_serve.server.gate import Door
from ds_serve.server.supervisor import Supervisor

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Made inside the event loop. exit_code is 0 however many requests the drain had to end, and 128 + the
    second signal's number where that was not awaited."""

    def __init__(
        self, door: Door, supervisor: Supervisor, server: uvicorn.Server, drain_timeout_s: float
    ) -> None:
        self.exit_code = 0
        self._door = door
        self._supervisor = supervisor
        self._server = server
        self._drain_timeout_s = drain_timeout_s
        self._loop = asyncio.get_running_loop()
        self._drain: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM come here. Only in the main thread."""
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._drain is not None:
                self._drain.cancel()

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._take, number)

    def _take(self, number: int) -> None:
        if self._drain is None:
            self._drain = asyncio.create_task(self._drained())
        else:
            log.warning("a second signal: ending at once")
            self.exit_code = 128 + number
            self._end_at_once()

    async def _drained(self) -> None:
        self._door.close()
        if self._door.num_open:
            log.info("draining: %d open requests have %g s", self._door.num_open, self._drain_timeout_s)
        try:
            await asyncio.wait_for(self._door.wait_empty(), self._drain_timeout_s)
        except TimeoutError:
            log.warning(
                "drained for %g s: %d requests are cut off", self._drain_timeout_s, self._door.num_open
            )
            await self._supervisor.stop()  # so that they end with an error, not with a broken connection
        self._server.should_exit = True

    def _end_at_once(self) -> None:
        self._supervisor.kill()
        self._server.force_exit = self._server.should_exit = True
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
