"""Kernel injection on CPU: swaps known bf16 modules for fused ones with packed weights, each checked first.

inject() is called by the loader after deepspeed.init_inference and after attention's install(). It knows
Llama, Mistral, Qwen2 and Qwen3 as transformers writes them, whole or cut by DeepSpeed into tensor shards; a
module that differs in any way (class, activation, sizes, hooks, dtype, a quantized linear) stays as it is,
and the report says why. Shards run it together and agree on each layer, since its sums are everyone's.
Each replacement is compared with its original on random input before the original is dropped, one
module at a time, so that memory grows by one module at most. The ops themselves are fused_cpu.py's.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer
from torch import nn

from ds_serve.attention.backends import Backend
from ds_serve.attention.builder import load_ops
from ds_serve.attention.context import AttentionBatch, use_batch
from ds_serve.attention.interface import NAME, NAME_WITHOUT_MASK
from ds_serve.attention.layout import KVLayout, LayerKV
from ds_serve.model.fused_cpu import FusedDecoderLayer, FusedRMSNorm, LayerList, PackedEmbedding, PackedLinear
from ds_serve.model.report import InjectionReport
from ds_serve.model.sharding import ShardedHead
from ds_serve.model.stage import Elsewhere

Reduce = Callable[[torch.Tensor], torch.Tensor]  # sums over the tensor shards, in place
Swap = Callable[[], float]  # its error, or raises _Mismatch

# transformers.models.<family>.modeling_<family>.<Prefix>DecoderLayer and so on
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}

# Largest accepted ||fused - original|| / ||original - input||, norms over the probe's tokens. Sums in
# another order flip last bits of bf16 (2^-9): what is seen is 0.002 to 0.006; a wrong weight gives over 0.05.
MAX_RELATIVE_ERROR = 0.02

_PROBE_LENGTHS = (3, 14)  # two sequences; with 17 tokens a product has more than one tile of rows


class _Mismatch(Exception):
    """A module is not exactly what a fused one replaces; the message is the reason reported."""


@torch.no_grad()
def inject(
    model: nn.Module,
    backend: Backend,
    mode: Literal["auto", "off"] = "auto",
    reduce: Reduce | None = None,
) -> InjectionReport:
    """Replaces in place what modules of model (or of the DeepSpeed engine around it) it can.

    Attention must be installed already, with the same backend. reduce sums over the tensor shards in place;
    None: model is whole. ValueError for another mode; a module whose replacement computes something else is
    kept, with a RuntimeWarning.
    """
    if mode not in ("auto", "off"):
        raise ValueError(f"mode: must be 'auto' or 'off', got {mode!r}")
    model = getattr(model, "module", model)
    report = InjectionReport()
    sites = list(_sites(model, backend, reduce))
    reason = "mode is off" if mode == "off" else _unavailable(model)
    if reason is None and not sites:
        reason = f"{type(model).__name__} is of no known family"
    reason = agreed(reason, reduce)
    if reason is not None:
        names = [name for name, _ in sites] or [f"layer {index}" for _, index in _decoder_layers(model)]
        report.keep(reason, *names)
        return report
    for name, swap in sites:
        try:
            report.fuse(name, swap())
        except _Mismatch as mismatch:
            report.keep(str(mismatch), name)
    if any(isinstance(layer, FusedDecoderLayer) for layer in model.base_model.layers):
        _shorten_loop(model)
    return report


def _shorten_loop(model: nn.Module) -> None:
    """Links neighbours, and spares the model's own loop over the layers what they do not need."""
    base, head = model.base_model, model.get_output_embeddings()
    head = head.linear if isinstance(head, ShardedHead) else head
    for layer, following in zip(base.layers, [*base.layers, head][1:], strict=True):
        if isinstance(layer, FusedDecoderLayer) and isinstance(following, FusedDecoderLayer | PackedLinear):
            layer.precede(following)
    if isinstance(base.layers[-1], FusedDecoderLayer):
        base.layers[-1].is_last = True
    base.layers = LayerList(base.layers)


def _unavailable(model: nn.Module) -> str | None:
    tensors = Counter((p.device.type, p.dtype) for p in model.parameters())
    if not tensors:
        return "the model has no parameters"
    (device, dtype), _ = tensors.most_common(1)[0]
    if device != "cpu" or dtype != torch.bfloat16:
        return f"the model is {dtype} on {device}, fused kernels are bfloat16 on CPU"
    if load_ops() is None:
        return "the C++ ops could not be built"
    if not torch.ops.ds_serve.has_avx512_bf16():
        return "the CPU has no AVX512-BF16"
    return None


def _family(model: nn.Module) -> tuple[str, str] | None:
    """(module path, class prefix) of a known causal language model, else None."""
    for name, prefix in FAMILIES.items():
        path = f"transformers.models.{name}.modeling_{name}"
        if any(c.__module__ == path and c.__name__ == f"{prefix}ForCausalLM" for c in type(model).__mro__):
            return path, prefix
    return None


def _decoder_layers(model: nn.Module) -> Iterator[tuple[nn.ModuleList, int]]:
    layers = getattr(getattr(model, "base_model", None), "layers", None)
    if isinstance(layers, nn.ModuleList):
        for index, layer in enumerate(layers):
            if not isinstance(layer, Elsewhere):
                yield layers, index


def _sites(model: nn.Module, backend: Backend, reduce: Reduce | None) -> Iterator[tuple[str, Swap]]:
    """A name and a call for each module of a known model that may be replaced."""
    family = _family(model)
    if family is None:
        return
    for layers, index in _decoder_layers(model):
        yield f"layer {index}", functools.partial(_swap_layer, model, family, layers, index, backend, reduce)
    if not isinstance(getattr(model.base_model, "norm", None), Elsewhere | None):
        yield "norm", lambda: _swap_norm(model, family)
    if not isinstance(model.get_output_embeddings(), Elsewhere | None):
        yield "head", lambda: _swap_head(model)


# ---- one kind of module each ----


def _swap_layer(
    model: nn.Module,
    family: tuple[str, str],
    layers: nn.ModuleList,
    index: int,
    backend: Backend,
    reduce: Reduce | None,
) -> float:
    layer = layers[index]
    with _together(reduce):
        _check_layer(layer, family, sharded=reduce is not None)
    attention = layer.self_attn
    window = getattr(attention, "sliding_window", None)
    if family[1] == "Mistral":
        window = getattr(attention.config, "sliding_window", None)
    fused = FusedDecoderLayer(layer, backend, window, reduce).eval()
    x, positions, batch = _probe_input(attention, model.config.hidden_size)
    rotary = model.base_model.rotary_emb(x, positions)
    run = {
        "attention_mask": None,
        "position_ids": positions,
        "use_cache": False,
        "position_embeddings": rotary,
    }
    with use_batch(batch):
        wanted, got = layer(x, **run), fused(x, **run)
    with _together(reduce):
        error = _accept(f"{type(layer).__name__} {attention.layer_idx}", got - x, wanted - x)
    layers[index] = fused
    return error


def _swap_norm(model: nn.Module, family: tuple[str, str]) -> float:
    norm = model.base_model.norm
    _check_norm(norm, family)
    fused = FusedRMSNorm(norm)
    x = _random(17, norm.weight.shape[0])
    error = _accept("final norm", fused(x), norm(x))
    model.base_model.norm = fused
    return error


def _swap_head(model: nn.Module) -> float:
    """The head, and an embedding tied to it, which then reads the head's packed rows: no second copy."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, ShardedHead):  # a tied embedding stays as it is: all rows are needed there
        head.linear, error = _packed(head.linear)
        return error
    tied = getattr(embedding, "weight", None) is head.weight
    if tied and type(embedding) is not nn.Embedding:
        raise _Mismatch(f"head tied to {type(embedding).__name__}")
    if tied and embedding.max_norm is not None:
        raise _Mismatch("embedding with max_norm")
    if tied:
        _check_hooks(embedding)
    packed, error = _packed(head)
    if tied:
        fused = PackedEmbedding(packed)
        ids = torch.linspace(0, head.out_features - 1, 67).long()
        _accept("tied embedding", fused(ids), embedding(ids))
        model.set_input_embeddings(fused)
    model.set_output_embeddings(packed)
    return error


def _packed(head: nn.Module) -> tuple[PackedLinear, float]:
    _check_linear(head)
    packed = PackedLinear(head)
    x = _random(17, head.in_features)
    return packed, _accept("head", packed(x), head(x))


# ---- what all shards do, all do ----


def agreed(reason: str | None, reduce: Reduce | None) -> str | None:
    """This shard's reason to leave a module alone, or another shard's, so that all take the same way."""
    if reduce is None:
        return reason
    device = get_accelerator().current_device_name()
    num_reasons = reduce(torch.tensor([float(reason is not None)], device=device)).item()
    return reason or "another tensor shard keeps it" if num_reasons else None


@contextlib.contextmanager
def _together(reduce: Reduce | None) -> Iterator[None]:
    """A _Mismatch that one shard raises inside is raised by all of them."""
    reason = None
    try:
        yield
    except _Mismatch as mismatch:
        reason = str(mismatch)
    reason = agreed(reason, reduce)
    if reason is not None:
        raise _Mismatch(reason)


# ---- is it exactly what the fused module replaces? ----


def _check_layer(layer: nn.Module, family: tuple[str, str], sharded: bool) -> None:
    path, prefix = family
    _check_class(layer, path, f"{prefix}DecoderLayer")
    _check_class(layer.self_attn, path, f"{prefix}Attention")
    _check_class(layer.mlp, path, f"{prefix}MLP")
    known = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    known |= {f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
    known |= {f"mlp.{n}" for n in ("gate_proj", "up_proj", "down_proj", "act_fn")}
    for name, module in layer.named_modules():
        _check_hooks(module)
        if name and name not in known and any(True for _ in module.parameters()):
            raise _Mismatch(f"unknown submodule {name}")
        if isinstance(module, nn.Linear) or name.endswith("_proj"):
            wanted = nn.Linear
            if sharded:
                wanted = LinearAllreduce if name.endswith(("o_proj", "down_proj")) else LinearLayer
            _check_linear(module, wanted)
        elif name.endswith("norm"):
            _check_norm(module, family)
    if layer.training:
        raise _Mismatch("in training mode")
    _check_attention(layer.self_attn)
    _check_mlp(layer.mlp)


def _check_attention(attention: nn.Module) -> None:
    if attention.config._attn_implementation not in (NAME, NAME_WITHOUT_MASK):
        raise _Mismatch(f"attention is {attention.config._attn_implementation!r}, not {NAME!r}")
    d, hidden = attention.head_dim, attention.q_proj.weight.shape[1]
    q, k, v = (len(getattr(attention, n).weight) for n in ("q_proj", "k_proj", "v_proj"))
    if d % 32 or hidden % 2:
        raise _Mismatch(f"head_dim {d} is not a multiple of 32 or hidden size {hidden} is odd")
    heads, kv_heads = q // d, k // d
    whole = q == heads * d == attention.o_proj.weight.shape[1] and k == kv_heads * d == v
    if not whole or kv_heads == 0 or heads % kv_heads:
        raise _Mismatch(f"attention of {q} q, {k} k and {v} v columns")


def _check_mlp(mlp: nn.Module) -> None:
    if type(mlp.act_fn).__name__ not in ("SiLUActivation", "SiLU"):
        raise _Mismatch(f"activation {type(mlp.act_fn).__name__}")
    inner, gate, up = mlp.down_proj.weight.shape[1], len(mlp.gate_proj.weight), len(mlp.up_proj.weight)
    if not inner == gate == up:
        raise _Mismatch(f"MLP of {gate} gate, {up} up and {inner} down columns")


def _check_class(module: nn.Module, path: str, name: str) -> None:
    found = type(module)
    if (found.__module__, found.__name__) != (path, name):
        raise _Mismatch(f"unknown class {found.__name__}")


def _check_linear(module: nn.Module, wanted: type[nn.Module] = nn.Linear) -> None:
    if type(module) is not wanted or getattr(module, "gather_output", False):
        raise _Mismatch(f"linear of class {type(module).__name__}")
    _check_hooks(module)
    _check_tensors(module)


def _check_norm(module: nn.Module, family: tuple[str, str]) -> None:
    _check_class(module, family[0], f"{family[1]}RMSNorm")
    _check_hooks(module)
    _check_tensors(module)


def _check_tensors(module: nn.Module) -> None:
    for p in module.parameters():
        if type(p) is not nn.Parameter:  # torchao's quantised tensors call themselves bfloat16
            raise _Mismatch(f"weight of class {type(p).__name__}")
        if p.dtype != torch.bfloat16 or p.device.type != "cpu":
            raise _Mismatch(f"{p.dtype} on {p.device.type}")


def _check_hooks(module: nn.Module) -> None:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        raise _Mismatch(f"{type(module).__name__} has hooks")


# ---- the comparison ----


def _random(*shape: int) -> torch.Tensor:
    """bf16 normal numbers, the same at every call and rank, small so that a residual hides no error."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=generator) / 64).bfloat16()


def _probe_input(attention: nn.Module, hidden: int) -> tuple[torch.Tensor, torch.Tensor, AttentionBatch]:
    """Hidden states [1, T, hidden], positions [1, T] and a batch of two fresh sequences, a block each."""
    kv_heads = len(attention.k_proj.weight) // attention.head_dim
    kv = LayerKV(kv_heads, attention.head_dim, attention.head_dim)
    layout = KVLayout((kv,), first_layer=attention.layer_idx)
    slots = torch.cat([torch.arange(n) + i * layout.block_size for i, n in enumerate(_PROBE_LENGTHS)])
    positions = slots % layout.block_size
    ends = torch.tensor(_PROBE_LENGTHS, dtype=torch.int32)
    batch = AttentionBatch(
        slab=layout.allocate(len(_PROBE_LENGTHS), "cpu"),
        layout=layout,
        slot_mapping=slots,
        query_start=nn.functional.pad(ends.cumsum(0), (1, 0)).int(),
        context_len=ends,
        block_tables=torch.arange(len(_PROBE_LENGTHS), dtype=torch.int32)[:, None].contiguous(),
        positions=positions,
        num_tokens=len(slots),
    )
    return _random(1, len(slots), hidden), positions[None], batch


def _accept(what: str, got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative error of got, or _Mismatch with a warning if it is above MAX_RELATIVE_ERROR."""
    error = float((got.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-30))
    if not error <= MAX_RELATIVE_ERROR:  # not a number is refused too
        warnings.warn(
            f"{what}: the fused module's relative error is {error:.3g}, above {MAX_RELATIVE_ERROR}; "
            "the original stays",
            RuntimeWarning,
            stacklevel=3,
        )
        raise _Mismatch("result differs from the original's")
    return error
