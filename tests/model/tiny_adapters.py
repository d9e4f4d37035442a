"""Random LoRA adapters of tiny models, made and saved by peft, and what the three of them answer."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import build, mixed_prompts, oracles, save
from transformers import PreTrainedModel

EVERYTHING = {"r": 6, "lora_alpha": 9, "use_rslora": True, "target_modules": "all-linear"}
EXPERTS = {"num_local_experts": 4}
MLA = {
    "num_key_value_heads": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "moe_intermediate_size": 48, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 32,
    "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
OWN_KV = {"num_key_value_heads": None}  # a field that these architectures do not have
# architecture: (what differs from the tiny model, the first adapter, the second)
CASES = {
    "llama": (
        {},
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj"]},
        EVERYTHING | {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {r"1\.self_attn\.k_proj": 2}},
    ),
    "gpt2": ({}, {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True}, EVERYTHING),
    "phi3": ({}, {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "gate_up_proj"]}, EVERYTHING),
    "qwen3": (
        {},
        {"r": 4, "lora_alpha": 8, "target_modules": r".*\.[02]\..*(q|k|v|up)_proj"},
        EVERYTHING | {"target_modules": ["k_proj", "gate_proj", "down_proj"], "layers_to_transform": [1]},
    ),
    "mixtral": (
        EXPERTS,
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        EVERYTHING | {"target_modules": ["k_proj", "o_proj"]},
    ),
}
MORE = {
    "deepseek_v3": (
        MLA,
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_a_proj", "q_b_proj", "o_proj"]},
        EVERYTHING | {"target_modules": ["kv_a_proj_with_mqa", "kv_b_proj"]},
    ),
    "gpt_neox": ({}, {"r": 4, "lora_alpha": 8, "target_modules": ["query_key_value"]}, EVERYTHING),
    "gpt_bigcode": (
        {"n_embd": 64, "n_layer": 3, "n_head": 8, "n_positions": 512, "multi_query": False},
        {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"]},
        EVERYTHING,
    ),
    "gemma": (
        {"head_dim": 16, "num_key_value_heads": 1},
        {"r": 4, "lora_alpha": 32, "target_modules": ["k_proj", "v_proj"]},
        EVERYTHING,
    ),
    "opt": (
        {"ffn_dim": 96, "word_embed_proj_dim": 64},
        {"r": 4, "lora_alpha": 8, "target_modules": ["k_proj", "out_proj"]},
        EVERYTHING,
    ),
    "bloom": (
        OWN_KV, {"r": 4, "lora_alpha": 16, "target_modules": ["query_key_value"]}, EVERYTHING,
    ),
    "falcon": (
        OWN_KV | {"new_decoder_architecture": True, "num_kv_heads": 4},
        {"r": 4, "lora_alpha": 16, "target_modules": ["query_key_value"]},
        EVERYTHING,
    ),
    "gptj": (OWN_KV | {"rotary_dim": 4}, {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}, EVERYTHING),
    "mpt": (
        OWN_KV | {"max_seq_len": 512, "attn_config": {"clip_qkv": 2.0}},
        {"r": 4, "lora_alpha": 8, "target_modules": ["Wqkv"]},
        EVERYTHING,
    ),
}  # fmt: skip
NAMES = ("fr", "de")


def make(architecture: str, folder: Path, number: int, **overrides) -> PeftModel:
    """The tiny model with its adapter of this number (0, 1), whose random tensors change every token."""
    changes, *adapters = (CASES | MORE)[architecture]
    return adapt(build(architecture, **changes, **overrides), folder, number, adapters[number])


def adapt(model: PreTrainedModel, folder: Path, number: int, config: dict) -> PeftModel:
    """model with a random adapter, which is saved to folder."""
    with warnings.catch_warnings():  # of transformers, and of fan_in_fan_out, which changes nothing here
        warnings.simplefilter("ignore")
        model = get_peft_model(model, LoraConfig(**config))
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
    model.save_pretrained(folder)
    return model.eval()


class Served:
    """A tiny model and its two adapters as files, and mixed requests to them, with what peft answers.

    Each prompt is asked of the model and of both adapters: prompts, lengths and adapters run beside one
    another, and so does wanted. settings name the files.
    """

    def __init__(self, architecture: str, folder: Path, num_prompts: int = 8, **overrides) -> None:
        model = build(architecture, **(CASES | MORE)[architecture][0], **overrides)
        folders = {name: folder / name for name in NAMES}
        self.settings = {
            "model": save(model, folder / "model"),
            "adapters": {name: str(folder) for name, folder in folders.items()},
        }
        models = {"": model} | {
            name: make(architecture, folders[name], number, **overrides) for number, name in enumerate(NAMES)
        }
        prompts = mixed_prompts(num_prompts)
        lengths = [4 + 3 * index % 7 for index in range(num_prompts)]
        answers = {name: oracles(each, prompts, lengths) for name, each in models.items()}
        assert all(a != b for a, b in zip(*(answers[name] for name in NAMES), strict=True))
        assert all(a != b for name in NAMES for a, b in zip(answers[""], answers[name], strict=True))
        self.prompts = [prompt for prompt in prompts for _ in answers]
        self.lengths = [length for length in lengths for _ in answers]
        self.adapters = [name for _ in prompts for name in answers]
        self.wanted = [answers[name][index] for index in range(num_prompts) for name in answers]
