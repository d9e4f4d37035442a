"""The device block pool: who uses which block, which free blocks still hold a known prefix.

A block is free when nobody uses it, cached when a key names its content. Free blocks are given out in this
order: blocks without a key, then the zone (blocks that were first in the eviction order; the manager sees to
it that the host has them), then the rest of the eviction order. Knows no sequences, no host and no tensors;
called by the manager and by the book of pins.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import islice

from ds_serve.cache.policy import EvictionOrder


class OutOfBlocks(Exception):
    """More blocks were asked for than are free. Nothing was changed."""


class BlockPool:
    """Blocks 0 .. num_blocks - 1.

    on_evict(key, uses, depth) is called for each cached block that is given out, when its key is off it.

    Invariants, held by check_integrity(): a block is in exactly one of blank, zone and order when its
    reference count is 0, in none of them otherwise; every key's block list names blocks that carry that key;
    no key maps to an empty list.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[bytes, int, int], None] | None = None) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks: must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self.num_evictions = 0
        self._on_evict = on_evict
        self._refs = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._uses = [0] * num_blocks
        self._depths = [0] * num_blocks
        # Two blocks may hold one key (equal prompts computed side by side): losing one keeps the other.
        self._by_key: dict[bytes, list[int]] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))  # last out first
        self._zone: OrderedDict[int, None] = OrderedDict()  # first out first
        self._held: set[int] = set()  # of the zone: in use, and each keeps its place there
        self._order = EvictionOrder(num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks that allocate() can give out, cached ones among them."""
        return len(self._blank) + len(self._zone) - len(self._held) + len(self._order)

    @property
    def num_cached(self) -> int:
        """Blocks, used or free, whose content a key names."""
        return sum(len(blocks) for blocks in self._by_key.values())

    @property
    def num_ready(self) -> int:
        """Free blocks that are given out before the eviction order is touched."""
        return len(self._blank) + len(self._zone) - len(self._held)

    @property
    def num_next(self) -> int:
        """Blocks that are given out before the eviction order is touched, those under hold() among them."""
        return len(self._blank) + len(self._zone)

    def find(self, key: bytes) -> int | None:
        """A block that holds key's content, or None."""
        blocks = self._by_key.get(key)
        return blocks[0] if blocks else None

    def key(self, block: int) -> bytes | None:
        """The key that names block's content, or None."""
        return self._keys[block]

    def uses(self, block: int) -> int:
        """How often block's content was hit since it was first computed."""
        return self._uses[block]

    def depth(self, block: int) -> int:
        """The index of block's content in its prompt, in blocks."""
        return self._depths[block]

    def is_free(self, block: int) -> bool:
        return self._refs[block] == 0

    def is_ready(self, block: int) -> bool:
        """Whether a cached block is free and given out before the eviction order is touched."""
        return block in self._zone and block not in self._held

    def is_leaving(self, key: bytes) -> bool:
        """Whether a block with this key is in the zone."""
        return any(block in self._zone for block in self._by_key.get(key, ()))

    def acquire(self, blocks: Sequence[int], is_hit: bool = True) -> None:
        """One more user for each of these blocks (of a match): they cannot be evicted until released."""
        for block in blocks:
            if block in self._zone:
                del self._zone[block]
                self._held.discard(block)
            elif self._refs[block] == 0:
                self._order.remove(block)
            self._refs[block] += 1
            self._uses[block] += is_hit

    def allocate(self, count: int) -> list[int]:
        """count blocks for one user, their old content forgotten. Raises OutOfBlocks, changing nothing."""
        if count > self.num_free:
            raise OutOfBlocks(f"{count} blocks wanted, {self.num_free} free of {self.num_blocks}")
        blocks = [self._blank.pop() for _ in range(min(count, len(self._blank)))]
        unheld = (block for block in self._zone if block not in self._held)
        victims = list(islice(unheld, min(count - len(blocks), len(self._zone) - len(self._held))))
        for block in victims:
            del self._zone[block]
        victims += [self._order.pop() for _ in range(count - len(blocks) - len(victims))]
        for block in victims:
            self._evict(block)
        blocks += victims
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def commit(self, block: int, key: bytes, depth: int = 0, uses: int = 0) -> None:
        """Publish: block (in use) holds key's content, completely written.

        depth: its index in its prompt; uses: how often that content was hit before.
        """
        if self._refs[block] == 0:
            raise ValueError(f"block {block} is free: only a block in use can be committed")
        if self._keys[block] == key:
            return
        if self._keys[block] is not None:
            raise ValueError(f"block {block} holds another key already")
        self._keys[block] = key
        self._depths[block] = depth
        self._uses[block] = uses
        self._by_key.setdefault(key, []).append(block)

    def release(self, blocks: Sequence[int]) -> None:
        """One user less for each block, given in table order: tails are evicted before heads.

        A block that was held, and not acquired since, is free again in its old place in the zone.
        """
        for block in reversed(blocks):
            if self._refs[block] <= 0:
                raise ValueError(f"block {block} is released more often than acquired")
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            key = self._keys[block]
            if key is None:
                self._blank.append(block)
            elif block in self._held:
                self._held.remove(block)
            else:
                self._order.add(block, key, self._uses[block], self._depths[block])

    def advance_zone(self) -> int | None:
        """The first block of the eviction order, moved to the zone's end; None where the order is empty."""
        if not len(self._order):
            return None
        block = self._order.pop()
        self._zone[block] = None
        return block

    def hold(self, block: int) -> None:
        """A user for a free block of the zone, which keeps its place there until somebody acquires it."""
        if block not in self._zone or self._refs[block]:
            raise ValueError(f"block {block} is not free in the zone: it cannot be held")
        self._held.add(block)
        self._refs[block] = 1

    def check_integrity(self, in_use: dict[int, int] | None = None) -> None:
        """Raise AssertionError unless the books are whole; in_use: expected users a block, others 0."""
        free = {block for block in range(self.num_blocks) if self._refs[block] == 0}
        blank, zone = set(self._blank), set(self._zone) - self._held
        ordered = {block for block in range(self.num_blocks) if block in self._order}
        assert free == blank | zone | ordered, f"free lists and reference counts differ: {free}"
        assert len(free) == self.num_free, "a block is in two free lists"
        assert len(ordered) == len(self._order), "the eviction order holds blocks that are not here"
        assert all(self._keys[block] is None for block in blank), "a cached block counts as blank"
        assert all(self._keys[block] is not None for block in zone | ordered), (
            "a blank block counts as cached"
        )
        assert self._held <= set(self._zone), "a block is held outside of the zone"
        named = [block for blocks in self._by_key.values() for block in blocks]
        keyed = [block for block, key in enumerate(self._keys) if key is not None]
        assert sorted(named) == keyed, f"keys and blocks differ: {sorted(named)} {keyed}"
        for key, blocks in self._by_key.items():
            assert blocks, "a key maps to no block"
            assert all(self._keys[block] == key for block in blocks), f"blocks {blocks} under a wrong key"
        if in_use is not None:
            used = {block: refs for block, refs in enumerate(self._refs) if refs}
            assert used == in_use, f"blocks in use: book {used}, users {in_use}"

    def _evict(self, block: int) -> None:
        key = self._keys[block]
        self._keys[block] = None
        holders = self._by_key[key]
        holders.remove(block)
        if not holders:
            del self._by_key[key]
        self.num_evictions += 1
        if self._on_evict is not None:
            self._on_evict(key, self._uses[block], self._depths[block])
