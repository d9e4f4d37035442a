"""Multi-head latent attention: the cache holds each token's latent instead of its keys and values.

DeepSeek-V2, -V3 and their kin compute a head's key [nope | rope] and value from one latent of r numbers:
k = W_UK c, v = W_UV c, and all heads share the rope part. Since q . (W_UK c) = (W_UK^T q) . c, and the sum of
p W_UV c is W_UV times the sum of p c, attention can stay with c: it has one key head [c | rope] whose first r
columns are its values. The model's own forward stays: only its kv_b_proj is replaced, by a LatentProjection,
which interface.paged_attention asks for the latent. Knows no block and no kernel. Called by interface.py and
by the loader.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from deepspeed.module_inject.layers import LinearLayer
from torch import nn

from ds_serve.attention.layout import LayerKV

_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


class LatentProjection(nn.Module):
    """In kv_b_proj's place, with its weight [H * (nope + v), r] of this shard's H heads in two parts.

    forward() keeps the step's latents for the attention call that follows, and gives the model zeros as the
    key and value of a single head, to which it adds the rope part. w_uk is [H, nope, r], w_uv [H, r, v]: as
    the products want them (in bf16 W_UV as a view of the whole weight took a token ten times as long).
    """

    def __init__(self, linear: nn.Module, rank: int, nope: int, rope: int, v_dim: int) -> None:
        super().__init__()
        self.rank, self.nope, self.rope, self.v_dim = rank, nope, rope, v_dim
        heads = linear.weight.detach().unflatten(0, (-1, nope + v_dim))
        self.w_uk = nn.Parameter(heads[:, :nope].contiguous(), requires_grad=False)
        self.w_uv = nn.Parameter(heads[:, nope:].transpose(1, 2).contiguous(), requires_grad=False)
        self._latent: torch.Tensor | None = None

    @staticmethod
    def of(attention: nn.Module) -> LatentProjection | None:
        """The one in an attention module, if it has one."""
        projection = attention._modules.get("kv_b_proj")
        return projection if isinstance(projection, LatentProjection) else None

    @property
    def shape(self) -> LayerKV:
        """What the layer caches."""
        return LayerKV(1, self.rank + self.rope, self.rank, v_in_k=True)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """latent [..., r] -> zeros [..., nope + v], which take no memory."""
        self._latent = latent
        return latent.new_zeros(()).expand(*latent.shape[:-1], self.nope + self.v_dim)

    def absorb(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """query [1, H, T, nope + rope] and key [1, 1, T, nope + rope] -> both of r + rope columns.

        ValueError where the model's tensors are not made as this module thinks.
        """
        latent, self._latent = self._latent, None
        wide = self.nope + self.rope
        tokens = query.shape[2]
        wanted = (1, len(self.w_uk), tokens, wide), (1, 1, tokens, wide), tokens * self.rank
        found = tuple(query.shape), tuple(key.shape), 0 if latent is None else latent.numel()
        if found != wanted:
            raise ValueError(f"latent attention: query, key and latents are {found}, expected {wanted}")
        query = torch.cat([query[..., : self.nope] @ self.w_uk, query[..., self.nope :]], -1)
        return query, torch.cat([latent.reshape(1, 1, tokens, self.rank), key[..., self.nope :]], -1)

    def expand(self, attended: torch.Tensor) -> torch.Tensor:
        """The sums of latents [T, H, r] -> the sums of values [T, H, v]."""
        return (attended.transpose(0, 1) @ self.w_uv).transpose(0, 1)

    def to_linear(self) -> nn.Linear:
        """kv_b_proj, as it was."""
        weight = torch.cat([self.w_uk, self.w_uv.transpose(1, 2)], 1).flatten(0, 1)
        linear = nn.Linear(self.rank, len(weight), bias=False, device="meta").train(self.training)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear


def use_latents(model: nn.Module) -> int:
    """Makes each latent attention of model, sharded and not yet installed, keep latents; how many there are.

    A layer stays as it is where its kv_b_proj is no plain matrix product, or where this shard's keys and
    values are no larger than the latent.
    """
    found = 0
    for module in _attentions(model):
        sizes = [getattr(module, name) for name in _SIZES]
        if _is_plain(module.kv_b_proj, *sizes):
            projection = LatentProjection(module.kv_b_proj, *sizes)
            module.kv_b_proj = projection.train(module.training)
            found += 1
    return found


def drop_latents(model: nn.Module) -> None:
    """Undoes use_latents: keys and values are cached again."""
    for module in _attentions(model):
        if isinstance(module.kv_b_proj, LatentProjection):
            module.kv_b_proj = module.kv_b_proj.to_linear()


def _attentions(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if all(hasattr(module, name) for name in ("layer_idx", "kv_b_proj", *_SIZES)):
            yield module


def _is_plain(linear: nn.Module, rank: int, nope: int, rope: int, v_dim: int) -> bool:
    if type(linear) not in (nn.Linear, LinearLayer) or getattr(linear, "gather_output", False):
        return False
    if linear.bias is not None or not linear.weight.dtype.is_floating_point or linear._forward_hooks:
        return False
    rows, columns = linear.weight.shape
    heads, rest = divmod(rows, nope + v_dim)
    return columns == rank and not rest and heads * (nope + rope + v_dim) > rank + rope
