"""OpenAI's request bodies and replies, as far as a load test must know them.

Knows JSON shapes; sends nothing and measures no time (client.py). Only the fields named here are decoded.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import msgspec

from ds_serve.bench.options import Options
from ds_serve.bench.prompts import Prompt


class Usage(NamedTuple):
    """Token counts as the server states them; host_cached is an extension of ds_serve."""

    prompt: int
    output: int
    cached: int = 0
    host_cached: int = 0


class Piece(NamedTuple):
    """What one event, or one whole reply, says. generated: it brings text, or a token that has none."""

    generated: bool = False
    finished: bool = False
    usage: Usage | None = None
    error: str | None = None


class Endpoint(Protocol):
    """One route. done is the data of the event that ends a good stream."""

    path: str
    done: bytes

    def body(self, prompts: list[Prompt]) -> bytes:
        """One request's JSON."""

    def event(self, data: bytes) -> Piece:
        """Raises msgspec.DecodeError for what is not the route's JSON."""

    def reply(self, data: bytes) -> Piece:
        """As event, of the body of a request that does not stream."""


def endpoint(options: Options, model: str) -> Endpoint:
    kinds = {"chat": Chat, "responses": Responses, "completions": Completions, "batch": Completions}
    return kinds[options.endpoint](options, model)


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None
    host_cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: _PromptDetails | None = None

    def plain(self) -> Usage:
        details = self.prompt_tokens_details or _PromptDetails()
        return Usage(
            self.prompt_tokens,
            self.completion_tokens or 0,
            details.cached_tokens or 0,
            details.host_cached_tokens or 0,
        )


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Object(msgspec.Struct):
    """A chunk or a whole reply of /completions and /chat/completions."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _OpenAI:
    done = b"[DONE]"

    def __init__(self, options: Options, model: str) -> None:
        self._options, self._model = options, model
        self._decoder = msgspec.json.Decoder(_Object)
        self._encoder = msgspec.json.Encoder()

    def _encoded(self, prompts: list[Prompt], content: dict) -> bytes:
        options = self._options
        fields = {"model": self._model, **content, "max_tokens": max(p.output_tokens for p in prompts)}
        if options.ignore_eos:
            fields["ignore_eos"] = True
        if options.streams:
            fields["stream"] = True
            if options.usage:
                fields["stream_options"] = {"include_usage": True}
        return self._encoder.encode(_without_null(fields | options.extra))

    def event(self, data: bytes) -> Piece:
        whole = self._decoder.decode(data)
        generated = finished = False
        for choice in whole.choices:
            delta = choice.delta
            finished = finished or choice.finish_reason is not None
            if choice.text or (delta and (delta.content or delta.reasoning_content or delta.tool_calls)):
                generated = True
        usage = None if whole.usage is None else whole.usage.plain()
        return Piece(generated, finished, usage, None if whole.error is None else error_text(whole.error))

    def reply(self, data: bytes) -> Piece:
        return self.event(data)


class Completions(_OpenAI):
    """POST /completions: one prompt, or several."""

    path = "/completions"

    def body(self, prompts: list[Prompt]) -> bytes:
        batch = self._options.endpoint == "batch"
        return self._encoded(
            prompts, {"prompt": [p.content for p in prompts] if batch else prompts[0].content}
        )


class Chat(_OpenAI):
    """POST /chat/completions: a chat, or one user's message."""

    path = "/chat/completions"

    def body(self, prompts: list[Prompt]) -> bytes:
        content = prompts[0].content
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        return self._encoded(prompts, {"messages": messages})


class _CachedDetails(msgspec.Struct):
    cached_tokens: int | None = None
    host_cached_tokens: int | None = None


class _ResponseUsage(msgspec.Struct):
    input_tokens: int = 0
    output_tokens: int = 0
    input_tokens_details: _CachedDetails | None = None


class _Response(msgspec.Struct):
    status: str | None = None
    usage: _ResponseUsage | None = None
    error: Any = None


class _ResponseEvent(msgspec.Struct):
    type: str = ""
    response: _Response | None = None
    message: str | None = None


class Responses:
    """POST /responses: its stream has typed events, and ends with response.completed or .incomplete."""

    path = "/responses"
    done = b""

    def __init__(self, options: Options, model: str) -> None:
        self._options, self._model = options, model
        self._events = msgspec.json.Decoder(_ResponseEvent)
        self._replies = msgspec.json.Decoder(_Response)

    def body(self, prompts: list[Prompt]) -> bytes:
        options, prompt = self._options, prompts[0]
        fields = {"model": self._model, "input": prompt.content, "max_output_tokens": prompt.output_tokens}
        if options.ignore_eos:
            fields["ignore_eos"] = True
        if options.streams:
            fields["stream"] = True
        return msgspec.json.encode(_without_null(fields | options.extra))

    def event(self, data: bytes) -> Piece:
        event = self._events.decode(data)
        match event.type.removeprefix("response."):
            case "output_text.delta":
                return Piece(generated=True)
            case "completed" | "incomplete":
                return Piece(finished=True, usage=_plain(event.response))
            case "failed":
                return Piece(error=error_text(event.response and event.response.error))
            case "error":
                return Piece(error=event.message or "an error event without a message")
        return Piece()

    def reply(self, data: bytes) -> Piece:
        whole = self._replies.decode(data)
        if whole.error is not None:
            return Piece(error=error_text(whole.error))
        return Piece(finished=whole.status is not None, usage=_plain(whole))


def _plain(response: _Response | None) -> Usage | None:
    if response is None or response.usage is None:
        return None
    usage, details = response.usage, response.usage.input_tokens_details or _CachedDetails()
    cached, from_host = details.cached_tokens or 0, details.host_cached_tokens or 0
    return Usage(usage.input_tokens, usage.output_tokens, cached, from_host)


def error_text(error: Any) -> str:
    """The message of an error in OpenAI's shape, or what is there in its place."""
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return error["message"]
    return str(error)


def _without_null(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
