"""What a rank remembers of its sequences on the host, and how a plan's rows become a step's arrays.

Each slot holds a sequence's tokens and block table as rows of two numpy arrays; a plan brings differences
only. Tokens that were drawn on the device since are not known here: a step names their slot instead. Knows no
tensor, no model and no sampling. Called by the worker; inputs.py takes a step to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ds_serve.messages import NewSequence, Row


@dataclass(frozen=True)
class HostStep:
    """A step's T tokens of R rows in one packed row, row after row; as numpy arrays.

    token_ids      int64[T]
    drawn_in       int64[T]  the slot whose last drawn token stands here, whatever token_ids says; -1: none
    positions      int64[T]
    query_start    int32[R+1], context_len int32[R]  as in AttentionBatch
    slot_mappings  int64[T] for each group of layers, tables int32[R, B] for each: 0 past a table's end, and
                   where a block is gone
    adapters       int64[R]  number of the row's LoRA adapter, 0: none
    slots, drawn_at  of the S tokens to be drawn, the latter being their positions
    scored         slot and number of tokens of each row whose prompt tokens are scored
    targets        int64[N], those tokens
    sampled        int64[S+N]  after which of the T tokens the S are drawn and the N stand, in this order.
                   Where there are none it names token 0, so that every model's head has a row to work on
    """

    token_ids: np.ndarray
    drawn_in: np.ndarray
    positions: np.ndarray
    query_start: np.ndarray
    context_len: np.ndarray
    slot_mappings: tuple[np.ndarray, ...]
    tables: tuple[np.ndarray, ...]
    adapters: np.ndarray
    slots: list[int]
    drawn_at: list[int]
    scored: list[tuple[int, int]]
    targets: np.ndarray
    sampled: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.context_len)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def is_decode(self) -> bool:
        """Whether each row is one token after which one is drawn, and nothing else is asked for."""
        return len(self.slots) == self.num_rows == self.num_tokens and not self.scored


class SlotTable:
    """Tokens and blocks of max_num_seqs sequences of up to max_model_len tokens."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, num_groups: int = 1) -> None:
        self.block_size = block_size
        max_blocks = -(-max_model_len // block_size)
        # Never touched pages are never committed, so long models cost what is used.
        self._tokens = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int64)
        self._num_known = np.zeros(max_num_seqs, dtype=np.int64)
        self._blocks = np.zeros((max_num_seqs, max_blocks, num_groups), dtype=np.int32)
        self._num_entries = [0] * max_num_seqs
        self._num_prompt = [0] * max_num_seqs
        self._adapters = np.zeros(max_num_seqs, dtype=np.int64)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sequences, blocks of each, groups of layers."""
        return self._blocks.shape

    def admit(self, new: NewSequence) -> None:
        """new takes its slot; what the slot held is forgotten."""
        self._tokens[new.slot, : len(new.token_ids)] = new.token_ids
        self._num_known[new.slot] = len(new.token_ids)
        self._num_entries[new.slot] = 0
        self._num_prompt[new.slot] = new.num_prompt_tokens
        self._adapters[new.slot] = new.adapter

    def gather(self, rows: Sequence[Row]) -> HostStep:
        """Extends tokens and block tables by what the rows bring and packs the rows, in order."""
        for row in rows:
            self._extend(row)
        slots = np.array([row.slot for row in rows])
        starts = np.array([row.start for row in rows])
        counts = np.array([row.count for row in rows])
        query_start = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])

        row_of = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(query_start[-1]) - query_start[row_of] + starts[row_of]
        slot_of = slots[row_of]
        slot_mappings, tables = self._tables(slots, slot_of, positions)
        samples = np.array([row.sample for row in rows])
        ends = starts + counts
        scored, targets, before = self._scored(rows, query_start)
        sampled = np.concatenate([(query_start[1:] - 1)[samples], before])
        return HostStep(
            token_ids=self._tokens[slot_of, positions],
            drawn_in=np.where(positions < self._num_known[slot_of], -1, slot_of),
            positions=positions,
            query_start=query_start,
            context_len=ends.astype(np.int32),
            slot_mappings=slot_mappings,
            tables=tables,
            adapters=self._adapters[slots],
            slots=slots[samples].tolist(),
            drawn_at=ends[samples].tolist(),
            scored=scored,
            targets=targets,
            sampled=sampled.astype(np.int64) if len(sampled) else np.zeros(1, dtype=np.int64),
        )

    def _extend(self, row: Row) -> None:
        if row.new_block_ids:
            held = self._num_entries[row.slot]
            self._num_entries[row.slot] = held + len(row.new_block_ids)
            entries = self._blocks[row.slot].reshape(-1)
            entries[held : self._num_entries[row.slot]] = row.new_block_ids

    def _tables(
        self, slots: np.ndarray, slot_of: np.ndarray, positions: np.ndarray
    ) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """slot_mappings and tables of a HostStep."""
        num_groups = self._blocks.shape[2]
        lengths = np.array([self._num_entries[slot] // num_groups for slot in slots])
        tables = self._blocks[slots, : lengths.max()]
        tables[np.arange(tables.shape[1]) >= lengths[:, None]] = 0
        np.maximum(tables, 0, out=tables)
        blocks = self._blocks[slot_of, positions // self.block_size].astype(np.int64)
        slot_mappings = blocks * self.block_size + (positions % self.block_size)[:, None]
        return (
            tuple(np.ascontiguousarray(slot_mappings[:, group]) for group in range(num_groups)),
            tuple(np.ascontiguousarray(tables[:, :, group]) for group in range(num_groups)),
        )

    def _scored(
        self, rows: Sequence[Row], query_start: np.ndarray
    ) -> tuple[list[tuple[int, int]], np.ndarray, np.ndarray]:
        """What HostStep says of scored rows, and where in the packed row what precedes each target."""
        scored, targets, before = [], [], []
        for row, first in zip(rows, query_start[:-1], strict=True):
            if row.scored:
                end = min(row.start + row.count, self._num_prompt[row.slot] - 1)
                scored.append((row.slot, end - row.start))
                targets.append(self._tokens[row.slot, row.start + 1 : end + 1])
                before.append(first + np.arange(end - row.start))
        none = np.zeros(0, dtype=np.int64)
        return scored, np.concatenate([none, *targets]), np.concatenate([none, *before])
