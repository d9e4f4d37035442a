"""An HTTP server that answers as the request's model says: well, or wrong in one certain way.

Plain sockets in a thread, so that it can stop anywhere. test_bench.py runs the load test against it.
"""

import asyncio
import json
import threading

TOKEN = b'data: {"choices":[{"index":0,"text":"a","finish_reason":null}]}\n\n'
LAST = b'data: {"choices":[{"index":0,"text":"","finish_reason":"length"}]}\n\n'
DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error":{"message":"the engine is gone","code":"engine_dead"}}\n\n'
REPLY = b'{"choices":[{"index":0,"text":"a","finish_reason":"length"}]}'


def _head(status, kind, rest):
    return f"HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Type: {kind}\r\n{rest}\r\n\r\n".encode()


def _stream(*pieces):
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return _head(200, "text/event-stream", "Transfer-Encoding: chunked") + chunks


def _json(status, body):
    return _head(status, "application/json", f"Content-Length: {len(body)}") + body


END = b"0\r\n\r\n"
ANSWERS = {
    "good": _stream(TOKEN, TOKEN, TOKEN, LAST, DONE) + END,
    "http 429": _json(429, b'{"error":{"message":"the queue is full","type":"rate_limit_error"}}'),
    "http 500": _head(500, "text/plain", "Content-Length: 4") + b"oops",
    "cut": _stream(TOKEN),
    "cut cleanly": _stream(TOKEN, LAST) + END,
    "error event": _stream(TOKEN, ERROR) + END,
    "bad json": _stream(b"data: {oops\n\n", DONE) + END,
    "not streamed": _json(200, REPLY),
    "disconnected": b"",
    "bad http": b"what?\r\n\r\n",
    "whole": _json(200, REPLY),
    "whole error": _json(200, b'{"error":{"message":"no"}}'),
    "whole nothing": _json(200, b"{}"),
    "whole bad": _json(200, b"{"),
    "whole cut": _head(200, "application/json", "Content-Length: 99") + b"{",
}


class RudeServer:
    """Use as a context. authorizations are the headers of that name; a model "timeout" is never answered."""

    def __enter__(self):
        self.authorizations = []
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._up.wait(10)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)

    async def _main(self):
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        self._up.set()
        await self._over.wait()
        server.close()

    async def _answer(self, reader, writer):
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head)}
            if head[0].startswith("GET"):
                models = json.dumps({"data": [{"id": "good"}]}).encode()
                writer.write(_json(200, models) if "/models" in head[0] else _json(404, b"{}"))
            else:
                self.authorizations.append(headers.get("authorization"))
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                if body["model"] == "timeout":
                    await self._over.wait()
                writer.write(ANSWERS[body["model"]])
            await writer.drain()
        finally:
            writer.close()
