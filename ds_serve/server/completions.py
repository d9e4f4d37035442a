"""POST /v1/completions: OpenAI's text completion shapes.

Knows the wording of completion replies; the order of events is replies.py's.
"""

from __future__ import annotations

from collections import defaultdict

from fastapi import Request, Response

from ds_serve.messages import TokenLogprob
from ds_serve.server.front import Front
from ds_serve.server.generation import Delta, Prompt
from ds_serve.server.protocol import CompletionBody
from ds_serve.server.replies import reply
from ds_serve.server.shapes import Envelope, finite, token_text


async def completions(front: Front, body: CompletionBody, http: Request) -> Response:
    """Raises ApiError, EngineDeadError (a 503) and ClientGone."""
    client = front.client
    adapter = front.adapter_of(body.model)
    prompts = await front.completion_prompts(body, client)
    return await reply(http, body, client, CompletionShape(front, body, prompts), prompts, adapter)


class CompletionShape(Envelope):
    """With echo, the first piece of each choice begins with its prompt."""

    def __init__(self, front: Front, body: CompletionBody, prompts: list[Prompt]) -> None:
        super().__init__(front, body, "cmpl", "text_completion", "text_completion")
        self._body, self._prompts = body, prompts
        self._offsets: defaultdict[int, int] = defaultdict(int)  # of each choice's next token, in characters
        self._to_echo = set(range(len(prompts) * body.n)) if body.echo else set()
        self._prompt_logprobs: dict[int, list[TokenLogprob]] = {}  # by prompt: its first choice brings them

    def choice(self, delta: Delta) -> dict:
        text, token_ids, logprobs = delta.text, delta.token_ids, delta.logprobs
        if delta.index in self._to_echo:
            self._to_echo.remove(delta.index)
            which = delta.index // self._body.n
            text = self._prompt_text(which) + text
            if self._body.prompt_logprobs is not None:
                of_prompt = self._prompt_logprobs.setdefault(which, delta.prompt_logprobs or [])
                token_ids = self._prompts[which].token_ids + token_ids
                logprobs = [None, *of_prompt, *(logprobs or [])]
        return {
            "index": delta.index,
            "text": text,
            "logprobs": None if logprobs is None else self._logprobs(delta.index, token_ids, logprobs),
            "finish_reason": delta.finish_reason,
        }

    def opening(self, index: int) -> None:
        return None

    chunk = choice

    def _prompt_text(self, which: int) -> str:
        prompt = self._body.prompt[which]
        return prompt if isinstance(prompt, str) else self.codec.decode(prompt, skip_special_tokens=False)

    def _logprobs(self, index: int, token_ids: list[int], logprobs: list[TokenLogprob | None]) -> dict:
        """A prompt's first token follows nothing, and has none."""
        tokens = [token_text(self.codec.token_bytes(token)) for token in token_ids]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [None if entry is None else finite(entry.logprob) for entry in logprobs],
            "top_logprobs": [None if entry is None else self._top(entry) for entry in logprobs],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """By text; where tokens share one, the likeliest stands."""
        top: dict[str, float] = {}
        for token, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True):
            top.setdefault(token_text(self.codec.token_bytes(token)), finite(logprob))
        return top
