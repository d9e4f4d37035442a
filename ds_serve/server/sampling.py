"""From a request's body to the engine's SamplingParams, with the model's own defaults.

Knows neither HTTP nor the engine. What is out of range is a ValueError that begins with the
parameter's name, from here or from SamplingParams itself.
"""

from __future__ import annotations

import secrets

from ds_serve.messages import EngineInfo, SamplingParams
from ds_serve.server.chat_protocol import ChatBody
from ds_serve.server.errors import ApiError
from ds_serve.server.protocol import CompletionBody
from ds_serve.text.defaults import GenerationDefaults

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions


def sampling_params(
    body: ChatBody | CompletionBody,
    defaults: GenerationDefaults,
    info: EngineInfo,
    num_prompt_tokens: int,
    grammar: str = "",
) -> SamplingParams:
    """The parameters of a prompt of num_prompt_tokens; a seed is drawn where none is given.

    Raises ApiError where prompt and max_tokens exceed the context, ValueError for other bad values.
    """
    _check_ids("stop_token_ids", body.stop_token_ids, info)
    return SamplingParams(
        max_tokens=_max_tokens(body, info, num_prompt_tokens),
        min_tokens=body.min_tokens,
        temperature=_temperature(body, defaults),
        top_k=_first(body.top_k, defaults.top_k, 0),
        top_p=_first(body.top_p, defaults.top_p, 1.0),
        min_p=_first(body.min_p, defaults.min_p, 0.0),
        repetition_penalty=_first(body.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=_logit_bias(body, info),
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        stop_token_ids=tuple(body.stop_token_ids),
        eos_token_ids=defaults.eos_token_ids,
        ignore_eos=body.ignore_eos,
        logprobs=_logprobs(body),
        grammar=grammar,
        prompt_logprobs=body.prompt_logprobs if isinstance(body, CompletionBody) else None,
    )


def check_prompt(token_ids: list[int], info: EngineInfo, name: str) -> None:
    """Raises ApiError for a prompt that is empty, too long, or outside of the vocabulary."""
    if not token_ids:
        raise ApiError(400, f"{name}: has no token", param=name)
    _check_ids(name, token_ids, info)
    if len(token_ids) >= info.max_model_len:
        raise ApiError(
            400,
            f"{name}: has {len(token_ids)} tokens; prompt and output together "
            f"may have {info.max_model_len} at most",
            param=name,
            code="context_length_exceeded",
        )


def _max_tokens(body: ChatBody | CompletionBody, info: EngineInfo, num_prompt_tokens: int) -> int:
    left = info.max_model_len - num_prompt_tokens
    asked = body.max_tokens_asked
    if isinstance(body, CompletionBody) and body.without_output:
        return 1  # it is computed, and not shown
    if asked is None:
        return min(COMPLETION_MAX_TOKENS, left) if isinstance(body, CompletionBody) else left
    if asked > left:
        name = "max_tokens" if body.max_tokens is not None else "max_completion_tokens"
        raise ApiError(
            400,
            f"{name}: {asked} after a prompt of {num_prompt_tokens} tokens is too long; "
            f"prompt and output together may have {info.max_model_len} at most",
            param=name,
            code="context_length_exceeded",
        )
    return asked


def _temperature(body: ChatBody | CompletionBody, defaults: GenerationDefaults) -> float:
    greedy = 0.0 if defaults.do_sample is False else None
    return _first(body.temperature, greedy, defaults.temperature, 1.0)


def _logprobs(body: ChatBody | CompletionBody) -> int | None:
    if isinstance(body, CompletionBody):
        return body.logprobs
    return (body.top_logprobs or 0) if body.logprobs else None


def _logit_bias(body: ChatBody | CompletionBody, info: EngineInfo) -> dict[int, float]:
    try:
        bias = {int(token): value for token, value in body.logit_bias.items()}
    except ValueError:
        raise ValueError(f"logit_bias: keys must be token ids, got {list(body.logit_bias)}") from None
    _check_ids("logit_bias", bias, info)
    return bias


def _check_ids(name: str, token_ids, info: EngineInfo) -> None:
    if token_ids and not (0 <= min(token_ids) and max(token_ids) < info.vocab_size):
        wrong = next(token for token in token_ids if not 0 <= token < info.vocab_size)
        raise ValueError(f"{name}: token id {wrong} is not in the vocabulary of {info.vocab_size}")


def _first(*values):
    return next(value for value in values if value is not None)
