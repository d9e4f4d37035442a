"""Sends one request and times what comes back.

Knows HTTP (aiohttp) and the clock; what is sent and when is load.py's, what a body means endpoints.py's. One
session for all, with as many connections as there are requests at a time.
"""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import Any

import aiohttp
import msgspec
from yarl import URL

from ds_serve.bench.endpoints import Endpoint, Piece, error_text
from ds_serve.bench.options import Options
from ds_serve.bench.records import INTERRUPTED, Record
from ds_serve.bench.sse import EventReader

_KEEP_ALIVE_S = 4.0  # below uvicorn's 5 s, so that the server does not close a connection that we just took
_LOOK_TIMEOUT_S = 10.0
_MAX_DETAIL = 300


class Unreachable(Exception):
    """The server cannot be asked what it serves; says why."""


class Client:
    """Use as an asynchronous context, on one event loop."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._url = options.url

    async def __aenter__(self) -> Client:
        headers = {"Content-Type": "application/json"}
        if self._options.api_key is not None:
            headers["Authorization"] = f"Bearer {self._options.api_key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=None, keepalive_timeout=_KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=self._options.timeout),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("Accept-Encoding", "User-Agent"),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def models(self) -> list[str]:
        """The names that /models lists. Raises Unreachable."""
        url = f"{self._url}/models"
        try:
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(_LOOK_TIMEOUT_S)) as response:
                data = await response.read()
                if response.status != 200:
                    hint = "" if self._url.endswith("/v1") else " (most URLs end in /v1)"
                    raise Unreachable(f"{url} answers {response.status}: {_refusal(data)}{hint}")
                return [card["id"] for card in msgspec.json.decode(data)["data"]]
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unreachable(f"{url}: {_readable(error)}") from error
        except (msgspec.DecodeError, KeyError, TypeError) as error:
            raise Unreachable(f"{url} does not answer with a list of models") from error

    async def page(self, path: str) -> bytes | None:
        """The body at a path beside /v1 (/health, say), or None where there is none."""
        url = self._url.removesuffix("/v1") + path
        try:
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(_LOOK_TIMEOUT_S)) as response:
                return await response.read() if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError):
            return None

    def sender(self, endpoint: Endpoint, *, streams: bool) -> Sender:
        return Sender(self._session, URL(self._url + endpoint.path), endpoint, streams)


class Sender:
    """Sends requests to one endpoint."""

    def __init__(self, session: aiohttp.ClientSession, url: URL, endpoint: Endpoint, streams: bool) -> None:
        self._session, self._url, self._endpoint = session, url, endpoint
        self._read = self._stream if streams else self._whole

    async def send(self, record: Record, body: bytes) -> None:
        """Fills in the record, whatever happens; only cancellation is raised (and noted) too."""
        record.sent = perf_counter()
        try:
            async with self._session.post(self._url, data=body) as response:
                record.status = response.status
                if response.status == 200:
                    await self._read(response, record)
                else:
                    record.fail(f"http {response.status}", _refusal(await response.read()))
        except asyncio.CancelledError:
            record.fail(INTERRUPTED)
            raise
        except TimeoutError:  # aiohttp's own timeouts are of this kind too
            record.fail("timeout", f"no end after {perf_counter() - record.sent:.1f} s")
        except aiohttp.ClientConnectorError as error:
            record.fail("connect", _readable(error))
        except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            record.fail("cut" if record.status else "disconnected", _readable(error))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            record.fail("bad json", str(error))
        except aiohttp.ClientError as error:
            record.fail("bad http", _readable(error))
        record.end = record.end or perf_counter()

    async def _whole(self, response: aiohttp.ClientResponse, record: Record) -> None:
        data = await response.read()
        record.end = perf_counter()
        piece = self._endpoint.reply(data)
        if piece.error is not None:
            record.fail("error in reply", piece.error[:_MAX_DETAIL])
        elif not piece.finished:
            record.fail("bad json", "the reply has no choice that ended")
        elif piece.usage is not None:
            record.count(piece.usage)

    async def _stream(self, response: aiohttp.ClientResponse, record: Record) -> None:
        if response.content_type != "text/event-stream":
            return record.fail("not streamed", f"Content-Type: {response.content_type}")
        reader, decode, done = EventReader(), self._endpoint.event, self._endpoint.done
        finished = False
        read = response.content.readany
        while piece := await read():
            now = perf_counter()
            for data in reader.feed(piece):
                if data == done:
                    record.end, finished = now, True
                else:
                    event = decode(data)
                    finished = self._take(event, record, now) or finished
                    if event.error is not None:
                        return
        if not finished:
            record.fail("cut", "the stream ended before its last event")

    def _take(self, event: Piece, record: Record, now: float) -> bool:
        """Notes an event. Returns whether it ends the stream by itself."""
        if event.generated or (event.finished and not record.times and self._endpoint.done):
            record.times.append(now)  # a lone last token may have no text
        if event.usage is not None:
            record.count(event.usage)
        if event.error is not None:
            record.fail("error event", event.error[:_MAX_DETAIL])
        if not self._endpoint.done and event.finished:
            record.end = now
            return True
        return False


def _refusal(data: bytes) -> str:
    try:
        body: Any = msgspec.json.decode(data)
        return error_text(body.get("error", body) if isinstance(body, dict) else body)[:_MAX_DETAIL]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return data[:_MAX_DETAIL].decode(errors="replace")


def _readable(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:_MAX_DETAIL]
