"""The scheduler: which tokens are computed in the next step, for whom, in which blocks.

Continuous batching without phases: every step closes gaps, single-token gaps (decodes) first, then prompt
chunks, within one token budget. Pure Python over plain values: it knows no clock but the one it is given, no
process, no tensor. The engine loop calls add / abort / schedule / update from one thread.

On one stage the ranks remember the tokens that they draw, so a sequence's next step is planned before its
token is known here. In a pipeline a token comes back first and goes out with the next plan. What fills the
stages are micro-batches: a step takes only its share of the decodes and of the prompt tokens, and several
chunks of one prompt may be in flight, since every stage runs the steps in order.

Its order is strict: by priority, then by arrival. The head of the waiting queue is never overtaken, and the
sequence that comes last is the first to be preempted, so the first one always gets on.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Callable

from ds_serve.cache.manager import CacheManager
from ds_serve.engine import integrity
from ds_serve.engine.limits import Limits, refusal
from ds_serve.engine.plan import Draft, Part
from ds_serve.engine.sequence import Sequence
from ds_serve.messages import (
    INVALID_TOKEN,
    FinishReason,
    Output,
    Request,
    Stats,
    StepPlan,
    StepResult,
    TokenLogprob,
)


class Scheduler:
    """Owns every open sequence, from add() to its last Output."""

    def __init__(self, limits: Limits, cache: CacheManager, clock: Callable[[], float] = time.monotonic):
        self.limits = limits
        self.cache = cache
        self._is_pipeline = limits.num_stages > 1
        self._clock = clock
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []  # sorted by key
        self._running: list[Sequence] = []  # sorted by key; each holds a slot
        self._landing: list[Sequence] = []  # ended with steps in flight; each still holds a slot
        self._in_flight: deque[tuple[int, list[Part]]] = deque()
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._arrivals = 0
        self._totals = dict.fromkeys(
            (
                "num_steps",
                "num_preemptions",
                "num_finished",
                "prompt_tokens",
                "cached_tokens",
                "output_tokens",
            ),
            0,
        )

    # -- requests in -----------------------------------------------------------------------------

    def add(self, request: Request) -> Output | None:
        """Queue a request; an Output with finish_reason "error" where it can never run."""
        problem = refusal(request, self.limits, self.cache)
        if request.id in self._sequences:
            problem = f"request id {request.id} is in use"
        elif len(self._waiting) >= self.limits.max_queue:
            problem = f"the queue is full: {len(self._waiting)} requests are waiting"
        if problem is not None:
            return Output(id=request.id, finish_reason="error", error=problem)
        sequence = Sequence(request, self.cache.new_table(request.salt), self._arrivals, self._clock())
        self._arrivals += 1
        self._sequences[request.id] = sequence
        insort(self._waiting, sequence, key=_key)
        return None

    def abort(self, request_id: str) -> Output | None:
        """End a request in any state; None where it is unknown or has ended."""
        sequence = self._sequences.get(request_id)
        return None if sequence is None else self._finish(sequence, "abort")

    def fail_all(self, reason: str) -> list[Output]:
        """End every open request with an error; for a dying engine, whose blocks die with it."""
        open_ids = list(self._sequences)
        self._sequences.clear()
        self._waiting.clear()
        self._running.clear()
        return [Output(id=request_id, finish_reason="error", error=reason) for request_id in open_ids]

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._sequences)

    @property
    def num_in_flight(self) -> int:
        """Steps planned whose results have not come back."""
        return len(self._in_flight)

    @property
    def can_plan(self) -> bool:
        """Whether another step may be planned before a result comes back."""
        return len(self._in_flight) < self.limits.max_steps_in_flight

    # -- a step out ------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step, or None where nothing can be computed before a result comes back."""
        draft = self._draft()
        self._preempt_drained(draft)
        self._schedule_running(draft)
        # Nobody is admitted in a step that ran short, unless nothing else is left to run.
        if not draft.short_of_blocks or not self._running:
            self._admit(draft)
        return self._plan(draft) if draft.counts else None

    def _draft(self) -> Draft:
        """An empty step; in a pipeline with this step's share of the work.

        What is in flight or done of a prompt counts too, so that shares stay the same from step to step.
        """
        num_batches = self.limits.num_batches
        if num_batches == 1:
            return Draft(self.limits, num_decodes=self.limits.max_num_seqs)
        num_decoding = sum(sequence.gap <= 1 for sequence in self._running)
        running = sum(s.num_prefill for s in self._running if s.num_computed < s.num_admitted)
        waiting = sum(len(sequence.token_ids) for sequence in self._waiting[: len(self._free_slots)])
        waiting = min(waiting, self.cache.pool.num_free * self.cache.block_size)
        return Draft(self.limits, -(-num_decoding // num_batches), running + waiting)

    def _gap(self, sequence: Sequence) -> int:
        """Tokens that a step may compute now: in a pipeline only those whose values are known here."""
        return 0 if self._is_pipeline and sequence.num_pending else sequence.gap

    def _schedule_running(self, draft: Draft) -> None:
        # A stable sort: decodes first, then chunks, each in key order.
        for sequence in sorted(self._running, key=_is_not_decode):
            gap = self._gap(sequence)
            is_decode = gap == 1
            count = draft.room(gap, is_decode)
            if count <= 0 or sequence.draining or sequence.slot is None:
                continue
            blocks = self._grow(sequence, sequence.num_scheduled + count, draft)
            if blocks is not None:
                draft.take(sequence, count, blocks, is_decode)

    def _grow(self, sequence: Sequence, num_tokens: int, draft: Draft) -> list[int] | None:
        """Blocks for a running sequence, preempting from the end of the order; None: not in this step."""
        while self.cache.missing(sequence.table, num_tokens) > self.cache.pool.num_free:
            draft.short_of_blocks = True
            if self._landing or any(other.draining for other in self._running):
                return None  # blocks are on their way back: nobody more has to go
            victim = self._running[-1]
            draft.give_back(victim)
            if victim.num_in_flight:
                victim.draining = True
                return None
            self._preempt(victim)
            if victim is sequence:
                return None
        return self.cache.grow(sequence.table, num_tokens)

    def _preempt_drained(self, draft: Draft) -> None:
        for sequence in [sequence for sequence in self._running if sequence.draining]:
            draft.short_of_blocks = True
            if not sequence.num_in_flight:
                self._preempt(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue, to be computed again: tokens are kept, blocks and slot are not."""
        self._running.remove(sequence)
        self._release(sequence)
        sequence.reset()
        insort(self._waiting, sequence, key=_key)
        self._totals["num_preemptions"] += 1

    def _admit(self, draft: Draft) -> None:
        while self._waiting and self._free_slots and draft.room(1) > 0:
            sequence = self._waiting[0]
            matched = self.cache.match(sequence.table, sequence.token_ids)
            needed = self.cache.blocks_for(len(sequence.token_ids)) - len(matched.device)
            if needed + self._promised_blocks() > self.cache.free_after(matched):
                return
            draft.discount(len(matched.device) * self.cache.block_size)
            count = draft.room(len(sequence.token_ids) - len(matched.device) * self.cache.block_size)
            if count < 1:
                return
            self._waiting.pop(0)
            cached, _ = self.cache.take_prefix(sequence.table, matched, load=False)
            self.cache.grow(sequence.table, cached + count)
            self._start(sequence, cached)
            draft.take(sequence, count, list(sequence.table.block_ids))

    def _promised_blocks(self) -> int:
        """Blocks that running sequences lack for their known tokens, and one each to go on with."""
        missing = (self.cache.missing(s.table, len(s.token_ids)) for s in self._running)
        return sum(missing) + len(self._running)

    def _start(self, sequence: Sequence, cached: int) -> None:
        sequence.slot = self._free_slots.pop()
        sequence.num_scheduled = sequence.num_computed = cached
        sequence.num_admitted = len(sequence.token_ids)
        sequence.num_prefill = sequence.num_admitted - cached
        insort(self._running, sequence, key=_key)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = cached
            sequence.first_scheduled_at = self._clock()
            self._totals["prompt_tokens"] += sequence.num_prompt_tokens
            self._totals["cached_tokens"] += cached

    def _plan(self, draft: Draft) -> StepPlan:
        plan, parts = draft.make(self._totals["num_steps"])
        self._totals["num_steps"] += 1
        self._in_flight.append((plan.step, parts))
        return plan

    # -- a result in -----------------------------------------------------------------------------

    def update(self, result: StepResult) -> list[Output]:
        """Take in the oldest step's result: append tokens, publish blocks, end requests.

        Raises ValueError where the result does not belong to the oldest step in flight.
        """
        step, parts = self._in_flight[0] if self._in_flight else (None, [])
        wanted = sum(part.samples for part in parts)
        if step != result.step or wanted != len(result.token_ids):
            raise ValueError(
                f"result of step {result.step} with {len(result.token_ids)} tokens, "
                f"but the oldest step in flight is {step} with {wanted}"
            )
        self._in_flight.popleft()
        tokens = iter(zip(result.token_ids, result.logprobs or [None] * wanted, strict=True))
        outputs = []
        for part in parts:
            sampled = next(tokens) if part.samples else None
            output = self._land_part(part, sampled)
            if output is not None:
                outputs.append(output)
        return outputs

    def _land_part(self, part: Part, sampled: tuple[int, TokenLogprob | None] | None) -> Output | None:
        sequence = part.sequence
        sequence.num_in_flight -= 1
        if sequence.is_finished:  # ended meanwhile: the token is dropped, its place consumed
            if not sequence.num_in_flight:
                self._landing.remove(sequence)
                self._release(sequence)
            return None
        sequence.num_computed += part.count
        if sampled is not None and sampled[0] == INVALID_TOKEN:
            return self._finish(sequence, "error", error="the model gave logits that are not finite")
        if sampled is not None:
            sequence.token_ids.append(sampled[0])
            sequence.num_pending -= 1
        self.cache.commit(sequence.table, sequence.token_ids, sequence.num_computed)
        return None if sampled is None else self._output(sequence, *sampled)

    def _output(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> Output:
        self._totals["output_tokens"] += 1
        if not sequence.first_token_at:
            sequence.first_token_at = self._clock()
        logprobs = None if sequence.request.params.logprobs is None else [logprob]
        num_output = len(sequence.token_ids) - sequence.num_prompt_tokens
        params = sequence.request.params
        if token in sequence.end_token_ids and num_output >= params.min_tokens:
            return self._finish(sequence, "stop", [token], logprobs, stop_token_id=token)
        if num_output >= params.max_tokens:
            return self._finish(sequence, "length", [token], logprobs)
        return self._message(sequence, token_ids=[token], logprobs=logprobs)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        token_ids: list[int] = [],  # noqa: B006 (never changed)
        logprobs: list | None = None,
        stop_token_id: int | None = None,
        error: str | None = None,
    ) -> Output:
        """The one place where a request ends."""
        del self._sequences[sequence.request.id]
        sequence.finish_reason = reason
        self._totals["num_finished"] += 1
        if sequence.slot is None:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
            if sequence.num_in_flight:
                self._landing.append(sequence)
            else:
                self._release(sequence)
        return self._message(
            sequence,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            error=error,
        )

    def _message(self, sequence: Sequence, **fields) -> Output:
        return Output(
            id=sequence.request.id,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=sequence.num_cached_tokens or 0,
            times=sequence.times,
            **fields,
        )

    def _release(self, sequence: Sequence) -> None:
        self.cache.free(sequence.table)
        self._free_slots.append(sequence.slot)

    # -- accounts --------------------------------------------------------------------------------

    def stats(self) -> Stats:
        pool = self.cache.pool
        return Stats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached,
            **self._totals,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues, slots, counters and both books of blocks are whole."""
        integrity.check(self)


def _key(sequence: Sequence) -> tuple[int, int]:
    return sequence.key


def _is_not_decode(sequence: Sequence) -> bool:
    return sequence.gap != 1
