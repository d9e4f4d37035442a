"""A name for every request, on its answer and in the access log: one JSON object a line when it has ended.

Knows what passes over HTTP, and of its content only sizes and counts: neither query strings nor prompts nor
keys. run.py puts it around the whole application; other layers and routes find the name in the
request's state as request_id, and put there what the line shall say: the number of the key (gate.py), the
call, which has counted tokens (observe.py), and another end of it than is seen here (connection.py).
"""

from __future__ import annotations

import logging
import time
import uuid
from datetime import UTC, datetime

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)
access_log = logging.getLogger("ds_serve.access")
prompt_log = logging.getLogger("ds_serve.prompts")

CLIENT_CLOSED = 499  # the status of an answer that nobody waited for

_MAX_ID_CHARS = 128


def log_to_stderr(*, access: bool, prompts: bool) -> None:
    """Sets up both loggers: bare lines to stderr, or nothing, whatever the level of other logs is."""
    for logger, wanted in ((access_log, access), (prompt_log, prompts)):
        logger.propagate = False
        logger.setLevel(logging.INFO if wanted else logging.CRITICAL)
        if wanted:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(message)s"))
            logger.handlers = [handler]


class RequestLog:
    """ASGI: takes the client's X-Request-Id or makes one, puts it on the answer, and logs the request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        state = scope.setdefault("state", {})
        name = state["request_id"] = _name(scope["headers"])
        header = (b"x-request-id", name.encode())
        status, num_bytes, is_whole = 0, 0, False

        async def watched(message: Message) -> None:
            nonlocal status, num_bytes, is_whole
            if message["type"] == "http.response.body":
                num_bytes += len(message.get("body", b""))
                is_whole = not message.get("more_body", False)
            elif message["type"] == "http.response.start":
                status = message["status"]
                message = message | {"headers": [*message.get("headers", ()), header]}
            await send(message)

        end = "client_gone"
        try:
            await self._app(scope, receive, watched)
            if is_whole and status != CLIENT_CLOSED:
                end = "complete"
        except Exception:
            end = "failed"
            log.exception("request %s failed", name)
            if not is_whole:
                raise  # and uvicorn closes the connection, as it would also under a whole answer
        finally:
            if access_log.isEnabledFor(logging.INFO):
                line = {"status": status, "bytes": num_bytes, "end": state.get("end", end)}
                access_log.info(_line(scope, state, line, time.monotonic() - began))


def _line(scope: Scope, state: dict, about: dict, seconds: float) -> str:
    client, call = scope.get("client"), state.get("call")
    if "key" in state:
        about["key"] = state["key"]
    if call is not None:
        about |= call.summary()
    return msgspec.json.encode(
        {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": state["request_id"],
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"],
            "duration_ms": round(seconds * 1000, 1),
            **about,
        }
    ).decode()


def _name(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's own name for its request if it is printable ASCII and not too long, else a new one."""
    for header, value in headers:
        if header == b"x-request-id" and 0 < len(value) <= _MAX_ID_CHARS:
            if all(0x21 <= byte <= 0x7E for byte in value):
                return value.decode()
            break
    return uuid.uuid4().hex
