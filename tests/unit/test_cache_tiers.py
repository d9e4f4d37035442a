"""What is stored and when, and what the host gives up: the rules one by one."""

from __future__ import annotations

import pytest
from cache_steps import admit, compute, found, prompt, pushed_out, serve, store, tiers

from ds_serve.cache.host import HostBook, State, Twin
from ds_serve.cache.manager import CacheManager
from ds_serve.cache.policy import EvictionOrder
from ds_serve.cache.pool import OutOfBlocks

# -- stores --------------------------------------------------------------------------------------


def test_what_is_evicted_next_is_stored_and_found_on_the_host():
    manager = pushed_out(1, 2)
    match = found(manager, prompt(1, 3))
    assert match.device == [] and len(match.host) == 3 and not match.waits
    assert (manager.evictions, manager.lost_blocks, manager.num_host_used) == (3, 0, 6)


def test_tails_are_stored_before_heads_and_blank_blocks_count_in_the_zone():
    manager = tiers(num_blocks=6, store_zone=4)
    table = compute(manager, manager.new_table(), prompt(1, 3))
    head, middle, tail, _ = table.block_ids
    manager.free(table)  # three are blank now
    assert [device for device, _ in store(manager)] == [tail]
    assert manager.stores() == []
    manager.grow(manager.new_table(), 8)  # takes two of the blank ones
    assert [device for device, _ in store(manager)] == [middle, head]


def test_nothing_is_due_where_nothing_changed_and_the_order_is_not_asked(monkeypatch):
    manager = tiers()
    serve(manager, prompt(1, 3))
    monkeypatch.setattr(EvictionOrder, "pop", None)
    monkeypatch.setattr(EvictionOrder, "first", None)
    assert manager.stores() == []


def test_a_store_is_not_visible_before_it_is_done_and_its_source_stays():
    manager = tiers()
    table = compute(manager, manager.new_table(), prompt(1, 3))
    manager.free(table)
    stores = manager.stores()
    assert len(stores) == 3 and manager.num_storing == 3 and manager.pool.num_free == 1
    assert manager.stores() == [], "at most one store of a key at a time"
    with pytest.raises(OutOfBlocks):
        manager.pool.allocate(2)
    assert manager.host.blocks(State.WRITING) == [0, 1, 2] and manager.host.blocks(State.READY) == []
    assert len(found(manager, prompt(1, 3)).device) == 3
    manager.stored(stores, [])
    assert manager.pool.num_free == 4 and manager.host.blocks(State.READY) == [0, 1, 2]


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("zone", [3, 6])
def test_stored_blocks_go_back_to_their_place_in_the_order(in_turn, zone):
    manager = tiers(num_blocks=8, store_zone=zone)
    first, second = (compute(manager, manager.new_table(), prompt(name, 3)) for name in (1, 2))
    wanted = list(reversed(first.block_ids[:3])) + list(reversed(second.block_ids[:3]))
    manager.free(first)
    manager.pool.allocate(1)
    early = manager.stores() if zone == 6 else []
    manager.free(second)
    manager.pool.allocate(1)  # no blank one is left
    stores = early + manager.stores()
    assert [device for device, _ in stores] == wanted[:zone]
    for done in reversed([[pair] for pair in stores]) if in_turn else [stores]:
        manager.stored(done, [])
    assert manager.pool.allocate(6) == wanted


def test_a_source_that_is_hit_while_its_store_runs_is_not_next_any_more():
    manager = tiers()
    manager.free(compute(manager, manager.new_table(), prompt(1, 3)))
    stores = manager.stores()
    table = admit(manager, prompt(1, 1))
    (hit,) = table.block_ids
    manager.free(table)
    assert not manager.pool.is_free(hit), "its store still reads it"
    manager.stored(stores, [])
    manager.check_integrity()
    assert manager.host.find(manager.pool.key(hit)).twin is Twin.STAYS
    assert manager.pool.allocate(4)[-1] == hit


def test_blocks_under_store_are_passed_over_where_they_are_next():
    manager = tiers(num_blocks=6)
    table = compute(manager, manager.new_table(), prompt(1, 5))
    *cached, blank = table.block_ids
    manager.free(table)
    first, second, third = manager.stores()
    manager.stored([second], [])
    assert manager.pool.allocate(3) == [blank, second[0], cached[1]]
    manager.stored([first, third], [])
    assert manager.pool.allocate(3) == [first[0], third[0], cached[0]]


def test_a_failed_store_is_dropped_and_not_tried_again():
    manager = tiers()
    manager.free(compute(manager, manager.new_table(), prompt(1, 3)))
    stores = manager.stores()
    manager.stored(stores, [1])
    manager.check_integrity()
    assert manager.num_host_used == 2 and manager.stores() == []
    manager.pool.allocate(4)
    assert (manager.evictions, manager.lost_blocks) == (3, 1)
    assert len(found(manager, prompt(1, 3)).host) == 1, "the middle block is gone"


def test_a_block_evicted_before_it_was_stored_is_lost_and_counted():
    manager = tiers()
    manager.free(compute(manager, manager.new_table(), prompt(1, 3)))
    manager.pool.allocate(4)
    assert (manager.evictions, manager.lost_blocks) == (3, 3)
    alone = CacheManager(4, 4, store_zone=4)
    alone.free(compute(alone, alone.new_table(), prompt(1, 3)))
    assert alone.stores() == []
    alone.pool.allocate(4)
    assert (alone.evictions, alone.lost_blocks) == (3, 0), "without a host nothing counts as lost"


def test_of_two_equal_blocks_the_second_keeps_the_key_on_the_device():
    manager = tiers(num_blocks=2, store_zone=2)
    one, two = manager.new_table(), manager.new_table()
    for table in (one, two):
        manager.grow(table, 4)
    for table in (one, two):
        manager.commit(table, prompt(1, 1), 4)
    manager.free(one)
    (pair,) = store(manager)
    manager.pool.allocate(1)
    assert manager.lost_blocks == 0 and found(manager, prompt(1, 1)).device == two.block_ids
    alone = tiers(num_blocks=2, store_zone=0)
    for table in (tables := [alone.new_table(), alone.new_table()]):
        alone.grow(table, 4)
    for table in tables:
        alone.commit(table, prompt(1, 1), 4)
    assert [alone.pool.uses(table.block_ids[0]) for table in tables] == [0, 1], "computed again: a use"
    alone.free(tables[0])
    alone.pool.allocate(1)
    assert (alone.evictions, alone.lost_blocks) == (1, 0), "not stored, but not lost"
    assert manager.host.find(two.keys[0]).twin is Twin.STAYS
    assert pair[0] != two.block_ids[0]


# -- what the host gives up ----------------------------------------------------------------------


def test_the_host_gives_up_what_the_device_holds_too_before_anything_else():
    manager = tiers(num_blocks=9, num_host_blocks=6, store_zone=9)
    for name in (1, 2):
        serve(manager, prompt(name, 3))
    blank = manager.pool.allocate(6)  # three blank ones, and the first prompt's
    hit = admit(manager, prompt(2, 3))
    spare = [manager.host.find(key).block for key in hit.keys]
    manager.pool.release(blank[:2])
    manager.free(compute(manager, manager.new_table(), prompt(3, 1)))
    ((_, host),) = manager.stores()
    assert host == spare[-1] and manager.host_evictions == 1, "the newest: its twin stays longest"
    assert len(found(manager, prompt(1, 3)).host) == 3


def test_else_the_one_that_left_the_device_first_goes_first():
    manager = pushed_out(1, 2, 3, num_host_blocks=9)
    serve(manager, prompt(4, 3))
    assert found(manager, prompt(1, 3)).num_blocks == 0, "it left the device first"
    assert len(found(manager, prompt(2, 3)).host) == 3 and len(found(manager, prompt(3, 3)).host) == 3


def test_entries_in_use_or_about_to_be_the_only_copy_are_never_given_up():
    book = HostBook(3)
    leaving, loading, writing, late = (bytes([name]) * 16 for name in range(4))
    assert [book.begin_store(key, 0, 0) for key in (leaving, loading, writing)] == [0, 1, 2]
    for block in (0, 1):
        book.end_store(block, ok=True)
    book.settle(loading, Twin.GONE)
    book.begin_load(1)
    assert not book.has_room and book.begin_store(late, 0, 0) is None
    with pytest.raises(ValueError, match="host block 2: must be ready, is writing"):
        book.begin_load(2)
    with pytest.raises(ValueError, match="in the host tier already"):
        book.begin_store(writing, 0, 0)
    book.end_load(1, ok=True)
    assert book.has_room and book.begin_store(late, 0, 0) == 1 and book.find(loading) is None


def test_stores_wait_for_host_entries_that_are_in_use():
    manager = tiers(num_blocks=8, num_host_blocks=2, store_zone=8)
    manager.free(compute(manager, manager.new_table(), prompt(1, 4)))
    stores = manager.stores()
    assert len(stores) == 2 and manager.stores() == [], "the host is full of entries under store"
    manager.stored(stores, [])
    assert manager.stores() == [], "both are next to leave the device"
    table = manager.new_table()
    manager.grow(table, 4 * 5)
    assert len(manager.stores()) == 1, "one has left the device: it may go"


def test_what_the_policy_would_give_up_at_once_is_not_stored():
    class MostUsedStays(dict):
        def add(self, block, key, uses, depth=0):
            self[block] = uses

        def remove(self, block):
            del self[block]

        def pop(self):
            victim = min(reversed(self), key=self.__getitem__)
            self.remove(victim)
            return victim

    manager = tiers(num_blocks=2, num_host_blocks=1, store_zone=2)
    manager.host._order = MostUsedStays()
    for _ in range(2):
        assert serve(manager, prompt(1, 1)) in (0, 4)
    serve(manager, prompt(2, 1))
    assert len(found(manager, prompt(1, 1)).host) == 1
    assert manager.host_evictions == 0 and manager.num_host_used == 1
    serve(manager, prompt(3, 1))
    assert manager.lost_blocks == 1, "the second prompt was hit less often than the entry that is there"
    manager.check_integrity()


def test_both_tiers_together_hold_nearly_the_sum():
    manager = CacheManager(20, 4, num_host_blocks=32, store_zone=6)
    prompts = [prompt(name, 4) for name in range(11)]  # 44 blocks, asked for in a circle
    assert sum(serve(manager, tokens) for tokens in prompts) == 0
    for _ in range(3):
        assert [serve(manager, tokens) for tokens in prompts] == [16] * 11
    assert manager.lost_blocks == 0


def test_hits_and_depth_reach_the_policy_over_both_tiers(monkeypatch):
    seen = []
    add = EvictionOrder.add

    def spy(self, block, key, uses, depth=0):
        seen.append((depth, uses))
        add(self, block, key, uses, depth)

    monkeypatch.setattr(EvictionOrder, "add", spy)
    manager = tiers()
    serve(manager, prompt(1, 2))
    assert seen == [(1, 0), (0, 0)]
    for name in (2, 1, 3, 1):
        seen.clear()
        serve(manager, prompt(name, 2))
    assert (0, 2) in seen and (1, 2) in seen, "hit twice, each time on the host"
    serve(manager, prompt(4, 2))
    table = manager.new_table()
    manager.take_prefix(table, manager.match(table, prompt(1, 2)), load=False)
    seen.clear()
    manager.free(compute(manager, table, prompt(1, 2)))
    store(manager)
    assert (0, 3) in seen and (1, 3) in seen, "computed though it is on the host: a use too"
