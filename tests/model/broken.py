"""Served models that are wrong in one layer, whose checkpoint is right: what `check` must find.

break_where_asked() makes this process load models as their config.json's `spoil` says, [how, layer]; their
original is not read that way, so it stays right.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ds_serve.model import fused_cpu, injection, loader
from ds_serve.model.stage import Elsewhere, stack_name


def break_where_asked(monkeypatch=None) -> None:
    """For good, or as long as monkeypatch says."""
    put = setattr if monkeypatch is None else monkeypatch.setattr
    put(injection, "MAX_RELATIVE_ERROR", math.inf)  # as if nobody had compared
    shard, take_mlp = loader.shard, fused_cpu.FusedDecoderLayer._take_mlp

    def shard_and_spoil(module, grid):
        how, index = getattr(module.config, "spoil", ("", 0))
        module = shard(module, grid)
        layer = module.get_submodule(stack_name(module))[index]
        if how in SPOIL and not isinstance(layer, Elsewhere):
            SPOIL[how](layer, grid.place)
        return module

    def take_mlp_and_spoil(self, ffn, norm):
        if getattr(self.config, "spoil", None) == ["fused gate and up", self.layer_idx]:
            ffn.gate_proj, ffn.up_proj = ffn.up_proj, ffn.gate_proj
        if getattr(self.config, "spoil", None) == ["fused norm", self.layer_idx]:
            norm.weight = nn.Parameter(norm.weight.roll(1), requires_grad=False)
        take_mlp(self, ffn, norm)

    put(loader, "shard", shard_and_spoil)
    put(fused_cpu.FusedDecoderLayer, "_take_mlp", take_mlp_and_spoil)


def _swap(tensor: torch.Tensor, first: slice | int, second: slice | int) -> None:
    with torch.no_grad():
        tensor[first], tensor[second] = tensor[second].clone(), tensor[first].clone()


def _swap_heads(layer: nn.Module, place) -> None:
    """Two query heads of different key-value heads, on one shard."""
    if place.shard == 0:
        attention = layer.self_attn
        d, rows = attention.head_dim, len(attention.q_proj.weight)
        _swap(attention.q_proj.weight, slice(0, d), slice(rows - d, rows))


def _swap_experts(layer: nn.Module, place) -> None:
    for weight in layer.mlp.experts.parameters():
        _swap(weight, 0, 1)


def _not_a_number(layer: nn.Module, place) -> None:
    with torch.no_grad():
        layer.mlp.up_proj.weight[0, 0] = math.nan


SPOIL = {"heads": _swap_heads, "experts": _swap_experts, "nan": _not_a_number}
