"""The longest prefix in the cache where some layers see a window only. Pure search; called by the manager."""

from __future__ import annotations

from collections.abc import Callable

from ds_serve.cache.table import Match
from ds_serve.messages import NO_BLOCK
from ds_serve.windows import Windows


def longest_seen(windows: Windows, limit: int, find: Callable[[int, int], int | None]) -> Match:
    """The longest prefix, of at most limit indexes, of which every group has what a query at its end sees.

    find(index, group): the block of that content, or None.
    """
    groups = range(windows.num_groups)
    whole, part = [g for g in groups if not windows.reaches[g]], [g for g in groups if windows.reaches[g]]
    end = 0 if whole else limit
    while end < limit and all(find(end, group) is not None for group in whole):
        end += 1
    while end:
        firsts = windows.firsts_seen(end * windows.block_size)
        gaps = (i for g in part for i in range(end - 1, firsts[g] - 1, -1) if find(i, g) is None)
        gap = next(gaps, None)
        if gap is None:
            entries = [find(i, g) if i >= firsts[g] else NO_BLOCK for i in range(end) for g in groups]
            return Match(entries, num_groups=len(groups))
        end = gap  # a prefix that ends between the two would need this block as well
    return Match(num_groups=len(groups))
