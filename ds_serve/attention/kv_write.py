"""Writes a step's keys and values of one layer into the slab: one Triton kernel, or two index_puts.

The kernel takes k and v with the strides that the model gives them, one program a token, and waits for
nothing. It runs on CUDA where triton is installed (torch brings it there). Knows no batch and no layout:
it is given the layer's regions as views. Used by flashinfer.py.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without it
    triton = None


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """k [T,Hk,Dk] and v [T,Hk,Dv], any strides but the last, into keys [blocks, block_size, Hk, Dk] and
    values [blocks, block_size, Hk, Dv], whose blocks are contiguous, all of one dtype; token t goes to
    slot_mapping[t] (int64: block * block_size + offset)."""
    if triton is None or not k.is_cuda:
        write_plain(k, v, keys, values, slot_mapping)
    else:
        launch(k, v, keys, values, slot_mapping)


def write_plain(
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """write_kv in PyTorch."""
    block, offset = slot_mapping // keys.shape[1], slot_mapping % keys.shape[1]
    keys[block, offset] = k
    values[block, offset] = v


def launch(
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """write_kv by the kernel. triton must be there."""
    tokens, heads, k_dim = k.shape
    _write[(tokens,)](
        k,
        v,
        keys,
        values,
        slot_mapping,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        keys.stride(0),
        values.stride(0),
        BLOCK_SIZE=keys.shape[1],
        K_DIM=k_dim,
        V_DIM=v.shape[2],
        K_SIZE=heads * k_dim,
        V_SIZE=heads * v.shape[2],
        K_PADDED=triton.next_power_of_2(heads * k_dim),
        V_PADDED=triton.next_power_of_2(heads * v.shape[2]),
    )


if triton is not None:

    @triton.jit(do_not_specialize_on_alignment=["slots"])  # it begins anywhere in a step's integers
    def _write(
        k,
        v,
        keys,
        values,
        slots,
        k_token,
        k_head,
        v_token,
        v_head,
        k_block,
        v_block,
        BLOCK_SIZE: tl.constexpr,
        K_DIM: tl.constexpr,
        V_DIM: tl.constexpr,
        K_SIZE: tl.constexpr,
        V_SIZE: tl.constexpr,
        K_PADDED: tl.constexpr,
        V_PADDED: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64)
        slot = tl.load(slots + token)
        block, entry = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        i = tl.arange(0, K_PADDED)
        key = tl.load(k + token * k_token + i // K_DIM * k_head + i % K_DIM, mask=i < K_SIZE)
        tl.store(keys + block * k_block + entry * K_SIZE + i, key, mask=i < K_SIZE)
        j = tl.arange(0, V_PADDED)
        value = tl.load(v + token * v_token + j // V_DIM * v_head + j % V_DIM, mask=j < V_SIZE)
        tl.store(values + block * v_block + entry * V_SIZE + j, value, mask=j < V_SIZE)
