"""Multi-head latent attention with latents in the cache: transformers' tokens, in a fraction of the memory.

Models of that look whose latents would not do keep their keys and values."""

from __future__ import annotations

import copy
import logging
import os
import queue

import pytest
import torch
from tiny_models import build, mixed_prompts, oracles, run_all, save
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from ds_serve.attention.backends import select_backend
from ds_serve.attention.interface import UnsupportedModelError, install
from ds_serve.attention.latent import LatentProjection, drop_latents, use_latents
from ds_serve.attention.layout import KVLayout, LayerKV
from ds_serve.attention.reference import ReferenceBackend
from ds_serve.config import Settings
from ds_serve.messages import Request, SamplingParams
from ds_serve.model.loader import _proven_layout, load
from ds_serve.model.parity import plain_output
from ds_serve.model.stage import Stage
from ds_serve.parallel.place import Place

SIZES = {"kv_lora_rank": 20, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
QUERIES = {"num_key_value_heads": 8, "q_lora_rank": 32}
EXPERTS = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
    "moe_intermediate_size": 48, "first_k_dense_replace": 1,
}  # fmt: skip
DENSE = SIZES | QUERIES
MOE = DENSE | EXPERTS
CASES = {
    "deepseek_v2": ("deepseek_v2", MOE),
    "deepseek_v2-whole-queries": ("deepseek_v2", MOE | {"q_lora_rank": None}),
    "deepseek_v3": ("deepseek_v3", MOE),
    "deepseek_v3-yarn": (
        "deepseek_v3",
        MOE
        | {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 1.0,
                "mscale_all_dim": 1.0, "original_max_position_embeddings": 128,
            }
        },
    ),
    "axk1": ("axk1", MOE),
    "glm4_moe_lite": ("glm4_moe_lite", MOE),
    "longcat_flash": (
        "longcat_flash",
        DENSE
        | {
            "num_layers": 2, "num_hidden_layers": 4, "head_dim": 8, "ffn_hidden_size": 96, "moe_topk": 2,
            "expert_ffn_hidden_size": 48, "n_routed_experts": 8, "zero_expert_num": 2,
        },
    ),
    "minicpm3": ("minicpm3", DENSE),
    "youtu": ("youtu", DENSE),
}  # fmt: skip
PART = ["deepseek_v2", "deepseek_v2-whole-queries", "deepseek_v3-yarn", "longcat_flash", "minicpm3"]
WANTED = list(CASES) if os.environ.get("DS_SERVE_TEST_ALL") == "1" else PART
EXPANDED = KVLayout((LayerKV(8, 24, 12),) * 3, 16, torch.float32)
PROMPTS = mixed_prompts(16)
LENGTHS = [6 + (7 * index) % 15 for index in range(len(PROMPTS))]


@pytest.fixture(scope="module", params=WANTED)
def case(request, tmp_path_factory):
    """(model directory, generate's tokens, number of layers) of one architecture in fp32."""
    architecture, overrides = CASES[request.param]
    model = build(architecture, **overrides)
    folder = save(model, tmp_path_factory.mktemp(request.param))
    return folder, oracles(model, PROMPTS, LENGTHS), model.config.num_hidden_layers


@pytest.fixture
def start(engine_of):
    """Starts an engine of a model directory, with a large pool unless settings say otherwise."""
    return lambda folder, **settings: engine_of(model=folder, **({"num_blocks": 200} | settings))


def latent_bytes(layers: int = 3, block_size: int = 16, itemsize: int = 4) -> int:
    """A block: for each layer and token one latent and one rope part, padded to 64 bytes a layer."""
    numbers = SIZES["kv_lora_rank"] + SIZES["qk_rope_head_dim"]
    return layers * -(-block_size * numbers * itemsize // 64) * 64


def test_chunks_and_hits_give_generates_tokens(case, start):
    folder, wanted, layers = case
    engine = start(folder, max_num_batched_tokens=23)
    assert run_all(engine, PROMPTS, LENGTHS) == wanted
    before = engine.stats().cached_tokens
    assert run_all(engine, PROMPTS, LENGTHS) == wanted
    hit = sum((len(prompt) - 1) // 16 * 16 for prompt in PROMPTS)
    assert engine.stats().cached_tokens - before >= hit
    assert engine.stats().bytes_per_block == latent_bytes(layers)


def test_preempted_requests_give_generates_tokens(case, start):
    folder, wanted, layers = case
    engine = start(folder, num_blocks=24, block_size=4, max_num_batched_tokens=48, attention="reference")
    assert run_all(engine, PROMPTS, LENGTHS) == wanted
    assert engine.stats().num_preemptions > 0
    assert engine.stats().bytes_per_block == latent_bytes(layers, block_size=4)


def test_evicted_latents_come_back_from_the_host(tmp_path, start):
    model = build("deepseek_v3", **MOE)
    wanted = oracles(model, PROMPTS, LENGTHS)
    engine = start(save(model, tmp_path), num_blocks=12, host_cache=40 * latent_bytes())
    for _ in range(3):
        assert run_all(engine, PROMPTS, LENGTHS) == wanted
    assert engine.stats().loaded_blocks > 0


def test_a_block_holds_a_tenth_of_the_keys_and_values(tmp_path):
    """As computed: 20 + 8 numbers a token and layer, for 8 heads of 16 + 8 + 12."""
    found = load(Settings(model=save(build("deepseek_v3", **MOE), tmp_path))).layout
    assert found.layers == (LayerKV(1, 28, 20, v_in_k=True),) * 3
    assert found.v_offset(1) == found.k_offset(1) > found.k_offset(0)
    assert found.bytes_per_block == latent_bytes()
    assert EXPANDED.bytes_per_block / found.bytes_per_block == pytest.approx(8 * 36 / 28)


def test_bf16_is_no_further_from_fp32_than_transformers(tmp_path, start):
    """The bound of test_engine_tokens.py: absorbed weights round elsewhere, and no worse."""
    model = build("minicpm3", torch.bfloat16, **DENSE)
    engine = start(save(model, tmp_path), max_num_batched_tokens=29)
    exact = copy.deepcopy(model).float()
    ours, theirs = [], []
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=5)
    for index, prompt in enumerate(mixed_prompts(24)):
        outputs = queue.SimpleQueue()
        engine.submit(Request(id=str(index), prompt_token_ids=prompt, params=params), outputs.put)
        found = outputs.get(timeout=60).logprobs[0]
        ids, top = torch.tensor([prompt]), found.top_ids
        with torch.inference_mode():
            truth = exact(ids, use_cache=False).logits[0, -1].log_softmax(-1)[top]
            eager = model(ids, use_cache=False).logits[0, -1].float().log_softmax(-1)[top]
        ours.append((truth - torch.tensor(found.top_logprobs)).abs().mean().item())
        theirs.append((truth - eager).abs().mean().item())
    mean_ours, mean_theirs = sum(ours) / len(ours), sum(theirs) / len(theirs)
    assert mean_ours <= 1.5 * mean_theirs + 0.01
    assert engine.stats().bytes_per_block == latent_bytes(itemsize=2)


# -- where latents would not do ----------------------------------------------------------------


def test_off_caches_keys_and_values(tmp_path, start):
    model = build("deepseek_v3", **MOE)
    engine = start(save(model, tmp_path), latent_cache="off")
    assert engine.stats().bytes_per_block == EXPANDED.bytes_per_block
    assert run_all(engine, PROMPTS, LENGTHS) == oracles(model, PROMPTS, LENGTHS)


def test_a_model_that_changes_its_keys_afterwards_keeps_them(tmp_path, start, monkeypatch, caplog):
    """Keys that are no linear function of the latent: the probe finds it, and the tokens are right."""
    plain = DeepseekV3Attention.expand_kv

    def normed(self, *latents):
        key, value = plain(self, *latents)
        return nn.functional.normalize(key, dim=-1) * 4, value

    monkeypatch.setattr(DeepseekV3Attention, "expand_kv", normed)
    model = build("deepseek_v3", **MOE)
    wanted = oracles(model, PROMPTS, LENGTHS)
    with caplog.at_level(logging.WARNING, "ds_serve"):
        engine = start(save(model, tmp_path))
    assert "keys and values are cached instead of latents" in caplog.text
    assert engine.stats().bytes_per_block == EXPANDED.bytes_per_block
    assert run_all(engine, PROMPTS, LENGTHS) == wanted


def test_a_model_wrong_in_both_ways_is_refused(tmp_path, monkeypatch):
    right = ReferenceBackend.forward

    def wrong(self, *args, scale, **kwargs):
        return right(self, *args, scale=2 * scale, **kwargs)

    monkeypatch.setattr(ReferenceBackend, "forward", wrong)
    folder = save(build("deepseek_v3", **MOE), tmp_path)
    with pytest.raises(UnsupportedModelError, match="differ"):
        load(Settings(model=folder, attention="reference"))


class OtherShardFails:
    """A grid of two shards, seen from the first: paged attention went wrong on the second."""

    place = Place(0, 2, 1)

    def all_reduce(self, signs: torch.Tensor) -> torch.Tensor:
        num_latent, problem = signs.tolist()
        return torch.tensor([2 * num_latent, problem + 1])


@pytest.mark.parametrize("latent_cache", ["auto", "off"])
def test_what_goes_wrong_on_another_shard_is_settled_on_this_one_too(latent_cache, caplog):
    stage = Stage(build("minicpm3", **DENSE), Place(), range(3))
    plain, backend = plain_output(stage, torch.device("cpu")), select_backend("cpu", torch.float32, 16)
    install(stage.module, backend)
    settings = Settings(model="none", latent_cache=latent_cache)
    if latent_cache == "off":
        with pytest.raises(UnsupportedModelError, match="another tensor shard"):
            _proven_layout(stage, plain, settings, backend, OtherShardFails())
        return
    with caplog.at_level(logging.WARNING, "ds_serve"):
        found = _proven_layout(stage, plain, settings, backend, OtherShardFails())
    assert found.layers == EXPANDED.layers
    assert "another tensor shard cannot use latents" in caplog.text


class Wrapped(nn.Linear):
    """A linear with a forward of its own: quantized, or with an adapter."""


@pytest.mark.parametrize("change", ["bias", "class", "hook", "one head"])
def test_layers_whose_projection_is_not_plain_or_no_larger_stay(change):
    model = build("deepseek_v3", **MOE)
    attention = model.model.layers[1].self_attn
    linear = attention.kv_b_proj
    if change == "bias":
        linear.bias = nn.Parameter(torch.zeros(linear.out_features))
    elif change == "class":
        linear.__class__ = Wrapped
    elif change == "hook":
        linear.register_forward_hook(lambda *_: None)
    else:  # 16 + 12 numbers of a shard's only head, for 20 of the latent
        attention.qk_rope_head_dim = 0
        linear.weight = nn.Parameter(linear.weight[:20])
        attention.v_head_dim = 4
    before = model.model.layers[0].self_attn.kv_b_proj.weight
    assert use_latents(model) == 2
    assert attention.kv_b_proj is linear
    assert LatentProjection.of(attention) is None
    other = model.model.layers[0].self_attn
    drop_latents(model)
    assert torch.equal(other.kv_b_proj.weight, before)
    assert not any(isinstance(module, LatentProjection) for module in model.modules())


def test_attention_without_its_latent_is_an_error():
    model = build("deepseek_v3", **MOE)
    use_latents(model)
    projection = LatentProjection.of(model.model.layers[0].self_attn)
    query, key = torch.zeros(1, 8, 3, 24), torch.zeros(1, 1, 3, 24)
    with pytest.raises(ValueError, match="latent attention: query, key and latents"):
        projection.absorb(query, key)
    projection(torch.zeros(1, 3, 20))
    projection.absorb(query, key)
    with pytest.raises(ValueError, match="latent attention"):  # each latent serves one call
        projection.absorb(query, key)


def test_values_need_as_many_columns_in_the_keys():
    with pytest.raises(ValueError, match="LayerKV"):
        LayerKV(1, 8, 9, v_in_k=True)
