"""POST /v1/responses: OpenAI's response object, and the events of its stream.

Knows the wording of replies; what may be asked is responses_protocol.py's, the order of pieces replies.py's.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

from fastapi import Request, Response

from ds_serve.server.errors import ApiError
from ds_serve.server.front import Front
from ds_serve.server.generation import Delta, Prompt
from ds_serve.server.replies import reply
from ds_serve.server.responses_protocol import ResponsesBody, in_our_words
from ds_serve.server.shapes import event, logprob_entry


async def responses(front: Front, body: ResponsesBody, http: Request) -> Response:
    """Raises ApiError, EngineDeadError (a 503) and ClientGone."""
    client = front.client
    front.check_model(body.model)
    chat = body.as_chat()
    with in_our_words():
        prompt = await front.chat_prompt(chat, client)
    return await reply(http, chat, client, ResponseShape(front, body, prompt), [prompt])


class ResponseShape:
    """The response and its one message, complete or as far as it has come."""

    def __init__(self, front: Front, body: ResponsesBody, prompt: Prompt) -> None:
        call = uuid.uuid4().hex
        self.id = f"resp_{call}"
        self.codec = front.codec
        self._front = front
        self._body = body
        self._params = prompt.params
        self._created = int(time.time())
        self._item_id = f"msg_{call}"
        self._next = 0  # sequence number of the next event
        self._text: list[str] = []
        self._logprobs: list[dict] = []
        self._finish_reason: str | None = None

    # -- what replies.py calls -----------------------------------------------------------------

    def whole(self, choices: list[Delta], usage: dict) -> dict:
        self._take(choices[0])
        return self._finished(usage)

    def begin(self, num_choices: int) -> Iterator[bytes]:
        response = self._response("in_progress")
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)
        yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", []))
        yield self._event("response.content_part.added", **self._place, part=self._part("", []))

    def piece(self, delta: Delta) -> Iterator[bytes]:
        logprobs = self._take(delta)
        if delta.text or logprobs:
            yield self._event(
                "response.output_text.delta", **self._place, delta=delta.text, logprobs=logprobs
            )

    def end(self, usage: dict) -> Iterator[bytes]:
        text, part = "".join(self._text), self._part("".join(self._text), self._logprobs)
        yield self._event("response.output_text.done", **self._place, text=text, logprobs=self._logprobs)
        yield self._event("response.content_part.done", **self._place, part=part)
        response = self._finished(usage)
        yield self._event("response.output_item.done", output_index=0, item=response["output"][0])
        yield self._event(f"response.{response['status']}", response=response)

    def failed(self, error: ApiError) -> Iterator[bytes]:
        told = {"code": "server_error", "message": error.body["error"]["message"]}
        output = [self._message("incomplete")]
        yield self._event(
            "response.failed", response=self._response("failed") | {"error": told, "output": output}
        )

    # -- the parts -----------------------------------------------------------------------------

    @property
    def _place(self) -> dict:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields) -> bytes:
        number, self._next = self._next, self._next + 1
        return event({"type": kind, "sequence_number": number, **fields}, kind)

    def _take(self, delta: Delta) -> list[dict]:
        """Notes a piece; its logprobs as they are told."""
        pairs = () if delta.logprobs is None else zip(delta.token_ids, delta.logprobs, strict=True)
        logprobs = [logprob_entry(self.codec, token, entry) for token, entry in pairs]
        self._text.append(delta.text)
        self._logprobs += logprobs
        self._finish_reason = delta.finish_reason or self._finish_reason
        return logprobs

    def _finished(self, usage: dict) -> dict:
        cut = self._finish_reason == "length"
        status = "incomplete" if cut else "completed"
        return self._response(status) | {
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._message(status)],
            "usage": _usage(usage),
        }

    def _message(self, status: str) -> dict:
        return self._item(status, [self._part("".join(self._text), self._logprobs)])

    def _item(self, status: str, content: list[dict]) -> dict:
        return {
            "type": "message",
            "id": self._item_id,
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _part(self, text: str, logprobs: list[dict]) -> dict:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _response(self, status: str) -> dict:
        body = self._body
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self._front.model_name,
            "instructions": body.instructions,
            "output": [],
            "usage": None,
            "text": body.text.model_dump(by_alias=True, exclude_none=True),
            "temperature": self._params.temperature,
            "top_p": self._params.top_p,
            "top_logprobs": body.top_logprobs or 0,
            "max_output_tokens": body.max_output_tokens,
            "tools": [],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "metadata": body.metadata,
            "user": body.user,
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key or None,
            "service_tier": "default",
            "store": False,
            "background": False,
            "truncation": "disabled",
            "previous_response_id": None,
        }


def _usage(usage: dict) -> dict:
    """Generation.usage in this route's words. Writes to the cache and reasoning are not told apart: 0."""
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
