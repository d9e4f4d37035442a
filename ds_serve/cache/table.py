"""A sequence's block table, and a prefix found for it: what the manager fills and the engine reads.

Both are flat lists, index after index (an index stands for block_size tokens), with one entry for each group
of layers. An entry is a block, or NO_BLOCK where no query sees those tokens any more. Knows no pool.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ds_serve.messages import NO_BLOCK


class BlockTable:
    """One sequence's blocks, in order, and the keys of its full indexes as far as they were asked for.

    firsts: of each group, the first index that still has its block. num_committed: indexes that others can
    find. loads are the copies (host block, device block) that its prefix still waits for. Grows at the end,
    and gives back what leaves a window, until it is freed as a whole; but a failed load takes blocks out of
    it (see CacheManager.loaded).
    """

    __slots__ = ("block_ids", "firsts", "keys", "loads", "num_committed", "num_groups", "root")

    def __init__(self, root: bytes, num_groups: int = 1) -> None:
        self.root = root
        self.num_groups = num_groups
        self.keys: list[bytes] = []
        self.loads: list[tuple[int, int]] = []
        self.clear()

    def clear(self) -> None:
        """Nothing is held; the keys of known tokens stay."""
        self.block_ids: list[int] = []
        self.firsts = [0] * self.num_groups
        self.num_committed = 0

    @property
    def length(self) -> int:
        """Indexes that it covers."""
        return len(self.block_ids) // self.num_groups

    @property
    def blocks(self) -> list[int]:
        """The blocks that it uses, in order."""
        return [block for block in self.block_ids if block != NO_BLOCK]


@dataclass(frozen=True, slots=True)
class Match:
    """The longest prefix found over both tiers, in block order: what the table has, then device, then beyond.

    device: entries of the leading part that lies on the device. beyond: what continues it, from its first
    host block on, whatever tier each block lies in. waits: the key that would come next is being loaded for
    another sequence right now.
    """

    device: list[int] = field(default_factory=list)
    beyond: list[tuple[Literal["device", "host"], int]] = field(default_factory=list)
    waits: bool = False
    num_groups: int = 1

    @property
    def host(self) -> list[int]:
        """The host blocks: what would have to be loaded."""
        return [block for tier, block in self.beyond if tier == "host"]

    @property
    def on_device(self) -> int:
        """Indexes of the leading part that lies on the device."""
        return len(self.device) // self.num_groups

    @property
    def num_blocks(self) -> int:
        """Indexes of the match, without those that the table has already."""
        return self.on_device + len(self.beyond)

    def first(self, num_loads: int) -> Match:
        """The part of it that needs no more than num_loads loads."""
        beyond, left = [], num_loads
        for tier, block in self.beyond:
            left -= tier == "host"
            if left < 0:
                return Match(self.device, beyond)
            beyond.append((tier, block))
        return self

    def taken(self, load: bool) -> list[int]:
        """The device blocks that take_prefix() would take over; all others are allocated."""
        later = [block for tier, block in self.beyond if tier == "device"] if load else []
        return [block for block in self.device if block != NO_BLOCK] + later
