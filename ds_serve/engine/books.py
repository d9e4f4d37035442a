"""Every open sequence and its place (waiting, running, or ended and landing), and the engine's totals.

Each change of place is one method here, so that slots, blocks and totals go with it. Decides nothing:
planner.py says who moves on, scheduler.py what results mean.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ds_serve.cache.manager import CacheManager
from ds_serve.engine.admission import Candidate, WaitingQueue
from ds_serve.engine.audit import Auditor
from ds_serve.engine.copies import CopyBook
from ds_serve.engine.limits import Limits
from ds_serve.engine.plan import Part
from ds_serve.engine.sequence import Sequence
from ds_serve.messages import FinishReason, Output, Request


@dataclass(slots=True)
class Totals:
    """What only ever grows, by its names in Stats. The engine's own requests do not count."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_finished: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    cached_tokens_host: int = 0
    output_tokens: int = 0
    loaded_blocks: int = 0
    stored_blocks: int = 0
    failed_copies: int = 0
    load_s: float = 0.0
    num_loads: int = 0
    store_s: float = 0.0
    num_stores: int = 0


class Books:
    """sequences by id; each is in waiting or running. Those in running or landing hold a slot.

    running is sorted by key; landing are those that ended with something in flight; in_flight are the steps
    whose results have not come back, oldest first, with everyone's part; copies are the loads and stores.
    """

    def __init__(self, limits: Limits, cache: CacheManager, clock: Callable[[], float]) -> None:
        self.cache = cache
        self.clock = clock
        self.sequences: dict[str, Sequence] = {}
        self.waiting = WaitingQueue(limits, cache)
        self.running: list[Sequence] = []
        self.landing: list[Sequence] = []
        self.in_flight: deque[tuple[int, list[Part]]] = deque()
        self.copies = CopyBook(limits.num_ranks)
        self.free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self.auditor = Auditor(limits.audit_share)
        self.totals = Totals()
        self._arrivals = 0

    def enqueue(self, request: Request) -> Sequence:
        """A request becomes a sequence that waits."""
        table = self.cache.new_table(request.salt, request.adapter)
        sequence = Sequence(request, table, self._arrivals, self.clock())
        self._arrivals += 1
        self.sequences[request.id] = sequence
        self.waiting.add(sequence)
        return sequence

    def start(self, found: Candidate) -> None:
        """Out of the queue into a slot, with what lies on the device; what is on the host is to be loaded."""
        sequence = found.sequence
        self.waiting.admit(found)
        cached, _ = self.cache.take_prefix(sequence.table, found.match, load=False)
        sequence.slot = self.free_slots.pop()
        sequence.num_scheduled = sequence.num_computed = cached
        sequence.num_admitted = len(sequence.token_ids)
        sequence.num_prefill = sequence.num_admitted - found.num_cached
        sequence.num_in_flight = 0
        sequence.is_loading = found.loads
        insort(self.running, sequence, key=_key)
        if not sequence.first_scheduled_at:
            sequence.first_scheduled_at = self.clock()
        if not found.loads:
            self.count_hit(sequence, cached)

    def loaded(self, sequence: Sequence) -> None:
        """No more of a prefix will be loaded: what is not there is computed."""
        sequence.is_loading = False
        sequence.num_prefill = sequence.num_admitted - sequence.num_computed
        self.count_hit(sequence, sequence.num_computed, sequence.num_loaded)

    def count_hit(self, sequence: Sequence, num_cached: int, num_host: int = 0) -> None:
        """What the cache had at a sequence's first start; later ones, after preemption, do not count."""
        if sequence.is_audit or sequence.num_cached_tokens is not None:
            return
        sequence.num_cached_tokens, sequence.num_host_tokens = num_cached, num_host
        self.totals.prompt_tokens += sequence.num_prompt_tokens
        self.totals.cached_tokens += num_cached
        self.totals.cached_tokens_host += num_host
        sequence.is_sampled = num_cached > 0 and self.auditor.is_sampled()

    def preempt(self, sequence: Sequence) -> None:
        """Back to the queue, to be computed again: tokens are kept, blocks and slot are not."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.reset()
        self.waiting.add(sequence)
        self.totals.num_preemptions += 1

    def finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        token_ids: list[int] = [],  # noqa: B006 (never changed)
        logprobs: list | None = None,
        stop_token_id: int | None = None,
        error: str | None = None,
    ) -> Output:
        """The one place where a request ends; what it has in flight lands first, then it gives all back."""
        del self.sequences[sequence.request.id]
        sequence.finish_reason = reason
        self.totals.num_finished += not sequence.is_audit
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self.landing.append(sequence)
            self.land_ended(sequence)
        return self.message(
            sequence,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            error=error,
        )

    def land_ended(self, sequence: Sequence) -> None:
        """An ended sequence gives slot and blocks back once nothing of it is in flight."""
        if not sequence.num_in_flight:
            self.landing.remove(sequence)
            self._release(sequence)

    def message(self, sequence: Sequence, **fields) -> Output:
        return Output(
            id=sequence.request.id,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=sequence.num_cached_tokens or 0,
            num_host_tokens=sequence.num_host_tokens,
            times=sequence.times,
            **fields,
        )

    def _release(self, sequence: Sequence) -> None:
        self.cache.free(sequence.table)
        self.free_slots.append(sequence.slot)


def _key(sequence: Sequence) -> tuple[int, int]:
    return sequence.key
