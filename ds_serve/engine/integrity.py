"""Whether the scheduler's books are whole: queues, slots, counters and blocks.

Changes nothing. Called by tests after every event.
"""

from __future__ import annotations

from collections import Counter
from operator import le
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_serve.engine.scheduler import Scheduler


def check(scheduler: Scheduler) -> None:
    """Raise AssertionError unless queues, slots, counters and all books of blocks are whole."""
    books = scheduler.books
    waiting, running, landing = list(books.waiting), books.running, books.landing
    holders = running + landing
    scheduler.cache.check_integrity(sequence.table for sequence in holders)
    slots = sorted(books.free_slots + [sequence.slot for sequence in holders])
    assert slots == list(range(scheduler.limits.max_num_seqs)), f"slots lost or shared: {slots}"
    assert _is_sorted(waiting), "waiting out of order"
    assert _is_sorted(running), "running out of order"
    overtaken = [sequence.num_overtaken for sequence in waiting]
    assert max(overtaken, default=0) <= scheduler.limits.max_overtaken, f"overtaken too often: {overtaken}"
    open_now = {sequence.request.id for sequence in waiting + running}
    assert open_now == set(books.sequences), f"requests lost: {open_now ^ set(books.sequences)}"
    assert all(sequence.num_in_flight for sequence in landing), "an ended sequence holds blocks"
    in_flight = Counter(part.sequence for _, parts in books.in_flight for part in parts)
    in_flight.update(books.copies.owners("load"))
    loading = {sequence for sequence in holders if sequence.table.loads}
    assert loading == set(books.copies.owners("load")), "loads under way and loading sequences differ"
    found = {sequence: sequence.num_in_flight for sequence in holders if sequence.num_in_flight}
    assert found == in_flight, "steps and loads in flight and their sequences' counters differ"
    for sequence in running:
        counters = (sequence.num_computed, sequence.num_scheduled, sequence.num_tokens)
        assert 0 <= counters[0] <= counters[1] <= counters[2], f"{sequence.request.id}: {counters}"
        if sequence.is_loading:
            there = sequence.table.num_committed * scheduler.cache.block_size
            assert counters[0] == there, f"{sequence.request.id}: {counters} before its load, {there} there"
        held = sequence.table.length * scheduler.cache.block_size
        assert held >= sequence.num_scheduled, f"{sequence.request.id}: too few blocks"
        seen = scheduler.cache.windows.firsts_seen(sequence.num_computed)
        firsts = sequence.table.firsts
        assert all(map(le, firsts, seen)), f"{sequence.request.id}: has from {firsts}, a query sees {seen}"


def _is_sorted(sequences: list) -> bool:
    return all(a.key < b.key for a, b in zip(sequences, sequences[1:], strict=False))
