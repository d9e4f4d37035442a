"""The cache as the scheduler sees it: match a prefix, grow a table, commit what was computed, free.

Joins block keys, the device pool, the host's book and the pins. It orders copies between the tiers (stores
and loads) and is told when they are done; who makes them it does not know. Knows a sequence only as its
BlockTable (tokens, blocks, keys); knows no queue, no priority, no clock and no tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Literal

from ds_serve.cache.hashing import block_key, root_key
from ds_serve.cache.host import HostBook, State, Twin
from ds_serve.cache.pins import PinBook
from ds_serve.cache.pool import BlockPool, OutOfBlocks
from ds_serve.cache.prefix import longest_seen
from ds_serve.cache.table import BlockTable, Match
from ds_serve.messages import NO_BLOCK
from ds_serve.windows import Windows


class CacheManager:
    """Block accounts of both tiers for all sequences of one engine.

    windows            the reach of each group of layers (0: all), whose blocks are given back when they leave
                       it; only without a host tier. tokens_ahead: see Windows
    num_host_blocks    0: no host tier. A host block's id means the same on every rank
    store_zone         so many of the blocks that are given out next are kept in the host too (write-behind)
    max_pinned_blocks  distinct device blocks that all pins together may hold
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        identity: str = "",
        prefix_caching: bool = True,
        num_host_blocks: int = 0,
        store_zone: int = 0,
        max_pinned_blocks: int = 0,
        windows: Sequence[int] = (0,),
        tokens_ahead: int = 0,
    ) -> None:
        self.block_size = block_size
        self.windows = Windows(tuple(windows), block_size, tokens_ahead)
        if self.windows.slide and num_host_blocks:
            raise ValueError(f"windows {list(windows)}: a host tier keeps whole prefixes only")
        self.pool = BlockPool(num_blocks, self._evicted)
        self.host = HostBook(num_host_blocks if prefix_caching else 0)
        self.pins = PinBook(self.pool, max_pinned_blocks)
        self.prefix_caching = prefix_caching
        self.lost_blocks = 0
        self._identity = identity
        self._store_zone = store_zone if self.host.num_blocks else 0
        self._stores: dict[int, int] = {}  # under way: host block -> device block

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks

    @property
    def num_host_blocks(self) -> int:
        return self.host.num_blocks

    @property
    def evictions(self) -> int:
        """Cached device blocks that were given out for something else."""
        return self.pool.num_evictions

    @property
    def host_evictions(self) -> int:
        """Host entries that gave way to others, those whose key the device held too among them."""
        return self.host.num_evictions

    @property
    def num_host_used(self) -> int:
        """Host blocks that hold an entry, in whatever state."""
        return self.host.num_used

    @property
    def num_pinned(self) -> int:
        """Distinct device blocks that pins hold."""
        return self.pins.num_blocks

    @property
    def num_storing(self) -> int:
        """Stores under way. A source that nobody else uses is free again as soon as its store is done."""
        return len(self._stores)

    def new_table(self, salt: str = "", adapter: str = "") -> BlockTable:
        """An empty table; only tables of equal salt and adapter can share blocks."""
        return BlockTable(root_key(self._identity, salt, adapter), self.windows.num_groups)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold num_tokens tokens."""
        return -(-num_tokens // self.block_size)

    # -- a prefix --------------------------------------------------------------------------------

    def match(self, table: BlockTable, token_ids: Sequence[int]) -> Match:
        """The longest cached prefix of token_ids, at most all but the last token, over both tiers.

        Of a key that both have, the device's block counts. The table is empty, or holds the prefix so far:
        then this is what continues it, and nothing where it holds other blocks too. Changes nothing:
        take_prefix() must follow before anything else is allocated, stored or loaded.
        """
        device: list[int] = []
        beyond: list[tuple[Literal["device", "host"], int]] = []
        limit = (len(token_ids) - 1) // self.block_size if self.prefix_caching else 0
        if table.length > table.num_committed:
            limit = 0
        if self.windows.slide:
            return longest_seen(
                self.windows,
                0 if table.length else limit,
                lambda index, group: self.pool.find(self._key(table, token_ids, index, group)),
            )
        for index in range(table.num_committed, limit):
            key = self._key(table, token_ids, index)
            block = self.pool.find(key)
            if block is not None:
                if beyond:
                    beyond.append(("device", block))
                else:
                    device.append(block)
                continue
            entry = self.host.find(key)
            if entry is None or entry.state is not State.READY:
                return Match(device, beyond, waits=entry is not None and entry.state is State.LOADING)
            beyond.append(("host", entry.block))
        return Match(device, beyond)

    def needed(self, num_tokens: int, match: Match, load: bool = False) -> int:
        """Blocks that a sequence with this match will lack at most on its way to num_tokens tokens."""
        firsts = self.windows.firsts_seen(match.on_device * self.block_size)
        return self.windows.most_blocks(num_tokens, firsts) - len(match.taken(load))

    def free_after(self, match: Match, load: bool = False) -> int:
        """Free device blocks that would be left if match.taken(load) were taken."""
        return self.pool.num_free - sum(self.pool.is_free(block) for block in match.taken(load))

    def take_prefix(self, table: BlockTable, match: Match, load: bool) -> tuple[int, list[tuple[int, int]]]:
        """Puts a match into its table: the tokens that it holds now, and the loads that they need.

        Without load it is match.device alone. With load it is all of it: device blocks are taken over
        wherever they lie, and for each host block one is allocated, to be loaded: (host block, device block).
        Until loaded() is called for exactly these loads the tokens are not there, and the table cannot be
        freed. Where they are more than load_room(match), take match.first(load_room(match)), and match again
        when it has come: else blocks are evicted for it that the host does not have yet. Raises OutOfBlocks,
        changing nothing.
        """
        if table.length > table.num_committed:
            raise ValueError("a prefix can only be taken into a table that holds nothing else")
        wanted, left = len(match.host) if load else 0, self.free_after(match, load)
        if wanted > left:
            raise OutOfBlocks(f"{wanted} blocks wanted to load a prefix into, {left} free")
        taken = match.taken(load)
        self.pool.acquire(taken)
        for block in taken:
            self._settle(self.pool.key(block))
        table.block_ids += match.device
        table.num_committed += match.on_device
        if match.device:
            table.firsts = self.windows.firsts_seen(match.on_device * self.block_size)
        if load:
            for host in match.host:
                self.host.begin_load(host)
            table.loads = list(zip(match.host, self.pool.allocate(wanted), strict=True))
            targets = dict(table.loads)
            table.block_ids += [targets[block] if tier == "host" else block for tier, block in match.beyond]
        return table.length * self.block_size, list(table.loads)

    def load_room(self, match: Match) -> int:
        """Device blocks that a match's loads can take now at the cost of nothing that the host lacks.

        0 while stores are under way that will make room; where none is, every block that is left.
        """
        taken = match.taken(load=True)
        ready = self.pool.num_ready - sum(self.pool.is_ready(block) for block in taken)
        if self._store_zone and (ready or self._stores):
            return ready
        return self.free_after(match, load=True)

    def loaded(self, table: BlockTable, loads: Sequence[tuple[int, int]], failed: Collection[int]) -> int:
        """All ranks have done a table's loads; failed are indexes into them. Returns the good tokens.

        Those are the tokens before the first failed block, whose blocks are visible to others from now on.
        Later blocks of the prefix are to be computed: those that others can see leave the table, those that
        were loaded or were to be loaded stay, to be written again, and move up. Failed host entries are
        dropped.
        """
        if not table.loads or list(loads) != table.loads:
            raise ValueError(f"loads done: {list(loads)}, under way for this table: {table.loads}")
        sources = {device: host for host, device in loads}
        bad = {loads[index][0] for index in failed}
        table.loads = []
        good = table.num_committed
        for index, block in enumerate(table.block_ids[good:], start=good):
            host = sources.get(block)
            if host in bad or (host is None and self.pool.key(block) is None):
                break
            if host is not None:
                entry = self.host.find(table.keys[index])
                self.pool.commit(block, entry.key, index, entry.uses)
                self._settle(entry.key)
            good = index + 1
        for host in sources.values():
            self.host.end_load(host, host not in bad)
        rest = table.block_ids[good:]
        self.pool.release([block for block in rest if self.pool.key(block) is not None])
        table.block_ids[good:] = [block for block in rest if self.pool.key(block) is None]
        table.num_committed = good
        return good * self.block_size

    # -- a table ---------------------------------------------------------------------------------

    def missing(self, table: BlockTable, num_tokens: int) -> int:
        """Blocks that the table lacks to hold num_tokens tokens, beside what it holds now."""
        return table.num_groups * max(0, self.blocks_for(num_tokens) - table.length)

    def lacking(self, table: BlockTable, num_tokens: int) -> int:
        """Blocks that the table will lack at most on its way to num_tokens tokens."""
        if not self.windows.slide:
            return self.missing(table, num_tokens)
        held = sum(table.length - first for first in table.firsts)
        return max(0, self.windows.most_blocks(num_tokens, table.firsts) - held)

    def grow(self, table: BlockTable, num_tokens: int) -> list[int]:
        """New blocks so that the table holds num_tokens tokens. Raises OutOfBlocks, changing nothing."""
        new = self.pool.allocate(self.missing(table, num_tokens))
        table.block_ids += new
        return new

    def commit(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """Publish the blocks that num_computed tokens, written and confirmed, fill."""
        if not self.prefix_caching:
            return
        for index in range(table.num_committed, num_computed // self.block_size):
            for group in range(table.num_groups):
                key = self._key(table, token_ids, index, group)
                block = table.block_ids[index * table.num_groups + group]
                self.pool.commit(block, key, index, self._uses(key))
                self._settle(key)
            table.num_committed = index + 1

    def slide(self, table: BlockTable, num_computed: int) -> None:
        """Give back what nobody sees any more once num_computed tokens are confirmed; it stays in the cache.

        Steps in flight read tokens that queries from num_computed on see, so theirs are not among them.
        """
        if not self.windows.slide:
            return
        left: list[int] = []
        kept = self.windows.firsts_kept(num_computed)
        for group, first in enumerate(table.firsts):
            for index in range(first, kept[group]):
                place = index * table.num_groups + group
                left.append(table.block_ids[place])
                table.block_ids[place] = NO_BLOCK
            table.firsts[group] = max(first, kept[group])
        if left:
            self.pool.release(left)

    def free(self, table: BlockTable) -> None:
        """Give every block back; the keys of known tokens stay for a later match.

        Raises ValueError while a load writes into the table: its end (loaded()) must come first.
        """
        if table.loads:
            raise ValueError(f"{len(table.loads)} loads into this table are under way: they must land first")
        self.pool.release(table.blocks)
        table.clear()

    # -- write-behind ----------------------------------------------------------------------------

    def stores(self) -> list[tuple[int, int]]:
        """Copies (device block, host block) that are due now, so that eviction finds them done.

        The zone is filled up with the blocks that are evicted next; those that the host lacks are stored,
        and held until stored() is called. Costs nothing while the zone is full. Where all host entries
        are in use, it waits for them; a block that the host's policy would give up at once is not stored.
        """
        due = []
        while self.pool.num_next < self._store_zone and self.host.has_room:
            block = self.pool.advance_zone()
            if block is None:
                break
            key = self.pool.key(block)
            if self._settle(key):
                continue
            target = self.host.begin_store(key, self.pool.uses(block), self.pool.depth(block))
            if target is not None:
                self.pool.hold(block)
                self._stores[target] = block
                due.append((block, target))
        return due

    def stored(self, stores: Sequence[tuple[int, int]], failed: Collection[int]) -> None:
        """All ranks have done these stores; failed are indexes into them: their entries are dropped."""
        for block, target in stores:
            if self._stores.get(target) != block:
                raise ValueError(f"no store of device block {block} to host block {target} is under way")
        for index, (_, target) in enumerate(stores):
            del self._stores[target]
            self.host.end_store(target, index not in failed)
        self.pool.release([block for block, _ in stores])

    # -- pins ------------------------------------------------------------------------------------

    def pin(self, name: str, table: BlockTable, num_tokens: int, until: float, must: bool) -> str | None:
        """Keep what the table has of its first num_tokens, in full and committed blocks, until then.

        They replace what the name pinned before. None, or, only for must, why it cannot be: it names the
        blocks wanted and the bound. A hint that does not fit is dropped in silence. A pin holds until
        expire() is called with a time at or past its end.
        """
        length = min(num_tokens // self.block_size, table.num_committed)
        entries = table.block_ids[: length * table.num_groups]
        blocks = [block for block in entries if block != NO_BLOCK]
        problem = self.pins.pin(name, blocks, until, must)
        return problem if must else None

    def pin_size(self, num_tokens: int) -> int:
        """Blocks that a prompt's pin holds, once its num_tokens tokens are computed."""
        length = num_tokens // self.block_size
        return sum(max(0, length - first) for first in self.windows.firsts_kept(num_tokens))

    def unpin(self, name: str) -> None:
        """Release what a name pinned; unknown names are fine."""
        self.pins.unpin(name)

    def expire(self, now: float) -> None:
        """Release every pin whose time has come; costs nothing where there is none."""
        self.pins.expire(now)

    # -- the books -------------------------------------------------------------------------------

    def check_integrity(self, tables: Iterable[BlockTable] = ()) -> None:
        """Raise AssertionError unless both books are whole and exactly these tables, the pins and the stores
        under way use device blocks, and exactly these tables' loads read host blocks."""
        tables = list(tables)
        users = Counter(block for table in tables for block in table.blocks)
        for table in tables:
            for place, block in enumerate(table.block_ids):
                index, group = divmod(place, table.num_groups)
                assert (block == NO_BLOCK) == (index < table.firsts[group]), f"{block} at {index}, {group}"
        users.update(self._stores.values())
        users.update(self.pins.users())
        self.pool.check_integrity(dict(users))
        self.pins.check_integrity()
        self.host.check_integrity(self._twin)
        loading = sorted(host for table in tables for host, _ in table.loads)
        assert loading == self.host.blocks(State.LOADING), f"host blocks under load differ: {loading}"
        writing = self.host.blocks(State.WRITING)
        assert sorted(self._stores) == writing, f"host blocks under store differ: {writing}"

    def _evicted(self, key: bytes, uses: int, depth: int) -> None:
        if self.host.num_blocks and not self._settle(key, uses) and self.pool.find(key) is None:
            self.lost_blocks += 1

    def _settle(self, key: bytes, uses: int = 0) -> bool:
        """The host's book learns what the device has of key; False where it has no entry."""
        return self.host.settle(key, self._twin(key), uses) if self.host.num_blocks else False

    def _twin(self, key: bytes) -> Twin:
        if self.pool.find(key) is None:
            return Twin.GONE
        return Twin.LEAVES if self.pool.is_leaving(key) else Twin.STAYS

    def _uses(self, key: bytes) -> int:
        """Hits of a key that is computed now: that it is known already makes one more."""
        block, entry = self.pool.find(key), self.host.find(key)
        if block is not None:
            return self.pool.uses(block) + 1
        return 0 if entry is None else entry.uses + 1

    def _key(self, table: BlockTable, token_ids: Sequence[int], index: int, group: int = 0) -> bytes:
        """Key of a full index's tokens, and all before them; a group after the first adds its number."""
        while len(table.keys) <= index:
            start = len(table.keys) * self.block_size
            parent = table.keys[-1] if table.keys else table.root
            table.keys.append(block_key(parent, token_ids[start : start + self.block_size]))
        return table.keys[index] + bytes([group]) if group else table.keys[index]
