"""The front's end of the two ZeroMQ sockets it shares with one engine process.

Knows messages, and nothing of HTTP, text or how the process is started (supervisor.py). One client
serves one life of the engine: after a restart there is a new folder and a new client.

The front binds both sockets in a private folder; the engine connects. A frame is a msgpack list:

    front.out  PUSH  list[FrontMessage]  ->  engine
    front.in   PULL  list[EngineMessage] <-  engine, EngineInfo first
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from ds_serve.messages import (
    Abort,
    EngineFailure,
    EngineInfo,
    EngineMessage,
    FrontMessage,
    Output,
    Request,
    Shutdown,
    Stats,
    StatsQuery,
    Unpin,
)


class EngineDeadError(RuntimeError):
    """The engine is not there (any more); reason says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class RequestTimeout(Exception):
    """The time that a caller gave its requests is over; they have been aborted."""


class EngineClient:
    """Sends requests to the engine and hands each caller its own outputs. One event loop only.

    Outputs that a caller has not read yet are merged when it reads, so a slow reader holds up
    nobody and costs no more than its own tokens.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._context = zmq.asyncio.Context()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(list[EngineMessage])
        self._inboxes: dict[str, _Inbox] = {}
        self._stats_waiters: list[asyncio.Future[Stats]] = []
        self._ready = asyncio.Event()
        self._dead = asyncio.Event()
        self._reason = ""
        self.info: EngineInfo | None = None
        self.last_token_at = -math.inf  # by time.monotonic()

    async def start(self) -> None:
        """Binds both sockets and listens. The engine may connect from now on."""
        self._out = self._bind(zmq.PUSH, "front.out")
        self._in = self._bind(zmq.PULL, "front.in")
        self._reader = asyncio.create_task(self._read())

    @property
    def alive(self) -> bool:
        """Whether the engine has said that it is ready, and has not failed since."""
        return self.info is not None and not self._dead.is_set()

    def check(self) -> None:
        """Raises EngineDeadError where the engine has failed."""
        if self._dead.is_set():
            raise EngineDeadError(self._reason)

    async def wait_ready(self) -> EngineInfo:
        """The engine's first message. Raises EngineDeadError where it fails before."""
        await self._ready.wait()
        self.check()
        return self.info

    async def wait_dead(self) -> str:
        """Returns the reason once the engine has failed, or fail() or close() was called."""
        await self._dead.wait()
        return self._reason

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """Outputs of one request; the last has a finish_reason.

        Leaving early (closing the iterator, or being cancelled) aborts the request.
        Raises EngineDeadError, at once or in the middle, and ValueError for an id in use.
        """
        async with aclosing(self.generate_all([request])) as outputs:
            async for _, output in outputs:
                yield output

    async def generate_all(
        self, requests: Sequence[Request], *, group: int = 1, timeout_s: float | None = None
    ) -> AsyncIterator[tuple[int, Output]]:
        """Outputs of several requests as they come, with the index of the request. As generate.

        Of each group of so many requests the first goes out alone, and the others with its first output: they
        have the prompt in common, and find it in the cache. Raises RequestTimeout after timeout_s seconds.
        """
        self.check()
        ids = [request.id for request in requests]
        if len(set(ids)) < len(ids) or not self._inboxes.keys().isdisjoint(ids):
            raise ValueError(f"id: a request of this id is open already, among {ids}")
        news = asyncio.Event()
        inboxes = [_Inbox(news) for _ in requests]
        self._inboxes.update(zip(ids, inboxes, strict=True))
        self._send(*requests[::group])
        heads = {*range(0, len(requests), group)} if group > 1 else set()
        alarm = _Alarm(news, timeout_s)
        try:
            while not all(inbox.finished for inbox in inboxes):
                await news.wait()
                news.clear()
                for index, inbox in enumerate(inboxes):
                    output = inbox.take()
                    if output is not None:
                        if index in heads:
                            heads.remove(index)
                            self._send(*requests[index + 1 : index + group])
                        yield index, output
                if all(inbox.finished for inbox in inboxes):
                    return
                if self._dead.is_set():
                    raise EngineDeadError(self._reason)
                if alarm.is_over:
                    raise RequestTimeout
        finally:  # no await here: this also runs while the caller's task is being cancelled
            alarm.cancel()
            for index, (request_id, inbox) in enumerate(zip(ids, inboxes, strict=True)):
                if not inbox.finished and (index % group == 0 or index - index % group not in heads):
                    self._abort(request_id)
                self._inboxes.pop(request_id, None)

    async def abort(self, request_id: str) -> None:
        """Ends a request here and in the engine; its iterator gives no more outputs. Unknown ids are fine."""
        self._abort(request_id)

    def unpin(self, cache_key: str, salt: str = "") -> None:
        """Releases the prefix kept under this key and salt; unknown keys are fine. Raises EngineDeadError."""
        self.check()
        self._send(Unpin(cache_key=cache_key, salt=salt))

    async def stats(self) -> Stats:
        """The engine's gauges and totals now. Raises EngineDeadError."""
        self.check()
        waiter = asyncio.get_running_loop().create_future()
        self._stats_waiters.append(waiter)
        self._send(StatsQuery())
        return await waiter

    def shut_down(self) -> None:
        """Asks the engine to end; every open iterator raises EngineDeadError."""
        self._send(Shutdown())
        self.fail("the server is shutting down")

    def fail(self, reason: str) -> None:
        """The engine is gone: every open iterator raises EngineDeadError(reason). The first call counts."""
        if self._dead.is_set():
            return
        self._reason = reason
        self._dead.set()
        self._ready.set()
        for inbox in self._inboxes.values():
            inbox.news.set()
        waiters, self._stats_waiters = self._stats_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(EngineDeadError(reason))

    async def close(self) -> None:
        """Ends what is open and closes the sockets. start() must have been called."""
        self.fail("the server is shutting down")
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        self._context.destroy(linger=0)

    def _bind(self, kind: int, name: str) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        socket.set_hwm(0)  # messages are small, and neither side may ever wait for the other
        socket.bind(f"ipc://{self._folder / name}")
        return socket

    def _send(self, *messages: FrontMessage) -> None:
        # Sent at once, or as soon as the engine's socket is connected; the future tells nothing new.
        self._out.send(self._encoder.encode(messages))

    def _abort(self, request_id: str) -> None:
        inbox = self._inboxes.pop(request_id, None)
        if inbox is None:
            return
        inbox.finish()
        if not self._dead.is_set():
            self._send(Abort(id=request_id))

    async def _read(self) -> None:
        try:
            while True:
                for message in self._decoder.decode(await self._in.recv()):
                    self._take(message)
        except msgspec.DecodeError as error:
            self.fail(f"the engine sent what is no list of messages: {error}")

    def _take(self, message: EngineMessage) -> None:
        if isinstance(message, Output):
            if message.token_ids:
                self.last_token_at = time.monotonic()
            inbox = self._inboxes.get(message.id)
            if inbox is not None:  # else aborted: its last outputs may still be under way
                inbox.put(message)
        elif isinstance(message, Stats):
            waiters, self._stats_waiters = self._stats_waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(message)
        elif isinstance(message, EngineInfo):
            self.info = message
            self._ready.set()
        elif isinstance(message, EngineFailure):
            self.fail(message.reason)


class _Alarm:
    """Sets news once the time is over, if there is a limit."""

    def __init__(self, news: asyncio.Event, timeout_s: float | None) -> None:
        self._news, self._timer = news, None
        self.is_over = False
        if timeout_s is not None:
            self._timer = asyncio.get_running_loop().call_later(timeout_s, self._ring)

    def _ring(self) -> None:
        self.is_over = True
        self._news.set()

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class _Inbox:
    """Outputs of one request that its caller has not read; news is shared by a call's requests."""

    __slots__ = ("_unread", "finished", "news")

    def __init__(self, news: asyncio.Event) -> None:
        self.news = news
        self.finished = False
        self._unread: list[Output] = []

    def put(self, output: Output) -> None:
        self._unread.append(output)
        self.news.set()

    def finish(self) -> None:
        self.finished = True
        self._unread.clear()
        self.news.set()

    def take(self) -> Output | None:
        """All that is unread as one output."""
        if not self._unread:
            return None
        outputs, self._unread = self._unread, []
        output = outputs[0] if len(outputs) == 1 else _merge(outputs)
        self.finished = output.finish_reason is not None
        return output


def _merge(outputs: list[Output]) -> Output:
    logprobs = [entry for output in outputs for entry in output.logprobs or ()]
    return msgspec.structs.replace(
        outputs[-1],
        token_ids=[token for output in outputs for token in output.token_ids],
        logprobs=logprobs or None,
        prompt_logprobs=outputs[0].prompt_logprobs,
        num_prompt_tokens=max(output.num_prompt_tokens for output in outputs),
        num_cached_tokens=max(output.num_cached_tokens for output in outputs),
        num_host_tokens=max(output.num_host_tokens for output in outputs),
        times=tuple(max(moments) for moments in zip(*(output.times for output in outputs), strict=True)),
    )
