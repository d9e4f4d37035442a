"""The scheduler: requests and results in, plans and outputs out.

Continuous batching without phases. Pure Python over plain values: it knows no clock but the one it is given,
no process, no tensor. The engine loop calls add / abort / unpin / schedule / update / copied from one thread.
planner.py decides what a plan holds, books.py keeps every sequence's place.

On one stage the ranks remember the tokens that they draw, so a sequence's next step is planned before its
token is known here. In a pipeline a token comes back first and goes out with the next plan. What fills the
stages are micro-batches: a step takes only its share of the decodes and of the prompt tokens, and several
chunks of one prompt may be in flight, since every stage runs the steps in order.

Its order is by priority, then by arrival. The head of the waiting queue is overtaken a few times at most
(admission.py), and who comes last is the first to be preempted, so the first one always gets on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict

import msgspec

from ds_serve.cache.manager import CacheManager
from ds_serve.engine import integrity
from ds_serve.engine.audit import RESERVED
from ds_serve.engine.books import Books
from ds_serve.engine.copies import Pairs
from ds_serve.engine.limits import Limits, refusal
from ds_serve.engine.plan import Part
from ds_serve.engine.planner import Planner
from ds_serve.engine.sequence import Sequence
from ds_serve.messages import (
    INVALID_TOKEN,
    NO_TOKEN_FITS,
    CopyResult,
    Output,
    Request,
    Stats,
    StepPlan,
    StepResult,
    TokenLogprob,
)

_FAILED = {
    INVALID_TOKEN: "the model gave logits that are not finite",
    NO_TOKEN_FITS: "no token fits the grammar that its output must follow, or it has become too complex",
}


class Scheduler:
    """Owns every open sequence, from add() to its last Output."""

    def __init__(self, limits: Limits, cache: CacheManager, clock: Callable[[], float] = time.monotonic):
        self.limits = limits
        self.cache = cache
        self.books = Books(limits, cache, clock)
        self._planner = Planner(limits, self.books)

    # -- requests in -----------------------------------------------------------------------------

    def add(self, request: Request) -> Output | None:
        """Queue a request; an Output with finish_reason "error" where it can never run."""
        problem = refusal(request, self.limits, self.cache)
        if request.id.startswith(RESERVED):
            problem = f"request id {request.id!r}: ids that begin with {RESERVED!r} are the engine's own"
        elif request.id in self.books.sequences:
            problem = f"request id {request.id} is in use"
        elif len(self.books.waiting) >= self.limits.max_queue:
            problem = f"the queue is full: {len(self.books.waiting)} requests are waiting"
        if problem is not None:
            return Output(id=request.id, finish_reason="error", error=problem)
        self.books.enqueue(request)
        return None

    def abort(self, request_id: str) -> Output | None:
        """End a request in any state; None where it is unknown or has ended."""
        sequence = self.books.sequences.get(request_id)
        if sequence is None or sequence.is_audit:
            return None
        return self.books.finish(sequence, "abort")

    def unpin(self, cache_key: str, salt: str) -> None:
        """Release what requests pinned under this key and salt."""
        self.cache.unpin(_pin_name(cache_key, salt))

    def fail_all(self, reason: str) -> list[Output]:
        """End every open request with an error; for a dying engine, whose blocks die with it."""
        open_ids = [name for name, sequence in self.books.sequences.items() if not sequence.is_audit]
        self.books.sequences.clear()
        self.books.waiting.clear()
        self.books.running.clear()
        return [Output(id=request_id, finish_reason="error", error=reason) for request_id in open_ids]

    @property
    def num_open(self) -> int:
        """Requests that have not ended, the engine's own among them."""
        return len(self.books.sequences)

    @property
    def num_in_flight(self) -> int:
        """Steps planned whose results have not come back; a plan without rows is none."""
        return len(self.books.in_flight)

    @property
    def num_copying(self) -> int:
        """Plans' loads, and plans' stores, that not all ranks have done."""
        return len(self.books.copies)

    @property
    def can_plan(self) -> bool:
        """Whether another step may be planned before a result comes back."""
        return len(self.books.in_flight) < self.limits.max_steps_in_flight

    def schedule(self) -> StepPlan | None:
        """The next plan, or None where nothing can be computed or copied before a result comes back.

        A plan without rows only starts copies: it is no step, and has no StepResult.
        """
        return self._planner.next()

    # -- a result in -----------------------------------------------------------------------------

    def update(self, result: StepResult) -> list[Output]:
        """Take in the oldest step's result: append tokens, publish blocks, end requests.

        Raises ValueError where the result does not belong to the oldest step in flight.
        """
        step, parts = self.books.in_flight[0] if self.books.in_flight else (None, [])
        wanted = sum(part.samples for part in parts)
        if step != result.step or wanted != len(result.token_ids):
            raise ValueError(
                f"result of step {result.step} with {len(result.token_ids)} tokens, "
                f"but the oldest step in flight is {step} with {wanted}"
            )
        self.books.in_flight.popleft()
        tokens = iter(zip(result.token_ids, result.logprobs or [None] * wanted, strict=True))
        scores = iter(result.prompt_logprobs)
        outputs = []
        for part in parts:
            sampled = next(tokens) if part.samples else None
            output = self._land_part(part, sampled, next(scores) if part.is_scored else [])
            if output is None:
                continue
            if not part.sequence.is_audit:
                outputs.append(output)
            elif output.finish_reason:
                self.books.auditor.take(output)
        return outputs

    def _land_part(
        self, part: Part, sampled: tuple[int, TokenLogprob | None] | None, scores: list[TokenLogprob]
    ) -> Output | None:
        sequence = part.sequence
        sequence.num_in_flight -= 1
        if sequence.is_finished:  # ended meanwhile: the token is dropped, its place consumed
            self.books.land_ended(sequence)
            return None
        sequence.num_computed += part.count
        sequence.prompt_logprobs += scores
        if sampled is not None and sampled[0] in _FAILED:
            return self.books.finish(sequence, "error", error=_FAILED[sampled[0]])
        if sampled is not None:
            sequence.token_ids.append(sampled[0])
            sequence.num_pending -= 1
        if sequence.uses_cache:
            self.cache.commit(sequence.table, sequence.token_ids, sequence.num_computed)
        self.cache.slide(sequence.table, sequence.num_computed)
        if sampled is None:
            return None
        is_first = len(sequence.token_ids) == sequence.num_prompt_tokens + 1
        problem = self._prompt_computed(sequence) if is_first else None
        if problem is not None:
            return self.books.finish(sequence, "error", error=problem)
        output = self._output(sequence, *sampled)
        if not sequence.is_scored:
            return output
        scores, sequence.prompt_logprobs, sequence.is_scored = sequence.prompt_logprobs, [], False
        return msgspec.structs.replace(output, prompt_logprobs=scores)

    def _prompt_computed(self, sequence: Sequence) -> str | None:
        """A prompt's KV is there: it is pinned and audited where that is due. Returns why it must end."""
        books, request = self.books, sequence.request
        sequence.first_token_at = books.clock()
        if sequence.is_sampled and not books.waiting and not books.auditor.open_ids:
            through_cache, without = (books.enqueue(each) for each in books.auditor.start(request))
            through_cache.is_audit = without.is_audit = True
            without.uses_cache = False
        if not request.cache_key:
            return None
        name, until = _pin_name(request.cache_key, request.salt), sequence.first_token_at + request.cache_ttl
        must = request.pin == "must"
        return self.cache.pin(name, sequence.table, sequence.num_prompt_tokens, until, must)

    def _output(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> Output:
        self.books.totals.output_tokens += not sequence.is_audit
        logprobs = None if sequence.request.params.logprobs is None else [logprob]
        num_output = len(sequence.token_ids) - sequence.num_prompt_tokens
        params = sequence.request.params
        if token in sequence.end_token_ids and num_output >= params.min_tokens:
            return self.books.finish(sequence, "stop", [token], logprobs, stop_token_id=token)
        if num_output >= params.max_tokens:
            return self.books.finish(sequence, "length", [token], logprobs)
        return self.books.message(sequence, token_ids=[token], logprobs=logprobs)

    # -- copies done -----------------------------------------------------------------------------

    def copied(self, result: CopyResult) -> None:
        """Take in one rank's word on a plan's loads or stores; they count when every rank has spoken.

        No request ends by it. Raises ValueError for copies that are not under way.
        """
        batch = self.books.copies.land(result)
        if batch is None:
            return
        totals, num_good = self.books.totals, batch.num_pairs - len(batch.failed)
        totals.failed_copies += len(batch.failed)
        if result.kind == "store":
            totals.stored_blocks += num_good
            totals.store_s += batch.seconds
            totals.num_stores += 1
            for _, pairs, failed in batch.landed():
                self.cache.stored(pairs, failed)
            return
        totals.loaded_blocks += num_good
        totals.load_s += batch.seconds
        totals.num_loads += 1
        for sequence, pairs, failed in batch.landed():
            self._land_load(sequence, pairs, failed)
        self.books.waiting.look_again()

    def _land_load(self, sequence: Sequence, pairs: Pairs, failed: set[int]) -> None:
        """What came is good up to the first failed block; from there on it is computed."""
        good = self.cache.loaded(sequence.table, pairs, failed)
        sequence.num_in_flight -= 1
        if sequence.is_finished:
            self.books.land_ended(sequence)
            return
        sequence.num_computed = sequence.num_scheduled = good
        block_size = self.cache.block_size
        there = set(sequence.table.block_ids[: good // block_size])
        sequence.num_loaded += sum(device in there for _, device in pairs) * block_size
        if failed:
            self.books.loaded(sequence)

    # -- accounts --------------------------------------------------------------------------------

    def stats(self) -> Stats:
        cache, pool = self.cache, self.cache.pool
        return Stats(
            num_running=sum(not sequence.is_audit for sequence in self.books.running),
            num_waiting=sum(not sequence.is_audit for sequence in self.books.waiting),
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached,
            num_host_blocks=cache.num_host_blocks,
            num_host_used=cache.num_host_used,
            num_pinned_blocks=cache.num_pinned,
            evictions=cache.evictions,
            host_evictions=cache.host_evictions,
            lost_blocks=cache.lost_blocks,
            audits=self.books.auditor.num_audits,
            audit_max_difference=self.books.auditor.max_difference,
            bytes_per_block=self.limits.bytes_per_block,
            **asdict(self.books.totals),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues, slots, counters and both books of blocks are whole."""
        integrity.check(self)


def _pin_name(cache_key: str, salt: str) -> str:
    """One name for both: the length keeps them from running into each other."""
    return f"{len(salt)}:{salt}{cache_key}"
