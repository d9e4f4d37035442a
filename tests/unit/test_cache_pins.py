"""Pins: what a name keeps on the device, for how long, and who gives way where the bound is reached."""

from __future__ import annotations

from cache_steps import admit, compute, prompt

from ds_serve.cache.manager import CacheManager


def pinned(manager: CacheManager, key: str, num: int, until: float, must: bool = False, name: int = 0):
    """Serves a prompt of num blocks (named by name, or its key) and pins it; what pin() says."""
    tokens = prompt(name or sum(key.encode()), num)
    table = compute(manager, admit(manager, tokens), tokens)
    said = manager.pin(key, table, len(tokens), until, must)
    manager.check_integrity([table])
    manager.free(table)
    manager.check_integrity()
    return said


def left(manager: CacheManager, num: int, name: int) -> int:
    """Blocks of the prompt that are still on the device."""
    return len(manager.match(manager.new_table(), prompt(name, num)).device)


def flood(manager: CacheManager) -> None:
    """Everything that can be evicted is."""
    manager.pool.release(manager.pool.allocate(manager.pool.num_free))


def test_what_is_pinned_is_not_evicted_until_its_time_has_passed():
    manager = CacheManager(8, 4, max_pinned_blocks=6)
    assert pinned(manager, "a", 3, until=10.0, name=1) is None
    assert pinned(manager, "b", 2, until=20.0, name=2, must=True) is None
    for now, first, second in ((9.9, 3, 2), (10.0, 0, 2), (19.0, 0, 2), (20.0, 0, 0)):
        manager.expire(now)
        flood(manager)
        assert (left(manager, 3, name=1), left(manager, 2, name=2)) == (first, second)
        assert manager.num_pinned == first + second


def test_only_committed_full_blocks_of_the_prompt_are_pinned():
    manager = CacheManager(8, 4, max_pinned_blocks=8)
    tokens = prompt(1, 4)
    table = manager.new_table()
    manager.grow(table, len(tokens))
    manager.commit(table, tokens, 9)
    assert manager.pin("a", table, 15, 1.0, must=True) is None
    assert manager.num_pinned == 2, "the third block is full, but not confirmed"
    manager.commit(table, tokens, len(tokens))
    manager.pin("a", table, 15, 1.0, must=True)
    assert manager.num_pinned == 3
    manager.check_integrity([table])


def test_a_newer_pin_of_a_name_replaces_the_older_one_and_renews_it():
    manager = CacheManager(8, 4, max_pinned_blocks=3)
    pinned(manager, "a", 3, until=10.0, name=1)
    pinned(manager, "a", 3, until=30.0, name=1)
    manager.expire(20.0)
    assert manager.num_pinned == 3
    assert pinned(manager, "a", 2, until=30.0, name=2, must=True) is None, "the older one makes room"
    assert manager.num_pinned == 2
    flood(manager)
    assert (left(manager, 3, 1), left(manager, 2, 2)) == (0, 2)


def test_blocks_that_two_pins_share_count_once():
    manager = CacheManager(8, 4, max_pinned_blocks=3)
    for name in ("a", "b"):
        assert pinned(manager, name, 3, until=10.0, must=True, name=1) is None
    assert manager.num_pinned == 3
    manager.unpin("a")
    flood(manager)
    assert manager.num_pinned == left(manager, 3, 1) == 3
    manager.unpin("b")
    manager.unpin("b")
    assert manager.num_pinned == 0


def test_a_must_that_does_not_fit_is_told_both_numbers_and_changes_nothing():
    manager = CacheManager(16, 4, max_pinned_blocks=4)
    assert pinned(manager, "a", 3, until=10.0, must=True) is None
    said = pinned(manager, "b", 2, until=99.0, must=True)
    assert "2 blocks" in said and "4 may be pinned" in said and "3 of them must stay" in said
    assert manager.num_pinned == 3
    said = pinned(manager, "a", 5, until=99.0, must=True)
    assert "5 blocks" in said and manager.num_pinned == 3
    manager.expire(10.0)
    assert pinned(manager, "b", 2, until=99.0, must=True) is None, "the first one's time has passed"


def test_hints_give_way_the_first_to_expire_before_others_and_never_a_must():
    manager = CacheManager(16, 4, max_pinned_blocks=6)
    pinned(manager, "must", 2, until=1.0, must=True, name=1)
    pinned(manager, "late", 2, until=30.0, name=2)
    pinned(manager, "soon", 2, until=20.0, name=3)
    assert pinned(manager, "new", 2, until=25.0, name=4) is None
    flood(manager)
    assert [left(manager, 2, name) for name in (1, 2, 3, 4)] == [2, 2, 0, 2]
    assert pinned(manager, "other", 4, until=40.0, must=True, name=5) is None, "hints give way to a must too"
    flood(manager)
    assert [left(manager, 4, name) for name in (1, 2, 4, 5)] == [2, 0, 0, 4]


def test_a_hint_that_cannot_fit_is_not_pinned_and_nobody_gives_way_for_it():
    manager = CacheManager(16, 4, max_pinned_blocks=4)
    pinned(manager, "must", 2, until=1.0, must=True)
    pinned(manager, "hint", 1, until=1.0, name=1)
    assert pinned(manager, "big", 3, until=9.0) is None
    flood(manager)
    assert manager.num_pinned == 3 and left(manager, 1, name=1) == 1
    nowhere = CacheManager(8, 4)
    assert pinned(nowhere, "a", 2, 1.0) is None and nowhere.num_pinned == 0
    assert "0 may be pinned" in pinned(nowhere, "a", 2, 1.0, must=True)


def test_a_pin_is_no_hit_and_pinned_blocks_match_as_usual():
    manager = CacheManager(8, 4, max_pinned_blocks=4)
    tokens = prompt(1, 3)
    pinned(manager, "a", 3, until=5.0, name=1)
    table = admit(manager, tokens)
    assert len(table.block_ids) == 3
    assert [manager.pool.uses(block) for block in table.block_ids] == [1, 1, 1]
    manager.free(table)
    manager.check_integrity()
