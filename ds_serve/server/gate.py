"""What every request passes before a route sees it: its key, whether there is room, its size, its time.

Knows HTTP and the server's limits, and nothing of what is asked. A request that may not come in ends here
with an error in OpenAI's shape; the body of one that may is read whole first, so that no route waits for it.
app.py puts it around the routes (add_gate); the Door is shared with ready.py and stop.py.
"""

from __future__ import annotations

import asyncio
import logging
import math
from urllib.parse import parse_qsl

import msgspec
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ds_serve.config import Settings
from ds_serve.server.accesslog import prompt_log
from ds_serve.server.errors import ApiError
from ds_serve.server.keys import KeyRing

# Answered also when the server is full or draining; the open ones of them without a key.
SERVICE_PATHS = frozenset({"/health", "/ready", "/version", "/metrics"})

# The query parameters of paths that begin so; no other path takes any.
QUERIES = {"/v1/cache/": frozenset({"cache_salt"})}

DRAINING_RETRY_S = 5
TIMEOUT_HEADER = "X-Request-Timeout"
TIMEOUT_HEADER_KEY = TIMEOUT_HEADER.lower().encode()

_FULL_RETRY_S = 1


class Door:
    """How many requests are inside, and whether more may come. One event loop only."""

    def __init__(self) -> None:
        self.num_open = 0
        self.is_closing = False
        self._empty = asyncio.Event()
        self._empty.set()

    def enter(self) -> None:
        self.num_open += 1
        self._empty.clear()

    def leave(self) -> None:
        self.num_open -= 1
        if not self.num_open:
            self._empty.set()

    def close(self) -> None:
        """From now on the server drains: nobody comes in any more."""
        self.is_closing = True

    async def wait_empty(self) -> None:
        await self._empty.wait()

    def check(self) -> None:
        """Raises ApiError 503 once the server drains."""
        if self.is_closing:
            raise ApiError(
                503,
                "the server is about to stop and takes no new requests",
                code="draining",
                retry_after_s=DRAINING_RETRY_S,
                headers={"Connection": "close"},
            )


def add_gate(app: Starlette, door: Door, settings: Settings, keys: KeyRing) -> None:
    """Puts the gate before the application's routes, and CORS around it where origins are set."""
    app.add_middleware(Gate, door, settings, keys)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )


class Gate:
    """ASGI: answers what may not come in, hands on the rest. HEAD is answered as GET is, without the body.

    Puts into the request's state: key, the number of its API key, and timeout_s, the seconds that its answer
    may take, where the server or the client set any.
    """

    def __init__(self, app: ASGIApp, door: Door, settings: Settings, keys: KeyRing) -> None:
        self._app = app
        self._door = door
        self._keys = keys
        self._keyless = SERVICE_PATHS - (set() if settings.open_metrics else {"/metrics"})
        self._max_open = settings.open_requests_limit
        self._max_bytes = settings.max_request_bytes
        self._body_timeout_s = settings.body_timeout
        self._timeout_s = settings.request_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # there are no others: nothing may go round the gate
            await send({"type": "websocket.close", "code": 1008})
            return
        self._door.enter()
        try:
            app = self._app
            try:
                headers = dict(scope["headers"])
                self._check(scope, headers)
                if b"content-length" in headers or b"transfer-encoding" in headers:
                    receive = await self._with_body(scope, headers, receive)
            except ApiError as error:
                app = error.response()
            except _Gone:
                return
            if scope["method"] == "HEAD":
                scope = scope | {"method": "GET"}
            await app(scope, receive, send)
        finally:
            self._door.leave()

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raises ApiError 401, 503, 429 or 400."""
        path, state = scope["path"], scope.setdefault("state", {})
        if not self._keys.is_open and path not in self._keyless:
            state["key"] = self._keys.find(headers.get(b"authorization", b""))
            if not state["key"]:
                raise ApiError(
                    401,
                    "Authorization: must be 'Bearer KEY' with a key that this server accepts",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if path not in SERVICE_PATHS:
            self._door.check()
            if self._door.num_open > self._max_open:
                raise ApiError(
                    429,
                    f"the server has {self._max_open} open requests, as many as it takes",
                    code="too_many_requests",
                    retry_after_s=_FULL_RETRY_S,
                )
        if scope["query_string"]:
            _check_query(path, scope["query_string"])
        if TIMEOUT_HEADER_KEY in headers or self._timeout_s is not None:
            state["timeout_s"] = _timeout_s(headers.get(TIMEOUT_HEADER_KEY), self._timeout_s)

    async def _with_body(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """receive, once the whole body has come, which it gives first. Raises ApiError 413 or 408, _Gone."""
        if int(headers.get(b"content-length", b"0")) > self._max_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._body_timeout_s):
                body = await self._read(receive)
        except TimeoutError:
            raise ApiError(
                408,
                f"the request did not arrive within {self._body_timeout_s:g} s",
                code="timeout",
                headers={"Connection": "close"},
            ) from None
        if prompt_log.isEnabledFor(logging.INFO):
            name = scope["state"].get("request_id")
            record = {"request_id": name, "path": scope["path"], "body": body.decode(errors="replace")}
            prompt_log.info(msgspec.json.encode(record).decode())
        return _replay(body, receive)

    async def _read(self, receive: Receive) -> bytes:
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            part = message.get("body", b"")
            size += len(part)
            if size > self._max_bytes:
                raise self._too_large()
            parts.append(part)
            more = message.get("more_body", False)
        return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._max_bytes} bytes", code="request_too_large")


class _Gone(Exception):
    """The client hung up before its request was whole."""


def _replay(body: bytes, receive: Receive) -> Receive:
    is_read = False

    async def replay() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _check_query(path: str, query: bytes) -> None:
    """Raises ApiError 400 for a parameter that nobody reads, or that is there twice."""
    left = set(next((names for start, names in QUERIES.items() if path.startswith(start)), ()))
    for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name not in left:
            message = f"{name}: unknown, not supported, or given twice in the query"
            raise ApiError(400, message, param=name, code="unsupported_parameter")
        left.remove(name)


def _timeout_s(asked: bytes | None, limit: float | None) -> float:
    """The shorter of the client's and the server's. Raises ApiError 400 for what is no time."""
    if asked is None:
        return limit
    try:
        seconds = float(asked)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        name = TIMEOUT_HEADER
        raise ApiError(400, f"{name}: must be seconds above 0, got {asked.decode('latin-1')!r}", param=name)
    return seconds if limit is None else min(seconds, limit)
