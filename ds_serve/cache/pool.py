"""The device block pool: who uses which block, which free blocks still hold a known prefix.

A block is free when nobody uses it, cached when a key names its content; a free cached block is given out
last, least recently used first. Knows no sequences and no tensors; called by the manager.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class OutOfBlocks(Exception):
    """More blocks were asked for than are free. Nothing was changed."""


class BlockPool:
    """Blocks 0 .. num_blocks - 1.

    Invariants, held by check_integrity(): a block is in the free list exactly when its reference count is 0;
    every key's block list names blocks that carry that key; no key maps to an empty list.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks: must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        # Two blocks may hold one key (equal prompts computed side by side): losing one keeps the other.
        self._by_key: dict[bytes, list[int]] = {}
        # First out first: unhashed blocks at the head, then cached ones by time of release.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.num_evictions = 0

    @property
    def num_free(self) -> int:
        """Blocks that allocate() can give out, cached ones among them."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks, used or free, whose content a key names."""
        return sum(len(blocks) for blocks in self._by_key.values())

    def find(self, key: bytes) -> int | None:
        """A block that holds key's content, or None."""
        blocks = self._by_key.get(key)
        return blocks[0] if blocks else None

    def is_free(self, block: int) -> bool:
        return self._refs[block] == 0

    def acquire(self, blocks: Sequence[int]) -> None:
        """One more user for each of these blocks (of a match): they cannot be evicted until released."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._free[block]
            self._refs[block] += 1

    def allocate(self, count: int) -> list[int]:
        """count blocks for one user, their old content forgotten. Raises OutOfBlocks, changing nothing."""
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks wanted, {len(self._free)} free of {self.num_blocks}")
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            if self._keys[block] is not None:
                self._forget(block)
                self.num_evictions += 1
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def commit(self, block: int, key: bytes) -> None:
        """Publish: block (in use) holds key's content, completely written."""
        if self._refs[block] == 0:
            raise ValueError(f"block {block} is free: only a block in use can be committed")
        if self._keys[block] == key:
            return
        if self._keys[block] is not None:
            raise ValueError(f"block {block} holds another key already")
        self._keys[block] = key
        self._by_key.setdefault(key, []).append(block)

    def release(self, blocks: Sequence[int]) -> None:
        """One user less for each block, given in table order: tails are evicted before heads."""
        for block in reversed(blocks):
            if self._refs[block] <= 0:
                raise ValueError(f"block {block} is released more often than acquired")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)

    def reset_cache(self) -> None:
        """Forget every key; users keep their blocks."""
        for block in range(self.num_blocks):
            if self._keys[block] is not None:
                self._forget(block)

    def check_integrity(self, in_use: dict[int, int] | None = None) -> None:
        """Raise AssertionError unless the books are whole; in_use: expected users a block, others 0."""
        free = {block for block in range(self.num_blocks) if self._refs[block] == 0}
        assert free == set(self._free), f"free list and reference counts differ: {free ^ set(self._free)}"
        named = [block for blocks in self._by_key.values() for block in blocks]
        keyed = [block for block, key in enumerate(self._keys) if key is not None]
        assert sorted(named) == keyed, f"keys and blocks differ: {sorted(named)} {keyed}"
        for key, blocks in self._by_key.items():
            assert blocks, "a key maps to no block"
            assert all(self._keys[block] == key for block in blocks), f"blocks {blocks} under a wrong key"
        if in_use is not None:
            used = {block: refs for block, refs in enumerate(self._refs) if refs}
            assert used == in_use, f"blocks in use: book {used}, sequences {in_use}"

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        self._keys[block] = None
        holders = self._by_key[key]
        holders.remove(block)
        if not holders:
            del self._by_key[key]
