"""POST /v1/responses: OpenAI's response object, and the events of its stream.

Knows the wording of replies (items of output: responses_output.py); what may be asked is
responses_protocol.py's, the order of pieces replies.py's.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

from fastapi import Request, Response

from ds_serve.server.chat import calls_of
from ds_serve.server.errors import ApiError
from ds_serve.server.front import Front
from ds_serve.server.generation import Delta, Prompt
from ds_serve.server.metrics import Call
from ds_serve.server.replies import reply
from ds_serve.server.responses_output import CallItem, Event, TextItem
from ds_serve.server.responses_protocol import ResponsesBody, in_our_words
from ds_serve.server.shapes import event, logprob_entry
from ds_serve.text.tools import CallPiece, Calls


async def responses(front: Front, body: ResponsesBody, http: Request) -> Response:
    """Raises ApiError, EngineDeadError (a 503) and ClientGone."""
    client = front.client
    adapter = front.adapter_of(body.model)
    chat = body.as_chat()
    with in_our_words():
        calls = calls_of(front, chat) if chat.may_call else None
        prompt = await front.chat_prompt(chat, client, calls)
    shape = ResponseShape(front, body, prompt, calls, http.state.call)
    return await reply(http, chat, client, shape, [prompt], adapter)


class ResponseShape:
    """One response, as far as it has come: text is a message, and each call an item of its own."""

    def __init__(
        self, front: Front, body: ResponsesBody, prompt: Prompt, calls: Calls | None, call: Call
    ) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self.codec = front.codec
        self._body = body
        self._params = prompt.params
        self._parser = None if calls is None else calls.parser()
        self._call = call
        self._created = int(time.time())
        self._sequence_number = 0
        self._items: list[TextItem | CallItem] = []
        self._status = "completed"

    def whole(self, choices: list[Delta], usage: dict) -> dict:
        self._take(choices[0])
        return self._finish(usage)[1]

    def begin(self, num_choices: int) -> Iterator[bytes]:
        for name in ("response.created", "response.in_progress"):
            yield self._event(name, {"response": self._response("in_progress")})

    def piece(self, delta: Delta) -> Iterator[bytes]:
        for told in self._take(delta):
            yield self._event(*told)

    def end(self, usage: dict) -> Iterator[bytes]:
        events, response = self._finish(usage)
        for told in events:
            yield self._event(*told)
        yield self._event(f"response.{self._status}", {"response": response})

    def failed(self, error: ApiError) -> Iterator[bytes]:
        self._status = "incomplete"
        response = self._response("failed") | {
            "output": self._output(),
            "error": {"code": "server_error", "message": error.body["error"]["message"]},
        }
        yield self._event("response.failed", {"response": response})

    def _event(self, name: str, fields: dict) -> bytes:
        number = self._sequence_number
        self._sequence_number += 1
        return event({"type": name, "sequence_number": number, **fields}, name)

    def _take(self, delta: Delta) -> list[Event]:
        """The events of a piece of the answer."""
        if delta.finish_reason == "length":
            self._status = "incomplete"
        if self._parser is not None:
            events = []
            for told in self._parser.push(delta.text, final=delta.finish_reason is not None):
                events += self._take_text(told, []) if isinstance(told, str) else self._take_call(told)
            if delta.finish_reason == "stop" and self._parser.complete:
                self._call.ended_by_calls(delta.index)
            return events
        pairs = () if delta.logprobs is None else zip(delta.token_ids, delta.logprobs, strict=True)
        logprobs = [logprob_entry(self.codec, token, entry) for token, entry in pairs]
        return self._take_text(delta.text, logprobs) if delta.text or logprobs else []

    def _take_text(self, text: str, logprobs: list[dict]) -> list[Event]:
        events = []
        if not self._items or isinstance(self._items[-1], CallItem):
            events = self._add(TextItem(len(self._items)))
        return events + self._items[-1].more(text, logprobs)

    def _take_call(self, piece: CallPiece) -> list[Event]:
        events = []
        if piece.name is not None:
            events = self._add(CallItem(len(self._items), piece.id, piece.name))
        return events + (self._items[-1].more(piece.arguments) if piece.arguments else [])

    def _add(self, item: TextItem | CallItem) -> list[Event]:
        before = self._items[-1].end("completed") if self._items else []
        self._items.append(item)
        return before + item.begin()

    def _finish(self, usage: dict) -> tuple[list[Event], dict]:
        """The last events but one, and the response that the last one tells."""
        events = [] if self._items else self._add(TextItem(0))
        events += self._items[-1].end(self._status)
        cut = self._status == "incomplete"
        return events, self._response(self._status) | {
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._output(),
            "usage": _usage(usage),
        }

    def _output(self) -> list[dict]:
        last = len(self._items) - 1
        return [item.item(self._status if i == last else "completed") for i, item in enumerate(self._items)]

    def _response(self, status: str) -> dict:
        body = self._body
        given = body.model_dump(
            by_alias=True,
            include={
                "instructions",
                "max_output_tokens",
                "metadata",
                "safety_identifier",
                "tool_choice",
                "user",
            }
            | {"parallel_tool_calls", "tools"},
        )
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": body.model,
            "output": [],
            "usage": None,
            **given,
            "text": body.text.model_dump(by_alias=True, exclude_none=True),
            "temperature": self._params.temperature,
            "top_p": self._params.top_p,
            "top_logprobs": body.top_logprobs or 0,
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
