"""Quantised checkpoints on one rank: transformers' tokens on the same checkpoint, or a sentence."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from tiny_models import build, mixed_prompts, oracles, run_all, save
from tiny_quantised import KINDS, edit_config, largest_gap, original, quantise
from transformers import AutoModelForCausalLM

from ds_serve.config import Settings
from ds_serve.model.errors import ModelLoadError
from ds_serve.model.loader import load, read_config
from ds_serve.model.quantised import name_skipped
from ds_serve.rank import build_local_engine

PROMPTS = mixed_prompts(8, longest=40)
LENGTHS = [6] * len(PROMPTS)
BOUND = 0.01  # of largest_gap, for kinds that round activations
OFTEN = ["torchao-int8", "torchao-int8-dynamic", "bitsandbytes-nf4", "compressed-tensors-w8a8", "fp8"]


def made(kind: str, folder: Path, *dtype: torch.dtype, **sizes) -> str:
    package = KINDS[kind][0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return quantise(kind, folder, *dtype, **sizes)


@pytest.mark.parametrize("kind", KINDS if os.environ.get("DS_SERVE_TEST_ALL") == "1" else OFTEN)
def test_greedy_tokens_are_transformers_own(kind, tmp_path):
    folder = made(kind, tmp_path)
    engine = build_local_engine(Settings(model=folder, num_blocks=64, max_num_batched_tokens=16))
    found = run_all(engine, PROMPTS, LENGTHS)
    engine.close()
    wanted = oracles(AutoModelForCausalLM.from_pretrained(folder).eval(), PROMPTS, LENGTHS)
    assert oracles(original(kind), PROMPTS, LENGTHS) != wanted  # a model that is not quantised is told apart
    if not KINDS[kind][1]:
        assert found == wanted
        return
    oracle = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert largest_gap(oracle, PROMPTS, found) < BOUND < largest_gap(original(kind), PROMPTS, wanted)


FUSABLE = {"hidden_size": 96, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("torchao-int8", "weight of class Int8Tensor"),
        ("compressed-tensors-w8a8", "hooks"),
        ("compressed-tensors-w4a16", None),
        ("fp8", None),
    ],
)
def test_injection_keeps_quantised_linears_and_takes_dense_ones(kind, reason, tmp_path):
    loaded = load(Settings(model=made(kind, tmp_path, torch.bfloat16, **FUSABLE)))
    assert loaded.dtype == loaded.layout.dtype == torch.bfloat16
    if any("fused kernels" in each or "C++" in each or "AVX" in each for each in loaded.injection.reasons):
        pytest.skip(str(loaded.injection.reasons))
    assert (reason is None) == (loaded.injection.kept == 0), loaded.injection
    assert all(reason in found for found in loaded.injection.reasons)


REFUSED = [
    ({"quant_method": "gptq", "bits": 4}, {}, "'gptq', which is not served here"),
    ({"quant_method": "awq", "bits": 4}, {}, "'awq', which is not served here"),
    ({"quant_method": "own"}, {}, "'own', which is not served here"),
    ({"bits": 4}, {}, "'None', which is not served here"),
    ({"quant_method": "fp8"}, {"dtype": "float16"}, "for float32, but dtype is float16; use dtype=auto"),
    (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"tensor_parallel": 2},
        "bitsandbytes, whose weights cannot be cut into tensor shards.*tensor_parallel is 2",
    ),
    (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
        {"tensor_parallel": 2},
        "torchao, whose weights cannot be cut into tensor shards",
    ),
    (
        {
            "quant_method": "torchao",
            "quant_type": {
                "default": {
                    "_type": "Int8DynamicActivationInt8WeightConfig",
                    "_data": {"granularity": [{"_type": "PerTensor"}, {"_type": "PerRow"}]},
                }
            },
        },
        {},
        "one scale for the activations of a step",
    ),
    (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"g": {"input_activations": {"dynamic": True, "strategy": "tensor"}}},
        },
        {},
        "one scale for the activations of a step",
    ),
    (
        {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}},
        {},
        "kv_cache_scheme",
    ),
]


@pytest.mark.parametrize(("how", "settings", "words"), REFUSED)
def test_what_cannot_be_served_is_refused_before_weights_are_read(
    how, settings, words, tmp_path, monkeypatch
):
    folder = save(build("llama"), tmp_path)
    edit_config(folder, quantization_config=how)
    monkeypatch.setattr("ds_serve.model.quantised._check_package", lambda *_: None)
    with pytest.raises(ModelLoadError, match=words):
        read_config(Settings(model=folder, **settings))


def test_a_stage_is_told_what_the_whole_model_kept(tmp_path):
    """Left to itself, transformers takes a stage's last linear for the head, which is not quantised."""
    whole = build("gpt2")
    whole.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    name_skipped(whole.config, whole)
    assert {"lm_head", "transformer.wte"} <= set(whole.config.quantization_config["llm_int8_skip_modules"])


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    folder = save(build("llama"), tmp_path)
    edit_config(folder, quantization_config={"quant_method": "torchao", "quant_type": {}})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match="pip install torchao"):
        load(Settings(model=folder))


def test_what_fails_inside_a_package_is_a_sentence(tmp_path):
    """4 bits on CPU need rows of whole blocks: the package raises deep in the first forward."""
    folder = made("bitsandbytes-nf4", tmp_path, intermediate_size=96)
    with pytest.raises(ModelLoadError, match="quantised by bitsandbytes, which cannot run it here"):
        load(Settings(model=folder))
