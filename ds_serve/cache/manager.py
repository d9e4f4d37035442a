"""The cache as the scheduler sees it: match a prefix, grow a table, commit what was computed, free.

Joins block keys and the device pool. Knows a sequence only as its BlockTable (tokens, blocks, keys); knows no
queue, no priority and no tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ds_serve.cache.hashing import block_key, root_key
from ds_serve.cache.pool import BlockPool


class BlockTable:
    """One sequence's blocks, in order, and the keys of its full blocks as far as they were asked for.

    Only ever grows at the end, until it is freed as a whole.
    """

    __slots__ = ("block_ids", "keys", "num_committed", "root")

    def __init__(self, root: bytes) -> None:
        self.root = root
        self.block_ids: list[int] = []
        self.keys: list[bytes] = []
        self.num_committed = 0


class CacheManager:
    """Block accounts for all sequences of one engine."""

    def __init__(self, num_blocks: int, block_size: int, *, identity: str = "", prefix_caching: bool = True):
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.prefix_caching = prefix_caching
        self._identity = identity

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks

    def new_table(self, salt: str = "") -> BlockTable:
        """An empty table; only tables of equal salt can share blocks."""
        return BlockTable(root_key(self._identity, salt))

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold num_tokens tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, table: BlockTable, token_ids: Sequence[int]) -> list[int]:
        """Blocks that hold the longest cached prefix of token_ids, at most all but the last token.

        Changes no reference: take_prefix() must follow before anything else is allocated.
        """
        if not self.prefix_caching:
            return []
        limit = (len(token_ids) - 1) // self.block_size
        blocks: list[int] = []
        for index in range(limit):
            block = self.pool.find(self._key(table, token_ids, index))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def free_after(self, matched: Sequence[int]) -> int:
        """Free blocks that would be left if the matched ones were taken."""
        return self.pool.num_free - sum(self.pool.is_free(block) for block in matched)

    def take_prefix(self, table: BlockTable, matched: Sequence[int]) -> int:
        """Puts matched blocks at the head of an empty table; returns the tokens they hold."""
        if table.block_ids:
            raise ValueError("a prefix can only be taken into an empty table")
        self.pool.acquire(matched)
        table.block_ids = list(matched)
        table.num_committed = len(matched)
        return len(matched) * self.block_size

    def missing(self, table: BlockTable, num_tokens: int) -> int:
        """Blocks that the table lacks to hold num_tokens tokens."""
        return max(0, self.blocks_for(num_tokens) - len(table.block_ids))

    def grow(self, table: BlockTable, num_tokens: int) -> list[int]:
        """New blocks so that the table holds num_tokens tokens. Raises OutOfBlocks, changing nothing."""
        new = self.pool.allocate(self.missing(table, num_tokens))
        table.block_ids += new
        return new

    def commit(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """Publish the blocks that num_computed tokens, written and confirmed, fill."""
        if not self.prefix_caching:
            return
        for index in range(table.num_committed, num_computed // self.block_size):
            self.pool.commit(table.block_ids[index], self._key(table, token_ids, index))
            table.num_committed = index + 1

    def free(self, table: BlockTable) -> None:
        """Give every block back; the keys of known tokens stay for a later match."""
        self.pool.release(table.block_ids)
        table.block_ids = []
        table.num_committed = 0

    def check_integrity(self, tables: Iterable[BlockTable] = ()) -> None:
        """Raise AssertionError unless the pool is whole and exactly these tables use its blocks."""
        users = Counter(block for table in tables for block in table.block_ids)
        self.pool.check_integrity(dict(users))

    def _key(self, table: BlockTable, token_ids: Sequence[int], index: int) -> bytes:
        while len(table.keys) <= index:
            start = len(table.keys) * self.block_size
            parent = table.keys[-1] if table.keys else table.root
            table.keys.append(block_key(parent, token_ids[start : start + self.block_size]))
        return table.keys[index]
