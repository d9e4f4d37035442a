"""Heads made to fit tensor shards: key-value heads copied, query heads filled up. What is computed stays.

Knows an attention's linears by their names, and no process group. Called by repairs.py, before the cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from ds_serve.model.repairs import Heads

KV_FIELDS = ("num_key_value_heads", "num_kv_heads")  # in a configuration, and in an attention


def copy_kv_heads(attention: nn.Module, heads: Heads) -> None:
    """Fewer key-value heads than shards: each is copied, so that every shard has one beside its queries."""
    kv = heads.kv // heads.kv_copies

    def copies(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().unflatten(0, (kv, -1)).repeat_interleave(heads.kv_copies, 0).flatten(0, 1)

    def grouped(tensor: torch.Tensor) -> torch.Tensor:
        groups = tensor.detach().unflatten(0, (kv, heads.query // kv + 2, -1))
        queries = groups[:, :-2].unflatten(1, (heads.kv_copies, -1))
        ends = groups[:, None, -2:].expand(-1, heads.kv_copies, *groups[:, -2:].shape[1:])
        return torch.cat([queries, ends], 2).flatten(0, 3)

    def fused(tensor: torch.Tensor) -> torch.Tensor:
        size = len(tensor) // (heads.query + 2 * kv)
        q, k, v = tensor.detach().split([heads.query * size, kv * size, kv * size])
        return torch.cat([q, copies(k), copies(v)])

    for name in ("k_proj", "v_proj", "qkv_proj", "Wqkv", "c_attn", "query_key_value"):
        linear = getattr(attention, name, None)
        if linear is not None:
            in_one = grouped if heads.interleaved else fused
            each_parameter(linear, copies if name in ("k_proj", "v_proj") else in_one)
            linear.out_features = len(linear.weight)
    for name in KV_FIELDS:
        if hasattr(attention, name):
            setattr(attention, name, heads.kv)
    attention.num_key_value_groups = heads.query // heads.kv


def fill_query_heads(attention: nn.Module, heads: Heads) -> None:
    """Falcon 7B has 71 query heads: further ones, of zeros, make a number that shards can divide."""
    more = heads.query - attention.num_heads
    width = more * attention.head_dim

    def queries(tensor: torch.Tensor) -> torch.Tensor:
        q, kv = tensor.detach().split([len(tensor) - 2 * attention.head_dim, 2 * attention.head_dim])
        return torch.cat([q, q.new_zeros(width, *q.shape[1:]), kv])

    each_parameter(attention.query_key_value, queries)
    weight = F.pad(attention.dense.weight.detach(), (0, width))
    attention.dense.weight = nn.Parameter(weight, requires_grad=False)
    attention.dense.in_features += width
    attention.num_heads = heads.query


def each_parameter(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Makes of each of module's own parameters what change gives."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(change(parameter), requires_grad=False))
