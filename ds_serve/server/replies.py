"""A Generation as an HTTP reply: one JSON object, or server-sent events as the text comes.

Knows when to send what; what a reply or an event looks like is its route's Shape. A client that
goes away has its requests aborted, whichever way it asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import msgspec
from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from ds_serve.server.client import EngineClient, EngineDeadError
from ds_serve.server.errors import ApiError
from ds_serve.server.generation import Delta, Generation, Prompt
from ds_serve.server.protocol import ChoicesBody, CompletionBody
from ds_serve.text.codec import TextCodec

T = TypeVar("T")


class ClientGone(Exception):
    """The client hung up before its answer was ready."""


class Shape(Protocol):
    """How one route words its reply, for one call, which id names.

    Events are server-sent ones as they go over the wire (shapes.event); usage is Generation.usage's.
    """

    id: str
    codec: TextCodec

    def whole(self, choices: list[Delta], usage: dict) -> dict:
        """The reply that is no stream."""

    def begin(self, num_choices: int) -> Iterable[bytes]:
        """The events before the first piece."""

    def piece(self, delta: Delta) -> Iterable[bytes]:
        """The events of one piece of a choice."""

    def end(self, usage: dict) -> Iterable[bytes]:
        """The events after the last piece."""

    def failed(self, error: ApiError) -> Iterable[bytes]:
        """The events that end a stream in the middle."""


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
    http: Request,
    body: ChoicesBody,
    client: EngineClient,
    shape: Shape,
    prompts: list[Prompt],
    adapter: str,
) -> Response:
    """Generates what the body asks of these prompts through an adapter ("": none), and answers as it asks.

    The first piece is awaited before a stream is opened, so that what the engine refuses still has
    its HTTP status. Raises ApiError, EngineDeadError, ClientGone.
    """
    generation = Generation(
        client,
        shape.codec,
        shape.id,
        prompts,
        watch=http.state.call.watch(),
        n=body.n,
        stop=body.stop,
        adapter=adapter,
        salt=body.cache_salt,
        priority=body.priority,
        cache_key=body.prompt_cache_key,
        cache_ttl=body.prompt_cache_ttl,
        without_output=isinstance(body, CompletionBody) and body.without_output,
        timeout_s=getattr(http.state, "timeout_s", None),
    )
    if not body.stream:
        whole = await _unless_gone(http, generation.collect())
        return json_reply(shape.whole(whole, generation.usage()))
    deltas = generation.deltas()
    first = await _unless_gone(http, anext(deltas))
    return EventStream(_events(first, deltas, generation, shape))


async def _events(
    first: Delta, deltas: AsyncIterator[Delta], generation: Generation, shape: Shape
) -> AsyncIterator[bytes]:
    async with aclosing(deltas):
        for event in shape.begin(len(generation.requests)):
            yield event
        delta: Delta | None = first
        try:
            while delta is not None:
                if delta.text or delta.logprobs or delta.prompt_logprobs or delta.finish_reason is not None:
                    for event in shape.piece(delta):
                        yield event
                delta = await anext(deltas, None)
        except (ApiError, EngineDeadError) as error:
            if isinstance(error, EngineDeadError):
                error = ApiError(503, error.reason, code="engine_dead")
            for event in shape.failed(error):
                yield event
            return
    for event in shape.end(generation.usage()):
        yield event


async def _unless_gone(http: Request, work: Awaitable[T]) -> T:
    """The result of work, cancelled where the client disconnects first (ClientGone)."""
    task, is_gone = asyncio.current_task(), False

    async def watch() -> None:
        nonlocal is_gone
        while (await http.receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if is_gone and not task.uncancel():  # else somebody else wants its end too
            raise ClientGone from None
        raise
    finally:
        watching.cancel()
