"""How far below the likeliest token an engine's greedy tokens lie, by that engine's own scoring of them.

In half precision two runs of other shapes round otherwise, and a random model's best tokens lie close: the
same tokens cannot be asked for. Scoring goes through prefill, so it judges what decode steps computed.
"""

from __future__ import annotations

import queue

from tiny_models import run_all

from ds_serve.messages import Request, SamplingParams


def worst_gap(engine, prompts: list[list[int]], lengths: list[int]) -> float:
    """Nats, over all tokens after the first of each prompt's continuation. The engine takes them anew."""
    tokens = run_all(engine, prompts, lengths)
    whole = [prompt + each for prompt, each in zip(prompts, tokens, strict=True)]
    return max(
        entry.top_logprobs[0] - entry.logprob
        for prompt, entries in zip(prompts, _scored(engine, whole), strict=True)
        for entry in entries[len(prompt) :]
    )


def _scored(engine, prompts: list[list[int]]) -> list[list]:
    outputs = [queue.SimpleQueue() for _ in prompts]
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    for index, (prompt, each) in enumerate(zip(prompts, outputs, strict=True)):
        engine.submit(Request(id=f"s{index}", prompt_token_ids=prompt, params=params), each.put)
    first = [each.get(timeout=120) for each in outputs]
    for output in first:
        assert output.finish_reason != "error", output.error
    return [output.prompt_logprobs for output in first]
