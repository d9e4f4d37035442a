"""The engine in a process of its own: the loop's inbox and outbox as two ZeroMQ sockets.

The front binds both in a private folder, and the engine connects. A frame is a msgpack list of messages
(messages.py); never pickle. Used by rank.py; knows no HTTP, no text and no tensor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from ds_serve.engine.loop import Closed
from ds_serve.messages import EngineMessage, FrontMessage

IDLE_POLL_MS = 1000


class IpcPort:
    """Both sockets of one engine process: Inbox.receive and deliver for the loop.

    front.out carries the front's messages, front.in the engine's. The front is gone when it says so
    (Shutdown) or when its process is: front_lives is asked every second, also while steps run.
    """

    def __init__(self, folder: str, front_lives: Callable[[], bool] = lambda: True) -> None:
        self._context = zmq.Context()
        self._in = self._connect(zmq.PULL, Path(folder) / "front.out")
        self._out = self._connect(zmq.PUSH, Path(folder) / "front.in")
        self._front_lives = front_lives
        self._looked = time.monotonic()
        self._decoder = msgspec.msgpack.Decoder(list[FrontMessage])
        self._encoder = msgspec.msgpack.Encoder()

    def _connect(self, kind: int, path: Path) -> zmq.Socket:
        socket = self._context.socket(kind)
        socket.set_hwm(0)
        socket.connect(f"ipc://{path}")
        return socket

    def receive(self, wait: bool) -> list[FrontMessage]:
        messages: list[FrontMessage] = []
        timeout = IDLE_POLL_MS if wait else 0
        while self._in.poll(timeout):
            messages += self._decoder.decode(self._in.recv())
            timeout = 0
        if time.monotonic() - self._looked >= IDLE_POLL_MS / 1000:
            self._looked = time.monotonic()
            if not self._front_lives():
                raise Closed
        return messages

    def deliver(self, messages: list[EngineMessage]) -> None:
        self._out.send(self._encoder.encode(messages))

    def close(self) -> None:
        """Send what is queued (for at most a second) and close."""
        self._context.destroy(linger=1000)
