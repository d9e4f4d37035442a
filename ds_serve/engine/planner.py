"""What the next plan holds: which tokens are computed, for whom, in which blocks; which blocks are copied.

Every step closes gaps, single-token gaps (decodes) first, then prompt chunks, within one token budget. The
sequence that comes last in order is the first to be preempted.

A sequence whose prefix is loaded holds its slot, and is left out of steps until it is there; each part of the
load counts as in flight. It cannot lock others out: at its admission its whole prompt fitted beside what
running ones lack, and a part that cannot be had is computed. So it goes on whatever the others do, or, where
it was chosen as a victim, gives everything back once its part has landed.

Knows no results and no messages of the front. Called by scheduler.py.
"""

from __future__ import annotations

from itertools import islice

from ds_serve.engine.books import Books
from ds_serve.engine.limits import Limits
from ds_serve.engine.plan import Draft
from ds_serve.engine.sequence import Sequence
from ds_serve.messages import StepPlan


class Planner:
    """Makes plans out of the books, and enters them there."""

    def __init__(self, limits: Limits, books: Books) -> None:
        self._limits = limits
        self._books = books
        self._cache = books.cache
        self._num_plans = 0

    def next(self) -> StepPlan | None:
        """The next plan, or None where nothing can be computed or copied before a result comes back."""
        self._cache.expire(self._books.clock())
        draft = self._draft()
        self._preempt_drained(draft)
        self._schedule_running(draft)
        # Nobody is admitted in a step that ran short, unless nothing else is left to run.
        if not draft.short_of_blocks or not self._books.running:
            self._admit(draft)
        self._start_stores(draft)
        if self._load_more(draft) and not draft.counts:
            self._schedule_running(draft)
        return self._plan(draft) if draft.counts or draft.loads or draft.stores else None

    def _draft(self) -> Draft:
        """An empty step; in a pipeline with this step's share of the work.

        What is in flight or done of a prompt counts too, so that shares stay the same from step to step.
        """
        num_batches, books = self._limits.num_batches, self._books
        if num_batches == 1:
            return Draft(self._limits, num_decodes=self._limits.max_num_seqs)
        num_decoding = sum(sequence.gap <= 1 for sequence in books.running)
        running = sum(s.num_prefill for s in books.running if s.num_computed < s.num_admitted)
        waiting = sum(len(sequence.token_ids) for sequence in islice(books.waiting, len(books.free_slots)))
        free = self._cache.pool.num_free // self._cache.windows.num_groups
        waiting = min(waiting, free * self._cache.block_size)
        return Draft(self._limits, -(-num_decoding // num_batches), running + waiting)

    # -- running sequences -----------------------------------------------------------------------

    def _schedule_running(self, draft: Draft) -> None:
        # A stable sort: decodes first, then chunks, each in key order.
        for sequence in sorted(self._books.running, key=_is_not_decode):
            gap = self._gap(sequence)
            is_decode = gap == 1
            count = draft.room(gap, is_decode, sequence.is_scored)
            if not is_decode:
                count = self._lossless(sequence, count)
            if count <= 0 or sequence.draining or sequence.slot is None:
                continue
            blocks = self._grow(sequence, sequence.num_scheduled + count, draft)
            if blocks is not None:
                draft.take(sequence, count, blocks, is_decode)

    def _gap(self, sequence: Sequence) -> int:
        """Tokens that a step may compute now."""
        return 0 if sequence.is_loading or self._is_others_turn(sequence) else sequence.gap

    def _is_others_turn(self, sequence: Sequence) -> bool:
        """Whether the other micro-batches come first: the token that it waits for is still being drawn.

        Who runs alone waits for nobody: the stages hand the token on sooner than they would hear of it here.
        """
        is_recent = self._num_plans - sequence.last_step < self._limits.num_batches
        return is_recent and sequence.num_pending > 0 and len(self._books.running) > 1

    def _grow(self, sequence: Sequence, num_tokens: int, draft: Draft) -> list[int] | None:
        """Blocks for a running sequence, preempting from the end of the order; None: not in this step."""
        missing = self._cache.missing(sequence.table, num_tokens)
        if not missing:  # most often: a block lasts for many tokens
            return []
        while missing > self._cache.pool.num_free:
            draft.short_of_blocks = True
            if self._blocks_come_back():
                return None  # nobody more has to go
            victim = self._books.running[-1]
            draft.give_back(victim)
            if victim.num_in_flight:
                victim.draining = True
                return None
            self._books.preempt(victim)
            if victim is sequence:
                return None
        return self._cache.grow(sequence.table, num_tokens)

    def _blocks_come_back(self) -> bool:
        """Whether something in flight gives blocks back when it lands."""
        books = self._books
        return bool(books.landing or self._cache.num_storing or any(each.draining for each in books.running))

    def _preempt_drained(self, draft: Draft) -> None:
        for sequence in [sequence for sequence in self._books.running if sequence.draining]:
            draft.short_of_blocks = True
            if not sequence.num_in_flight:
                self._books.preempt(sequence)

    def _lossless(self, sequence: Sequence, count: int) -> int:
        """Of a chunk's tokens those whose blocks evict nothing that a store under way would have saved."""
        if not self._cache.num_storing:
            return count
        blocks = len(sequence.table.block_ids) + self._cache.pool.num_ready
        return min(count, blocks * self._cache.block_size - sequence.num_scheduled)

    def _load_more(self, draft: Draft) -> bool:
        """The next part for each whose prefix is being loaded; whether one has come to its end.

        A part takes no more blocks than the device can give without loss: a long prefix that was loaded in
        one go would push out more than the stores have saved.
        """
        is_one_ready = False
        for sequence in self._books.running:
            if sequence.is_loading and not sequence.table.loads and not sequence.draining:
                self._load_part(sequence, draft)
                is_one_ready |= not sequence.is_loading
        return is_one_ready

    def _load_part(self, sequence: Sequence, draft: Draft) -> None:
        match = self._cache.match(sequence.table, sequence.token_ids)
        part = match.first(self._cache.load_room(match))
        if part.num_blocks:
            _, loads = self._cache.take_prefix(sequence.table, part, load=True)
            # What others have computed meanwhile is there at once, also ahead of loads.
            there = sequence.table.num_committed * self._cache.block_size
            sequence.num_computed = sequence.num_scheduled = there
            if loads:
                sequence.num_in_flight += 1
                draft.loads.append((sequence, loads))
                return
        is_more_to_come = part.num_blocks < match.num_blocks and self._cache.num_storing
        if not is_more_to_come and not match.waits:
            self._books.loaded(sequence)

    # -- waiting requests ------------------------------------------------------------------------

    def _admit(self, draft: Draft) -> None:
        """Give slots to those whose turn it is; audits go, and then pins, where they are in the way."""
        books = self._books
        self._fill_slots(draft)
        if books.auditor.open_ids and not all(each.is_audit for each in books.waiting):
            self._drop_audit(draft)
            self._fill_slots(draft)
        # Nothing runs or will land, so no block comes back but from pins: an answer is worth more than a pin.
        while (
            books.waiting and not (books.running or books.landing or books.copies) and self._cache.num_pinned
        ):
            self._cache.pins.give_up()
            self._fill_slots(draft)

    def _fill_slots(self, draft: Draft) -> None:
        books = self._books
        while books.free_slots and draft.room(1) > 0:
            found = books.waiting.next(self._promised_blocks())
            if found is None:
                draft.is_held_up = len(books.waiting) > 0
                return
            sequence = found.sequence
            draft.discount(found.num_cached)
            if draft.room(1) < 1:
                return
            books.start(found)
            if sequence.is_loading:
                self._start_stores(draft)  # what the hit took out of the zone is made up for before it gives
                self._load_part(sequence, draft)
            if not sequence.is_loading:
                self._first_chunk(sequence, draft)

    def _first_chunk(self, sequence: Sequence, draft: Draft) -> None:
        gap = len(sequence.token_ids) - sequence.num_scheduled
        count = self._lossless(sequence, draft.room(gap, is_scored=sequence.is_scored))
        if count > 0:
            self._cache.grow(sequence.table, sequence.num_scheduled + count)
            draft.take(sequence, count, [])

    def _drop_audit(self, draft: Draft) -> None:
        auditor = self._books.auditor
        for name in auditor.open_ids:
            sequence = self._books.sequences[name]
            draft.give_back(sequence)
            auditor.take(self._books.finish(sequence, "abort"))

    def _promised_blocks(self) -> int:
        """Blocks that running sequences lack for their known tokens, and one of each group to go on with."""
        running, cache = self._books.running, self._cache
        lacking = sum(cache.lacking(sequence.table, len(sequence.token_ids)) for sequence in running)
        return lacking + len(running) * cache.windows.num_groups

    # -- the plan --------------------------------------------------------------------------------

    def _start_stores(self, draft: Draft) -> None:
        """Stores hold blocks that were free. Where somebody lacks blocks, those under way land first."""
        if not (self._cache.num_storing and (draft.short_of_blocks or draft.is_held_up)):
            draft.stores += self._cache.stores()

    def _plan(self, draft: Draft) -> StepPlan:
        plan, parts = draft.make(self._num_plans)
        self._num_plans += 1
        if parts:
            self._books.in_flight.append((plan.step, parts))
            self._books.totals.num_steps += 1
        self._books.copies.start(plan.step, "load", draft.loads)
        self._books.copies.start(plan.step, "store", [(None, draft.stores)])
        return plan


def _is_not_decode(sequence: Sequence) -> bool:
    return sequence.gap != 1
