"""What is found over both tiers, and how it is loaded: the rules one by one."""

from __future__ import annotations

import pytest
from cache_steps import admit, compute, found, land, prompt, pushed_out, serve, store, tiers

from ds_serve.cache.host import State, Twin
from ds_serve.cache.manager import CacheManager
from ds_serve.cache.pool import OutOfBlocks
from ds_serve.cache.table import Match


def mixed() -> tuple[CacheManager, list[int]]:
    """A prompt of four blocks that lie on device, host, device, host."""
    manager = CacheManager(8, 4, num_host_blocks=8, store_zone=8)
    tokens = prompt(1, 4)
    first = compute(manager, manager.new_table(), tokens)
    keys = list(first.keys)
    manager.free(first)
    store(manager)
    manager.pool.allocate(8)
    for index in (0, 2):
        manager.pool.commit(index, keys[index], index)
        manager._settle(keys[index])
    manager.pool.release(list(range(8)))
    manager.check_integrity()
    return manager, tokens


def test_a_prefix_may_lie_device_host_device_host():
    manager, tokens = mixed()
    table = manager.new_table()
    match = manager.match(table, tokens)
    assert match.device == [0] and [tier for tier, _ in match.beyond] == ["host", "device", "host"]
    assert match.num_blocks == 4 and match.taken(False) == [0] and match.taken(True) == [0, 2]
    assert (manager.free_after(match), manager.free_after(match, load=True)) == (7, 6)
    cached, loads = manager.take_prefix(table, match, load=True)
    assert cached == 16 and [host for host, _ in loads] == match.host
    assert table.block_ids == [0, loads[0][1], 2, loads[1][1]]
    manager.check_integrity([table])
    assert manager.loaded(table, loads, []) == 16
    assert found(manager, tokens).device == table.block_ids


def test_without_load_only_the_leading_part_is_taken():
    manager, tokens = mixed()
    table = manager.new_table()
    assert manager.take_prefix(table, manager.match(table, tokens), load=False) == (4, [])
    assert table.block_ids == [0] and manager.host.blocks(State.LOADING) == []


def test_a_failed_load_cuts_the_prefix_and_shared_blocks_leave_the_table():
    manager, tokens = mixed()
    table = admit(manager, tokens)
    (lost, target), (kept, later) = table.loads
    manager.grow(table, len(tokens))
    last = table.block_ids[-1]
    assert manager.loaded(table, list(table.loads), [0]) == 4
    manager.check_integrity([table])
    assert table.block_ids == [0, target, later, last], (
        "block 2 is visible to others: it must not be overwritten"
    )
    assert manager.pool.is_free(2) and manager.pool.key(2) is not None
    assert manager.host.blocks(State.READY) == sorted({0, 1, 2, 3} - {lost}) and kept != lost
    match = found(manager, tokens)
    assert match.device == [0] and match.host == []
    compute(manager, table, tokens)
    manager.check_integrity([table])
    assert len(found(manager, tokens).device) == 4


def test_a_load_is_not_visible_before_it_is_done_and_others_wait_for_it():
    manager = pushed_out(1, 2, num_blocks=3)
    table = admit(manager, prompt(1, 3))
    match = found(manager, prompt(1, 3))
    assert match == Match([], [], waits=True)
    assert not found(manager, prompt(9, 3)).waits
    land(manager, table)
    assert found(manager, prompt(1, 3)) == Match(table.block_ids, [])
    assert all(manager.host.find(key).twin is Twin.STAYS for key in table.keys)


def test_after_a_failed_load_nobody_waits_for_the_lost_key():
    manager = pushed_out(1, 2)
    table = admit(manager, prompt(1, 3))
    assert land(manager, table, failed=[0, 1, 2]) == 0
    assert found(manager, prompt(1, 3)) == Match()
    manager.free(table)
    manager.check_integrity()
    assert manager.num_host_used == 3


def test_an_aborted_load_lands_before_its_blocks_go():
    manager = pushed_out(1, 2)
    table = admit(manager, prompt(1, 3))
    with pytest.raises(ValueError, match="must land first"):
        manager.free(table)
    land(manager, table)
    manager.free(table)
    manager.check_integrity()
    assert manager.pool.num_free == 4 and len(found(manager, prompt(1, 3)).device) == 3


def test_a_prefix_that_does_not_fit_changes_nothing():
    manager = pushed_out(1, 2)
    other = manager.new_table()
    manager.grow(other, 8)
    table = manager.new_table()
    match = manager.match(table, prompt(1, 3))
    with pytest.raises(OutOfBlocks, match="3 blocks wanted to load a prefix into, 2 free"):
        manager.take_prefix(table, match, load=True)
    manager.check_integrity([other, table])
    assert manager.take_prefix(table, match, load=False) == (0, [])


def test_a_hit_leaves_one_token_to_compute_on_the_host_too():
    manager = pushed_out(1, 2)
    assert len(found(manager, prompt(1, 3)[:12]).host) == 2
    assert len(found(manager, prompt(1, 3)[:13]).host) == 3


def test_no_hit_across_salts_in_either_tier():
    manager = tiers()
    serve(manager, prompt(1, 3), salt="a")
    assert found(manager, prompt(1, 3), salt="b") == Match() and found(manager, prompt(1, 3)) == Match()
    assert len(found(manager, prompt(1, 3), salt="a").device) == 3
    serve(manager, prompt(2, 3))
    assert found(manager, prompt(1, 3), salt="b") == Match() and found(manager, prompt(1, 3)) == Match()
    assert len(found(manager, prompt(1, 3), salt="a").host) == 3


def test_without_prefix_caching_neither_tier_holds_anything():
    manager = CacheManager(4, 4, prefix_caching=False, num_host_blocks=8, store_zone=4)
    assert serve(manager, prompt(1, 3)) == serve(manager, prompt(1, 3)) == 0
    assert manager.num_host_blocks == manager.num_host_used == manager.lost_blocks == 0


def test_what_was_not_ordered_cannot_land():
    manager = pushed_out(1, 2)
    table = admit(manager, prompt(1, 3))
    with pytest.raises(ValueError, match="under way for this table"):
        manager.loaded(table, table.loads[:1], [])
    with pytest.raises(ValueError, match="under way for this table"):
        manager.loaded(manager.new_table(), [], [])
    with pytest.raises(ValueError, match="no store of device block 0 to host block 1"):
        manager.stored([(0, 1)], [])
    with pytest.raises(ValueError, match="holds nothing else"):
        manager.take_prefix(table, Match(), load=False)
    with pytest.raises(ValueError, match="num_host_blocks"):
        CacheManager(4, 4, num_host_blocks=-1)


def test_a_long_prefix_is_loaded_in_parts_at_the_cost_of_nothing_on_the_device():
    manager = CacheManager(16, 4, num_host_blocks=32, store_zone=4)
    for name in range(4):
        table = manager.new_table()
        for end in (8, 16, 24, 32, 33):  # in chunks: each finds what it evicts stored
            manager.grow(table, end)
            manager.commit(table, prompt(name, 8), end)
            store(manager)
        manager.free(table)
        store(manager)
    table, rounds, good = manager.new_table(), 0, 0
    while (match := manager.match(table, prompt(0, 8))).num_blocks:
        room = manager.load_room(match)
        part = match.first(room)
        manager.take_prefix(table, part, load=True)
        assert match.device == [] and len(part.host) == min(room, len(match.host)) and not part.waits
        good += len(part.host)
        assert land(manager, table) == 4 * good
        stores = manager.stores()
        assert stores and manager.load_room(Match()) == 4 - len(stores), "not those under store"
        manager.stored(stores, [])
        rounds += 1
    manager.check_integrity([table])
    assert (rounds, good, manager.lost_blocks) == (2, 8, 0)
    assert manager.match(table, prompt(0, 8)[:-1] + [7, 7]) == Match(), "nothing continues it"
    manager.free(table)
    table = manager.new_table()
    manager.grow(table, 4)
    assert manager.match(table, prompt(0, 8)) == Match(), "it holds more than a prefix"


def test_load_room_leaves_out_what_the_match_itself_takes():
    manager, tokens = mixed()
    match = found(manager, tokens)
    assert manager.load_room(match) == manager.free_after(match, load=True) == 6
    store(manager)
    assert manager.load_room(match) == 6 and match.first(0) == Match([0]) and match.first(2) is match
    assert match.first(1).taken(load=True) == [0, 2]
