"""BLOOM, Falcon, GPT-J and MPT through ds_paged, although they do not call transformers' AttentionInterface.

adapt() replaces what attends in each of their layers by a call of interface.paged_attention; their weights,
their loops and everything else stay transformers' own. ALiBi becomes a table of biases by head and position
of the key, one for all layers, with the numbers of the model's own function: biases by distance differ from
these by a constant for each query, which softmax drops. Knows no block and no kernel. The loader calls
plain_attention() before it reads weights, and adapt() between plain_output() and install(); sharding.py calls
cut_biases().
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MethodType

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.bloom import modeling_bloom
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomPreTrainedModel
from transformers.models.falcon import modeling_falcon
from transformers.models.falcon.modeling_falcon import FalconAttention, FalconPreTrainedModel
from transformers.models.gptj.modeling_gptj import GPTJAttention, GPTJPreTrainedModel
from transformers.models.mpt import modeling_mpt
from transformers.models.mpt.modeling_mpt import MptAttention, MptPreTrainedModel

from ds_serve.attention.interface import UnsupportedModelError, mark_adapted, paged_attention
from ds_serve.model.repairs import Heads
from ds_serve.parallel.place import Place

_MODELS = (BloomPreTrainedModel, FalconPreTrainedModel, GPTJPreTrainedModel, MptPreTrainedModel)


def plain_attention(config: PreTrainedConfig) -> str:
    """The implementation of transformers that is right for config: eager, which all models have.

    But for Falcon with ALiBi: there transformers 5.23's eager attention adds the biases twice, its sdpa once.
    """
    return "sdpa" if config.model_type == "falcon" and config.alibi else "eager"


def adapt(model: PreTrainedModel, place: Place, longest: Callable[[], int]) -> None:
    """Makes a model of these families, or this rank's part of one, ready for install(). Leaves others alone.

    longest gives max_model_len, and is asked where there is ALiBi only: others may have no such length.
    UnsupportedModelError for an MPT whose configuration asks for what transformers does not compute.
    """
    if not isinstance(model, _MODELS):
        return
    bias = _own_bias(model, place, longest)
    for module in model.modules():
        if isinstance(module, BloomAttention | FalconAttention | MptAttention):
            module.ds_paged_bias = bias
            module.forward = MethodType(_forward_of(module), module)
        elif isinstance(module, GPTJAttention):
            module._attn = MethodType(_gptj, module)
    mark_adapted(model)


def _forward_of(module: nn.Module):
    if isinstance(module, BloomAttention):
        return _bloom
    return _falcon if isinstance(module, FalconAttention) else _mpt


# -- what attends in one layer: each in place of a method of transformers, with its arguments ----------------


def _bloom(
    self: BloomAttention,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    alibi: torch.Tensor,
    attention_mask: torch.Tensor,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    q, k, v = self._reshape(self.query_key_value(hidden_states))
    out, _ = paged_attention(
        self, q, k, v, None, scaling=self.inv_norm_factor, key_bias=self.ds_paged_bias, **kwargs
    )
    return residual + self.dense(out.flatten(2)), None


def _falcon(
    self: FalconAttention,
    hidden_states: torch.Tensor,
    alibi: torch.Tensor | None,
    attention_mask: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """In each of Falcon's layouts the fused weight goes by key-value heads: their queries, then k, then v."""
    grouped = self.new_decoder_architecture or self.multi_query
    kv_heads = self.num_kv_heads if grouped else self.num_heads
    fused = self.query_key_value(hidden_states).unflatten(2, (kv_heads, -1, self.head_dim))
    q, k, v = fused[..., :-2, :].flatten(2, 3), fused[..., -2, :], fused[..., -1, :]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if alibi is None:
        q, k = modeling_falcon.apply_rotary_pos_emb(q, k, *position_embeddings)
    out, _ = paged_attention(
        self, q, k, v, None, scaling=self.inv_norm_factor, key_bias=self.ds_paged_bias, **kwargs
    )
    return self.dense(out.flatten(2)), None


def _gptj(
    self: GPTJAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """Returns [1, H, T, D]: GPT-J turns it round itself."""
    out, _ = paged_attention(self, query, key, value, None, scaling=1 / self.scale_attn)
    return out.transpose(1, 2), None


def _mpt(
    self: MptAttention,
    hidden_states: torch.Tensor,
    position_bias: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    fused = self.Wqkv(hidden_states)
    if self.clip_qkv:
        fused = fused.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    q, k, v = (x.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for x in fused.chunk(3, dim=2))
    out, _ = paged_attention(
        self, q, k, v, None, scaling=self.softmax_scale, key_bias=self.ds_paged_bias, **kwargs
    )
    return self.out_proj(out.flatten(2)), None


# -- ALiBi ---------------------------------------------------------------------------------------------------


def _own_bias(model: PreTrainedModel, place: Place, longest: Callable[[], int]) -> torch.Tensor | None:
    """float32 [this rank's heads, longest() or more], None for a model with rotary embeddings.

    By the modules' functions: those of the same name in the models are DeepSpeed's once it has cut them.
    """
    config, device = model.config, model.device
    heads = config.num_attention_heads
    if isinstance(model, GPTJPreTrainedModel) or (
        isinstance(model, FalconPreTrainedModel) and not config.alibi
    ):
        return None
    if isinstance(model, MptPreTrainedModel):
        _check_mpt(config)
    length = -(-longest() // 64) * 64  # never fewer than the tokens of a probe
    everyone = torch.ones(1, length, dtype=torch.long, device=device)
    if isinstance(model, MptPreTrainedModel):
        # By distance from the last key: what two neighbours differ by is the slope, exactly.
        ends = modeling_mpt.build_mpt_alibi_tensor(heads, 2, device=device)[:, 0]
        table = (ends[:, 1:] - ends[:, :1]) * torch.arange(length, device=device)
    elif isinstance(model, BloomPreTrainedModel):
        table = modeling_bloom.build_alibi_tensor(everyone, heads, model.dtype)[:, 0]
    else:
        table = modeling_falcon.build_alibi_tensor(everyone, heads, model.dtype)[:, 0]
        table = table / math.sqrt(config.head_dim)
    return table.float()[Heads.of(config, place).own_query].contiguous()


def cut_biases(layer: nn.Module, heads: Heads) -> None:
    """Tells a layer that is cut into shards, and not adapted yet, which biases of all heads' are its own."""

    def own(value):
        """Biases [H, 1, T], or with a dimension of 1 before them: [1, H, 1 or T, T]."""
        if not isinstance(value, torch.Tensor) or value.dim() < 3:
            return value
        dim = value.dim() - 3
        return value[(slice(None),) * dim + (heads.own_query,)] if value.shape[dim] == heads.query else value

    def give(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        biased = {name: own(kwargs[name]) for name in _BIASES & kwargs.keys()}
        return args, kwargs | biased

    for module in layer.modules():
        if isinstance(module, BloomAttention | FalconAttention | MptAttention):
            module.register_forward_pre_hook(give, with_kwargs=True)


_BIASES = {"alibi", "position_bias", "attention_mask"}  # Falcon's mask holds biases
_MPT_COMPUTED = {
    "alibi": True, "alibi_bias_max": 8, "attn_type": "multihead_attention", "prefix_lm": False,
    "qk_ln": False, "attn_uses_sequence_id": False, "logit_scale": None, "no_bias": True,
}  # fmt: skip


def _check_mpt(config: PreTrainedConfig) -> None:
    """transformers reads these fields of an MPT's configuration, and computes as if they were like this."""
    for name, computed in _MPT_COMPUTED.items():
        asked = getattr(config.attn_config, name, getattr(config, name, computed))
        if asked != computed:
            raise UnsupportedModelError(
                f"MPT with {name}={asked!r}: transformers computes {name}={computed!r} whatever the "
                "configuration says, so its answers would not be this model's"
            )
