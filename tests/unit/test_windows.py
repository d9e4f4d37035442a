"""Layers that see a window: groups of layers, the bound on a sequence's blocks, prefixes with holes, pins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_serve.cache.manager import CacheManager
from ds_serve.cache.prefix import longest_seen
from ds_serve.messages import NO_BLOCK
from ds_serve.windows import MAX_GROUPS, MAX_PADDING, Windows, group_layers

REACHES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 9, 17]), min_size=1, max_size=4).map(tuple)


@given(REACHES, st.sampled_from([1, 2, 4]), st.integers(1, 30), st.integers(1, 60))
def test_most_blocks_is_what_a_sequence_holds_at_its_fullest(reaches, block_size, ahead, num_tokens):
    """Whatever results lag behind: from the first block kept to the last one that is being written."""
    windows = Windows(reaches, block_size, ahead)
    held = [
        sum(-(-min(computed + ahead, num_tokens) // block_size) - f for f in windows.firsts_kept(computed))
        for computed in range(num_tokens)
    ]
    assert max(held) <= windows.most_blocks(num_tokens)
    if len(reaches) == 1 and not num_tokens % block_size:
        assert max(held) == windows.most_blocks(num_tokens)


@given(REACHES, st.integers(0, 9), st.integers(0, 200), st.integers(1, 150))
def test_longest_is_the_longest_that_fits(reaches, ahead, num_blocks, limit):
    windows = Windows(reaches, 4, ahead)
    longest = windows.longest(num_blocks, limit)
    assert 0 <= longest <= limit and windows.most_blocks(longest) <= num_blocks
    assert longest == limit or windows.most_blocks(longest + 1) > num_blocks


@given(REACHES, st.integers(0, 12), st.data())
def test_longest_seen_is_the_longest_prefix_of_which_nothing_that_is_seen_is_missing(reaches, limit, data):
    windows = Windows(reaches, 4)
    cells = [(index, group) for index in range(limit) for group in range(len(reaches))]
    missing = data.draw(st.sets(st.sampled_from(cells), max_size=6)) if cells else set()
    blocks = {cell: number for number, cell in enumerate(cells) if cell not in missing}
    match = longest_seen(windows, limit, lambda index, group: blocks.get((index, group)))

    def needed(end):
        """Written out token by token: what the query at the end of so many blocks sees."""
        first = [end * 4 - reach + 1 if reach else 0 for reach in reaches]
        return {(token // 4, g) for g in range(len(reaches)) for token in range(max(0, first[g]), end * 4)}

    assert match.on_device == max(end for end in range(limit + 1) if not needed(end) & missing)
    seen = needed(match.on_device)
    entries = [(index, group) for index in range(match.on_device) for group in range(len(reaches))]
    assert match.device == [blocks[cell] if cell in seen else NO_BLOCK for cell in entries]


def interleaved(num_layers: int, period: int, window: int) -> list[int]:
    """Every period-th layer sees all."""
    return [0 if (layer + 1) % period == 0 else window for layer in range(num_layers)]


@pytest.mark.parametrize(
    ("num_layers", "period", "window", "groups"),
    [(26, 2, 4096, [1, 1]), (24, 2, 128, [1, 1]), (26, 6, 512, [1, 6]), (62, 6, 1024, [1, 5])],
    ids=["gemma2-2b", "gpt-oss-20b", "gemma3-1b", "gemma3-27b"],
)
def test_layers_of_one_reach_share_groups_of_even_sizes(num_layers, period, window, groups):
    reaches = interleaved(num_layers, period, window)
    found = group_layers(reaches, [1] * num_layers, [0] * num_layers, 131_072)
    assert [found.reaches.count(0), found.reaches.count(window)] == groups
    assert all(found.reaches[group] == reach for group, reach in zip(found.groups, reaches, strict=True))
    sizes = [found.groups.count(group) for group in range(len(found.reaches))]
    assert max(sizes) * len(sizes) <= MAX_PADDING * num_layers and len(sizes) <= MAX_GROUPS


@pytest.mark.parametrize(
    ("reaches", "stages", "max_model_len", "window"),
    [
        ([0] * 4, [0] * 4, 999, 0),
        ([64] * 4, [0] * 4, 999, 64),
        ([0] * 9 + [64], [0] * 10, 999, 0),  # a padded group would cost more than it gives back
        ([0, 64] * 4, [0] * 8, 64, 0),  # no sequence is longer than the window
        ([0] * 4 + [64] * 4, [0] * 4 + [1] * 4, 999, 0),  # each stage would have half of its rows empty
    ],
    ids=["all-full", "uniform", "uneven", "short", "stages"],
)
def test_where_groups_save_nothing_there_is_one(reaches, stages, max_model_len, window):
    found = group_layers(reaches, [1] * len(reaches), stages, max_model_len)
    assert found.reaches == (window,) and set(found.groups) == {0}


def test_pipeline_stages_have_their_share_of_every_group():
    stages = [layer // 13 for layer in range(26)]
    found = group_layers(interleaved(26, 2, 4096), [1] * 26, stages, 131_072)
    for group in range(2):
        here = [stage for each, stage in zip(found.groups, stages, strict=True) if each == group]
        assert abs(here.count(0) - here.count(1)) <= 1


@given(st.sampled_from([(6,), (0, 6), (0, 3, 10)]), st.integers(1, 40), st.integers(1, 9))
def test_a_pin_keeps_what_the_next_hit_needs_and_nothing_else(windows, length, step):
    manager = CacheManager(200, 4, windows=windows, max_pinned_blocks=200)
    tokens = list(range(length))
    table = manager.new_table()
    for end in [*range(step, length, step), length]:
        manager.grow(table, end)
        manager.commit(table, tokens, end)
        manager.slide(table, end)
        manager.check_integrity([table])
    assert manager.pin("name", table, length, 9.0, must=True) is None
    assert manager.num_pinned == manager.pin_size(length)
    manager.free(table)
    manager.pool.release(manager.pool.allocate(manager.pool.num_free))  # whatever else was cached is gone
    match = manager.match(manager.new_table(), tokens)
    assert match.on_device == (length - 1) // 4
    other = manager.new_table()
    assert manager.take_prefix(other, match, load=False) == (match.on_device * 4, [])
    manager.check_integrity([other])


def test_a_host_tier_and_windows_exclude_each_other():
    with pytest.raises(ValueError, match="host tier"):
        CacheManager(8, 4, windows=(0, 6), num_host_blocks=4)
