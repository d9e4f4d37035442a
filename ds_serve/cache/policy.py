"""The order in which cached blocks that nobody uses are evicted; one object a tier.

The same class orders the device's free cached blocks and the host's entries. It knows block numbers, keys and how
often a key was hit; it knows no pool, no other tier and no content. Called by the books in cache/.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice


class EvictionOrder:
    """Cached blocks without users, of one tier, in the order in which they are evicted."""

    def __init__(self, capacity: int) -> None:
        """capacity: blocks of the tier, those in use among them."""
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def add(self, block: int, key: bytes, uses: int, depth: int = 0) -> None:
        """block became evictable. uses: hits of its key since it was first computed; depth: its index in its prompt.

        Raises ValueError for a block that is in the order already.
        """
        if block in self._blocks:
            raise ValueError(f"block {block} is in the eviction order already")
        self._blocks[block] = None

    def remove(self, block: int) -> None:
        """block is in use again, or forgotten. Raises KeyError for a block that is not in the order."""
        del self._blocks[block]

    def pop(self) -> int:
        """The next victim, removed. Raises KeyError where there is none."""
        return self._blocks.popitem(last=False)[0]

    def first(self, count: int) -> list[int]:
        """The next count victims in their order (fewer where there are not so many), not removed. O(count)."""
        return list(islice(self._blocks, count))

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: int) -> bool:
        return block in self._blocks
