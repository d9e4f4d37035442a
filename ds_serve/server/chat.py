"""POST /v1/chat/completions: OpenAI's chat shapes.

Knows the wording of chat replies; the order of events is replies.py's.
"""

from __future__ import annotations

from fastapi import Request, Response

from ds_serve.server.chat_protocol import ChatBody
from ds_serve.server.front import Front
from ds_serve.server.generation import Delta
from ds_serve.server.replies import reply
from ds_serve.server.shapes import Envelope, logprob_entry


async def chat_completions(front: Front, body: ChatBody, http: Request) -> Response:
    """Raises ApiError, EngineDeadError (a 503) and ClientGone."""
    client = front.client
    front.check_model(body.model)
    shape = ChatShape(front, body)
    prompts = [await front.chat_prompt(body, client)]
    return await reply(http, body, client, shape, prompts)


class ChatShape(Envelope):
    def __init__(self, front: Front, body: ChatBody) -> None:
        super().__init__(front, body, "chatcmpl", "chat.completion", "chat.completion.chunk")

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
