"""POST /v1/completions: OpenAI's text completion shapes.

Knows the wording of completion replies; the order of events is replies.py's.
"""

from __future__ import annotations

from collections import defaultdict

from fastapi import Request, Response

from ds_serve.messages import TokenLogprob
from ds_serve.server.front import Front
from ds_serve.server.generation import Delta
from ds_serve.server.protocol import CompletionBody
from ds_serve.server.replies import reply
from ds_serve.server.shapes import Envelope, finite, token_text


async def completions(front: Front, body: CompletionBody, http: Request) -> Response:
    """Raises ApiError, EngineDeadError (a 503) and ClientGone."""
    client = front.client
    front.check_model(body.model)
    shape = CompletionShape(front, body)
    prompts = await front.completion_prompts(body, client)
    return await reply(http, body, client, shape, prompts)


class CompletionShape(Envelope):
    def __init__(self, front: Front, body: CompletionBody) -> None:
        super().__init__(front, body, "cmpl", "text_completion", "text_completion")
        self._offsets: defaultdict[int, int] = defaultdict(int)  # of each choice's next token, in characters

    def choice(self, whole: Delta) -> dict:
        return {
            "index": whole.index,
            "text": whole.text,
            "logprobs": self._logprobs(whole),
            "finish_reason": whole.finish_reason,
        }

    def opening(self, index: int) -> None:
        return None

    chunk = choice

    def _logprobs(self, delta: Delta) -> dict | None:
        if delta.logprobs is None:
            return None
        tokens = [token_text(self.codec.token_bytes(token)) for token in delta.token_ids]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[delta.index])
            self._offsets[delta.index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [finite(entry.logprob) for entry in delta.logprobs],
            "top_logprobs": [self._top(entry) for entry in delta.logprobs],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """By text; where tokens share one, the likeliest stands."""
        top: dict[str, float] = {}
        for token, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True):
            top.setdefault(token_text(self.codec.token_bytes(token)), finite(logprob))
        return top
