"""One request in the engine: its tokens, its block table and a few counters.

Knows nothing of other sequences, of queues or of budgets; the scheduler owns and changes it.
"""

from __future__ import annotations

from ds_serve.cache.table import BlockTable
from ds_serve.messages import FinishReason, Request, TokenLogprob


class Sequence:
    """Counters, all in tokens:

        token_ids        prompt + confirmed output
        num_pending      sampled by steps in flight, value not yet known here
        num_scheduled    KV is written, or will be by the steps and loads in flight
        num_computed     KV is written, confirmed by a result
        num_admitted     known when it took its slot; the ranks draw later ones
        num_prefill      of num_admitted, those that were not in the cache

        num_computed <= num_scheduled <= len(token_ids) + num_pending

    Where its table waits for loads, they are in flight from its admission on, and it takes part in no step
    until they have landed. There is no prefill and no decode phase: a sequence has a gap, and the scheduler
    closes it.
    """

    __slots__ = (
        "arrival",
        "draining",
        "end_token_ids",
        "finish_reason",
        "first_scheduled_at",
        "first_token_at",
        "is_announced",
        "is_audit",
        "is_loading",
        "is_sampled",
        "is_scored",
        "last_step",
        "look_again_at",
        "num_admitted",
        "num_cached_tokens",
        "num_computed",
        "num_host_tokens",
        "num_in_flight",
        "num_loaded",
        "num_overtaken",
        "num_pending",
        "num_prefill",
        "num_prompt_tokens",
        "num_scheduled",
        "prefix_score",
        "prompt_logprobs",
        "queued_at",
        "request",
        "slot",
        "table",
        "token_ids",
        "uses_cache",
        "waits_for_load",
    )

    def __init__(self, request: Request, table: BlockTable, arrival: int, now: float) -> None:
        self.request = request
        self.table = table
        self.arrival = arrival
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.end_token_ids = request.params.end_token_ids
        self.num_pending = 0
        self.num_scheduled = 0
        self.num_computed = 0
        self.num_admitted = 0
        self.num_prefill = 0
        self.num_in_flight = 0  # steps, and its loads as one
        self.last_step = 0  # the number of the last step that it took part in
        self.is_loading = False  # more of its prefix is to be loaded, or is under way: no rows until then
        self.num_loaded = 0  # tokens that loads have brought since it took its slot
        self.num_cached_tokens: int | None = (
            None  # set once, at the first admission or when its loads are done
        )
        self.num_host_tokens = 0  # of those
        self.slot: int | None = None  # holds a slot exactly while it holds blocks
        self.is_announced = False  # the ranks know that it has the slot
        self.draining = False  # chosen as a victim while in flight: preempted once it has landed
        # Its prompt's log-probabilities, until they are handed out: every token is computed, none is a hit.
        self.is_scored = request.params.prompt_logprobs is not None
        self.prompt_logprobs: list[TokenLogprob] = []
        self.uses_cache = not self.is_scored  # False: neither matches nor is published
        self.is_audit = False  # the engine's own
        self.is_sampled = False  # a hit to be audited
        # While it waits: what the cache held for it when that was last looked up, and until when that stands.
        self.prefix_score = 0.0
        self.waits_for_load = False
        self.look_again_at = 0
        self.num_overtaken = 0
        self.finish_reason: FinishReason | None = None
        self.queued_at = now
        self.first_scheduled_at = 0.0
        self.first_token_at = 0.0

    @property
    def key(self) -> tuple[int, int]:
        """Order among sequences: lower goes first, higher is preempted first."""
        return (self.request.priority, self.arrival)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def gap(self) -> int:
        """Tokens whose KV is still to be computed; 0 once the last token asked for is being sampled."""
        if self.num_output >= self.request.params.max_tokens:
            return 0
        return self.num_tokens - self.num_scheduled

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def times(self) -> tuple[float, float, float]:
        return (self.queued_at, self.first_scheduled_at, self.first_token_at)

    def reset(self) -> None:
        """Back to nothing computed (its blocks are given back by the caller); tokens stay."""
        self.num_scheduled = self.num_computed = self.num_loaded = 0
        self.prompt_logprobs.clear()
        self.is_loading = False
        self.slot = None
        self.is_announced = False
        self.draining = False
