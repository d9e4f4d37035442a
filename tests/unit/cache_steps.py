"""One engine's steps on the books of the cache, one request after the other: for tests of the manager."""

from __future__ import annotations

from collections.abc import Collection

from ds_serve.cache.manager import CacheManager
from ds_serve.cache.table import BlockTable, Match


def prompt(name: int, num_blocks: int, block_size: int = 4) -> list[int]:
    """Tokens of so many full blocks, and one more."""
    return [1000 * name + position for position in range(num_blocks * block_size + 1)]


def admit(manager: CacheManager, tokens: list[int], salt: str = "", load: bool = True) -> BlockTable:
    """A table with the longest prefix; its loads, if any, are under way."""
    table = manager.new_table(salt)
    manager.take_prefix(table, manager.match(table, tokens), load)
    return table


def land(manager: CacheManager, table: BlockTable, failed: Collection[int] = ()) -> int:
    """The table's loads are done; the tokens that are good."""
    if not table.loads:
        return table.num_committed * manager.block_size
    return manager.loaded(table, list(table.loads), failed)


def compute(manager: CacheManager, table: BlockTable, tokens: list[int]) -> BlockTable:
    """All that the table lacks of tokens is computed, and published."""
    manager.grow(table, len(tokens))
    manager.commit(table, tokens, len(tokens))
    return table


def store(manager: CacheManager) -> list[tuple[int, int]]:
    """What is due is stored, and done."""
    stores = manager.stores()
    manager.stored(stores, [])
    return stores


def serve(manager: CacheManager, tokens: list[int], salt: str = "") -> int:
    """A whole request, then the stores that are due; the tokens that it found in the cache."""
    table = admit(manager, tokens, salt)
    cached = land(manager, table)
    manager.free(compute(manager, table, tokens))
    store(manager)
    manager.check_integrity()
    return cached


def tiers(num_blocks: int = 4, num_host_blocks: int = 8, store_zone: int = 4) -> CacheManager:
    return CacheManager(num_blocks, 4, num_host_blocks=num_host_blocks, store_zone=store_zone)


def found(manager: CacheManager, tokens: list[int], salt: str = "") -> Match:
    return manager.match(manager.new_table(salt), tokens)


def pushed_out(*names: int, num_blocks: int = 3, num_host_blocks: int = 8) -> CacheManager:
    """Prompts of three blocks, on a device of four (or num_blocks + 1); all but the last only on the host."""
    manager = tiers(num_blocks + 1, num_host_blocks, num_blocks + 1)
    for name in names:
        serve(manager, prompt(name, num_blocks))
    return manager
