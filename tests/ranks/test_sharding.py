"""Tensor shards give the whole model's logits in fp32, each with its part of the parameters.

What nobody knows how to cut is refused by name.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from launch import run_ranks
from sharding_cases import CASES, FUSED, GEMMA3N, IN_FOUR
from tiny_models import build
from torch import nn

from ds_serve.attention.interface import UnsupportedModelError
from ds_serve.model.repairs import Heads
from ds_serve.model.sharding import shard
from ds_serve.parallel.grid import Grid
from ds_serve.parallel.place import Place

SCRIPT = Path(__file__).with_name("sharding_run.py")
MAX_DIFFERENCE = 1e-4  # of logits of about 10


@functools.cache
def results(ranks: int) -> dict[str, dict]:
    """The records of all cases: one run of the ranks for all tests."""
    names = [*CASES, *FUSED] if ranks == 2 else IN_FOUR
    lines = [line for line in run_ranks(SCRIPT, ranks, *names, timeout=280) if line.startswith("{")]
    return {record["case"]: record for record in map(json.loads, lines)}


def record_of(name: str, ranks: int) -> dict:
    record = results(ranks)[name]
    assert record["error"] is None, record["error"]
    return record


@pytest.mark.parametrize(
    ("name", "ranks"),
    [(name, 2) for name in CASES] + [(name, 4) for name in IN_FOUR],
)
def test_logits_and_parameters(name, ranks):
    record = record_of(name, ranks)
    same = record["difference"] < MAX_DIFFERENCE and record["argmax"]
    assert same == (CASES[name].spoil is None), record["difference"]
    assert sum(record["shards"]) <= record["whole"] + (ranks - 1) * record["uncut"]
    assert record["latents"] == [3 if CASES[name].architecture == "deepseek_v3" else 0] * ranks
    assert not record["left_behind"]


@pytest.mark.parametrize("name", FUSED)
def test_fused_shards_give_the_logits_of_plain_ones(name):
    record = record_of(name, 2)
    if not record["available"]:
        pytest.skip("the fused layers need AVX512-BF16")
    others = 1 if FUSED[name].spoil else 0
    assert record["injected"] == [5 - others] * 2, record["reasons"]  # three layers, the last norm, the head
    assert record["reasons"] == [{}, {}] or record["reasons"] == [
        {"another tensor shard keeps it": 1}, {"LlamaDecoderLayer has hooks": 1},
    ]  # fmt: skip
    kinds = ["FusedDecoderLayer"] * 3
    if others:
        kinds[1] = "LlamaDecoderLayer"
    assert record["kinds"] == [kinds] * 2
    # bf16 logits of three layers; where there are biases, DeepSpeed rounds before it adds them
    assert record["difference"] < 0.03
    assert record["difference_of_some"] < 1e-6
    assert record["of_none"][0] == 0


# -- refusals ----------------------------------------------------------------------------------


def first_of(tp: int) -> Grid:
    """Shard 0 of tp, without a process group: what is refused is refused before anything is sent."""
    return Grid(Place(0, tp, 1))


class Quantized(nn.Linear):
    pass


def add_unknown_linear(layer):
    layer.self_attn.lora = nn.Linear(64, 64)
    return "self_attn.lora"


def add_gate_of_heads(layer):
    layer.self_attn.gate_proj = nn.Linear(64, 8)
    return "self_attn.gate_proj"


def add_unknown_parameter(layer):
    layer.self_attn.slopes = nn.Parameter(torch.zeros(8))
    return "self_attn.slopes"


def add_norm_of_inner(layer):
    layer.mlp.sub_norm = nn.LayerNorm(96)
    return "mlp.sub_norm.weight"


def add_norm_before_sum(layer):
    layer.self_attn.sub_norm = nn.LayerNorm(64)
    return "self_attn.sub_norm.weight"


def add_wide_layer_norm(layer):
    layer.self_attn.q_norm = nn.LayerNorm(64)
    return "self_attn.q_norm.weight"


def add_norm_without_weight(layer):
    layer.self_attn.q_norm = nn.RMSNorm(64, elementwise_affine=False)
    return "self_attn.q_norm.*no weight"


def quantize(layer):
    layer.mlp.down_proj = Quantized(96, 64, bias=False)
    return "mlp.down_proj.*Quantized"


def use_other_heads(layer):
    layer.self_attn.k_proj = nn.Linear(64, 18)
    return "self_attn.k_proj of width 18"


@pytest.mark.parametrize(
    "change",
    [
        add_unknown_linear, add_gate_of_heads, add_unknown_parameter, add_norm_of_inner, add_norm_before_sum,
        add_wide_layer_norm, add_norm_without_weight, quantize, use_other_heads,
    ],
)  # fmt: skip
def test_unknown_weight_is_refused_by_name(change):
    model = build("llama")
    name = change(model.model.layers[1])
    with pytest.raises(UnsupportedModelError, match=name):
        shard(model, first_of(2))


def test_activations_that_look_at_one_another_are_refused():
    model = build("gemma3n_text", **GEMMA3N | {"activation_sparsity_pattern": [0.5] * 3})
    with pytest.raises(UnsupportedModelError, match="activation_sparsity"):
        shard(model, first_of(2))


@pytest.mark.parametrize(("query", "kv", "tp"), [(8, 8, 16), (8, 3, 4), (6, 3, 4), (6, 1, 4)])
def test_heads_that_cannot_be_divided_are_refused(query, kv, tp):
    config = build("llama").config
    config.num_attention_heads, config.num_key_value_heads = query, kv
    with pytest.raises(
        UnsupportedModelError, match=f"{query} attention heads with {kv} .* tensor_parallel can"
    ):
        Heads.of(config, Place(0, tp, 1))


def test_heads_are_all_given_out_once():
    config = build("llama").config
    for query, kv, tp in ((8, 4, 4), (6, 3, 2), (14, 7, 4), (8, 1, 4), (8, 2, 4)):
        config.num_attention_heads, config.num_key_value_heads = query, kv
        places = [Heads.of(config, Place(rank, tp, 1)) for rank in range(tp)]
        given = [head for heads in places for head in range(heads.own_query.start, heads.own_query.stop)]
        assert given == list(range(query))
        assert all(heads.own_kv.stop > heads.own_kv.start for heads in places)


def test_one_shard_is_the_model_itself():
    model = build("llama")
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    whole = shard(model, first_of(1))
    assert whole is model
    assert all(torch.equal(weights[name], parameter) for name, parameter in whole.named_parameters())
