"""Hugging Face models through ds_paged: the same logits as eager attention, or a refusal that says why."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ds_serve.attention.backends import select_backend
from ds_serve.attention.context import AttentionBatch, use_batch
from ds_serve.attention.interface import (
    NAME,
    NAME_WITHOUT_MASK,
    MaskSpec,
    UnsupportedModelError,
    install,
    paged_attention,
    paged_mask,
    probe_layers,
)
from ds_serve.attention.layout import KVLayout, LayerKV
from ds_serve.attention.reference import ReferenceBackend

transformers.logging.set_verbosity_error()

COMMON = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 8}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
MLA = {
    "num_key_value_heads": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
# One for each thing that differs in how a model calls attention.
MODELS = {
    "llama": {},
    "mistral": WINDOW,
    "gemma2": {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 24, **WINDOW},
    "gemma3_text": {"query_pre_attn_scalar": 24, **MIXED},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, **WINDOW},
    "deepseek_v3": MLA,
    "granite": {"attention_multiplier": 0.2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, **WINDOW},
    "llama4_text": {
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 8,
    },
    "stablelm": {"partial_rotary_factor": 0.5},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
}


def make_model(name: str, **options):
    settings = {**COMMON, **options}
    if name in ("phimoe", "deepseek_v3", "stablelm"):  # they derive it
        del settings["head_dim"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **settings), attn_implementation="eager"
    )
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from zero, so that wrong attention shows in the logits
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn_like(parameter) * 1.5 * parameter.shape[-1] ** -0.5)
    return model


def ragged(rows: list[tuple[int, int, list[int]]], layout: KVLayout, slab: torch.Tensor) -> AttentionBatch:
    """rows: (first position, end, block table)."""
    positions = [p for begin, end, _ in rows for p in range(begin, end)]
    slots = [table[p // 16] * 16 + p % 16 for begin, end, table in rows for p in range(begin, end)]
    counts = [end - begin for begin, end, _ in rows]
    width = max(len(table) for _, _, table in rows)
    return AttentionBatch(
        slab=slab,
        layout=layout,
        slot_mapping=torch.tensor(slots),
        query_start=torch.tensor([0, *counts]).cumsum(0).int(),
        context_len=torch.tensor([end for _, end, _ in rows], dtype=torch.int32),
        block_tables=torch.tensor([t + [0] * (width - len(t)) for _, _, t in rows], dtype=torch.int32),
        positions=torch.tensor(positions),
        num_tokens=len(slots),
    )


@pytest.mark.parametrize("prefer", ["reference", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_eager(name, prefer):
    """Two prompts in ragged steps: whole, in chunks, token by token, together and alone."""
    model = make_model(name, **MODELS[name])
    ids = torch.randint(3, 150, (37,)), torch.randint(3, 150, (20,))
    with torch.no_grad():
        want = [model(x[None]).logits[0] for x in ids]
    install(model, select_backend("cpu", torch.float32, 16, prefer))
    layout = KVLayout(probe_layers(model), dtype=torch.float32)
    slab = layout.allocate(8, "cpu")
    tables = [3, 5, 1], [7, 2]
    got = [[], []]
    for step in ([(0, 0, 18)], [(0, 18, 19), (1, 0, 12)], [(1, 12, 19), (0, 19, 37)], [(1, 19, 20)]):
        batch = ragged([(begin, end, tables[s]) for s, begin, end in step], layout, slab)
        packed = torch.cat([ids[s][begin:end] for s, begin, end in step])[None]
        with torch.no_grad(), use_batch(batch):
            logits = model(input_ids=packed, position_ids=batch.positions[None], use_cache=False).logits[0]
        for (s, _, _), part in zip(step, logits.split([e - b for _, b, e in step]), strict=True):
            got[s].append(part)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(torch.cat(mine), theirs, atol=1e-4, rtol=1e-4)


def test_probe_finds_each_layer_shape():
    assert probe_layers(installed("llama")) == [LayerKV(4, 16, 16)] * 4
    assert probe_layers(installed("deepseek_v3", **MLA)) == [LayerKV(8, 24, 16)] * 4


def installed(name: str, **options):
    model = make_model(name, **options)
    install(model, ReferenceBackend())
    return model


@pytest.mark.parametrize(("name", "wanted"), [("gemma2", NAME_WITHOUT_MASK), ("llama4_text", NAME)])
def test_masks_are_built_only_where_they_tell_more_than_the_attention_call(name, wanted):
    """Gemma gives a layer's window to attention itself, Llama 4 a layer's chunk to the mask alone."""
    model = installed(name, **MODELS[name])
    probe_layers(model)
    configs = {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}
    assert configs == {wanted}


def test_probe_refuses_layers_that_do_not_call_once():
    model = installed("llama")
    model.model.layers[2].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(UnsupportedModelError, match=r"\[0, 1, 3\]"):
        probe_layers(model)
    assert probe_layers(model, layers=[0, 1, 3]) == [LayerKV(4, 16, 16)] * 3


@pytest.mark.parametrize("name", ["bloom", "falcon", "gptj", "mpt"])
def test_models_that_ignore_the_interface_are_refused(name):
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            name,
            vocab_size=32,
            hidden_size=32,
            n_embd=32,
            d_model=32,
            n_layer=1,
            n_head=4,
            num_attention_heads=4,
        )
    )
    with pytest.raises(UnsupportedModelError, match="AttentionInterface"):
        install(model, ReferenceBackend())


def test_stateful_models_and_other_layer_types_are_refused():
    model = make_model("llama")
    model.config.layer_types = ["full_attention", "linear_attention"] * 2
    with pytest.raises(UnsupportedModelError, match="linear_attention"):
        install(model, ReferenceBackend())
    model.config.layer_types = None
    model._is_stateful = True
    with pytest.raises(UnsupportedModelError, match="recurrent"):
        install(model, ReferenceBackend())


def call(module=None, q=(1, 2, 3, 8), kv_heads=1, mask=None, **keywords):
    module = module or nn.Module()
    k = torch.zeros(1, kv_heads, 3, 8)
    return paged_attention(module, torch.zeros(q), k, k, mask, scaling=1.0, **keywords)


@pytest.mark.parametrize(
    "keywords",
    [
        {"position_bias": torch.zeros(1)},
        {"head_mask": torch.zeros(1)},
        {"indices": torch.zeros(1)},
        {"output_attentions": True},
        {"dropout": 0.1},
        {"is_causal": False},
        {"mask": torch.zeros(1, 1, 3, 3)},
        {"a_keyword_of_the_future": 1},
    ],
)
def test_what_is_not_computed_is_refused_by_name(keywords):
    name = "attention_mask" if "mask" in keywords else next(iter(keywords))
    with pytest.raises(UnsupportedModelError, match=name):
        call(**keywords)


def test_a_rank_without_kv_head_gives_an_empty_result():
    output, weights = call(q=(1, 0, 3, 8), kv_heads=0, position_ids=torch.zeros(3), dropout=0.0)
    assert output.shape == (1, 3, 0, 8) and weights is None


def test_misuse_is_told():
    with pytest.raises(ValueError, match="one packed row"):
        call(q=(2, 2, 3, 8))
    with pytest.raises(RuntimeError, match="install"):
        call()
    model = installed("llama")
    with pytest.raises(RuntimeError, match="use_batch"):
        model(torch.zeros(1, 2, dtype=torch.long), use_cache=False)


def test_masks():
    assert paged_mask(batch_size=1, q_length=3, kv_length=3) is None
    assert paged_mask(local_size=8) == MaskSpec(8)
    assert paged_mask(attention_mask=torch.ones(1, 3)) is None
    for wrong in (
        {"use_vmap": True},
        {"attention_mask": torch.tensor([[0, 1, 1]])},
        {"allow_is_bidirectional_skip": True},
    ):
        with pytest.raises(UnsupportedModelError):
            paged_mask(**wrong)
    module = nn.Module()
    module.layer_idx, module.ds_paged_backend = 0, ReferenceBackend()
    layout = KVLayout([LayerKV(1, 8, 8)], dtype=torch.float32)
    with (
        use_batch(ragged([(0, 3, [0])], layout, layout.allocate(1, "cpu"))),
        pytest.raises(UnsupportedModelError, match="sliding_window=4"),
    ):
        call(module, mask=MaskSpec(8), sliding_window=4)
