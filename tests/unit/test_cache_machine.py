"""Both tiers under random operations, against a model of what every block really holds.

Copies are made pair by pair at random moments between their order and their end, steps are computed before
they are confirmed, and anything may be freed, stored, loaded or pinned in between. After each operation the
books are whole, what is visible is what the block really holds, and nothing in use was given away.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ds_serve.cache.host import State
from ds_serve.cache.manager import CacheManager
from ds_serve.cache.pool import OutOfBlocks
from ds_serve.cache.table import BlockTable, Match

SIZE, DEVICE, HOST, PINNED = 2, 9, 10, 4
GARBAGE = "garbage"

# Few prompts of up to five blocks, the first block the same: so that they come back, from either tier.
PROMPTS = st.builds(
    lambda name, length: [7, 7, *[name] * 9][:length], st.integers(0, 4), st.sampled_from([2, 5, 8, 11, 11])
)


@dataclass(eq=False)
class Run:
    """A sequence that holds blocks. computed: tokens written; confirmed: tokens committed."""

    salt: str
    tokens: list[int]
    table: BlockTable
    computed: int = 0
    aborted: bool = False

    def content(self, index: int) -> tuple:
        """What block index holds once it is full."""
        return (self.salt, *self.tokens[: (index + 1) * SIZE])


@dataclass(eq=False)
class Copy:
    """A plan's loads (of run) or stores under way; made: pairs whose bytes have been copied."""

    pairs: list[tuple[int, int]]
    contents: list[object]
    run: Run | None = None
    made: set[int] = field(default_factory=set)


class CacheMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.manager = CacheManager(
            DEVICE, SIZE, num_host_blocks=HOST, store_zone=6, max_pinned_blocks=PINNED
        )
        self.device: list[object] = [GARBAGE] * DEVICE
        self.host: list[object] = [GARBAGE] * HOST
        self.meaning: dict[bytes, tuple] = {}  # of every key ever asked for
        self.runs: list[Run] = []
        self.copies: list[Copy] = []
        self.pins: dict[str, tuple[dict[int, tuple], float, bool]] = {}
        self.now = 0.0

    # -- requests --------------------------------------------------------------------------------

    @rule(
        tokens=PROMPTS,
        salt=st.sampled_from("aab"),
        load=st.booleans(),
        num_loads=st.integers(0, 5),
    )
    def admit(self, tokens, salt, load, num_loads):
        self.take(Run(salt, tokens, self.manager.new_table(salt)), load, num_loads)

    @precondition(lambda self: self.on_host())
    @rule(data=st.data(), num_loads=st.sampled_from([1, 5, 5]))
    def admit_with_loads(self, data, num_loads):
        tokens = data.draw(st.sampled_from(self.on_host()))
        self.take(Run("a", tokens, self.manager.new_table("a")), True, num_loads)

    def on_host(self) -> list[list[int]]:
        """Prompts that have something to load."""
        prompts = [[7, 7, *[name] * 9] for name in range(5)]
        return [each for each in prompts if self.manager.match(self.manager.new_table("a"), each).host]

    @precondition(lambda self: self.active())
    @rule(data=st.data(), load=st.booleans(), num_loads=st.integers(0, 5))
    def go_on_with_prefix(self, data, load, num_loads):
        run = data.draw(st.sampled_from(self.active()))
        if run.table.num_committed == len(run.table.block_ids):
            self.take(run, load, num_loads)
        else:
            assert self.manager.match(run.table, run.tokens) == Match()

    def take(self, run, load, num_loads):
        tokens = run.tokens
        match = self.manager.match(run.table, tokens)
        for index, key in enumerate(run.table.keys):
            assert self.meaning.setdefault(key, run.content(index)) == run.content(index)
        self.check_match(run, match)
        match = match.first(num_loads)
        assert len(match.host) <= num_loads
        held = len(run.table.block_ids)
        left, wanted = self.manager.free_after(match, load), len(match.host) if load else 0
        with self.watched():
            if wanted > left:
                with pytest.raises(OutOfBlocks):
                    self.manager.take_prefix(run.table, match, load)
                assert len(run.table.block_ids) == held
                return
            cached, loads = self.manager.take_prefix(run.table, match, load)
        assert self.manager.pool.num_free == left - wanted
        assert [host for host, _ in loads] == (match.host if load else [])
        taken = match.num_blocks if load else len(match.device)
        assert cached == (held + taken) * SIZE == len(run.table.block_ids) * SIZE
        run.computed = cached
        if run not in self.runs:
            self.runs.append(run)
        if loads:
            for _, block in loads:
                self.device[block] = GARBAGE
            self.copies.append(Copy(loads, [self.host[host] for host, _ in loads], run))

    def check_match(self, run, match):
        """Right, and the longest there is."""
        limit, held = (len(run.tokens) - 1) // SIZE, len(run.table.block_ids)
        tiers = {"device": self.device, "host": self.host}
        found = [("device", block) for block in match.device] + match.beyond
        for index, (tier, block) in enumerate(found, start=held):
            assert tiers[tier][block] == run.content(index)
        held += len(found)
        assert (held <= limit or not found) and (not match.beyond or match.beyond[0][0] == "host")
        end = run.content(held)
        loading = {self.host[block] for copy in self.copies if copy.run for block, _ in copy.pairs}
        assert match.waits == (held < limit and end in loading and end not in self.visible())
        if held < limit and not match.waits:
            ready = {self.host[block] for block in self.manager.host.blocks(State.READY)}
            assert end not in self.visible() | ready

    @rule(tokens=PROMPTS, stores=st.booleans())
    def serve(self, tokens, stores):
        """A whole request without loads, and then perhaps the stores: this is what fills the tiers."""
        run = Run("a", tokens, self.manager.new_table("a"))
        self.take(run, False, 0)
        self.compute(run, len(tokens))
        self.confirm(run)
        self.end_or_abort(run)
        if stores and self.order_stores():
            self.land_copy(self.copies[-1], set())

    @precondition(lambda self: self.active())
    @rule(data=st.data(), count=st.integers(1, 5))
    def compute_some(self, data, count):
        self.compute(data.draw(st.sampled_from(self.active())), count)

    def compute(self, run, count):
        """A step is planned, and computed; it is confirmed later."""
        end = min(run.computed + count, len(run.tokens))
        missing = self.manager.missing(run.table, end)
        with self.watched():
            if missing > self.manager.pool.num_free:
                with pytest.raises(OutOfBlocks):
                    self.manager.grow(run.table, end)
                return
            self.manager.grow(run.table, end)
        for index in range(run.computed // SIZE, -(-end // SIZE)):
            block = run.table.block_ids[index]
            assert self.users()[block] == 1, "a block that is written has one user"
            assert self.manager.pool.key(block) is None, "what is visible is not written again"
            self.device[block] = run.content(index) if (index + 1) * SIZE <= end else GARBAGE
        run.computed = end

    @precondition(lambda self: self.active())
    @rule(data=st.data())
    def confirm_one(self, data):
        self.confirm(data.draw(st.sampled_from(self.active())))

    def confirm(self, run):
        self.manager.commit(run.table, run.tokens, run.computed)
        for index, key in enumerate(run.table.keys):
            assert self.meaning.setdefault(key, run.content(index)) == run.content(index)
        run.tokens.append(len(run.tokens) % 2)

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def end_one(self, data):
        self.end_or_abort(data.draw(st.sampled_from(self.runs)))

    def end_or_abort(self, run):
        if run.table.loads:
            with pytest.raises(ValueError, match="must land first"):
                self.manager.free(run.table)
            run.aborted = True
            return
        self.manager.free(run.table)
        self.runs.remove(run)

    # -- copies ----------------------------------------------------------------------------------

    @rule()
    def order(self):
        self.order_stores()

    def order_stores(self) -> bool:
        before = self.manager.num_storing
        stores = self.manager.stores()
        assert self.manager.num_storing == before + len(stores)
        assert self.manager.stores() == []
        if stores:
            loading = {host for copy in self.copies if copy.run for host, _ in copy.pairs}
            busy = loading | {host for copy in self.copies if not copy.run for _, host in copy.pairs}
            assert not busy & {host for _, host in stores}, "a host block that is in use is given away"
            for block, host in stores:
                assert self.manager.pool.key(block) is not None and not self.users()[block]
                self.host[host] = GARBAGE
            self.copies.append(Copy(stores, [self.device[block] for block, _ in stores]))
        return bool(stores)

    @precondition(lambda self: self.copies)
    @rule(data=st.data())
    def make_copy(self, data):
        copy = data.draw(st.sampled_from(self.copies))
        self.make(copy, data.draw(st.integers(0, len(copy.pairs) - 1)))

    @precondition(lambda self: self.copies)
    @rule(data=st.data())
    def land(self, data):
        copy = data.draw(st.sampled_from(self.copies))
        every = range(len(copy.pairs))
        failed = data.draw(st.sets(st.sampled_from(every), max_size=2)) if data.draw(st.booleans()) else set()
        self.land_copy(copy, failed)

    def land_copy(self, copy, failed):
        self.copies.remove(copy)
        for index in range(len(copy.pairs)):
            self.make(copy, index)
            if index in failed:  # a load's source is what is wrong, a store's target
                host = copy.pairs[index][copy.run is None]
                self.host[host] = GARBAGE
                if copy.run is not None:
                    self.device[copy.pairs[index][1]] = GARBAGE
        if copy.run is None:
            self.manager.stored(copy.pairs, failed)
        else:
            self.land_load(copy, failed)

    def land_load(self, copy, failed):
        run = copy.run
        targets = [block for _, block in copy.pairs]
        bad = [run.table.block_ids.index(targets[index]) for index in failed]
        good = self.manager.loaded(run.table, copy.pairs, failed)
        assert good == (min(bad) * SIZE if failed else run.computed)
        assert all(self.device[run.table.block_ids[i]] == run.content(i) for i in range(good // SIZE))
        run.computed = good
        if run.aborted:
            self.manager.free(run.table)
            self.runs.remove(run)

    def make(self, copy, index):
        """Copies a pair, if that was not done: its source is what it was when it was ordered."""
        if index in copy.made:
            return
        copy.made.add(index)
        source, target = copy.pairs[index]
        if copy.run is None:
            self.host[target] = self.device[source]
        else:
            self.device[target] = self.host[source]
        assert (self.host[target] if copy.run is None else self.device[target]) == copy.contents[index]

    # -- pins ------------------------------------------------------------------------------------

    @precondition(lambda self: self.active())
    @rule(data=st.data(), name=st.sampled_from("pqr"), ttl=st.integers(1, 4), must=st.booleans())
    def pin(self, data, name, ttl, must):
        run = data.draw(st.sampled_from(self.active()))
        count = min(len(run.tokens) // SIZE, run.table.num_committed)
        blocks = {block: run.content(i) for i, block in enumerate(run.table.block_ids[:count])}
        others = {each: pin for each, pin in self.pins.items() if each != name}
        held = {block for pin in others.values() if pin[2] for block in pin[0]}
        said = self.manager.pin(name, run.table, len(run.tokens), self.now + ttl, must)
        if len(held | set(blocks)) > PINNED:
            assert (said is not None) == must
            return
        assert said is None
        for each in sorted(others, key=lambda each: others[each][1]):
            if (
                len({block for pin in others.values() for block in pin[0]} | set(blocks)) > PINNED
                and not others[each][2]
            ):
                del others[each]
        self.pins = {**others, name: (blocks, self.now + ttl, must)}

    @rule(name=st.sampled_from("pqr"))
    def unpin(self, name):
        self.manager.unpin(name)
        self.pins.pop(name, None)

    @rule(seconds=st.integers(1, 3))
    def expire(self, seconds):
        self.now += seconds
        self.manager.expire(self.now)
        self.pins = {name: pin for name, pin in self.pins.items() if pin[1] > self.now}

    # -- what must hold --------------------------------------------------------------------------

    def active(self) -> list[Run]:
        return [run for run in self.runs if not run.table.loads]

    def users(self) -> Counter[int]:
        """Who reads or writes each device block, as the model knows it."""
        users = Counter(block for run in self.runs for block in run.table.block_ids)
        users.update(block for copy in self.copies if copy.run is None for block, _ in copy.pairs)
        users.update(block for blocks, _, _ in self.pins.values() for block in blocks)
        return users

    def visible(self) -> set[object]:
        return {self.device[block] for block in range(DEVICE) if self.manager.pool.key(block) is not None}

    @contextmanager
    def watched(self):
        """No block that somebody uses is given away here, and what is lost is counted."""
        users, before, lost = self.users(), self.keys(), self.manager.lost_blocks
        runs = [(run, list(run.table.block_ids)) for run in self.runs]
        yield
        gone = [key for key in before if key not in self.keys()]
        assert self.manager.lost_blocks - lost == sum(self.manager.host.find(key) is None for key in gone)
        for block in users:
            assert not self.manager.pool.is_free(block)
        for run, blocks in runs:
            grown = run.table.block_ids[len(blocks) :]
            new = {block for block in grown if self.manager.pool.key(block) is None}
            assert not new & set(users), "a block that is in use is given away"

    def keys(self) -> set[bytes]:
        return {key for block in range(DEVICE) if (key := self.manager.pool.key(block)) is not None}

    @invariant()
    def books_are_whole(self):
        self.manager.check_integrity(run.table for run in self.runs)
        for block, pins in self.users().items():
            assert pins and not self.manager.pool.is_free(block)
        assert self.manager.num_pinned == len({b for blocks, _, _ in self.pins.values() for b in blocks})

    @invariant()
    def what_is_visible_is_there(self):
        for block in range(DEVICE):
            key = self.manager.pool.key(block)
            assert key is None or self.device[block] == self.meaning[key]
        for key, meaning in self.meaning.items():
            entry = self.manager.host.find(key)
            if entry is not None and entry.state is not State.WRITING:
                assert self.host[entry.block] == meaning

    @invariant()
    def pinned_blocks_stay(self):
        for blocks, _, _ in self.pins.values():
            for block, content in blocks.items():
                assert self.device[block] == content and self.manager.pool.key(block) is not None

    def teardown(self):
        for copy in self.copies:
            for index in range(len(copy.pairs)):
                self.make(copy, index)
            if copy.run is None:
                self.manager.stored(copy.pairs, [])
            else:
                self.manager.loaded(copy.run.table, copy.pairs, [])
        for run in self.runs:
            self.manager.free(run.table)
        for name in self.pins:
            self.manager.unpin(name)
        self.manager.check_integrity()
        assert (
            self.manager.pool.num_free == DEVICE and self.manager.num_pinned == self.manager.num_storing == 0
        )


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
