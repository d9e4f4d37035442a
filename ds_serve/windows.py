"""Layers that see a part of the context only: which layers share KV blocks, and how many a sequence takes.

Every layer has a reach: a query at position i sees keys j > i - reach; reach 0 stands for all of them. Layers
of one reach form one or more groups, and a block holds block_size tokens of one group's layers, so that a
window's blocks are given back while those of layers that see everything stay. Numbers only: knows no pool, no
tensor and no rank. The workers group layers by it, the cache keeps and counts blocks by it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

MAX_GROUPS = 8

# Groups are padded to the largest one. A sequence shorter than any window pays that and gets nothing for it.
MAX_PADDING = 1.15

# Groups are chosen for sequences of so many windows, or of the longest length where that is less.
TYPICAL_WINDOWS = 4


@dataclass(frozen=True)
class Windows:
    """The reach of each group's layers, in tokens (0: all), and what follows for a sequence's blocks.

    tokens_ahead: tokens that steps in flight may add to one sequence, so how far results lag behind.
    """

    reaches: tuple[int, ...] = (0,)
    block_size: int = 16
    tokens_ahead: int = 0

    def __post_init__(self) -> None:
        if not self.reaches or min(self.reaches) < 0 or len(self.reaches) > MAX_GROUPS:
            raise ValueError(f"windows: 1 to {MAX_GROUPS} numbers of at least 0, got {self.reaches}")

    @property
    def num_groups(self) -> int:
        return len(self.reaches)

    @property
    def slide(self) -> bool:
        """Whether any blocks are ever given back before their sequence ends."""
        return any(self.reaches)

    def firsts_seen(self, position: int) -> list[int]:
        """Of each group, the index of the first block that a query at this position, or later, sees."""
        size = self.block_size
        return [max(0, (position - reach + 1) // size) if reach else 0 for reach in self.reaches]

    def firsts_kept(self, num_computed: int) -> list[int]:
        """Of each group, the index of the first block that a sequence of so many computed tokens keeps.

        It keeps what a later sequence with the same tokens needs for the longest hit: what a query at the
        last block border before its end sees.
        """
        return self.firsts_seen((num_computed - 1) // self.block_size * self.block_size)

    def most_blocks(self, num_tokens: int, firsts: Sequence[int] | None = None) -> int:
        """The most blocks that a sequence uses at a time on its way to num_tokens tokens.

        firsts: the index of the first block that it still has of each group, 0 by default.
        """
        length = -(-num_tokens // self.block_size)
        return sum(
            max(0, min(length - first, self._most_of_window(reach) if reach else length))
            for reach, first in zip(self.reaches, firsts or [0] * self.num_groups, strict=True)
        )

    def longest(self, num_blocks: int, limit: int) -> int:
        """The longest sequence, of at most limit tokens, that num_blocks blocks are enough for. May be 0."""
        low, high = 0, -(-limit // self.block_size)
        while low < high:
            middle = (low + high + 1) // 2
            if self.most_blocks(middle * self.block_size) <= num_blocks:
                low = middle
            else:
                high = middle - 1
        return min(limit, low * self.block_size)

    def _most_of_window(self, reach: int) -> int:
        """Between the first block kept and the last one that a step in flight writes."""
        return 1 - -(reach - 1) // self.block_size - -self.tokens_ahead // self.block_size


@dataclass(frozen=True)
class Grouping:
    """group of each layer of the model, and the reach of each group."""

    groups: tuple[int, ...]
    reaches: tuple[int, ...]


def one_group(reaches: Sequence[int]) -> Grouping:
    """All layers together: what leaves the longest window is given back, if there is no layer without."""
    return Grouping((0,) * len(reaches), (0 if 0 in reaches else max(reaches),))


def group_layers(
    reaches: Sequence[int], sizes: Sequence[int], stages: Sequence[int], max_model_len: int
) -> Grouping:
    """The groups with which a long sequence takes least memory, for layers in the model's order.

    sizes: a token's KV in each layer, in any unit; stages: the pipeline stage of each layer. A block's row is
    as large as the largest group on its stage, and the stage with the largest rows sets the number of blocks.
    One group where others would save nothing, or waste more on short sequences than MAX_PADDING allows.
    """
    if not any(reaches):
        return one_group(reaches)
    num_tokens = min(max_model_len, TYPICAL_WINDOWS * max(reaches))

    def row(grouping: Grouping) -> int:
        filled: dict[tuple[int, int], int] = defaultdict(int)
        for group, stage, size in zip(grouping.groups, stages, sizes, strict=True):
            filled[group, stage] += size
        return max(filled.values())

    def cost(grouping: Grouping) -> int:
        return row(grouping) * sum(min(reach or num_tokens, num_tokens) for reach in grouping.reaches)

    best = whole = one_group(reaches)
    for most_layers in range(len(reaches), 0, -1):  # of equals the fewest groups
        grouping = _round_robin(reaches, most_layers)
        num_groups = len(grouping.reaches)
        if num_groups > MAX_GROUPS or row(grouping) * num_groups > row(whole) * MAX_PADDING:
            continue
        if cost(grouping) < cost(best):
            best = grouping
    return best


def _round_robin(reaches: Sequence[int], most_layers: int) -> Grouping:
    """Groups of at most so many layers of one reach, dealt out in turn, so that every stage has of each."""
    group_reaches: list[int] = []
    groups = [0] * len(reaches)
    for reach in sorted(set(reaches)):
        layers = [layer for layer, each in enumerate(reaches) if each == reach]
        count = -(-len(layers) // most_layers)
        for turn, layer in enumerate(layers):
            groups[layer] = len(group_reaches) + turn % count
        group_reaches += [reach] * count
    return Grouping(tuple(groups), tuple(group_reaches))
