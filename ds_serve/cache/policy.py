"""The order in which cached blocks that nobody uses are evicted; one object a tier.

A block that was never hit goes before one that was, each kind least recently used first, so that prompts that
never come back pass through without washing out those that do. Two things keep what was hit once from
staying for ever: blocks that were hit may fill only a share of the tier before they pay themselves, and a
block that is computed again soon after its eviction counts as hit. docs/cache_policy.md: how it was chosen.

Knows block numbers and keys; knows no pool, no other tier and no content. Called by the books in cache/.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import chain, islice

# Of the tier's blocks. With less, what comes back is pressed out by a scan; with all of it, a block that was
# hit once would stay until something else was hit as often.
HIT_SHARE = 0.8


class EvictionOrder:
    """Cached blocks without users, of one tier, in the order in which they are evicted. O(1) a block.

    It remembers as many evicted keys as the tier has blocks.
    """

    def __init__(self, capacity: int) -> None:
        """capacity: blocks of the tier, those in use among them."""
        self._max_hit = int(capacity * HIT_SHARE)
        self._max_evicted = capacity
        self._new: OrderedDict[int, bytes] = OrderedDict()  # block -> key; first out first
        self._hit: OrderedDict[int, bytes] = OrderedDict()  # likewise
        self._evicted: OrderedDict[bytes, None] = OrderedDict()  # first forgotten first

    def add(self, block: int, key: bytes, uses: int, depth: int = 0) -> None:
        """block became evictable. uses: hits of its key since it was first computed.

        depth, its index in its prompt, makes no difference: tails go before heads where they are added first.
        Raises ValueError for a block that is in the order already.
        """
        if block in self:
            raise ValueError(f"block {block} is in the eviction order already")
        # A key without hits that was here before is one that was lost, and asked for again.
        came_back = uses > 0 or key in self._evicted
        (self._hit if came_back else self._new)[block] = key

    def remove(self, block: int) -> None:
        """block is in use again, or forgotten. Raises KeyError for a block that is not in the order."""
        del (self._hit if block in self._hit else self._new)[block]

    def pop(self) -> int:
        """The next victim, removed; its key is remembered. Raises KeyError where there is none."""
        takes_hit = not self._new or len(self._hit) > self._max_hit
        block, key = (self._hit if takes_hit else self._new).popitem(last=False)
        self._evicted[key] = None
        self._evicted.move_to_end(key)
        if len(self._evicted) > self._max_evicted:
            self._evicted.popitem(last=False)
        return block

    def first(self, count: int) -> list[int]:
        """The next count victims in their order (fewer where there are fewer), not removed. O(count)."""
        above = max(0, len(self._hit) - self._max_hit)
        order = chain(islice(self._hit, above), self._new, islice(self._hit, above, None))
        return list(islice(order, count))

    def __len__(self) -> int:
        return len(self._new) + len(self._hit)

    def __contains__(self, block: int) -> bool:
        return block in self._new or block in self._hit
