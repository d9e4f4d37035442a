"""Tiny random-weight models of several architectures, saved as directories, and requests to try them with."""

from __future__ import annotations

import math
import queue
import random
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ds_serve.messages import Request, SamplingParams
from ds_serve.model.adapters import plain_attention

VOCAB = 160
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 96, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCAB, "n_embd": 64, "n_layer": 3, "n_head": 8, "n_positions": 512,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
ARCHITECTURES = {
    "llama": COMMON,
    "qwen3": COMMON | {"head_dim": 16},
    "mistral": COMMON | {"head_dim": 16, "sliding_window": 8},
    "gemma2": COMMON | {
        "head_dim": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0,
        "query_pre_attn_scalar": 24, "sliding_window": 8,
    },
    "gpt2": GPT2,
    "gpt_oss": COMMON | {
        "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip
OWN_KV = {"num_key_value_heads": None}  # a field that these architectures do not have
# Architecture and configuration of the models that model/adapters.py is for.
ADAPTED = {
    "bloom": ("bloom", OWN_KV),
    "falcon_7b": ("falcon", OWN_KV | {"multi_query": True, "parallel_attn": True}),
    "falcon_40b": ("falcon", OWN_KV | {"new_decoder_architecture": True, "num_kv_heads": 4}),
    "falcon_rw": (
        "falcon", OWN_KV | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "gptj": ("gptj", OWN_KV | {"rotary_dim": 4}),
    "mpt": ("mpt", OWN_KV | {"max_seq_len": 512, "attn_config": {"clip_qkv": 2.0}}),
}  # fmt: skip


def build(architecture: str, dtype: torch.dtype = torch.float32, **overrides):
    """A model in eval mode whose random weights make logits that depend on everything."""
    config = AutoConfig.for_model(architecture, **(ARCHITECTURES.get(architecture, COMMON) | overrides))
    plain = plain_attention(config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=plain)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                scale = 0.5 if "emb" in name or "wte" in name else 1.5 / math.sqrt(parameter.shape[-1])
                parameter.copy_(noise * scale)
            else:
                parameter.add_(noise * (0.2 if "bias" in name or "sinks" in name else 0.1))
    return model.eval().to(dtype)


def save(model, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def mixed_prompts(count: int, longest: int = 60, seed: int = 0) -> list[list[int]]:
    """Lengths of all kinds, block borders among them; every fourth continues an earlier prompt."""
    rng = random.Random(seed)
    prompts: list[list[int]] = []
    for index in range(count):
        length = rng.choice([1, 3, 15, 16, 17, 31, 33, longest // 2])
        own = [rng.randrange(3, VOCAB) for _ in range(length)]
        shared = prompts[rng.randrange(len(prompts))] if index % 4 == 3 else []
        prompts.append((shared + own)[:longest])
    return prompts


def oracle(model, prompt: list[int], max_tokens: int, **kwargs) -> list[int]:
    """transformers' own greedy continuation."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, **kwargs
        )
    return out[0, len(prompt) :].tolist()


def oracles(model, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """oracle() of many prompts: those of one length go through generate as one batch, without padding."""
    longest = max(lengths)
    found: dict[int, list[int]] = {}
    for length in sorted({len(prompt) for prompt in prompts}):
        group = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[index] for index in group])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, do_sample=False
            )
        for index, tokens in zip(group, out[:, length:].tolist(), strict=True):
            found[index] = tokens[: lengths[index]]
    return [found[index] for index in range(len(prompts))]


def run_all(
    engine, prompts, max_tokens: int | list[int], adapters: list[str] | None = None, **params
) -> list[list[int]]:
    """Submits every prompt at once; the tokens of each, greedy unless params say otherwise."""
    adapters = adapters or [""] * len(prompts)
    lengths = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
    params = {"temperature": 0.0} | params
    queues = []
    for index, (prompt, length, adapter) in enumerate(zip(prompts, lengths, adapters, strict=True)):
        queues.append(queue.SimpleQueue())
        request = Request(
            id=f"r{index}",
            prompt_token_ids=prompt,
            params=SamplingParams(max_tokens=length, **params),
            adapter=adapter,
        )
        engine.submit(request, queues[-1].put)
    return [drain(each) for each in queues]


def drain(outputs: queue.SimpleQueue) -> list[int]:
    tokens: list[int] = []
    while True:
        output = outputs.get(timeout=120)
        tokens += output.token_ids
        if output.finish_reason == "error":
            raise AssertionError(output.error)
        if output.finish_reason:
            return tokens
