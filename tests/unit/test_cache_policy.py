"""The eviction order: what goes first, what survives a scan, what it costs, and a plain model beside it."""

from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_serve.cache.policy import HIT_SHARE, EvictionOrder


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def filled(capacity: int, uses: dict[int, int]) -> EvictionOrder:
    """Blocks in the dict's order; a block's key is its number."""
    order = EvictionOrder(capacity)
    for block, count in uses.items():
        order.add(block, key(block), count)
    return order


def drained(order: EvictionOrder) -> list[int]:
    return [order.pop() for _ in range(len(order))]


def test_never_hit_goes_before_hit_and_each_kind_in_order_of_release():
    order = filled(10, {3: 1, 5: 0, 4: 2, 6: 0})
    assert order.first(4) == [5, 6, 3, 4]
    assert drained(order) == [5, 6, 3, 4]


def test_tails_go_before_heads():
    """Released tail first, as the pool does; the head was hit oftener than what came after it."""
    order = EvictionOrder(20)
    for first, hits in ((0, [2, 1, 0, 0]), (4, [1, 1, 0, 0]), (8, [0, 0, 0, 0])):
        for depth in reversed(range(4)):
            order.add(first + depth, key(first + depth), hits[depth], depth)
    victims = drained(order)
    for first in (0, 4, 8):
        chain = [block for block in victims if first <= block < first + 4]
        assert chain == sorted(chain, reverse=True)


def test_hit_blocks_pay_themselves_above_their_share():
    hit = int(100 * HIT_SHARE)
    order = filled(100, dict.fromkeys(range(hit + 2), 1) | {200: 0, 201: 0})
    assert order.first(5) == [0, 1, 200, 201, 2]
    assert [order.pop() for _ in range(5)] == [0, 1, 200, 201, 2]


def test_a_block_in_use_is_no_victim_and_comes_back_as_the_last_of_its_kind():
    order = filled(10, {0: 0, 1: 0, 2: 0})
    order.remove(0)
    assert 0 not in order and len(order) == 2
    order.add(0, key(0), 1)
    assert drained(order) == [1, 2, 0]


def test_computed_again_after_eviction_counts_as_hit():
    order = filled(4, {0: 0})
    assert order.pop() == 0
    order.add(1, key(0), 0)  # the same content in another block
    order.add(2, key(2), 0)
    assert drained(order) == [2, 1]


def test_only_as_many_evicted_keys_are_remembered_as_the_tier_has_blocks():
    order = filled(4, {0: 0})
    order.pop()
    for block in range(1, 5):
        order.add(block, key(block), 0)
        order.pop()
    order.add(0, key(0), 0)
    order.add(9, key(9), 0)
    assert drained(order) == [0, 9]
    assert len(order._evicted) == 4


def test_a_removed_block_is_not_remembered_as_evicted():
    order = filled(4, {0: 0})
    order.remove(0)
    order.add(0, key(0), 0)
    order.add(1, key(1), 0)
    assert drained(order) == [0, 1]


@pytest.mark.parametrize("num_scanned", [100, 1000, 20_000])
def test_a_scan_of_any_length_leaves_what_was_hit(num_scanned):
    order = filled(100, dict.fromkeys(range(60), 1) | dict.fromkeys(range(60, 100), 0))
    for number in range(1000, 1000 + num_scanned):
        order.add(order.pop(), key(number), 0)
    assert all(block in order for block in range(60))


def test_what_was_hit_long_ago_gives_way_to_what_is_hit_now():
    order = filled(100, dict.fromkeys(range(80), 1) | dict.fromkeys(range(80, 100), 0))
    for number in range(1000, 1100):
        order.add(order.pop(), key(number), 1)
    assert not any(block in order and order._hit[block] == key(block) for block in range(80))


class Counted(OrderedDict):
    """Counts what is read from its iterators."""

    reads = 0

    def __iter__(self):
        for each in super().__iter__():
            Counted.reads += 1
            yield each


@pytest.mark.parametrize("num_hit", [0, 2000, 9000, 10_000])
def test_first_reads_no_more_than_it_gives(num_hit):
    order = filled(10_000, {block: int(block < num_hit) for block in range(10_000)})
    wanted = order.first(7)
    order._new, order._hit = Counted(order._new), Counted(order._hit)
    Counted.reads = 0
    assert order.first(7) == wanted and len(wanted) == 7
    assert Counted.reads <= 2 * 7


def test_errors():
    order = EvictionOrder(4)
    order.add(1, key(1), 0)
    with pytest.raises(ValueError, match="block 1 is in the eviction order already"):
        order.add(1, key(1), 1)
    with pytest.raises(KeyError):
        order.remove(2)
    order.pop()
    with pytest.raises(KeyError):
        order.pop()
    assert order.first(3) == [] and len(order) == 0


class Plain:
    """The same rules, in lists and slowly."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.blocks: list[tuple[int, int, bool]] = []  # block, key, was hit; in order of add
        self.evicted: list[int] = []

    def add(self, block: int, number: int, uses: int) -> None:
        self.blocks.append((block, number, uses > 0 or number in self.evicted))

    def order(self) -> list[int]:
        left, victims = list(self.blocks), []
        while left:
            hit = [each for each in left if each[2]]
            new = [each for each in left if not each[2]]
            victim = hit[0] if not new or len(hit) > int(self.capacity * HIT_SHARE) else new[0]
            left.remove(victim)
            victims.append(victim[0])
        return victims

    def remove(self, block: int) -> None:
        self.blocks = [each for each in self.blocks if each[0] != block]

    def pop(self) -> int:
        block = self.order()[0]
        number = next(each[1] for each in self.blocks if each[0] == block)
        self.remove(block)
        self.evicted = [each for each in self.evicted if each != number] + [number]
        self.evicted = self.evicted[-self.capacity :]
        return block


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 12), st.integers(0, 2)),
        st.tuples(st.just("remove"), st.integers(0, 11), st.just(0)),
        st.tuples(st.just("pop"), st.just(0), st.just(0)),
    ),
    max_size=80,
)


@settings(deadline=None, max_examples=300)
@given(capacity=st.integers(1, 12), steps=STEPS)
def test_equals_a_plain_model(capacity, steps):
    order, plain = EvictionOrder(capacity), Plain(capacity)
    for what, number, uses in steps:
        held = sorted(block for block, _, _ in plain.blocks)
        free = [block for block in range(capacity) if block not in held]
        if what == "add" and free:
            order.add(free[0], key(number), uses)
            plain.add(free[0], number, uses)
        elif what == "remove" and number in held:
            order.remove(number)
            plain.remove(number)
        elif what == "pop" and held:
            assert order.pop() == plain.pop()
        wanted = plain.order()
        assert order.first(capacity) == wanted and order.first(2) == wanted[:2]
        assert len(order) == len(wanted) and all(block in order for block in wanted)
