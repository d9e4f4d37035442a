"""POST /v1/chat/completions: OpenAI's chat shapes, with and without calls of tools.

Knows the wording of chat replies; the order of events is replies.py's, how a model writes calls
text/tools.py's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from fastapi import Request, Response

from ds_serve.server.chat_protocol import ChatBody, NamedTool
from ds_serve.server.errors import refusing
from ds_serve.server.front import Front
from ds_serve.server.generation import Delta
from ds_serve.server.metrics import Call
from ds_serve.server.replies import reply
from ds_serve.server.shapes import Envelope, logprob_entry
from ds_serve.text.tools import CallPiece, Calls, arguments_rule


async def chat_completions(front: Front, body: ChatBody, http: Request) -> Response:
    """Raises ApiError, EngineDeadError (a 503) and ClientGone."""
    client = front.client
    adapter = front.adapter_of(body.model)
    calls = calls_of(front, body) if body.may_call else None
    shape = ChatShape(front, body) if calls is None else CallingShape(front, body, calls, http.state.call)
    prompts = [await front.chat_prompt(body, client, calls)]
    return await reply(http, body, client, shape, prompts, adapter)


def calls_of(front: Front, body: ChatBody) -> Calls:
    """What the answer may call. Raises ApiError."""
    chosen = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
    with refusing():
        functions = {
            tool.function.name: arguments_rule(
                tool.function.parameters, f"tools[{index}].function.parameters"
            )
            for index, tool in enumerate(body.tools)
            if chosen in (None, tool.function.name)
        }
    return Calls(
        front.call_format(),
        functions,
        required=body.tool_choice != "auto",
        parallel=body.parallel_tool_calls and chosen is None,
        added_tokens=front.codec.added_tokens,
    )


class ChatShape(Envelope):
    def __init__(self, front: Front, body: ChatBody) -> None:
        super().__init__(front, body, "chatcmpl", "chat.completion", "chat.completion.chunk")
        if body.service_tier is not None:
            self._rest["service_tier"] = "default"

    def choice(self, whole: Delta) -> dict:
        message = {"role": "assistant", "content": whole.text, "refusal": None}
        return self._choice(whole, {"message": message})

    def opening(self, index: int) -> dict:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, delta: Delta) -> dict:
        return self._choice(delta, {"delta": {"content": delta.text} if delta.text else {}})

    def _choice(self, delta: Delta, content: dict) -> dict:
        return {
            "index": delta.index,
            **content,
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
        }

    def _logprobs(self, delta: Delta) -> dict | None:
        if delta.logprobs is None:
            return None
        pairs = zip(delta.token_ids, delta.logprobs, strict=True)
        return {
            "content": [logprob_entry(self.codec, token, entry) for token, entry in pairs],
            "refusal": None,
        }


class CallingShape(ChatShape):
    """Replies that may hold calls: content is null where there is none.

    An answer that ends with its calls has the finish_reason tool_calls, but stop where the tool was named,
    as OpenAI has it. What max_tokens or a stop string cut off is told as far as it came.
    """

    def __init__(self, front: Front, body: ChatBody, calls: Calls, call: Call) -> None:
        super().__init__(front, body)
        self._call = call
        self._named = isinstance(body.tool_choice, NamedTool)
        self._parsers = defaultdict(calls.parser)

    def choice(self, whole: Delta) -> dict:
        events, whole = self._take(whole)
        calls = [_call(event) for event in events if isinstance(event, CallPiece)]
        content = "".join(event for event in events if isinstance(event, str)) or None
        message = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        return self._choice(whole, {"message": message})

    def opening(self, index: int) -> dict:
        return self._choice(Delta(index), {"delta": {"role": "assistant", "content": None}})

    def piece(self, delta: Delta) -> Iterator[bytes]:
        """A chunk for each event: OpenAI's client reads one call's piece in each, and the end by itself."""
        events, delta = self._take(delta)
        contents = [
            {"content": event}
            if isinstance(event, str)
            else {"tool_calls": [{"index": event.index, **_call(event)}]}
            for event in events
        ]
        if delta.finish_reason is not None or (delta.logprobs and not contents):
            contents.append({})
        last = len(contents) - 1
        for i, content in enumerate(contents):
            part = replace(
                delta,
                logprobs=delta.logprobs if i == 0 else None,
                finish_reason=delta.finish_reason if i == last else None,
            )
            yield self._chunk([self._choice(part, {"delta": content})])

    def _take(self, delta: Delta) -> tuple[list[str | CallPiece], Delta]:
        """The events of the delta's text, and the delta with the finish_reason that they give it."""
        parser = self._parsers[delta.index]
        events = parser.push(delta.text, final=delta.finish_reason is not None)
        if delta.finish_reason == "stop" and parser.complete and not self._named:
            delta = replace(delta, finish_reason="tool_calls")
            self._call.ended_by_calls(delta.index)
        return events, delta


def _call(piece: CallPiece) -> dict:
    """A call, or what a stream tells of one: id, type and name come with its first piece."""
    if piece.id is None:
        return {"function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"id": piece.id, "type": "function", "function": function}
