"""The engine on a pretended CUDA device: nothing meets a tensor of the other side, and few things wait.

What it cannot show (kernels, order, speed) is for tests/gpu.
"""

from __future__ import annotations

import os

import pytest
import torch
from pretended_cuda import OnDevice, pretend
from test_window_tokens import LONG
from test_window_tokens import MODELS as WINDOWED
from tiny_adapters import MLA, Served
from tiny_models import build, mixed_prompts, oracles, run_all, save

from ds_serve.config import Settings
from ds_serve.rank import build_local_engine

if torch.cuda.is_available():
    pytest.skip("there is a CUDA device; tests/gpu runs there", allow_module_level=True)

ALL = pytest.mark.skipif(os.environ.get("DS_SERVE_TEST_ALL") != "1", reason="make test-all")
PLAIN = {"attention": "reference", "compile": "off", "graphs": "off"}
PROMPTS = mixed_prompts(10)
LENGTHS = [4 + index % 5 for index in range(10)]
# Threads that wait in the launching one's place.
ALLOWED = ("ds-serve-finisher: event.synchronize", "ds-serve-copier: ")


def run(settings, prompts, lengths, *args, rounds=1, **params):
    """Requests on the pretended device: tokens by round, and the lines that waited for it unasked."""
    with pretend() as waits:
        settings = PLAIN | {"num_blocks": 200, "max_num_batched_tokens": 32} | settings
        engine = build_local_engine(Settings(**settings))
        try:
            assert engine.info.device == "cuda:0"
            with waits.counted() as places:
                found = [run_all(engine, prompts, lengths, *args, **params) for _ in range(rounds)]
        finally:
            engine.close()
        engine.scheduler.check_integrity()
    return found, sorted(each for each in places if not any(known in each for known in ALLOWED))


def test_sides_are_kept_apart():
    with pretend() as waits, waits.counted() as places:
        there = torch.arange(4.0).to("cuda")
        assert isinstance(there, OnDevice) and there.device == torch.device("cuda:0")
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(4)
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert (there[1:] * 2).sum().item() == 12
    assert sum(places.values()) == 2, "to the device and back"
    assert not torch.cuda.is_available()


@pytest.mark.parametrize("name", ["gpt_oss", pytest.param("deepseek_v3", marks=ALL)])
def test_a_step_waits_for_nothing(name, tmp_path):
    model = build(name, **(MLA if name == "deepseek_v3" else {}))
    found, waited = run({"model": save(model, tmp_path)}, PROMPTS, LENGTHS)
    assert found == [oracles(model, PROMPTS, LENGTHS)]
    assert not waited


@ALL
def test_windows_in_groups(tmp_path):
    model = build("gemma3_text", **WINDOWED["gemma3_text"])
    found, waited = run({"model": save(model, tmp_path), "max_num_batched_tokens": 64}, LONG, [6] * 4)
    assert found == [oracles(model, LONG, [6] * 4)]
    assert not waited


@ALL
def test_adapters(tmp_path):
    served = Served("llama", tmp_path, num_prompts=4)
    found, waited = run(served.settings, served.prompts, served.lengths, served.adapters)
    assert found == [served.wanted]
    assert not waited


def test_the_host_tier(tmp_path):
    model, prompts, lengths = build("llama"), PROMPTS[:6], LENGTHS[:6]
    tier = {"host_cache": 2**24, "num_blocks": 24, "block_size": 4, "max_num_batched_tokens": 64}
    found, waited = run({"model": save(model, tmp_path)} | tier, prompts, lengths, rounds=2)
    assert found == [oracles(model, prompts, lengths)] * 2
    assert not waited


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({"temperature": 0.8, "top_p": 0.9, "seed": 7}, marks=ALL),
        pytest.param({"temperature": 0.8, "top_k": 40, "min_p": 0.01, "seed": 7}, marks=ALL),
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "logit_bias": {5: 3.0}, "logprobs": 3},
        pytest.param({"logprobs": 3, "prompt_logprobs": 2}, marks=ALL),
    ],
    ids=" ".join,
)
def test_sampling(params, tmp_path, engine_of):
    folder = save(build("llama"), tmp_path)
    wanted = run_all(engine_of(model=folder, num_blocks=200), PROMPTS, LENGTHS, **params)
    found, waited = run({"model": folder}, PROMPTS, LENGTHS, **params)
    assert found == [wanted]
    assert not waited
