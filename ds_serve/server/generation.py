"""One call's choices: from prompts to engine requests, from their outputs to pieces of text.

Knows nothing of OpenAI's shapes; chat.py and completions.py turn a Delta into those.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec

from ds_serve.messages import Output, Request, SamplingParams, TokenLogprob, sibling_seed
from ds_serve.server.client import EngineClient, EngineDeadError, RequestTimeout
from ds_serve.server.errors import from_engine, timed_out
from ds_serve.server.metrics import RequestWatch
from ds_serve.text.codec import TextCodec
from ds_serve.text.detokenize import Detokenizer


@dataclass(frozen=True)
class Prompt:
    token_ids: list[int]
    params: SamplingParams
    skip_special_tokens: bool = True  # in the text of its choices


@dataclass
class Delta:
    """What a choice gained: text that may be shown, and the tokens whose logprobs were asked for.

    prompt_logprobs, of every prompt token but the first, come with a prompt's first choice. finish_reason is
    set on a choice's last delta. Tokens may come before their text, which is held back where it could become
    a stop string.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    prompt_logprobs: list[TokenLogprob] | None = None


def join(deltas: list[Delta]) -> Delta:
    """All deltas of one choice as one."""
    logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    return Delta(
        deltas[0].index,
        "".join(delta.text for delta in deltas),
        [token for delta in deltas for token in delta.token_ids],
        logprobs or None,
        deltas[-1].finish_reason,
        deltas[0].prompt_logprobs,
    )


class Generation:
    """n choices of each prompt; choice i of all is choice i % n of prompt i // n.

    The j-th choice of a prompt has its seed plus j, so that a given seed gives n different texts,
    the same at each call. cache_key pins each prompt once, not once a choice, and a prompt that spans blocks
    is computed once: its other choices wait for the first one's first token. Without output a choice is its
    prompt alone, as if max_tokens were 0. timeout_s is the time for all of it.
    """

    def __init__(
        self,
        client: EngineClient,
        codec: TextCodec,
        call_id: str,
        prompts: list[Prompt],
        *,
        watch: RequestWatch,
        n: int = 1,
        stop: list[str] | None = None,
        adapter: str = "",
        salt: str = "",
        priority: int = 0,
        cache_key: str = "",
        cache_ttl: float = 300.0,
        without_output: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        self._client = client
        self._watch = watch
        self._n = n
        self._timeout_s = timeout_s
        self.prompts = prompts
        self.requests = [
            Request(
                id=f"{call_id}-{i * n + j}",
                prompt_token_ids=prompt.token_ids,
                params=_choice_params(prompt.params, j),
                adapter=adapter,
                salt=salt,
                priority=priority,
                cache_key=cache_key if j == 0 else "",
                cache_ttl=cache_ttl,
            )
            for i, prompt in enumerate(prompts)
            for j in range(n)
        ]
        self._choices = [
            _Choice(codec, request, stop or [], without_output, prompts[i // n].skip_special_tokens)
            for i, request in enumerate(self.requests)
        ]
        watch.begin(call_id, self.requests, n)
        longest = max(len(prompt.token_ids) for prompt in prompts)
        is_shared = longest > client.info.block_size or prompts[0].params.prompt_logprobs is not None
        self._group = n if is_shared else 1

    async def deltas(self) -> AsyncIterator[Delta]:
        """Pieces of all choices as they come. Leaving early aborts what is open.

        Raises ApiError where the engine refuses a request or time is over, EngineDeadError where it dies.
        """
        outputs = self._client.generate_all(self.requests, group=self._group, timeout_s=self._timeout_s)
        with self._watch as watch:
            try:
                async with aclosing(outputs):
                    async for index, output in outputs:
                        watch.output(index, output)
                        delta = self._choices[index].take(index, output)
                        if delta.finish_reason is not None:
                            watch.end(index, delta.finish_reason)
                            if output.finish_reason is None:
                                await self._client.abort(self.requests[index].id)
                        yield delta
            except RequestTimeout:
                raise timed_out(self._timeout_s) from None

    async def collect(self) -> list[Delta]:
        """Each choice as one delta."""
        parts: list[list[Delta]] = [[] for _ in self.requests]
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                parts[delta.index].append(delta)
        return [join(part) for part in parts]

    def usage(self) -> dict:
        """Token counts so far: prompts once each, outputs of all choices.

        cached_tokens were not computed again; host_cached_tokens, our own field, are those of them that came
        from CPU memory.
        """
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        completion_tokens = sum(choice.num_tokens for choice in self._choices)
        firsts = self._choices[:: self._n]
        cached = sum(choice.num_cached_tokens for choice in firsts)
        from_host = sum(choice.num_host_tokens for choice in firsts)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached, "host_cached_tokens": from_host},
        }


def _choice_params(params: SamplingParams, index: int) -> SamplingParams:
    """Of a prompt's index-th choice: its own seed, and the prompt is scored once."""
    if index == 0:
        return params
    seed = sibling_seed(params.seed, index)
    return msgspec.structs.replace(params, seed=seed, prompt_logprobs=None)


class _Choice:
    """Counts and text of one request. num_tokens: up to the token that completed a stop string."""

    def __init__(
        self,
        codec: TextCodec,
        request: Request,
        stop: list[str],
        without_output: bool,
        skip_special_tokens: bool,
    ) -> None:
        self.num_tokens = 0
        self._without_output = without_output
        self.num_cached_tokens = 0
        self.num_host_tokens = 0
        self._detokenizer = Detokenizer(
            codec.backend,
            stop=stop,
            skip_special_tokens=skip_special_tokens,
            min_tokens=request.params.min_tokens,
            prompt_token_ids=request.prompt_token_ids,
        )

    def take(self, index: int, output: Output) -> Delta:
        if output.finish_reason == "error":
            raise from_engine(output.error or "the engine gave no reason")
        if output.finish_reason == "abort":
            raise EngineDeadError("the engine aborted the request")
        if self._without_output:
            return Delta(index, finish_reason=output.finish_reason, prompt_logprobs=output.prompt_logprobs)
        # The id that ended the request counts, and has no text.
        ended = output.stop_token_id is not None
        token_ids = output.token_ids[:-1] if ended else output.token_ids
        before = self._detokenizer.num_tokens
        text = self._detokenizer.push(token_ids, final=output.finish_reason is not None)
        stopped = self._detokenizer.stop_hit is not None
        taken = self._detokenizer.num_tokens - before
        self.num_tokens += taken + (ended and not stopped)
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self.num_host_tokens = max(self.num_host_tokens, output.num_host_tokens)
        return Delta(
            index,
            text,
            token_ids[:taken],
            None if output.logprobs is None else output.logprobs[:taken],
            "stop" if stopped else output.finish_reason,
            output.prompt_logprobs,
        )
