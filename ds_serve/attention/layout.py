"""Where the keys and values of a block of tokens lie: one slab, block-major.

A slab is a tensor [num_blocks, block_elems]: row b holds block b of every layer, K then V, so that
moving a block between device and host is one contiguous copy. This module gives the regions' places
and sizes; what lies inside a region is the backend's own business. It knows no model and no kernel.
The worker allocates slabs by it, backends find their regions by it.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cached_property

import torch

ALIGN_BYTES = 64
HUGE_PAGE = 2 << 20


@dataclass(frozen=True)
class LayerKV:
    """One layer's KV shape on this rank. num_kv_heads may be 0 (a tensor rank without a KV head).

    v_in_k: the values are the first v_dim columns of the keys, and have no place of their own.
    reach: a query at position i sees keys j > i - reach at most (a window's or a chunk's size); 0: all.
    """

    num_kv_heads: int
    k_dim: int
    v_dim: int
    v_in_k: bool = False
    reach: int = 0

    def __post_init__(self) -> None:
        if self.num_kv_heads < 0 or self.k_dim < 1 or self.v_dim < 1:
            raise ValueError(f"LayerKV: needs num_kv_heads >= 0 and k_dim, v_dim >= 1, got {self}")
        if self.v_in_k and self.v_dim > self.k_dim:
            raise ValueError(f"LayerKV: values of more columns than the keys they lie in: {self}")


@dataclass(frozen=True)
class KVLayout:
    """Regions of one block's row. Offsets and sizes are in elements of dtype.

    layers are this stage's, in order; first_layer is the model-wide index (layer_idx) of layers[0].
    groups: the group of each of them (all in group 0 by default). A block holds one group's layers, and its
    row is as long as the largest group's. Each K and V region is padded to a multiple of 64 bytes.
    """

    layers: tuple[LayerKV, ...]
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    first_layer: int = 0
    groups: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "groups", tuple(self.groups) or (0,) * len(self.layers))
        if len(self.groups) != len(self.layers):
            raise ValueError(f"groups: one for each of {len(self.layers)} layers, got {len(self.groups)}")
        if self.block_size < 1:
            raise ValueError(f"block_size: must be at least 1, got {self.block_size}")
        if self.first_layer < 0:
            raise ValueError(f"first_layer: must be at least 0, got {self.first_layer}")

    @cached_property
    def _offsets(self) -> list[int]:
        """Start of K0, V0, K1, V1, ... and, last, the row's length."""
        align = max(1, ALIGN_BYTES // self.dtype.itemsize)
        offsets, ends = [], [0] * (1 + max(self.groups, default=0))
        for layer, group in zip(self.layers, self.groups, strict=True):
            for dim in (layer.k_dim, 0 if layer.v_in_k else layer.v_dim):
                elems = self.block_size * layer.num_kv_heads * dim
                offsets.append(ends[group])
                ends[group] += -(-elems // align) * align
        return [*offsets, max(ends)]

    def k_offset(self, layer: int) -> int:
        """First element of the layer's K region; layer counts from 0 within this layout."""
        return self._offsets[2 * layer]

    def v_offset(self, layer: int) -> int:
        """First element of the layer's V region: its K region where the values are columns of the keys."""
        return self._offsets[2 * layer + (0 if self.layers[layer].v_in_k else 1)]

    @property
    def block_elems(self) -> int:
        return self._offsets[-1]

    @property
    def bytes_per_block(self) -> int:
        return self.block_elems * self.dtype.itemsize

    def allocate(self, num_blocks: int, device: torch.device | str, pin_memory: bool = False) -> torch.Tensor:
        """Zeros [num_blocks, block_elems]; zeros, since backends may read lines they then mask."""
        if num_blocks < 1:
            raise ValueError(f"num_blocks: must be at least 1, got {num_blocks}")
        if torch.device(device).type != "cpu" or pin_memory:
            return torch.zeros(
                num_blocks, self.block_elems, dtype=self.dtype, device=device, pin_memory=pin_memory
            )
        slab = torch.empty(num_blocks, self.block_elems, dtype=self.dtype)
        _advise_huge_pages(slab)
        return slab.zero_()


def _advise_huge_pages(tensor: torch.Tensor) -> None:
    """Ask Linux for 2 MiB pages under memory not yet touched: a layer's regions lie a block apart, and with
    small pages every one of them costs a walk of the page table."""
    if sys.platform != "linux":
        return
    start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    size = (tensor.data_ptr() + tensor.nbytes - start) // HUGE_PAGE * HUGE_PAGE
    if size > 0:
        MADV_HUGEPAGE = 14
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_HUGEPAGE)
