"""Pins: device blocks that a name keeps from being evicted until a time has passed.

A pin is a reference to each of its blocks. How many distinct blocks all pins hold together is bounded. Knows
blocks and the pool, and neither keys, tokens nor a clock; called by the manager.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ds_serve.cache.pool import BlockPool


@dataclass(frozen=True, slots=True)
class _Pin:
    blocks: tuple[int, ...]
    until: float
    must: bool


class PinBook:
    """max_blocks: how many distinct blocks may be pinned at once."""

    def __init__(self, pool: BlockPool, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self._pool = pool
        self._pins: dict[str, _Pin] = {}
        self._users: Counter[int] = Counter()
        self._next_expiry = math.inf  # no pin expires before

    @property
    def num_blocks(self) -> int:
        """Distinct blocks that are pinned."""
        return len(self._users)

    def users(self) -> Counter[int]:
        """How many pins hold each block."""
        return Counter(self._users)

    def pin(self, name: str, blocks: Sequence[int], until: float, must: bool) -> str | None:
        """Pin these blocks (in use) instead of what the name pinned before; None, or why that cannot be.

        Where they do not fit, hints give way, the one that expires first before the others; what must be
        pinned never does until it has expired. Where they do not fit even so, nothing changes.
        """
        leaving = self._make_room(name, blocks)
        if leaving is None:
            taken = {block for pin in self._pins.values() if pin.must for block in pin.blocks}
            return (
                f"{len(blocks)} blocks cannot be pinned: {self.max_blocks} may be pinned at once, and "
                f"{len(taken)} of them must stay pinned until they expire or are released"
            )
        pin = _Pin(tuple(blocks), until, must)
        self._pool.acquire(pin.blocks, is_hit=False)
        self._users.update(pin.blocks)
        for other in (name, *leaving):
            self.unpin(other)
        self._pins[name] = pin
        self._next_expiry = min(self._next_expiry, until)
        return None

    def unpin(self, name: str) -> None:
        """Release a name's blocks; an unknown name is fine."""
        pin = self._pins.pop(name, None)
        if pin is None:
            return
        _drop(self._users, pin.blocks)
        self._pool.release(pin.blocks)

    def expire(self, now: float) -> None:
        """Release what was pinned until now or earlier. Costs nothing where there is none."""
        if now < self._next_expiry:
            return
        for name in [name for name, pin in self._pins.items() if pin.until <= now]:
            self.unpin(name)
        self._next_expiry = min((pin.until for pin in self._pins.values()), default=math.inf)

    def give_up(self) -> None:
        """Release the pin that is missed least: the hint that expires first, else what must be pinned.

        For one who needs the blocks and has no other way to get them. Raises ValueError where there is none.
        """
        self.unpin(min(self._pins, key=lambda name: (self._pins[name].must, self._pins[name].until)))

    def check_integrity(self) -> None:
        """Raise AssertionError unless the counts are those of the pins, and within the bound."""
        users = Counter(block for pin in self._pins.values() for block in pin.blocks)
        assert users == self._users, f"pinned blocks: book {self._users}, pins {users}"
        assert len(users) <= self.max_blocks, f"{len(users)} blocks are pinned, {self.max_blocks} may be"

    def _make_room(self, name: str, blocks: Sequence[int]) -> list[str] | None:
        """Names of the hints that have to give way to these blocks; None: it is not enough."""
        users = Counter(self._users)
        users.update(blocks)
        if name in self._pins:
            _drop(users, self._pins[name].blocks)
        leaving: list[str] = []
        if len(users) <= self.max_blocks:
            return leaving
        hints = [each for each, pin in self._pins.items() if not pin.must and each != name]
        for each in sorted(hints, key=lambda each: self._pins[each].until):
            leaving.append(each)
            _drop(users, self._pins[each].blocks)
            if len(users) <= self.max_blocks:
                return leaving
        return None


def _drop(users: Counter[int], blocks: Sequence[int]) -> None:
    """One user less for each block; those without any are no longer counted."""
    for block in blocks:
        users[block] -= 1
        if not users[block]:
            del users[block]
