"""Keeps one engine alive: starts it, watches it, starts it again, and leaves nothing behind.

Knows processes and folders; how ranks are started is launch.py's, what passes over the sockets client.py's.
run.py owns one Supervisor, and the routes ask it for the client of the engine's present life.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ds_serve import launch
from ds_serve.messages import EngineInfo
from ds_serve.server.client import EngineClient, EngineDeadError

log = logging.getLogger(__name__)

_LAST_WORDS_S = 0.5  # how long an ended engine's EngineFailure may still be under way


@dataclass(frozen=True)
class RestartPolicy:
    """At most max_restarts within window_s seconds, waiting twice as long each time (seconds)."""

    max_restarts: int = 5
    window_s: float = 600.0
    first_delay_s: float = 1.0
    max_delay_s: float = 30.0

    def delay_s(self, restarts: int) -> float:
        return min(self.first_delay_s * 2**restarts, self.max_delay_s)


class Supervisor:
    """One engine at a time: what start([FOLDER, PID]) says, in a process group of its own.

    FOLDER is private (0700) and holds settings.json (0600) and both sockets; it goes with the
    engine. PID is this process's id: the engine ends where that is gone. With several ranks, start gives
    their launcher, or, in a process that a launcher started, its own rank. An engine that fails before
    it was ever ready is not started again: its settings or its model are at fault.
    """

    def __init__(
        self,
        settings_json: str,
        *,
        start: Callable[[Sequence[str]], launch.Launch] = launch.one,
        ranks: int = 1,
        policy: RestartPolicy | None = None,
        grace_s: float = launch.GRACE_S,
    ) -> None:
        self._settings_json = settings_json
        self._start = start
        self._ranks = ranks
        self._policy = policy or RestartPolicy()
        self._grace_s = grace_s
        self._group: int | None = None  # the process group of the engine of the moment
        self._stopping = asyncio.Event()
        self._ready = asyncio.Event()  # ready, or given up
        self._client: EngineClient | None = None
        self._was_ready = False
        self._reason = "the engine is starting"
        self.failure: str | None = None  # why it is gone for good: it failed, and is never started again
        self.retry_after_s = 5
        self.num_restarts = 0
        self.given_up = asyncio.Event()

    @property
    def reason(self) -> str:
        """Why there is no engine, or why there was none last."""
        return self._reason

    @property
    def client(self) -> EngineClient:
        """The live engine's client. Raises EngineDeadError while there is none."""
        if self._client is None:
            raise EngineDeadError(self._reason)
        self._client.check()
        return self._client

    @property
    def is_stopping(self) -> bool:
        """Whether the engine's end is wanted."""
        return self._stopping.is_set()

    async def start(self) -> None:
        """Starts the engine process; it loads on its own (wait_ready)."""
        self._task = asyncio.create_task(self._run())

    async def wait_ready(self) -> EngineInfo:
        """The engine's description once it answers. Raises EngineDeadError where it never will."""
        await self._ready.wait()
        return self.client.info

    async def stop(self) -> None:
        """Ends the engine: asks it to, then SIGTERM to its group, then SIGKILL, each after the grace."""
        self._stopping.set()
        await self._task

    def kill(self) -> None:
        """Ends the engine by SIGKILL, also one that stop() is waiting for. stop() is still to be awaited."""
        self._stopping.set()
        self._grace_s = 0.0
        if self._group is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._group, signal.SIGKILL)

    async def _run(self) -> None:
        restarts: deque[float] = deque()
        try:
            while not self._stopping.is_set():
                try:
                    self._reason = await self._live()
                except (OSError, ValueError) as error:
                    self._reason = f"the engine cannot be started: {error}"
                    log.error(self._reason)
                if self._stopping.is_set() or not self._was_ready:
                    break
                now = time.monotonic()
                while restarts and restarts[0] < now - self._policy.window_s:
                    restarts.popleft()
                if len(restarts) >= self._policy.max_restarts:
                    if restarts:
                        log.error("started again %d times in %g s", len(restarts), self._policy.window_s)
                    break
                await self._pause(self._policy.delay_s(len(restarts)))
                restarts.append(now)
                self.num_restarts += 1
        finally:
            self.given_up.set()
            self._ready.set()

    async def _pause(self, delay_s: float) -> None:
        log.warning("starting the engine again in %g s", delay_s)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), delay_s)
        self._reason = f"the engine is starting again after it failed: {self._reason}"

    async def _live(self) -> str:
        """One life of the engine, from start to end. Returns why it ended."""
        folder = Path(tempfile.mkdtemp(prefix="ds-serve-"))
        try:
            client = EngineClient(folder)
            await client.start()
            try:
                process = self._spawn(folder)
                self._group = process.pid
                try:
                    reason = await self._watch(process, client)
                    failed = not self._stopping.is_set()
                finally:
                    await self._end(process, client)
                    self._group = None
                if failed and not self._policy.max_restarts:
                    self.failure = reason
                log.log(logging.ERROR if failed else logging.INFO, "engine: %s", reason)
                return reason
            finally:
                self._client = None
                await client.close()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _spawn(self, folder: Path) -> _Process:
        settings = folder / "settings.json"
        settings.touch(mode=0o600)
        settings.write_text(self._settings_json, encoding="utf-8")
        return _Process(*self._start([str(folder), str(os.getpid())]))

    async def _watch(self, process: _Process, client: EngineClient) -> str:
        exited = asyncio.create_task(process.wait())
        dead = asyncio.create_task(client.wait_dead())
        stopping = asyncio.create_task(self._stopping.wait())
        ready = asyncio.create_task(client.wait_ready())
        ends = {exited, dead, stopping}
        try:
            await asyncio.wait({ready, *ends}, return_when=asyncio.FIRST_COMPLETED)
            if client.alive:
                self._client = client
                self._was_ready = True
                self._ready.set()
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                client.shut_down()
            elif exited.done():
                await asyncio.wait({dead}, timeout=_LAST_WORDS_S)
                client.fail(f"{self._culprit(client)} {launch.describe(exited.result())}")
            return await client.wait_dead()
        finally:
            for task in (exited, dead, stopping, ready):
                task.cancel()
            await asyncio.gather(exited, dead, stopping, ready, return_exceptions=True)

    def _culprit(self, client: EngineClient) -> str:
        """Who ended without a word. Of other ranks' ends, once it is ready, rank 0 would have told."""
        if self._ranks == 1:
            return "the engine process"
        return "rank 0" if client.info is not None else "a rank"

    async def _end(self, process: _Process, client: EngineClient) -> None:
        if self._stopping.is_set() and client.info is not None:  # it hears: else it is still loading
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), self._grace_s)
        await asyncio.to_thread(launch.end_group, process.pid, self._grace_s)
        await process.wait()


class _Process:
    """A process in a group of its own, for any event loop: uvloop starts none in a group."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        # By this thread: the process ends with the thread that started it (rank.py).
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, process_group=0)
        self.pid = self._process.pid
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[int] = self._loop.create_future()
        threading.Thread(target=self._reap, name="reap", daemon=True).start()

    async def wait(self) -> int:
        """Its exit code as subprocess has it: negative for a signal."""
        return await asyncio.shield(self._exit)

    def _reap(self) -> None:
        code = self._process.wait()
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._exit.set_result, code)
