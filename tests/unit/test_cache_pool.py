"""The block pool by hypothesis over random operations, and the rules of the device tier one by one."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ds_serve.cache.hashing import block_key, root_key
from ds_serve.cache.manager import CacheManager
from ds_serve.cache.pool import BlockPool, OutOfBlocks


class PoolMachine(RuleBasedStateMachine):
    """A pool against a model of it: what each user holds, and what content each block was given."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(7, lambda key, *_: self.evicted.append(key))
        self.evicted: list[bytes] = []
        self.users: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    @rule(count=st.integers(0, 9))
    def allocate(self, count):
        free = self.pool.num_free
        if count > free:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(count)
            assert self.pool.num_free == free
            return
        self.evicted.clear()
        blocks = self.pool.allocate(count)
        held = {block for user in self.users for block in user}
        assert len(set(blocks)) == count and not held & set(blocks)
        known = [self.content.pop(block) for block in blocks if block in self.content]
        assert self.evicted == known
        self.users.append(blocks)

    @precondition(lambda self: any(self.users))
    @rule(data=st.data(), name=st.integers(0, 4))
    def commit(self, data, name):
        block = data.draw(st.sampled_from([block for user in self.users for block in user]))
        key = bytes([name]) * 16
        if self.content.get(block, key) != key:
            with pytest.raises(ValueError, match="another key"):
                self.pool.commit(block, key)
        else:
            self.pool.commit(block, key)
            self.content[block] = key

    @rule(name=st.integers(0, 4))
    def find_and_share(self, name):
        key = bytes([name]) * 16
        block = self.pool.find(key)
        assert (block is not None) == (key in self.content.values())
        if block is not None:
            assert self.content[block] == key
            self.pool.acquire([block])
            self.users.append([block])

    @rule(holds=st.booleans())
    def advance_zone(self, holds):
        free = self.pool.num_free
        block = self.pool.advance_zone()
        if block is None:
            return
        assert self.pool.is_leaving(self.content[block]) and self.pool.num_free == free
        if holds:
            self.pool.hold(block)
            self.users.append([block])

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def release(self, data):
        user = self.users.pop(data.draw(st.integers(0, len(self.users) - 1)))
        self.pool.release(user)

    @invariant()
    def books_are_whole(self):
        counts: dict[int, int] = {}
        for user in self.users:
            for block in user:
                counts[block] = counts.get(block, 0) + 1
        self.pool.check_integrity(counts)
        assert self.pool.num_cached == len(self.content)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def filled(manager: CacheManager, tokens: list[int], salt: str = ""):
    table = manager.new_table(salt)
    manager.take_prefix(table, manager.match(table, tokens), load=False)
    manager.grow(table, len(tokens))
    manager.commit(table, tokens, len(tokens))
    return table


def test_a_hit_leaves_at_least_one_token_to_compute():
    manager = CacheManager(8, 4)
    manager.free(filled(manager, list(range(8))))
    assert len(manager.match(manager.new_table(), list(range(8))).device) == 1
    assert len(manager.match(manager.new_table(), list(range(9))).device) == 2


def test_no_hit_across_salts_or_models():
    manager = CacheManager(8, 4)
    manager.free(filled(manager, list(range(8)), salt="a"))
    assert manager.match(manager.new_table("b"), list(range(9))).num_blocks == 0
    assert len(manager.match(manager.new_table("a"), list(range(9))).device) == 2
    assert root_key("model", "salt") != root_key("models", "alt")


def test_a_key_names_everything_before_it():
    root = root_key("m")
    assert block_key(block_key(root, [1, 2]), [3, 4]) != block_key(block_key(root, [1, 9]), [3, 4])
    assert block_key(root, [1, 23]) != block_key(root, [12, 3])


def test_tails_are_evicted_before_heads_and_unhashed_before_hashed():
    manager = CacheManager(4, 4)
    table = filled(manager, list(range(14)))  # three full blocks and a part of a fourth
    head, middle, tail, part = table.block_ids
    manager.free(table)
    assert manager.pool.allocate(4) == [part, tail, middle, head]


def test_least_recently_used_goes_first():
    manager = CacheManager(4, 4)
    first, second = filled(manager, [1] * 8), filled(manager, [2] * 8)
    manager.free(first)
    manager.free(second)
    again = filled(manager, [1] * 8)  # reuses one block of the first, and takes another
    manager.free(again)
    assert manager.pool.find(manager.new_table().root) is None
    assert len(manager.match(manager.new_table(), [1] * 9).device) == 2


def test_evicting_one_of_two_equal_blocks_keeps_the_other():
    manager = CacheManager(4, 4)
    one, two = manager.new_table(), manager.new_table()
    for table in (one, two):  # both computed side by side, before either was published
        manager.grow(table, 4)
    for table in (one, two):
        manager.commit(table, [5] * 4, 4)
    manager.free(one)
    manager.pool.allocate(3)
    assert manager.match(manager.new_table(), [5] * 5).device == two.block_ids


def test_a_matched_block_cannot_be_evicted_once_taken():
    manager = CacheManager(2, 4)
    manager.free(filled(manager, [1] * 8))
    table = manager.new_table()
    matched = manager.match(table, [1] * 8)
    assert manager.free_after(matched) == 1
    manager.take_prefix(table, matched, load=False)
    with pytest.raises(OutOfBlocks):
        manager.pool.allocate(2)
    assert manager.pool.allocate(1) != matched.device


def test_misuse_is_refused():
    pool = BlockPool(2)
    with pytest.raises(ValueError, match="free"):
        pool.commit(0, b"k")
    with pytest.raises(ValueError, match="more often"):
        pool.release([1])
    with pytest.raises(ValueError, match="num_blocks"):
        BlockPool(0)
