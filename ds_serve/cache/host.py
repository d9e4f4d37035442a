"""The book of the host tier: which key lies in which host block, and which entry is given up next.

An entry is writing (its store is under way: nobody sees it), ready, or loading (a load reads it). Only a
ready one can be given up: first those whose key stays on the device too, then, in the policy's order, those
that the device no longer has. Knows no device block, no sequence and no tensor; called by the manager, which
tells it what the device has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from ds_serve.cache.policy import EvictionOrder


class State(Enum):
    WRITING = "writing"
    READY = "ready"
    LOADING = "loading"


class Twin(Enum):
    """What the device has of an entry's key."""

    STAYS = "stays"  # this entry is a spare copy: given up first
    LEAVES = "leaves"  # next to be evicted from the device: not given up, it would have to be stored again
    GONE = "gone"  # nothing: the policy decides


@dataclass(slots=True)
class HostEntry:
    """uses and depth as of the moment when the device lost the key."""

    block: int
    key: bytes
    uses: int
    depth: int
    state: State = State.WRITING
    twin: Twin = Twin.LEAVES


class HostBook:
    """Blocks 0 .. num_blocks - 1 of host memory; with 0 there is no host tier, and nothing is found."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 0:
            raise ValueError(f"num_host_blocks: must be at least 0, got {num_blocks}")
        self.num_blocks = num_blocks
        self.num_evictions = 0
        self._by_key: dict[bytes, HostEntry] = {}
        self._entries: list[HostEntry | None] = [None] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        # Of spare copies the newest goes first: its twin stays longest on the device.
        self._spare: dict[int, None] = {}
        # One number more than blocks, for a newcomer that is weighed against those that are there.
        self._order = EvictionOrder(num_blocks + 1)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def has_room(self) -> bool:
        """Whether a store could find a block now."""
        return bool(self._free or self._spare or len(self._order))

    def find(self, key: bytes) -> HostEntry | None:
        """The entry of a key, in whatever state, or None."""
        return self._by_key.get(key)

    def blocks(self, state: State) -> list[int]:
        """All blocks whose entry is in this state."""
        return [entry.block for entry in self._entries if entry is not None and entry.state is state]

    def begin_store(self, key: bytes, uses: int, depth: int) -> int | None:
        """A block for a key that is not here, whose entry is writing until end_store(); its twin is leaving.

        None where every entry is in use, or the policy would give up the newcomer itself.
        """
        if key in self._by_key:
            raise ValueError(f"key {key.hex()} is in the host tier already")
        block = self._take_block(key, uses, depth)
        if block is not None:
            self._entries[block] = self._by_key[key] = HostEntry(block, key, uses, depth)
        return block

    def end_store(self, block: int, ok: bool) -> None:
        """The store into block is done: its entry is ready, or, where it failed, gone."""
        self._end(block, State.WRITING, ok)

    def begin_load(self, block: int) -> HostEntry:
        """A hit: the entry in block is read until end_load(). Raises ValueError unless it is ready."""
        entry = self._entry(block, State.READY)
        self._leave_order(entry)
        entry.state = State.LOADING
        entry.uses += 1
        return entry

    def end_load(self, block: int, ok: bool) -> None:
        """The load from block is done: its entry is ready again, or, where it failed, gone."""
        self._end(block, State.LOADING, ok)

    def settle(self, key: bytes, twin: Twin, uses: int = 0) -> bool:
        """Tells what the device has of key now (uses: its hits, for GONE); False where there is no entry."""
        entry = self._by_key.get(key)
        if entry is None:
            return False
        if twin is not entry.twin:
            self._leave_order(entry)
            entry.twin = twin
            entry.uses = max(uses, entry.uses)
            self._enter_order(entry)
        return True

    def check_integrity(self, twin_of: Callable[[bytes], Twin]) -> None:
        """Raise AssertionError unless the book is whole; twin_of: what the device has of a key."""
        entries = [entry for entry in self._entries if entry is not None]
        used = [block for block, entry in enumerate(self._entries) if entry is not None]
        assert sorted(used + self._free) == list(range(self.num_blocks)), "host blocks lost or shared"
        assert [entry.block for entry in entries] == used, "an entry lies in another entry's block"
        assert {entry.key: entry for entry in entries} == self._by_key, "keys and entries differ"
        assert len(self._by_key) == len(entries), "a key is in the host tier twice"
        for entry in entries:
            assert entry.twin is twin_of(entry.key), f"host block {entry.block}: its twin is {entry.twin}"
            ready = entry.state is State.READY
            spare, ordered = ready and entry.twin is Twin.STAYS, ready and entry.twin is Twin.GONE
            assert (entry.block in self._spare) == spare, f"host block {entry.block}: spare is {not spare}"
            assert (entry.block in self._order) == ordered, f"host block {entry.block}: order {not ordered}"
        places = len(self._spare) + len(self._order)
        found = sum(entry.state is State.READY and entry.twin is not Twin.LEAVES for entry in entries)
        assert places == found, f"{places} places in the orders, {found} entries that can be given up"

    def _take_block(self, key: bytes, uses: int, depth: int) -> int | None:
        if self._free:
            return self._free.pop()
        if self._spare:
            block = next(reversed(self._spare))
            return self._evict(block)
        newcomer = self.num_blocks
        self._order.add(newcomer, key, uses, depth)
        victim = self._order.pop()
        if victim == newcomer:
            return None
        self._order.remove(newcomer)
        return self._evict(victim)

    def _evict(self, block: int) -> int:
        self._spare.pop(block, None)
        entry = self._entries[block]
        self._entries[block] = None
        del self._by_key[entry.key]
        self.num_evictions += 1
        return block

    def _end(self, block: int, state: State, ok: bool) -> None:
        entry = self._entry(block, state)
        if ok:
            entry.state = State.READY
            self._enter_order(entry)
            return
        self._entries[block] = None
        del self._by_key[entry.key]
        self._free.append(block)

    def _entry(self, block: int, state: State) -> HostEntry:
        entry = self._entries[block] if 0 <= block < self.num_blocks else None
        if entry is None or entry.state is not state:
            found = "no entry" if entry is None else entry.state.value
            raise ValueError(f"host block {block}: must be {state.value}, is {found}")
        return entry

    def _enter_order(self, entry: HostEntry) -> None:
        if entry.state is not State.READY:
            return
        if entry.twin is Twin.STAYS:
            self._spare[entry.block] = None
        elif entry.twin is Twin.GONE:
            self._order.add(entry.block, entry.key, entry.uses, entry.depth)

    def _leave_order(self, entry: HostEntry) -> None:
        if entry.state is not State.READY:
            return
        if entry.twin is Twin.STAYS:
            del self._spare[entry.block]
        elif entry.twin is Twin.GONE:
            self._order.remove(entry.block)
