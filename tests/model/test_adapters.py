"""BLOOM, Falcon, GPT-J and MPT, whose attention adapters.py replaces: generate's tokens, and refusals."""

from __future__ import annotations

import pytest
import torch
from test_stage import load_stages, prompts, run
from tiny_models import ADAPTED, build, mixed_prompts, oracles, run_all, save

from ds_serve.attention.interface import UnsupportedModelError
from ds_serve.attention.layout import LayerKV
from ds_serve.config import Settings
from ds_serve.model import adapters
from ds_serve.model.loader import ModelLoadError, load
from ds_serve.parallel.place import Place
from ds_serve.rank import build_local_engine

NUM_REQUESTS = 16
LENGTHS = [4 + (7 * index) % 17 for index in range(NUM_REQUESTS)]
BIASED = ["bloom", "falcon_rw", "mpt"]


def tiny(name: str, dtype: torch.dtype = torch.float32, **overrides):
    architecture, own = ADAPTED[name]
    return build(architecture, dtype, **own | overrides)


@pytest.fixture(scope="module", params=list(ADAPTED))
def case(request, tmp_path_factory):
    """(name, model, its directory, prompts, generate's tokens) in fp32."""
    model = tiny(request.param)
    folder = save(model, tmp_path_factory.mktemp(request.param))
    requests = mixed_prompts(NUM_REQUESTS)
    return request.param, model, folder, requests, oracles(model, requests, LENGTHS)


@pytest.mark.parametrize("attention", ["reference", "cpu"])
def test_chunked_prompts_and_prefix_hits(case, attention):
    _, _, folder, requests, wanted = case
    engine = build_local_engine(
        Settings(model=folder, num_blocks=400, attention=attention, max_num_batched_tokens=23)
    )
    assert run_all(engine, requests, LENGTHS) == wanted
    before = engine.stats().cached_tokens
    assert run_all(engine, requests, LENGTHS) == wanted
    cached = engine.stats().cached_tokens - before
    engine.close()
    assert cached >= sum((len(request) - 1) // 16 * 16 for request in requests)


def test_preemption(case):
    _, _, folder, requests, wanted = case
    engine = build_local_engine(
        Settings(model=folder, num_blocks=24, block_size=4, max_num_batched_tokens=64, attention="reference")
    )
    assert run_all(engine, requests, LENGTHS) == wanted
    preempted = engine.stats().num_preemptions
    engine.close()
    assert preempted > 0


@pytest.mark.parametrize("stages", [2, 3])
def test_stages_one_after_another_are_the_whole_model(case, stages):
    name, model, folder, _, _ = case
    models = load_stages(folder, stages)
    for found, ids in zip(run(models, prompts()), prompts(), strict=True):
        with torch.inference_mode():
            wanted = model(ids[None], use_cache=False).logits[0]
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    held = [key for each in models for key, _ in each.stage.module.named_parameters()]
    twice = {key for key in held if held.count(key) > 1}
    assert twice <= {"lm_head.weight"}, "a parameter is on several stages"
    assert set(held) >= {key for key, _ in model.named_parameters()}, name


@pytest.mark.parametrize(("name", "kv_heads"), [("falcon_7b", 1), ("falcon_40b", 4), ("falcon_rw", 8)])
def test_falcon_keeps_each_kv_head_once(tmp_path, name, kv_heads):
    """Its own forward copies them for all of their queries."""
    loaded = load(Settings(model=save(tiny(name), tmp_path)))
    assert loaded.layout.layers == (LayerKV(kv_heads, 8, 8),) * 3


@pytest.mark.parametrize("name", BIASED)
def test_bf16_keeps_the_models_own_rounding(name):
    """The table's differences are those that transformers adds to the scores of a bf16 model."""
    model = tiny(name, torch.bfloat16)
    seen = []
    attend = {"bloom": "h.0.self_attention", "falcon_rw": "h.0.self_attention", "mpt": "blocks.0.attn"}[name]
    handle = model.base_model.get_submodule(attend).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(torch.zeros(1, 300, dtype=torch.long))
    handle.remove()
    adapters.adapt(model, Place(), lambda: 500)
    found = model.base_model.get_submodule(attend).ds_paged_bias
    assert found.shape == (8, 512)
    if name == "falcon_rw":  # sdpa's mask holds the biases
        own = seen[0]["attention_mask"][0, :, -1].float()
    else:
        own = seen[0]["alibi" if name == "bloom" else "position_bias"][:, 0].float()
    own = own[:, -300:]
    torch.testing.assert_close(found[:, :300] - found[:, :1], own - own[:, :1], atol=0, rtol=1e-6)
    assert (own[:, 1:] != own[:, :1]).all()


def test_shards_have_the_biases_of_their_own_heads():
    model = tiny("bloom", n_head=4)
    tables = []
    for place in (Place(), Place(0, 2, 1), Place(1, 2, 1)):
        adapters.adapt(model, place, lambda: 64)
        tables.append(model.transformer.h[0].self_attention.ds_paged_bias)
    assert torch.equal(tables[0], torch.cat(tables[1:]))


@pytest.mark.parametrize("name", BIASED)
def test_a_wrong_bias_is_noticed_at_load(name, tmp_path, monkeypatch):
    right = adapters._own_bias
    monkeypatch.setattr(adapters, "_own_bias", lambda *args: right(*args).flip(0))
    with pytest.raises(UnsupportedModelError, match="differ"):
        load(Settings(model=save(tiny(name), tmp_path)))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"attn_config": {"alibi": False}}, "alibi=False.*computes alibi=True"),
        ({"attn_config": {"alibi_bias_max": 16}}, "alibi_bias_max=16"),
        ({"attn_config": {"qk_ln": True}}, "qk_ln"),
        ({"logit_scale": 0.5}, "logit_scale=0.5"),
        ({"no_bias": False}, "no_bias"),
    ],
)
def test_an_mpt_that_transformers_does_not_compute_is_refused(tmp_path, overrides, words):
    with pytest.raises(UnsupportedModelError, match=words):
        load(Settings(model=save(tiny("mpt", **overrides), tmp_path)))


def test_bloom_states_no_longest_length(tmp_path):
    model = tiny("bloom")
    del model.config.max_position_embeddings
    folder = save(model, tmp_path)
    with pytest.raises(ModelLoadError, match="give max_model_len"):
        load(Settings(model=folder))
    assert load(Settings(model=folder, max_model_len=5)).max_model_len == 5


def test_falcons_plain_attention_adds_its_biases_once():
    """transformers' eager attention adds them twice: the day it does not, plain_attention() may go."""
    model, ids = tiny("falcon_rw"), torch.arange(3, 40)[None]
    with torch.no_grad():
        once = model(ids).logits
        model.config._attn_implementation = "eager"
        twice = model(ids).logits
    assert not torch.allclose(once, twice, atol=1e-2)
