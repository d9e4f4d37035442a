"""Whether the scheduler's books are whole: queues, slots, counters and blocks.

Reads what the scheduler keeps to itself, and changes nothing. Called by tests after every event.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_serve.engine.scheduler import Scheduler


def check(scheduler: Scheduler) -> None:
    """Raise AssertionError unless queues, slots, counters and all books of blocks are whole."""
    waiting, running, landing = list(scheduler._waiting), scheduler._running, scheduler._landing
    holders = running + landing
    scheduler.cache.check_integrity(sequence.table for sequence in holders)
    slots = sorted(scheduler._free_slots + [sequence.slot for sequence in holders])
    assert slots == list(range(scheduler.limits.max_num_seqs)), f"slots lost or shared: {slots}"
    assert _is_sorted(waiting), "waiting out of order"
    assert _is_sorted(running), "running out of order"
    open_now = {sequence.request.id for sequence in waiting + running}
    assert open_now == set(scheduler._sequences), f"requests lost: {open_now ^ set(scheduler._sequences)}"
    assert all(sequence.num_in_flight for sequence in landing), "an ended sequence holds blocks"
    in_flight = Counter(part.sequence for _, parts in scheduler._in_flight for part in parts)
    found = {sequence: sequence.num_in_flight for sequence in holders if sequence.num_in_flight}
    assert found == in_flight, "steps in flight and their sequences' counters differ"
    for sequence in running:
        counters = (sequence.num_computed, sequence.num_scheduled, sequence.num_tokens)
        assert 0 <= counters[0] <= counters[1] <= counters[2], f"{sequence.request.id}: {counters}"
        held = len(sequence.table.block_ids) * scheduler.cache.block_size
        assert held >= sequence.num_scheduled, f"{sequence.request.id}: too few blocks"


def _is_sorted(sequences: list) -> bool:
    return all(a.key < b.key for a, b in zip(sequences, sequences[1:], strict=False))
