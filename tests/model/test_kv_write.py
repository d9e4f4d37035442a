"""The write of keys and values: the Triton kernel, by Triton's interpreter, against PyTorch's index_put."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from ds_serve.attention import kv_write
from ds_serve.attention.context import AttentionBatch
from ds_serve.attention.layout import KVLayout, LayerKV
from ds_serve.attention.reference import region

# tokens, KV heads, dims of keys and values, dtype
CASES = [
    (1, 2, 64, 64, torch.bfloat16),
    (7, 3, 24, 24, torch.float32),
    (5, 2, 16, 8, torch.float16),
    (9, 1, 128, 128, torch.bfloat16),
]


def problem(tokens: int, heads: int, k_dim: int, v_dim: int, dtype: torch.dtype, device: str = "cpu"):
    """k and v as views of larger memory, the regions of layer 1 of 2, and slots in any order."""
    generator = torch.Generator().manual_seed(tokens)
    layout = KVLayout((LayerKV(heads, k_dim, v_dim),) * 2, 4, dtype)
    num_blocks = 6 + tokens // 4
    slab = torch.randn(num_blocks, layout.block_elems, generator=generator).to(device, dtype)
    batch = AttentionBatch(slab, layout, *[torch.empty(0)] * 5, num_tokens=0)
    keys = region(batch, layout.k_offset(1), heads, k_dim)
    values = region(batch, layout.v_offset(1), heads, v_dim)
    k = torch.randn(heads, tokens, k_dim, generator=generator).to(device, dtype).transpose(0, 1)
    v = torch.randn(tokens, heads, 2 * v_dim, generator=generator).to(device, dtype)[..., :v_dim]
    return k, v, slab, keys, values, torch.randperm(4 * num_blocks, generator=generator)[:tokens].to(device)


def compare(cases: list = CASES, device: str = "cpu") -> None:
    """The whole slab is bit for bit what index_put makes of it. On a CPU it needs TRITON_INTERPRET=1."""
    for case in cases:
        k, v, slab, keys, values, slots = problem(*case, device)
        before = slab.clone()
        kv_write.write_plain(k, v, keys, values, slots)
        wanted = slab.clone()
        assert not torch.equal(wanted, before)
        slab.copy_(before)
        kv_write.launch(k, v, keys, values, slots)
        assert torch.equal(slab, wanted), case


def test_plain_write_puts_each_token_at_its_slot():
    k, v, _, keys, values, slots = problem(*CASES[1])
    kv_write.write_kv(k, v, keys, values, slots)
    for token, slot in enumerate(slots.tolist()):
        assert torch.equal(keys[slot // 4, slot % 4], k[token])
        assert torch.equal(values[slot // 4, slot % 4], v[token])


def test_kernel_writes_the_same_bits():
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, __file__], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


if __name__ == "__main__":
    compare()
    print("ok")
