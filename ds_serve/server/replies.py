"""A Generation as an HTTP reply: one JSON object, or server-sent events as the text comes.

Knows when to send what; what a choice or a chunk looks like is its route's Shape. A client that
goes away has its requests aborted, whichever way it asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import msgspec
from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from ds_serve.server.client import EngineClient, EngineDeadError
from ds_serve.server.errors import ApiError
from ds_serve.server.generation import Delta, Generation, Prompt
from ds_serve.server.protocol import GenerationBody
from ds_serve.text.codec import TextCodec

T = TypeVar("T")


class ClientGone(Exception):
    """The client hung up before its answer was ready."""


class Shape(Protocol):
    """How one route words its reply. Every method returns plain JSON values. id names the call."""

    id: str
    codec: TextCodec

    def envelope(self, choices: list[dict], *, chunk: bool) -> dict:
        """The object around choices: id, object, created, model."""

    def choice(self, whole: Delta) -> dict:
        """One finished choice."""

    def opening(self, index: int) -> dict | None:
        """The chunk that opens a choice's stream, if the route has one."""

    def chunk(self, delta: Delta) -> dict:
        """One piece of a choice."""


class EventStream(StreamingResponse):
    """Server-sent events; closes its iterator whatever ends it."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def stream_response(self, send) -> None:
        async with aclosing(self.body_iterator):
            await super().stream_response(send)


def json_reply(payload: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(payload), status, media_type="application/json")


async def reply(
    http: Request, body: GenerationBody, client: EngineClient, shape: Shape, prompts: list[Prompt]
) -> Response:
    """Generates what the body asks of these prompts, and answers as it asks.

    The first piece is awaited before a stream is opened, so that what the engine refuses still has
    its HTTP status. Raises ApiError, EngineDeadError, ClientGone.
    """
    generation = Generation(
        client,
        shape.codec,
        shape.id,
        prompts,
        n=body.n,
        stop=body.stop,
        salt=body.cache_salt,
        priority=body.priority,
        cache_key=body.prompt_cache_key,
        cache_ttl=body.prompt_cache_ttl,
    )
    if not body.stream:
        whole = await _unless_gone(http, generation.collect())
        payload = shape.envelope([shape.choice(choice) for choice in whole], chunk=False)
        return json_reply(payload | {"usage": generation.usage()})
    deltas = generation.deltas()
    first = await _unless_gone(http, anext(deltas))
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    return EventStream(_events(first, deltas, generation, shape, with_usage))


async def _events(
    first: Delta, deltas: AsyncIterator[Delta], generation: Generation, shape: Shape, with_usage: bool
) -> AsyncIterator[bytes]:
    nothing = {"usage": None} if with_usage else {}
    async with aclosing(deltas):
        for index in range(len(generation.requests)):
            opening = shape.opening(index)
            if opening is not None:
                yield _event(shape.envelope([opening], chunk=True) | nothing)
        delta: Delta | None = first
        try:
            while delta is not None:
                if delta.text or delta.logprobs or delta.finish_reason is not None:
                    yield _event(shape.envelope([shape.chunk(delta)], chunk=True) | nothing)
                delta = await anext(deltas, None)
        except ApiError as error:
            yield _event(error.body)
            return
        except EngineDeadError as error:
            yield _event(ApiError(503, error.reason, code="engine_dead").body)
            return
    if with_usage:
        yield _event(shape.envelope([], chunk=True) | {"usage": generation.usage()})
    yield b"data: [DONE]\n\n"


def _event(payload: dict) -> bytes:
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"


async def _unless_gone(http: Request, work: Awaitable[T]) -> T:
    """The result of work, cancelled where the client disconnects first (ClientGone)."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(http))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
