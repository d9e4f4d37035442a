"""The control plane, rank 0's side: what all ranks are to do goes out, and what became of it comes in.

Each rank has one link thread, which owns what is received, sends heartbeats, and sleeps between them. It
knows messages (wire.py) and signs of life (health.py); no tensor, no model, no request. The other side is
follower.py. Made by worker/cluster.py; the engine's rank draws results from Controller.results.
"""

from __future__ import annotations

import math
import os
import queue
import signal
import threading
import time
from contextlib import suppress

import msgspec
import zmq

from ds_serve.messages import CopyResult, StepResult
from ds_serve.parallel.follower import Follower
from ds_serve.parallel.health import Health, Progress, RankFailure, WakingClock, beat_interval, describe
from ds_serve.parallel.place import Place
from ds_serve.parallel.wire import (
    KEY,
    Beat,
    BoundSockets,
    Build,
    Failure,
    Gone,
    Leave,
    RankMessage,
    Store,
    decode_up,
    encode,
    frames,
    host_id,
    pidfd,
    poll_until,
    read_topic,
    say_here,
)

__all__ = ["Controller", "Follower", "Progress", "RankFailure"]

_HURRY_S = 0.05  # between looks while ranks join, and while a verdict is being formed


class Controller:
    """Rank 0's side. results brings StepResults of the rank that samples, CopyResults of all, and, once, a
    RankFailure.

    All methods may be called from any thread, send() and report() at the same time from several.
    """

    def __init__(self, place: Place, store: Store, timeout_s: float) -> None:
        self.place = place
        self.results: queue.SimpleQueue[StepResult | CopyResult | RankFailure] = queue.SimpleQueue()
        self.progress = Progress()
        self._health = Health(place, timeout_s)
        self._beat_s = beat_interval(timeout_s)
        self._clock = WakingClock(2 * self._beat_s)
        self._host = host_id()
        self._sockets = BoundSockets(place)
        self._lock = threading.Lock()  # holds sockets.plans
        self._subscribed = {0}
        self._processes: dict[int, int] = {}  # rank -> pid, of this machine
        self._pidfds: dict[int, int] = {}  # descriptor -> rank
        self._joined = threading.Event()
        self._failed = threading.Event()
        self._failure: RankFailure | None = None
        self._leaving = False
        self._closed = False
        store.set(KEY, msgspec.json.encode(self._sockets.address).decode())
        self._thread = threading.Thread(target=self._run, name="ds-serve-control", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Waits until every other rank is connected, so that none misses a message.

        Raises TimeoutError naming who is missing, RankFailure where one has come and is lost again.
        """
        if not self._joined.wait(timeout_s):
            missing = " and ".join(str(Place(rank, self.place.tp, self.place.pp)) for rank in self._missing())
            raise TimeoutError(f"{missing} did not connect to rank 0 within {timeout_s:g} s")
        self.check()

    def send(self, message: RankMessage) -> None:
        """To all other ranks, in the order of the calls. Never waits for them.

        After a Build all ranks, this one too, count as loading until their progress says otherwise.
        After a failure nothing is sent: the ranks only end.
        """
        if isinstance(message, Build):
            self.progress.phase = "loading"
        frame = encode(message)
        with self._lock:
            if self.failed:
                return
            if isinstance(message, Leave):
                self._leaving = True
            self._health.sent(message)
            self._sockets.plans.send(frame)

    def landed(self) -> None:
        """Rank 0 has drawn a result itself; those that come in from other ranks are counted here."""
        self._health.landed()

    def report(self, error: BaseException) -> None:
        """Rank 0's own worker failed. The verdict may name another rank, which brought that about."""
        if not self._closed:
            say_here(self._sockets.context, describe(0, error))

    @property
    def failed(self) -> bool:
        return self._failed.is_set()

    def check(self, wait_s: float = 0.0) -> None:
        """Raises the RankFailure, if there is one; waits so long for a verdict that may be under way."""
        if self._failed.wait(wait_s):
            raise self._failure

    def stage_busy_s(self) -> list[float]:
        """Seconds that shard 0 of each stage has computed; of other ranks as of their last heartbeat."""
        return [self.progress.busy_s, *self._health.stage_busy_s()[1:]]

    def kill(self) -> None:
        """SIGKILL to the other ranks of this machine. Those elsewhere end themselves after close()."""
        for pid in list(self._processes.values()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """What was sent leaves within a second. Ranks that were not told to leave end with code 1."""
        if self._closed:
            return
        self._closed = True
        if not self._leaving and self._thread.is_alive():
            with self._lock:
                self._sockets.plans.send(encode(Gone(reason=str(self._failure or "its process ends"))))
        self._sockets.context.term()  # stops the link thread, which closes its sockets
        self._thread.join()

    # -- the link thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._follow_others()
        except zmq.ContextTerminated:
            pass
        except Exception as error:
            self._conclude(RankFailure(self.place, f"its control link failed: {describe(0, error).reason}"))
        finally:
            with self._lock:
                self._sockets.close()
            for descriptor in self._pidfds:
                os.close(descriptor)

    def _follow_others(self) -> None:
        self._poller = zmq.Poller()
        self._poller.register(self._sockets.words, zmq.POLLIN)
        door = self._sockets.door
        if door is not None:
            self._poller.register(door.socket, zmq.POLLIN)
        looked = -math.inf
        while True:
            ready = poll_until(self._poller, looked + self._pause_s)
            now = self._clock.now()
            for source in ready:
                if source is self._sockets.words:
                    self._read_words(now)
                elif isinstance(source, int):
                    self._bury(source, now)
                else:
                    door.answer()
            if time.monotonic() >= looked + self._pause_s:
                self._look(now)
                looked = time.monotonic()

    @property
    def _pause_s(self) -> float:
        forming = self._health.suspicious and not self.failed and not self._leaving
        return _HURRY_S if forming or not self._joined.is_set() else self._beat_s

    def _read_words(self, now: float) -> None:
        for frame in frames(self._sockets.words):
            word = decode_up(frame)
            match word:
                case StepResult():
                    self._health.landed()
                    self.results.put(word)
                case CopyResult():
                    self.results.put(word)
                case Beat():
                    if word.rank in self._health.missing():
                        self._watch(word, now)
                    self._health.heard(word, now)
                case Failure():
                    self._health.failed(word, now)

    def _watch(self, hello: Beat, now: float) -> None:
        """The end of a process of this machine is seen at once, where the system has pidfds."""
        if hello.host != self._host:
            return
        self._processes[hello.rank] = hello.pid
        try:
            descriptor = pidfd(hello.pid)
        except ProcessLookupError:
            self._health.died(hello.rank, "the process died", now)
            return
        if descriptor is not None:
            self._pidfds[descriptor] = hello.rank
            self._poller.register(descriptor, zmq.POLLIN)

    def _bury(self, descriptor: int, now: float) -> None:
        rank = self._pidfds.pop(descriptor)
        self._poller.unregister(descriptor)
        os.close(descriptor)
        self._processes.pop(rank)
        self._health.died(rank, "the process died", now)

    def _look(self, now: float) -> None:
        """Says that rank 0 lives, sees who has come or gone, and judges."""
        beat = self.progress.beat(0, os.getpid(), self._host)
        self._health.heard(beat, now)
        with self._lock:
            self._sockets.plans.send(encode(beat))
            topics = list(frames(self._sockets.plans))
        for rank, has_come in filter(None, map(read_topic, topics)):
            if has_come:
                self._subscribed.add(rank)
            else:
                self._health.lost(rank, now)
        if not self._joined.is_set() and not self._missing():
            self._sockets.remove_folder()
            self._joined.set()
        if self._leaving or self.failed:
            return
        failure = self._health.judge(now)
        if failure is not None:
            self._conclude(failure)

    def _missing(self) -> list[int]:
        unheard = self._health.missing()
        return [
            rank for rank in range(self.place.world_size) if rank in unheard or rank not in self._subscribed
        ]

    def _conclude(self, failure: RankFailure) -> None:
        self._failure = failure
        self._failed.set()
        self._joined.set()
        self.results.put(failure)
