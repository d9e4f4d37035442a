"""What a step's attention must know beyond q, k and v, and how it gets there.

Hugging Face modules call the attention function many frames below the runner, and some of them drop
keywords on the way: so the batch travels in a context variable. The worker builds an AttentionBatch a
step and runs the model inside use_batch(batch); interface.py and fused layers read get_batch().
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch

from ds_serve.attention.layout import KVLayout


@dataclass(frozen=True)
class AdapterRows:
    """Which LoRA adapter each of a step's tokens takes, where any takes one.

    of_token     int64[T]  number of the token's adapter, from 1; 0: none
    first, last  the lowest and the highest number in it, 0 left out
    """

    of_token: torch.Tensor
    first: int
    last: int


@dataclass(frozen=True)
class HostRows:
    """A step's rows as they are on the host, for backends that plan a step there and must not ask the device.

    query_start  int32[R+1], context_len int32[R]: as in AttentionBatch
    tables       int32[R, B] for each group of layers: its block_tables
    graph        R, where the batch's tensors are those of a captured graph of R rows (the last of them may be
                 padding: one token in a block that nobody reads); 0 elsewhere
    """

    query_start: np.ndarray
    context_len: np.ndarray
    tables: tuple[np.ndarray, ...]
    graph: int = 0


@dataclass
class AttentionBatch:
    """The ragged batch of one step: T tokens of R rows, row after row. All tensors on the slab's device.

    slab          [num_blocks, layout.block_elems]  the KV memory
    slot_mapping  int64[T]    block * block_size + offset of each of the step's tokens
    query_start   int32[R+1]  row r's tokens are query_start[r] .. query_start[r+1]-1
    context_len   int32[R]    row r's length after this step; its tokens are the last of them
    block_tables  int32[R, B] block ids in order, padded with 0; any id where nobody sees the tokens any more
    more_groups   slot_mapping and block_tables of groups 1, 2, ..: those above are group 0's (see tables)
    positions     int64[T]    position of each token in its sequence
    num_tokens    T, a plain int, so that nobody needs to ask the device
    sampled       int64[S] or None  the tokens whose logits are wanted (None: all); a last layer may leave
                  the others' hidden states unfinished, once their KV is written
    adapters      LoRA adapters of the tokens; None: no token takes one
    num_calls     attention calls so far: how far the step has got, for who watches over it
    host          the rows on the host; None where whoever made the batch has no copy there
    """

    slab: torch.Tensor
    layout: KVLayout
    slot_mapping: torch.Tensor
    query_start: torch.Tensor
    context_len: torch.Tensor
    block_tables: torch.Tensor
    positions: torch.Tensor
    num_tokens: int
    sampled: torch.Tensor | None = None
    adapters: AdapterRows | None = None
    num_calls: int = 0
    more_groups: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    host: HostRows | None = None

    def tables(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """slot_mapping and block_tables of a layer's group; layer counts from 0 within the layout."""
        group = self.layout.groups[layer]
        return self.more_groups[group - 1] if group else (self.slot_mapping, self.block_tables)


current_batch: ContextVar[AttentionBatch | None] = ContextVar("ds_serve_attention_batch", default=None)


@contextmanager
def use_batch(batch: AttentionBatch) -> Iterator[AttentionBatch]:
    """Makes batch the one that attention sees inside the with block."""
    token = current_batch.set(batch)
    try:
        yield batch
    finally:
        current_batch.reset(token)


def get_batch() -> AttentionBatch:
    """The batch of the step now running. RuntimeError outside of use_batch."""
    batch = current_batch.get()
    if batch is None:
        raise RuntimeError("no attention batch: run the model inside `with use_batch(batch):`")
    return batch
