"""Paged attention by our C++ op, for bf16 and fp32 on CPUs. See csrc/paged_attention.cpp.

Inside a region lie, for each KV head and each 16 tokens, 64-byte lines of 16 32-bit words, so that a
word is one fp32 or two bf16 that AVX512-BF16 multiplies at once:
  bf16: K as [Dk/2][16 tokens][2], V as [16/2 token pairs][Dv][2];  fp32: K as [Dk][16], V as [16][Dv].
Where values are columns of the keys there are K lines only, of which the op makes V lines as it goes, once
for all heads that share them. Only the op reads and writes it.
"""

from __future__ import annotations

import torch

from ds_serve.attention.builder import load_ops
from ds_serve.attention.context import AttentionBatch

_DTYPES = (torch.bfloat16, torch.float32)


def unavailable_reason(device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
    """None if the op can run, else a sentence. Compiles the op if this process has not loaded it."""
    if device.type != "cpu":
        return f"it computes on CPUs, and the device is {device}"
    if dtype not in _DTYPES:
        return f"it computes in bfloat16 and float32, and the dtype is {dtype}"
    if block_size % 16:
        return f"block_size must be a multiple of 16, and is {block_size}"
    if load_ops() is None:
        return "its C++ op could not be built (see the warning above)"
    return None


class CpuBackend:
    """See backends.Backend for the contract. bf16 needs an even k_dim."""

    name = "cpu"
    captures = False
    reads_tables = True

    def prepare(self, batch: AttentionBatch) -> None:
        """There is nothing to plan."""

    def forward(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor | None,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None = None,
        chunk: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        key_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        layout = batch.layout
        slot_mapping, block_tables = batch.tables(layer)
        return torch.ops.ds_serve.paged_attention(
            q,
            k,
            k[..., : layout.layers[layer].v_dim] if v is None else v,
            batch.slab,
            layout.k_offset(layer),
            layout.v_offset(layer),
            layout.block_size,
            slot_mapping,
            batch.query_start,
            batch.context_len,
            block_tables,
            scale,
            window or 0,
            chunk or 0,
            softcap or 0.0,
            sinks,
            key_bias,
        )
