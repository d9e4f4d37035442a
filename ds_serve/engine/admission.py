"""The waiting requests: their order, and whose turn it is to take a slot.

Order is by priority, then arrival. Among the first of equal priority the one with the longest cached prefix,
beside what it must compute, may go first, since the prefix may be evicted while it waits. Nobody is overtaken
more than a few times, and one that has begun (it was preempted) not at all: so the first always gets on.

One whose prefix is just being loaded for another is passed over, by whomever, until that load is done.

Knows the cache as what matches; changes neither it nor a sequence's progress. Called by the scheduler.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass

from ds_serve.cache.manager import CacheManager
from ds_serve.cache.table import Match
from ds_serve.engine.limits import Limits
from ds_serve.engine.sequence import Sequence

# Who may overtake: the first of the queue so far. Each that is looked at costs a look-up in the cache.
WINDOW = 8

# How far the window is filled up past those that wait for another's load.
LOOK_AHEAD = 64

# Prefixes are looked up again after so many steps. Stale meanwhile is the order, nothing else: the one whose
# turn it is, is always looked up.
LOOK_AGAIN_STEPS = 8

NO_MATCH = Match(device=[], beyond=[])


@dataclass(frozen=True, slots=True)
class Candidate:
    """Whose turn it is. num_cached: tokens that it need not compute, those of loads among them."""

    sequence: Sequence
    match: Match
    loads: bool
    num_cached: int


class WaitingQueue:
    """Requests without a slot."""

    def __init__(self, limits: Limits, cache: CacheManager) -> None:
        self._cache = cache
        self._block_size = cache.block_size
        self._max_overtaken = limits.max_overtaken
        self._loads_pay = limits.loads_pay(cache.block_size)
        self._order: list[Sequence] = []  # sorted by key
        self._now = 0  # counts next(), and jumps where a load has ended

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._order)

    def add(self, sequence: Sequence) -> None:
        insort(self._order, sequence, key=_key)

    def remove(self, sequence: Sequence) -> None:
        self._order.remove(sequence)

    def clear(self) -> None:
        self._order.clear()

    def look_again(self) -> None:
        """A load has ended: what was looked up may be otherwise now."""
        self._now += LOOK_AGAIN_STEPS

    def next(self, num_promised: int) -> Candidate | None:
        """Whose turn it is, if its whole prompt fits beside num_promised blocks; still in the queue."""
        self._now += 1
        if num_promised >= self._cache.pool.num_free:
            return None  # everyone needs a block at least
        window = self._window()
        while window:
            # Of equals max takes the first. Where the best does not fit, the first in order may.
            best = max(window, key=_prefix_score)
            for sequence in dict.fromkeys((best, window[0])):
                candidate = self._look_up(sequence)
                if sequence.waits_for_load:
                    window.remove(sequence)
                    break
                if self._fits(candidate, num_promised):
                    return candidate
            else:
                return None
        return None

    def admit(self, candidate: Candidate) -> None:
        """It leaves the queue; those before it have been overtaken, unless they wait for a load anyway."""
        for sequence in self._order:
            if sequence is candidate.sequence:
                break
            sequence.num_overtaken += not sequence.waits_for_load
        self._order.remove(candidate.sequence)

    def _window(self) -> list[Sequence]:
        """Who may go first, in order, and knows its score."""
        window: list[Sequence] = []
        for sequence in self._order[:LOOK_AHEAD]:
            if window and sequence.request.priority != window[0].request.priority:
                break
            if self._now >= sequence.look_again_at:
                self._look_up(sequence)
            if sequence.waits_for_load:
                continue
            window.append(sequence)
            is_overtaken_enough = sequence.num_overtaken >= self._max_overtaken
            if len(window) == WINDOW or is_overtaken_enough or sequence.num_output:
                break
        return window

    def _look_up(self, sequence: Sequence) -> Candidate:
        """What the cache has for it now; its score goes with it."""
        num_tokens = len(sequence.token_ids)
        match = self._cache.match(sequence.table, sequence.token_ids) if sequence.uses_cache else NO_MATCH
        loads = self._loads_pay and bool(match.beyond)
        num_cached = (match.num_blocks if loads else match.on_device) * self._block_size
        sequence.prefix_score = num_cached / (num_tokens - num_cached)
        sequence.waits_for_load = match.waits
        sequence.look_again_at = self._now + LOOK_AGAIN_STEPS
        return Candidate(sequence, match, loads, num_cached)

    def _fits(self, candidate: Candidate, num_promised: int) -> bool:
        """Its blocks beside those promised: what is loaded takes device blocks as what is computed does."""
        match, loads = candidate.match, candidate.loads
        needed = self._cache.needed(len(candidate.sequence.token_ids), match, loads)
        return needed + num_promised <= self._cache.free_after(match, loads)


def _key(sequence: Sequence) -> tuple[int, int]:
    return sequence.key


def _prefix_score(sequence: Sequence) -> float:
    return sequence.prefix_score
