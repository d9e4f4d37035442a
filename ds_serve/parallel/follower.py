"""The control plane, the side of every rank but 0: messages in, results, heartbeats and failures out.

Its link thread also ends the process when rank 0 or the launcher is gone, whatever the worker's thread is in.
Knows no tensor, no model, no request. The other side is control.py. Made by worker/cluster.py.
"""

from __future__ import annotations

import math
import os
import queue
import shutil
import signal
import threading
import time
from contextlib import suppress
from typing import NoReturn

import msgspec
import zmq

from ds_serve.messages import CopyResult, StepPlan, StepResult
from ds_serve.parallel.health import Progress, WakingClock, beat_interval, describe, patience
from ds_serve.parallel.place import Place
from ds_serve.parallel.wire import (
    KEY,
    Address,
    Beat,
    Build,
    ConnectedSockets,
    Failure,
    Gone,
    Leave,
    Phase,
    RankMessage,
    Store,
    decode_down,
    encode,
    frames,
    host_id,
    pidfd,
    poll_until,
)

_GRACE_S = 1.0  # a follower waits so much longer for rank 0 than rank 0 for it
_LAST_WORDS_S = 0.3  # what a process sent last may be read so long after its end


class Follower:
    """The side of every other rank. It ends its process where rank 0 or the launcher is gone.

    receive() is for the thread that steps the worker; deliver() and fail() for any.
    """

    def __init__(self, place: Place, store: Store, timeout_s: float) -> None:
        self.place = place
        self.progress = Progress()
        self._timeout_s = timeout_s
        self._beat_s = beat_interval(timeout_s)
        self._clock = WakingClock(2 * self._beat_s)
        self._host, self._pid, self._launcher = host_id(), os.getpid(), os.getppid()
        self._address = msgspec.json.decode(store.get(KEY), type=Address)
        self._sockets = ConnectedSockets(place, self._address)
        self._lock = threading.Lock()  # holds sockets.words
        self._inbox: queue.SimpleQueue[RankMessage] = queue.SimpleQueue()
        self._heard = self._clock.now()
        self._phase_of_rank_0: Phase = "idle"
        self._left = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ds-serve-control", daemon=True)
        self._thread.start()

    def receive(self) -> RankMessage:
        """The next message, in rank 0's order; sleeps until it is there."""
        return self._inbox.get()

    def deliver(self, result: StepResult | CopyResult) -> None:
        """To rank 0: a step's result, from the rank that samples, and a copy's, from every rank."""
        self._send(result)

    def fail(self, error: BaseException) -> None:
        """Tells rank 0 why this rank ends, waits for at most a second until that has left, and closes."""
        if not self._closed:
            self._send(describe(self.place.rank, error))
            self.close()

    def close(self) -> None:
        """What was sent leaves within a second. Without a Leave or fail() rank 0 takes this rank for lost."""
        if self._closed:
            return
        self._closed = True
        self._sockets.context.term()  # stops the link thread, which closes its sockets
        self._thread.join()

    def _send(self, message: StepResult | CopyResult | Beat | Failure) -> None:
        frame = encode(message)
        with self._lock:
            self._sockets.words.send(frame)

    # -- the link thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._follow_rank_0()
        except zmq.ContextTerminated:
            pass
        except Exception as error:
            self._end(f"its control link failed: {describe(self.place.rank, error).reason}")
        finally:
            with self._lock:
                self._sockets.close()

    def _follow_rank_0(self) -> None:
        poller = zmq.Poller()
        poller.register(self._sockets.plans, zmq.POLLIN)
        rank_0 = self._pidfd_of_rank_0()
        if rank_0 is not None:
            poller.register(rank_0, zmq.POLLIN)
        beaten = -math.inf
        while True:
            ready = poll_until(poller, beaten + self._beat_s)
            now = self._clock.now()
            if self._sockets.plans in ready:
                self._read_plans(now)
            if rank_0 in ready:
                poller.unregister(rank_0)
                os.close(rank_0)
                self._outlive_rank_0()
            if time.monotonic() >= beaten + self._beat_s:
                self._send(self.progress.beat(self.place.rank, self._pid, self._host))
                beaten = time.monotonic()
                self._judge(now)

    def _pidfd_of_rank_0(self) -> int | None:
        if self._address.host != self._host:
            return None
        try:
            return pidfd(self._address.pid)
        except ProcessLookupError:
            self._end("rank 0's process died")

    def _read_plans(self, now: float) -> None:
        self._heard = now
        for frame in frames(self._sockets.plans):
            message = decode_down(frame)
            match message:
                case Beat():
                    self._phase_of_rank_0 = message.phase
                    continue
                case Gone():
                    self._end(f"rank 0 gave up: {message.reason}")
                case Build():
                    self.progress.phase = self._phase_of_rank_0 = "loading"
                case StepPlan():
                    self._phase_of_rank_0 = "idle"
                case Leave():
                    self._left = True
            self._inbox.put(message)

    def _outlive_rank_0(self) -> None:
        """Its process is gone. Its last messages may still be on their way, a Leave among them."""
        until = time.monotonic() + _LAST_WORDS_S
        while not self._left and (wait_s := until - time.monotonic()) > 0:
            if self._sockets.plans.poll(math.ceil(wait_s * 1000)):
                self._read_plans(self._clock.now())
        if not self._left:
            self._end("rank 0's process died")

    def _judge(self, now: float) -> None:
        if os.getppid() != self._launcher:
            self._end("the process that started it is gone")
        limit = patience(self._timeout_s, self._phase_of_rank_0) + _GRACE_S
        if not self._left and now - self._heard > limit:
            if self._address.host == self._host:  # a stopped process is deaf to the launcher's SIGTERM
                with suppress(ProcessLookupError):
                    os.kill(self._address.pid, signal.SIGKILL)
            self._end(f"rank 0 gave no sign for {limit:g} s")

    def _end(self, reason: str) -> NoReturn:
        """The worker's thread may be inside a collective that never returns: the process ends here."""
        try:
            if self._address.folder:
                shutil.rmtree(self._address.folder, ignore_errors=True)
            os.write(2, f"ds-serve: {self.place}: {reason}; this process ends\n".encode())
        finally:  # stderr may be a pipe that nobody reads any more
            os._exit(1)
