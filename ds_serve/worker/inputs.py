"""A step's arrays on their way to the device, and the tokens that were drawn there.

Knows tensors, rows and slots; no model, no plan and no block book. Called by the worker and by certify.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ds_serve.attention.context import AdapterRows, AttentionBatch, HostRows
from ds_serve.attention.layout import KVLayout
from ds_serve.worker.put import put
from ds_serve.worker.slots import HostStep


@dataclass
class StepInputs:
    """A HostStep's model inputs on the device: input_ids int64[1, T], slots int64[S], targets int64[N]."""

    input_ids: torch.Tensor
    attention: AttentionBatch
    slots: torch.Tensor
    targets: torch.Tensor


class TokenPool:
    """The last token drawn for each slot, on the device: a step may need it before the host knows it."""

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)

    def put(self, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
        """token_ids int64[S] were drawn for slots int64[S]."""
        self.tokens.index_copy_(0, slots, token_ids)

    def fill(self, token_ids: torch.Tensor, drawn_in: torch.Tensor) -> torch.Tensor:
        """token_ids int64[T], but the slot's last drawn token where drawn_in int64[T] names one."""
        return torch.where(drawn_in < 0, token_ids, self.tokens[drawn_in.clamp(min=0)])


def upload(step: HostStep, slab: torch.Tensor, layout: KVLayout, pool: TokenPool | None = None) -> StepInputs:
    """step on the slab's device. pool may be left out where every token is known on the host."""
    groups = len(step.tables)
    of_token, first, last = _adapters_of_tokens(step)
    token_ids, drawn_in, positions, query_start, context_len, sampled, slots, targets, *rest = put(
        [
            step.token_ids, step.drawn_in, step.positions, step.query_start, step.context_len, step.sampled,
            np.array(step.slots, dtype=np.int64), step.targets, *step.slot_mappings, *step.tables, *of_token,
        ],
        slab.device,
    )  # fmt: skip
    if (step.drawn_in >= 0).any():
        token_ids = pool.fill(token_ids, drawn_in)
    (slot_mapping, block_tables), *more_groups = zip(rest[:groups], rest[groups : 2 * groups], strict=True)
    attention = AttentionBatch(
        slab=slab,
        layout=layout,
        slot_mapping=slot_mapping,
        query_start=query_start,
        context_len=context_len,
        block_tables=block_tables,
        positions=positions,
        num_tokens=step.num_tokens,
        sampled=sampled,
        adapters=AdapterRows(rest[-1], first, last) if of_token else None,
        more_groups=tuple(more_groups),
        host=HostRows(step.query_start, step.context_len, step.tables),
    )
    return StepInputs(token_ids[None], attention, slots, targets)


def _adapters_of_tokens(step: HostStep) -> tuple[list[np.ndarray], int, int]:
    """[each token's adapter int64[T]], and the lowest and highest of them; [] where no token takes one."""
    taken = step.adapters[step.adapters > 0]
    if not len(taken):
        return [], 0, 0
    of_token = np.repeat(step.adapters, np.diff(step.query_start))
    return [of_token], int(taken.min()), int(taken.max())
