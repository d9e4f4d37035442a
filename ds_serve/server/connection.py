"""uvicorn's HTTP connection with limits that it does not have: slow arrivals, slow readers, long heads.

Knows uvicorn's protocol classes (h11's, or httptools' where that is installed) and transports; nothing of
requests' content. run.py hands it to uvicorn.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

MAX_HEAD_BYTES = 32 * 1024  # of a request's line and headers; more are a 400


class Connection(AutoHTTPProtocol):
    """One client's connection.

    A request's head must have come within arrival_timeout_s of its first byte, the first one's of the
    connection's start, and so must the rest of a body that was refused. How long a connection may be idle
    between requests is uvicorn's.

    A client that takes nothing for stall_timeout_s of an answer that waits for it is cut off. Until then
    uvicorn's send() waits: such a client fills one buffer (64 KiB and a chunk) and holds up no one else.
    """

    def __init__(self, *args: Any, arrival_timeout_s: float, stall_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._arrival_timeout_s = arrival_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._arrival: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._unsent = 0
        self._head_bytes: int | None = None  # so far, where a head has begun; h11 counts for itself

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response("The request's head is too long.")
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if not is_answering and self._arrival is None:
            self._await_head()
        elif is_answering and self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def on_message_begin(self) -> None:  # httptools' parser calls this one and the next
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _await_head(self) -> None:
        self._arrival = self.loop.call_later(self._arrival_timeout_s, self.transport.abort)

    def _watch_reader(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._stall = self.loop.call_later(self._stall_timeout_s, self._check_reader)

    def _check_reader(self) -> None:
        if self.transport.get_write_buffer_size() < self._unsent:
            self._watch_reader()
            return
        if self.cycle is not None:
            self.cycle.scope["state"]["end"] = "stalled"
        self.transport.abort()

    def _cancel(self) -> None:
        for timer in (self._arrival, self._stall):
            if timer is not None:
                timer.cancel()
        self._arrival = self._stall = None
