"""What Llama-like bf16 modules of transformers compute, on CPU with packed weights and fused ops.

A weight is packed once (csrc/gemm_bf16.h says how) and the packed form is the only one kept. A decoder
layer is four ops: norm + QKV + RoPE, the backend's paged attention, output projection + residual, norm +
SwiGLU + residual. `reduce`, where given, is called on the two projections' outputs in place before their
residual is added: the all-reduce of a tensor-parallel shard. This module does not decide which modules to
replace and does not check results: injection.py, its only caller, does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ds_serve.attention import interface
from ds_serve.attention.backends import Backend
from ds_serve.attention.context import current_batch

OPS = torch.ops.ds_serve


def pack(weight: torch.Tensor) -> nn.Parameter:
    """bf16 [N, K] -> packed [ceil(N/32), ceil(K/2), 32, 2], zeros where N or K fill up."""
    return nn.Parameter(OPS.pack_weight(weight.detach().contiguous()), requires_grad=False)


def unpack(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The inverse of pack: a new tensor [n, k]."""
    return packed.detach().permute(0, 2, 1, 3).reshape(packed.shape[0] * 32, -1)[:n, :k].contiguous()


def interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Rows (or elements) of gate and up, 16 of one and 16 of the other in turn: what the mlp op wants.

    Both are filled up with zeros to a multiple of 16, whose SiLU(0) * 0 adds nothing.
    """
    tail, fill = gate.shape[1:], gate.new_zeros(-len(gate) % 16, *gate.shape[1:])
    tiles = [torch.cat([part, fill]).reshape(-1, 16, *tail) for part in (gate, up)]
    return torch.stack(tiles, dim=1).reshape(-1, *tail)


def _bias(*linears: nn.Linear) -> torch.Tensor | None:
    """The linears' biases in one vector, zeros where one has none; None if none has."""
    if all(linear.bias is None for linear in linears):
        return None
    parts = [
        linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
        for linear in linears
    ]
    return torch.cat([part.detach() for part in parts])


class FusedRMSNorm(nn.Module):
    """RMSNorm over the last dimension, rounded as transformers' bf16 RMSNorm is."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach(), requires_grad=False)
        self.variance_epsilon = norm.variance_epsilon

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return OPS.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class PackedLinear(nn.Module):
    """y = x W^T + b with W packed. x bf16 [..., K] -> [..., N]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = pack(linear.weight)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        """A plain copy [N, K], made at each reading."""
        return unpack(self.packed, self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return OPS.linear_packed(x, self.packed, self.out_features, self.bias)


class PackedEmbedding(nn.Module):
    """An embedding that reads its rows from a tied head's packed weight, which it shares."""

    def __init__(self, head: PackedLinear) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = head.out_features, head.in_features
        self.packed = head.packed

    @property
    def weight(self) -> torch.Tensor:
        """A plain copy [N, K], made at each reading."""
        return unpack(self.packed, self.num_embeddings, self.embedding_dim)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return OPS.embedding_packed(input_ids, self.packed, self.num_embeddings, self.embedding_dim)


class LayerList(nn.ModuleList):
    """A ModuleList whose slice of everything is itself: the model's loop takes one at each step, and a new
    ModuleList of thirty layers costs as much as several of their ops in a decode step."""

    def __getitem__(self, index):
        if isinstance(index, slice) and index.indices(len(self)) == (0, len(self), 1):
            return self
        return super().__getitem__(index)


class FusedDecoderLayer(nn.Module):
    """A Llama, Mistral, Qwen2 or Qwen3 decoder layer in four ops.

    Takes over layer's norms and packs its projections; layer itself is not kept. window is the layer's
    sliding window or None. Called as the layer was, with hidden_states [1, T, hidden] inside use_batch.
    """

    def __init__(
        self,
        layer: nn.Module,
        backend: Backend,
        window: int | None,
        reduce: Callable[[torch.Tensor], Any] | None = None,
    ) -> None:
        super().__init__()
        attention, ffn = layer.self_attn, layer.mlp
        self.layer_idx = attention.layer_idx
        self.ds_paged_backend = backend  # install() sets it again on all modules with a layer_idx
        self.config = attention.config
        self.is_causal = True
        self.scaling, self.window, self.reduce = float(attention.scaling), window, reduce
        if hasattr(layer, "attention_type"):  # the model's loop reads it in older transformers
            self.attention_type = layer.attention_type
        self._next: tuple[torch.Tensor | None] = (None,)
        self.is_last = False  # set by injection.py: then only sampled tokens go on after attention
        self._take_attention(attention, layer.input_layernorm)
        self._take_mlp(ffn, layer.post_attention_layernorm)

    def precede(self, following: FusedDecoderLayer | PackedLinear) -> None:
        """Says what runs after this layer, so that its first weights are fetched at this layer's end."""
        self._next = (following.packed if isinstance(following, PackedLinear) else following._in[2],)

    def _keep(self, name: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Registers tensor as a parameter, so that the model's bytes are still counted, and returns it."""
        parameter = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
        self.register_parameter(name, parameter)
        return parameter

    # The argument tuples below hold the registered parameters themselves: nn.Module's attribute lookup is
    # slow enough to show in a decode step of thirty layers.
    def _take_attention(self, attention: nn.Module, norm: nn.Module) -> None:
        q, k, v, o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        d = attention.head_dim
        self._in = (
            self._keep("input_norm", norm.weight),
            norm.variance_epsilon,
            self._keep("qkv", pack(torch.cat([q.weight.detach(), k.weight.detach(), v.weight.detach()]))),
            self._keep("qkv_bias", _bias(q, k, v)),
            *(
                self._keep(name, attention.get_submodule(name).weight if hasattr(attention, name) else None)
                for name in ("q_norm", "k_norm")
            ),
        )
        self._heads = (len(q.weight) // d, len(k.weight) // d, d)
        self._out = (self._keep("o", pack(o.weight)), len(o.weight))
        self._out_bias = self._keep("o_bias", o.bias)

    def _take_mlp(self, ffn: nn.Module, norm: nn.Module) -> None:
        gate, up, down = ffn.gate_proj, ffn.up_proj, ffn.down_proj
        bias, inner = _bias(gate, up), down.weight.shape[1]
        if bias is not None:
            bias = interleave(*bias.chunk(2))
        self._mlp = (
            self._keep("mlp_norm", norm.weight),
            norm.variance_epsilon,
            self._keep("gate_up", pack(interleave(gate.weight.detach(), up.weight.detach()))),
            self._keep("gate_up_bias", bias),
            self._keep("down", pack(nn.functional.pad(down.weight.detach(), (0, -inner % 16)))),
        )
        self._down_bias = self._keep("down_bias", down.bias)
        self._inner = inner + -inner % 16

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if past_key_values is not None or use_cache:
            raise ValueError("use_cache: must be False, KV lies in the attention batch's slab")
        x = hidden_states
        q, k, v = OPS.attention_in(x, *self._in, *position_embeddings, *self._heads, self._out[0])
        attended = self._attend(q, k, v)
        batch = current_batch.get()
        rows = batch.sampled if self.is_last and batch is not None else None
        if rows is None or len(rows) == x.shape[1]:
            return self._second_part(attended, x)
        return x.index_copy(1, rows, self._second_part(attended[rows], x[:, rows]))

    def _second_part(self, attended: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """From attention's output [T, H, D] and the residual [1, T, hidden] to the layer's output."""
        if self.reduce is not None:
            return self._sharded(attended, x)
        x = OPS.projection(attended, *self._out, self._out_bias, x, self._mlp[2])
        return OPS.mlp(x, *self._mlp, self._down_bias, self._inner, True, *self._next)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v [T, heads, D] -> [T, H, D]."""
        batch = current_batch.get()
        if batch is None:  # a dry forward that only records shapes, or an error that the interface reports
            parts = (t.transpose(0, 1)[None] for t in (q, k, v))
            out, _ = interface.paged_attention(
                self, *parts, None, scaling=self.scaling, sliding_window=self.window
            )
            return out[0]
        batch.num_calls += 1
        layer = self.layer_idx - batch.layout.first_layer
        return self.ds_paged_backend.forward(layer, q, k, v, batch, scale=self.scaling, window=self.window)

    def _sharded(self, attended: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The layer's second part on one of several shards: biases and residuals once, after the sum."""
        if not len(attended):  # no token is sampled, and the other shards send nothing either
            return x
        for project, bias in ((self._attention_part, self._out_bias), (self._mlp_part, self._down_bias)):
            part = project(attended, x)
            self.reduce(part)
            x = x + (part if bias is None else part + bias).view_as(x)
        return x

    def _attention_part(self, attended: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return OPS.projection(attended, *self._out, None, None, self._mlp[2])

    def _mlp_part(self, attended: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return OPS.mlp(x, *self._mlp, None, self._inner, False, *self._next)
