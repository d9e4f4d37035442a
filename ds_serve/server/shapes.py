"""What OpenAI's chat and completion replies have in common; how an event goes over the wire."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import msgspec

from ds_serve.messages import TokenLogprob
from ds_serve.server.errors import ApiError
from ds_serve.server.front import Front
from ds_serve.server.generation import Delta
from ds_serve.server.protocol import ChoicesBody
from ds_serve.text.codec import TextCodec

_LOWEST_LOGPROB = -9999.0  # JSON has no infinity


class Envelope:
    """Identity of one call, the object around its choices, and the stream of its chunks.

    A route's own shape adds choice (one finished choice), opening (the chunk that opens a choice's stream, or
    None) and chunk (one piece of a choice).
    """

    def __init__(self, front: Front, body: ChoicesBody, prefix: str, kind: str, chunk_kind: str) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.codec = front.codec
        self._kinds = {False: kind, True: chunk_kind}
        self._rest = {"created": int(time.time()), "model": body.model}
        self._with_usage = body.stream_options is not None and body.stream_options.include_usage

    def envelope(self, choices: list[dict], *, chunk: bool) -> dict:
        return {"id": self.id, "object": self._kinds[chunk], **self._rest, "choices": choices}

    def whole(self, choices: list[Delta], usage: dict) -> dict:
        return self.envelope([self.choice(choice) for choice in choices], chunk=False) | {"usage": usage}

    def begin(self, num_choices: int) -> Iterator[bytes]:
        for index in range(num_choices):
            opening = self.opening(index)
            if opening is not None:
                yield self._chunk([opening])

    def piece(self, delta: Delta) -> Iterator[bytes]:
        yield self._chunk([self.chunk(delta)])

    def end(self, usage: dict) -> Iterator[bytes]:
        if self._with_usage:
            yield self._chunk([], usage)
        yield b"data: [DONE]\n\n"

    def failed(self, error: ApiError) -> Iterator[bytes]:
        yield event(error.body)

    def _chunk(self, choices: list[dict], usage: dict | None = None) -> bytes:
        chunk = self.envelope(choices, chunk=True)
        return event(chunk | {"usage": usage} if self._with_usage else chunk)


def event(payload: dict, name: str = "") -> bytes:
    """A server-sent event: the payload as JSON, after a line with its name if it has one."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + msgspec.json.encode(payload) + b"\n\n"


def logprob_entry(codec: TextCodec, token_id: int, entry: TokenLogprob) -> dict:
    """A chosen token's log-probability as chats and responses tell it, with the likeliest beside it."""
    top = zip(entry.top_ids, entry.top_logprobs, strict=True)
    alternatives = [_logprob(codec, *pair) for pair in top]
    return _logprob(codec, token_id, entry.logprob) | {"top_logprobs": alternatives}


def _logprob(codec: TextCodec, token_id: int, logprob: float) -> dict:
    data = codec.token_bytes(token_id)
    return {"token": token_text(data), "logprob": finite(logprob), "bytes": list(data)}


def token_text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


def finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
