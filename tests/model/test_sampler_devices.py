"""What a device draws is what the CPU draws. Its branches run on CPU tensors, and on CUDA if there is any."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_serve.messages import INVALID_TOKEN, SamplingParams
from ds_serve.worker import draw
from ds_serve.worker.sampler import Sampler

VOCAB = 3000
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

rows = st.lists(
    st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 0.4, 1.0, 3.0]),
            "top_k": st.sampled_from([0, 1, 5, 50, 2000, VOCAB + 1]),
            "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.01]),
            "min_p": st.sampled_from([0.0, 0.02, 1.0]),
            "repetition_penalty": st.sampled_from([1.0, 1.3]),
            "frequency_penalty": st.sampled_from([0.0, 0.5]),
            "logit_bias": st.sampled_from([{}, {3: 5.0, 4: -5.0}]),
            "min_tokens": st.sampled_from([0, 3]),
            "seed": st.integers(-(2**63), 2**63 - 1),
            "logprobs": st.sampled_from([None, 0, 4]),
        }
    ),
    min_size=1,
    max_size=9,
)


def steps(device: str, batch: list[dict], logits: torch.Tensor) -> list:
    sampler, slots = Sampler(len(batch), VOCAB, device), list(range(len(batch)))
    for slot, fields in enumerate(batch):
        params = SamplingParams(max_tokens=9, eos_token_ids=(1, 2), **fields)
        sampler.admit(slot, params, [slot, 7, 7], 1)
    found = []
    for position in (3, 4):
        out = sampler.sample(logits.to(device), slots, [position] * len(slots))
        token_ids, logprobs = out.to_host()
        found.append((token_ids, [entry and entry.top_ids for entry in logprobs]))
        sampler.append(slots, [max(token, 0) for token in token_ids])
    return found


@pytest.fixture(params=["branches", pytest.param("cuda", marks=needs_cuda)])
def device_steps(request, monkeypatch):
    def run(batch, logits):
        if request.param == "cuda":
            return steps("cuda", batch, logits)
        with monkeypatch.context() as patch:
            patch.setattr(draw, "_on_cpu", lambda tensor: False)
            return steps("cpu", batch, logits)

    return run


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows, st.integers(0, 2**31), st.sampled_from([0.05, 1.0, 4.0]), st.booleans())
def test_a_device_draws_what_the_cpu_draws(device_steps, batch, seed, spread, ties):
    logits = torch.randn(len(batch), VOCAB, generator=torch.Generator().manual_seed(seed)) * spread
    if ties:
        logits = logits.bfloat16().float()
    cpu, device = steps("cpu", batch, logits), device_steps(batch, logits)
    assert [tokens for tokens, _ in device] == [tokens for tokens, _ in cpu]
    if not ties:
        assert device == cpu


def test_no_distribution_is_an_invalid_token_there_too(device_steps):
    logits = torch.full((2, VOCAB), torch.nan)
    found = device_steps([{"temperature": 1.0, "top_p": 0.5}, {"temperature": 0.0}], logits)
    assert [tokens for tokens, _ in found] == [[INVALID_TOKEN] * 2] * 2
