"""A step in the making, and the plan that comes of it.

The scheduler fills a Draft, then has it made into a StepPlan. Knows neither queue, cache nor clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ds_serve.engine.copies import Pairs
from ds_serve.engine.limits import Limits
from ds_serve.engine.sequence import Sequence
from ds_serve.messages import NewSequence, Row, StepPlan


@dataclass(slots=True)
class Part:
    """A sequence's part in a planned step: count tokens; samples if they reach the sequence's end.

    is_scored: log-probabilities of prompt tokens come back with it.
    """

    sequence: Sequence
    count: int
    samples: bool
    is_scored: bool


@dataclass(slots=True)
class Draft:
    """A step in the making: no counter of a sequence moves before it is made into a plan.

    num_decodes         rows of a running sequence's single token that it may still take
    num_prompt_tokens   what all micro-batches share
    budget, chunks      tokens that it may still take, and how many of them in prompt chunks; below 1: none
    scored              and how many in chunks whose log-probabilities are asked for
    loads               parts of prefixes, each with whose it is
    stores              copies of what the device gives up next
    short_of_blocks     a running sequence lacked blocks; is_held_up: a waiting one did, or waits for a load
    """

    limits: Limits
    num_decodes: int
    num_prompt_tokens: int = 0
    budget: int = field(init=False)
    chunks: int = field(init=False)
    scored: int = field(init=False)
    counts: dict[Sequence, int] = field(default_factory=dict)
    decodes: set[Sequence] = field(default_factory=set)
    new_blocks: dict[Sequence, list[int]] = field(default_factory=dict)
    loads: list[tuple[Sequence, Pairs]] = field(default_factory=list)
    stores: Pairs = field(default_factory=list)
    short_of_blocks: bool = False
    is_held_up: bool = False

    def __post_init__(self) -> None:
        self.budget = self.limits.max_num_batched_tokens
        self.chunks = self.limits.chunk_tokens(self.num_prompt_tokens)
        self.scored = self.limits.max_scored_tokens

    def room(self, gap: int, is_decode: bool = False, is_scored: bool = False) -> int:
        """How many of a sequence's gap tokens it may take; below 1: none."""
        if is_scored:
            gap = min(gap, self.scored)
        if is_decode:
            return min(gap, self.budget, self.num_decodes)
        return min(gap, self.budget, self.chunks)

    def take(self, sequence: Sequence, count: int, new_blocks: list[int], is_decode: bool = False) -> None:
        self.counts[sequence] = count
        self.new_blocks[sequence] = new_blocks
        self.budget -= count
        self.scored -= count * sequence.is_scored
        if is_decode:
            self.decodes.add(sequence)
            self.num_decodes -= 1
        else:
            self.chunks -= count

    def give_back(self, sequence: Sequence) -> None:
        """Refund the budget of a sequence that loses its place in the step, if it has one."""
        count = self.counts.pop(sequence, 0)
        self.budget += count
        self.scored += count * sequence.is_scored
        if sequence in self.decodes:
            self.decodes.remove(sequence)
            self.num_decodes += 1
        else:
            self.chunks += count

    def discount(self, num_cached: int) -> None:
        """Tokens that the cache holds are no work: each micro-batch's share becomes smaller."""
        before = self.limits.chunk_tokens(self.num_prompt_tokens)
        self.num_prompt_tokens -= num_cached
        self.chunks -= before - self.limits.chunk_tokens(self.num_prompt_tokens)

    def make(self, step: int) -> tuple[StepPlan, list[Part]]:
        """The plan, and each sequence's part in its rows; their counters move now.

        A sequence's first rows bring the sequence itself and all of its blocks.
        """
        new, rows, parts = [], [], []
        for sequence, count in self.counts.items():
            start = sequence.num_scheduled
            samples = start + count == sequence.num_tokens
            is_scored = sequence.is_scored and start < sequence.num_prompt_tokens - 1
            new_blocks = self.new_blocks[sequence]
            if not sequence.is_announced:
                sequence.is_announced = True
                new.append(_new(sequence, self.limits))
                new_blocks = list(sequence.table.block_ids)
            rows.append(
                Row(
                    slot=sequence.slot,
                    start=start,
                    count=count,
                    new_block_ids=new_blocks,
                    sample=samples,
                    scored=is_scored,
                )
            )
            parts.append(Part(sequence, count, samples, is_scored))
            sequence.num_scheduled += count
            sequence.num_pending += samples
            sequence.num_in_flight += 1
            sequence.last_step = step
        loads = [pair for _, pairs in self.loads for pair in pairs]
        return StepPlan(step=step, new=new, rows=rows, loads=loads, stores=self.stores), parts


def _new(sequence: Sequence, limits: Limits) -> NewSequence:
    return NewSequence(
        slot=sequence.slot,
        token_ids=list(sequence.token_ids),
        num_prompt_tokens=sequence.num_prompt_tokens,
        params=sequence.request.params,
        adapter=limits.adapter_number(sequence.request.adapter),
    )
