"""Log-probabilities of a prompt's own tokens against transformers' logits, however the work is cut up."""

from __future__ import annotations

import queue

import pytest
import torch
from tiny_models import build, mixed_prompts, save

from ds_serve.config import Settings
from ds_serve.messages import Request, SamplingParams
from ds_serve.rank import build_local_engine

TOP = 3


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(model directory, prompts, each prompt's log-probabilities [P - 1, V]) in fp32."""
    model = build("llama")
    prompts = [*mixed_prompts(12), [5]]
    with torch.inference_mode():
        wanted = [model(torch.tensor([p]), use_cache=False).logits[0, :-1].log_softmax(-1) for p in prompts]
    return save(model, tmp_path_factory.mktemp("model")), prompts, wanted


def submit(engine, prompts, max_tokens=9, **params):
    """All at once; outputs of each request, by their order."""
    found = queue.SimpleQueue()
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, **params)
    for index, prompt in enumerate(prompts):
        engine.submit(Request(id=str(index), prompt_token_ids=prompt, params=params), found.put)
    outputs = [[] for _ in prompts]
    num_open = len(prompts)
    while num_open:
        output = found.get(timeout=60)
        outputs[int(output.id)].append(output)
        num_open -= output.finish_reason is not None
    return outputs


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"num_blocks": 20, "block_size": 4, "max_num_batched_tokens": 40, "attention": "reference"},
        {"num_blocks": 20, "block_size": 4, "steps_in_flight": 1, "attention": "reference"},
    ],
    ids=["whole", "chunks", "preempted", "preempted, one step in flight"],
)
def test_they_are_those_of_the_whole_prompt(case, settings):
    folder, prompts, wanted = case
    engine = build_local_engine(Settings(model=folder, **({"num_blocks": 400} | settings)))
    try:
        plain = submit(engine, prompts)
        scored = submit(engine, prompts, prompt_logprobs=TOP)
        stats = engine.stats()
    finally:
        engine.close()
    assert (stats.num_preemptions > 0) == ("block_size" in settings)
    assert stats.num_free_blocks == stats.num_blocks
    for prompt, logprobs, before, outputs in zip(prompts, wanted, plain, scored, strict=True):
        assert all(output.prompt_logprobs is None for output in before + outputs[1:])
        found = outputs[0].prompt_logprobs
        assert len(found) == len(prompt) - 1
        assert outputs[-1].num_cached_tokens == 0
        for entry, token, row in zip(found, prompt[1:], logprobs, strict=True):
            assert entry.logprob == pytest.approx(row[token].item(), abs=1e-4)
            assert entry.top_logprobs == pytest.approx(row.topk(TOP).values.tolist(), abs=1e-4)
            assert entry.top_ids[0] == row.argmax()
        assert [o.token_ids for o in outputs] == [o.token_ids for o in before]


def test_a_pinned_prompt_is_cached_and_so_not_scored(case):
    folder, prompts, _ = case
    engine = build_local_engine(Settings(model=folder, num_blocks=40))
    found = queue.SimpleQueue()
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    try:
        engine.submit(Request(id="a", prompt_token_ids=prompts[0], params=params, cache_key="k"), found.put)
        assert "prompt_logprobs" in found.get(timeout=60).error
    finally:
        engine.close()
