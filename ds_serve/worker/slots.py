"""What a rank remembers of its sequences, and how a plan's rows become a ragged batch.

Each slot holds a sequence's tokens and block table, on the host, as rows of two numpy arrays; a plan brings
differences only. Knows no model and no sampling. Called by the worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ds_serve.attention.context import AdapterRows, AttentionBatch
from ds_serve.attention.layout import KVLayout
from ds_serve.messages import NewSequence, Row


@dataclass
class StepInputs:
    """A step's model inputs on the device: T tokens of R rows in one packed row.

    input_ids    int64[1, T]
    slots, positions of the S tokens to be drawn
    scored       slot and number of tokens of each row whose prompt tokens are scored
    targets      int64[N], those tokens

    attention.sampled tells after which of the T tokens the S are drawn and the N stand, in this order. Where
    there are none it names token 0, so that every model's head has a row to work on.
    """

    input_ids: torch.Tensor
    attention: AttentionBatch
    slots: list[int]
    positions: list[int]
    scored: list[tuple[int, int]]
    targets: torch.Tensor


class SlotTable:
    """Tokens and blocks of max_num_seqs sequences of up to max_model_len tokens."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, num_groups: int = 1) -> None:
        self.block_size = block_size
        max_blocks = -(-max_model_len // block_size)
        # Never touched pages are never committed, so long models cost what is used.
        self._tokens = np.empty((max_num_seqs, max_model_len + 1), dtype=np.int64)
        self._blocks = np.zeros((max_num_seqs, max_blocks, num_groups), dtype=np.int32)
        self._num_entries = [0] * max_num_seqs
        self._num_prompt = [0] * max_num_seqs
        self._adapters = np.zeros(max_num_seqs, dtype=np.int64)

    def admit(self, new: NewSequence) -> None:
        """new takes its slot; what the slot held is forgotten."""
        self._tokens[new.slot, : len(new.token_ids)] = new.token_ids
        self._num_entries[new.slot] = 0
        self._num_prompt[new.slot] = new.num_prompt_tokens
        self._adapters[new.slot] = new.adapter

    def append(self, slots: Sequence[int], positions: Sequence[int], token_ids: Sequence[int]) -> None:
        """The sampled token of each slot, at its position."""
        self._tokens[slots, positions] = token_ids

    def build(self, rows: Sequence[Row], slab: torch.Tensor, layout: KVLayout) -> StepInputs:
        """Extends tokens and block tables by what the rows bring and packs the rows, in order."""
        for row in rows:
            if row.new_block_ids:
                held = self._num_entries[row.slot]
                self._num_entries[row.slot] = held + len(row.new_block_ids)
                entries = self._blocks[row.slot].reshape(-1)
                entries[held : self._num_entries[row.slot]] = row.new_block_ids
            if row.token_ids:
                end = row.start + row.count
                self._tokens[row.slot, end - len(row.token_ids) : end] = row.token_ids
        slots = np.array([row.slot for row in rows])
        starts = np.array([row.start for row in rows])
        counts = np.array([row.count for row in rows])
        query_start = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])
        num_tokens = int(query_start[-1])

        row_of = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(num_tokens) - query_start[row_of] + starts[row_of]
        slot_of = slots[row_of]
        device = slab.device
        (slot_mapping, block_tables), *more_groups = self._tables(slots, slot_of, positions, device)
        samples = np.array([row.sample for row in rows])
        ends = starts + counts
        scored, targets, before = self._scored(rows, query_start)
        sampled = np.concatenate([(query_start[1:] - 1)[samples], before])
        if not len(sampled):
            sampled = np.zeros(1)
        attention = AttentionBatch(
            slab=slab,
            layout=layout,
            slot_mapping=slot_mapping,
            query_start=_put(query_start, device),
            context_len=_put(ends.astype(np.int32), device),
            block_tables=block_tables,
            positions=_put(positions, device),
            max_query_len=int(counts.max()),
            num_tokens=num_tokens,
            sampled=_put(sampled.astype(np.int64), device),
            adapters=_adapter_rows(self._adapters[slots], counts, device),
            more_groups=tuple(more_groups),
        )
        return StepInputs(
            input_ids=_put(self._tokens[slot_of, positions], device)[None],
            attention=attention,
            slots=slots[samples].tolist(),
            positions=ends[samples].tolist(),
            scored=scored,
            targets=_put(targets, device),
        )

    def _tables(
        self, slots: np.ndarray, slot_of: np.ndarray, positions: np.ndarray, device: torch.device
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """slot_mapping and block_tables of each group; 0 past a table's end, and where a block is gone."""
        num_groups = self._blocks.shape[2]
        lengths = np.array([self._num_entries[slot] // num_groups for slot in slots])
        tables = self._blocks[slots, : lengths.max()]
        tables[np.arange(tables.shape[1]) >= lengths[:, None]] = 0
        np.maximum(tables, 0, out=tables)
        blocks = self._blocks[slot_of, positions // self.block_size].astype(np.int64)
        offsets = positions % self.block_size
        return [
            (
                _put(blocks[:, group] * self.block_size + offsets, device),
                _put(np.ascontiguousarray(tables[:, :, group]), device),
            )
            for group in range(num_groups)
        ]

    def _scored(
        self, rows: Sequence[Row], query_start: np.ndarray
    ) -> tuple[list[tuple[int, int]], np.ndarray, np.ndarray]:
        """What StepInputs says of scored rows, and where in the packed row what precedes each target."""
        scored, targets, before = [], [], []
        for row, first in zip(rows, query_start[:-1], strict=True):
            if row.scored:
                end = min(row.start + row.count, self._num_prompt[row.slot] - 1)
                scored.append((row.slot, end - row.start))
                targets.append(self._tokens[row.slot, row.start + 1 : end + 1])
                before.append(first + np.arange(end - row.start))
        none = np.zeros(0, dtype=np.int64)
        return scored, np.concatenate([none, *targets]), np.concatenate([none, *before])


def _adapter_rows(of_row: np.ndarray, counts: np.ndarray, device: torch.device) -> AdapterRows | None:
    taken = of_row[of_row > 0]
    if not len(taken):
        return None
    return AdapterRows(_put(np.repeat(of_row, counts), device), int(taken.min()), int(taken.max()))


def _put(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device)
