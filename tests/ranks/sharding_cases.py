"""Tiny models, one for each way in which a decoder layer's weights are cut, for sharding_run.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tiny_models import ADAPTED, OWN_KV
from torch import nn


@dataclass(frozen=True)
class Case:
    """overrides of the tiny model's configuration; spoil(model, grid) damages a shard after the cut."""

    architecture: str
    overrides: dict = field(default_factory=dict)
    spoil: Callable | None = None


def _swap_rows(model: nn.Module, grid) -> None:
    """As if the shards had been given out in the wrong order within one weight."""
    if grid.place.shard == 0:
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.data = torch.roll(weight.data, 1, 0)


def _keep_bias(model: nn.Module, grid) -> None:
    """The bias after a sum, added on every shard instead of one."""
    experts = model.model.layers[0].mlp.experts
    experts.down_proj_bias.data = torch.ones_like(experts.down_proj_bias)


def _hook_one_shard(model: nn.Module, grid) -> None:
    """One shard's layer cannot be replaced, so no shard's is."""
    if grid.place.shard == 1:
        model.model.layers[1].register_forward_hook(lambda *_: None)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MLA = {
    "num_key_value_heads": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "moe_intermediate_size": 48, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 32,
    "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8}
OPT = {"ffn_dim": 96, "word_embed_proj_dim": 64}
LLAMA4 = {
    "head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1,
    "attention_chunk_size": 8, "moe_layers": [1],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
GEMMA3N = {
    "head_dim": 16, "layer_types": SLIDING["layer_types"], "sliding_window": 8, "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 160, "laurel_rank": 8,
    "activation_sparsity_pattern": [0.0] * 3, "altup_num_inputs": 2,
}  # fmt: skip
DBRX = {
    "d_model": 64, "n_heads": 8, "n_layers": 3, "max_seq_len": 512,
    "attn_config": {"kv_n_heads": 4, "clip_qkv": 8, "rope_theta": 10000.0},
    "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
}  # fmt: skip
FALCON_7B, FALCON_40B = ADAPTED["falcon_7b"][1], ADAPTED["falcon_40b"][1]
BIGCODE = {"n_embd": 64, "n_layer": 3, "n_head": 8, "n_positions": 512}
ODD = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}

CASES = {
    "llama": Case("llama"),
    "llama-tied": Case("llama", {"tie_word_embeddings": True}),
    "llama-biases": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-odd": Case("llama", ODD | {"intermediate_size": 97, "vocab_size": 161}),
    "llama-odd-tied": Case("llama", ODD | {"tie_word_embeddings": True, "vocab_size": 161}),
    "llama-1kv": Case("llama", {"num_key_value_heads": 1}),
    "qwen2": Case("qwen2"),
    "qwen3": Case("qwen3"),
    "qwen3-1kv": Case("qwen3", {"num_key_value_heads": 1}),
    "mistral": Case("mistral"),
    "gemma": Case("gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": Case("gemma2"),
    "gemma3n": Case("gemma3n_text", GEMMA3N),
    "gpt2": Case("gpt2"),
    "gpt_neox": Case("gpt_neox", {"rotary_pct": 0.25}),
    "gpt_bigcode": Case("gpt_bigcode", BIGCODE),
    "opt": Case("opt", OPT),
    "phi": Case("phi", {"partial_rotary_factor": 0.5}),
    "phi3": Case("phi3"),
    "phi3-1kv": Case("phi3", {"num_key_value_heads": 1}),
    "phi3-odd": Case("phi3", ODD),
    "glm4": Case("glm4", {"head_dim": 16}),
    "cohere": Case("cohere", {"use_qk_norm": True}),
    "olmo2": Case("olmo2"),
    "olmo2-odd": Case("olmo2", ODD),
    "olmo3": Case("olmo3", SLIDING),
    "olmoe": Case("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "minimax_m2": Case("minimax_m2", EXPERTS | {"head_dim": 16}),
    "mixtral": Case("mixtral", EXPERTS | {"sliding_window": 8}),
    "mixtral-odd": Case("mixtral", EXPERTS | {"intermediate_size": 88}),
    "qwen2_moe": Case("qwen2_moe", MOE | {"shared_expert_intermediate_size": 48}),
    "qwen3_moe": Case("qwen3_moe", MOE | {"head_dim": 16}),
    "granitemoe": Case("granitemoe", EXPERTS | {"attention_multiplier": 0.2}),
    "deepseek_v3": Case("deepseek_v3", MLA),
    "gpt_oss": Case("gpt_oss"),
    "gpt_oss-odd": Case("gpt_oss", ODD),
    "llama4": Case("llama4_text", LLAMA4),
    "dbrx": Case("dbrx", DBRX),
    "apertus": Case("apertus"),
    "hunyuan": Case("hunyuan_v1_dense", {"head_dim": 16}),
    "starcoder2": Case("starcoder2", {"sliding_window": 8}),
    **{name: Case(*of) for name, of in ADAPTED.items()},
    "bloom-odd": Case("bloom", ODD | OWN_KV),
    "falcon_7b-odd": Case("falcon", FALCON_7B | {"num_attention_heads": 7, "hidden_size": 56, "bias": True}),
    "falcon_40b-odd": Case("falcon", FALCON_40B | ODD | OWN_KV | {"num_kv_heads": 3}),
    "falcon_40b-2kv": Case("falcon", FALCON_40B | {"num_kv_heads": 2, "bias": True}),
    "falcon_rw-odd": Case("falcon", ADAPTED["falcon_rw"][1] | ODD | OWN_KV),
    "mpt-odd": Case("mpt", ADAPTED["mpt"][1] | ODD | OWN_KV),
    "spoiled-order": Case("llama", spoil=_swap_rows),
    "spoiled-bias": Case("gpt_oss", spoil=_keep_bias),
}
# bf16 models whose shards are injected after the cut.
WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
FUSED = {
    "fused-llama": Case("llama", WIDE),
    "fused-tied-biases": Case(
        "llama",
        WIDE | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "vocab_size": 161},
    ),
    "fused-odd": Case(
        "llama",
        WIDE
        | {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 192, "intermediate_size": 97},
    ),
    "fused-qwen2": Case("qwen2", WIDE),
    "fused-qwen3": Case("qwen3", WIDE | {"head_dim": 64}),
    "fused-mistral": Case("mistral", WIDE | {"sliding_window": 8}),
    "fused-1kv": Case("llama", WIDE | {"num_key_value_heads": 1}),
    "fused-with-hook": Case("llama", WIDE, spoil=_hook_one_shard),
}
IN_FOUR = [
    "llama", "llama-tied", "llama-biases", "llama-1kv", "qwen3", "gemma2", "gpt2", "phi3", "olmo2", "mixtral",
    "qwen3_moe", "deepseek_v3", "gpt_oss", "spoiled-order", "bloom-odd", "falcon_7b-odd",
    "falcon_40b-2kv", "falcon_rw", "mpt-odd",
]  # fmt: skip
