"""The reference backend against transformers' eager attention on dense masks, and the KV layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as eager
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as eager_with_sinks

from ds_serve.attention.context import AttentionBatch, get_batch, use_batch
from ds_serve.attention.layout import KVLayout, LayerKV
from ds_serve.attention.reference import ReferenceBackend


def dense_mask(length: int, window: int | None, chunk: int | None) -> torch.Tensor:
    """Additive [1,1,length,length], written out pair by pair."""
    mask = torch.full((length, length), float("-inf"))
    for i in range(length):
        for j in range(i + 1):
            if (window is None or i - j < window) and (chunk is None or i // chunk == j // chunk):
                mask[i, j] = 0.0
    return mask[None, None]


def single_row(layout: KVLayout, slab, table: list[int], begin: int, end: int) -> AttentionBatch:
    positions = torch.arange(begin, end)
    blocks = torch.tensor(table)
    size = layout.block_size
    return AttentionBatch(
        slab=slab,
        layout=layout,
        slot_mapping=blocks[positions // size] * size + positions % size,
        query_start=torch.tensor([0, end - begin], dtype=torch.int32),
        context_len=torch.tensor([end], dtype=torch.int32),
        block_tables=blocks[None].int(),
        positions=positions,
        num_tokens=end - begin,
    )


@given(
    length=st.integers(1, 40),
    cut=st.floats(0, 1),
    heads=st.sampled_from([(1, 1), (2, 1), (6, 2)]),
    dims=st.sampled_from([(8, 8), (24, 16), (5, 7)]),
    window=st.sampled_from([None, 1, 6]),
    chunk=st.sampled_from([None, 8]),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_reference_equals_eager(length, cut, heads, dims, window, chunk, softcap, sinks, biased, dtype, seed):
    """In two calls, the second reading what the first wrote, against one dense call."""
    generator = torch.Generator().manual_seed(seed)
    (num_heads, kv_heads), (k_dim, v_dim) = heads, dims

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    q, k = random(1, num_heads, length, k_dim), random(1, kv_heads, length, k_dim)
    v = random(1, kv_heads, length, v_dim)
    module = nn.Module().eval()
    module.num_key_value_groups = num_heads // kv_heads
    module.sinks = random(num_heads).float()
    key_bias = random(num_heads, 40).float() if biased else None
    if sinks or biased:
        softcap = None  # no model has both
    mask = dense_mask(length, window, chunk)
    if biased:
        mask = mask + key_bias[None, :, None, :length]
    if sinks:
        want, _ = eager_with_sinks(module, q, k, v, mask, scaling=0.4)
    else:
        want, _ = eager(module, q, k, v, mask.to(dtype), scaling=0.4, softcap=softcap)
    layout = KVLayout([LayerKV(1, 8, 8), LayerKV(kv_heads, k_dim, v_dim)], 4, dtype)
    slab = layout.allocate(12, "cpu")
    table = torch.randperm(12, generator=generator).tolist()
    split = int(cut * length)
    parts = []
    for begin, end in ((0, split), (split, length)):
        if begin < end:
            batch = single_row(layout, slab, table, begin, end)
            rows = (x[0, :, begin:end].transpose(0, 1) for x in (q, k, v))
            options = {"window": window, "chunk": chunk, "softcap": softcap}
            options |= {"sinks": module.sinks if sinks else None, "key_bias": key_bias}
            parts.append(ReferenceBackend().forward(1, *rows, batch, scale=0.4, **options))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(torch.cat(parts), want[0], atol=tolerance, rtol=tolerance)
    assert not slab[:, : layout.k_offset(1)].any(), "layer 1 wrote into layer 0"


@given(
    shapes=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 70), st.integers(1, 70)), max_size=5),
    block_size=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_regions_are_aligned_and_do_not_overlap(shapes, block_size, dtype):
    layout = KVLayout([LayerKV(*s) for s in shapes], block_size, dtype)
    end = 0
    for i, (heads, k_dim, v_dim) in enumerate(shapes):
        for offset, dim in ((layout.k_offset(i), k_dim), (layout.v_offset(i), v_dim)):
            assert offset >= end and offset * dtype.itemsize % 64 == 0
            end = offset + block_size * heads * dim
    assert end <= layout.block_elems and layout.bytes_per_block % 64 == 0
    slab = layout.allocate(3, "cpu")
    assert slab.shape == (3, layout.block_elems) and slab.dtype == dtype and not slab.any()


def test_a_bias_that_does_not_fit_is_refused():
    layout = KVLayout([LayerKV(1, 8, 8)], 4, torch.float32)
    batch = single_row(layout, layout.allocate(4, "cpu"), [0, 1, 2], 0, 9)
    q, k = torch.zeros(9, 2, 8), torch.zeros(9, 1, 8)
    for bias in (torch.zeros(1, 9), torch.zeros(2, 8), torch.zeros(2, 9).double()):
        with pytest.raises(ValueError, match=r"key_bias: must be float32\[2, 9 or more\]"):
            ReferenceBackend().forward(0, q, k, k, batch, scale=1.0, key_bias=bias)
    with pytest.raises(ValueError, match="softcap"):
        ReferenceBackend().forward(0, q, k, k, batch, scale=1.0, softcap=2.0, key_bias=torch.zeros(2, 9))


def test_bad_layouts_are_refused():
    for wrong in ((-1, 8, 8), (1, 0, 8), (1, 8, 0)):
        with pytest.raises(ValueError, match="LayerKV"):
            LayerKV(*wrong)
    with pytest.raises(ValueError, match="block_size"):
        KVLayout([], 0)
    with pytest.raises(ValueError, match="num_blocks"):
        KVLayout([LayerKV(1, 8, 8)]).allocate(0, "cpu")


def test_the_batch_is_seen_inside_its_block_only():
    layout = KVLayout([LayerKV(1, 8, 8)], 4, torch.float32)
    batch = single_row(layout, layout.allocate(1, "cpu"), [0], 0, 1)
    with pytest.raises(RuntimeError, match="use_batch"):
        get_batch()
    with use_batch(batch), use_batch(batch) as inner:
        assert get_batch() is inner
    with pytest.raises(RuntimeError, match="use_batch"):
        get_batch()
