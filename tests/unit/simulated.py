"""Workers without a model, and a scheduler over them that is driven by hand.

They keep what each KV slot holds and check every plan against it.

A position's KV is stood for by a checksum of all tokens up to it, and a sampled token is a function of the
sequence so far, so a wrong block, a stale block, a block that one rank lacks or a lost token shows as a wrong
answer.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from zlib import crc32

from ds_serve.cache.manager import CacheManager
from ds_serve.engine.limits import Limits
from ds_serve.engine.scheduler import Scheduler
from ds_serve.messages import (
    NO_BLOCK,
    CopyResult,
    NewSequence,
    Request,
    Row,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenLogprob,
)

VOCAB = 50
BLOCK = 4  # tokens, in Tiers


def next_token(tokens: list[int]) -> int:
    return crc32(bytes(tokens)) % VOCAB


def expected_output(request: Request) -> list[int]:
    """What any schedule must give: tokens until an end token or max_tokens."""
    tokens = list(request.prompt_token_ids)
    params = request.params
    for produced in range(1, params.max_tokens + 1):
        tokens.append(next_token(tokens))
        if tokens[-1] in params.end_token_ids and produced >= params.min_tokens:
            break
    return tokens[len(request.prompt_token_ids) :]


def expected_prompt_logprobs(request: Request) -> list[TokenLogprob] | None:
    """Of every prompt token but the first, where asked for."""
    count, prompt = request.params.prompt_logprobs, request.prompt_token_ids
    if count is None:
        return None
    return [_score(prompt[: position + 1], count) for position in range(1, len(prompt))]


def _score(tokens: list[int], count: int) -> TokenLogprob:
    """Of the last of tokens."""
    checksum = crc32(bytes(tokens))
    top = range(count)
    return TokenLogprob(
        logprob=-(checksum % 89) / 100,
        top_ids=[(checksum + index) % VOCAB for index in top],
        top_logprobs=[-(checksum % 97) / 100 - index for index in top],
    )


def make_request(name: object, prompt: list[int], max_tokens: int, **fields) -> Request:
    params = {k: fields.pop(k) for k in list(fields) if k in SamplingParams.__struct_fields__}
    params = SamplingParams(max_tokens=max_tokens, **params)
    return Request(id=str(name), prompt_token_ids=prompt, params=params, **fields)


LOST = (-1, -1, -1)


class _Rank:
    """One rank's KV, on the device and on the host. It knows no tokens but those of a row: hidden states."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        num_host_blocks: int,
        windows: tuple[int, ...],
    ) -> None:
        self.block_size, self.windows = block_size, windows
        # A position holds its token, the checksum of all tokens up to it, and whose layers' KV it is.
        self.kv: list[list[tuple[int, int, int]]] = [[LOST] * block_size for _ in range(num_blocks)]
        self.host: list[list[tuple[int, int, int]]] = [[LOST] * block_size for _ in range(num_host_blocks)]
        self.tables: list[list[int]] = [[] for _ in range(max_num_seqs)]

    def write(self, row: Row, tokens: list[int]) -> None:
        table = self.tables[row.slot]
        table += row.new_block_ids
        end = row.start + row.count
        assert end * len(self.windows) <= len(table) * self.block_size, "a row goes past its blocks"
        before = [self._at(row.slot, row.start - 1, g)[1] if row.start else 0 for g in self._groups]
        for group, checksum in enumerate(before):
            for position, token in enumerate(tokens, row.start):
                checksum = crc32(bytes([token]), checksum)
                block, offset = self._place(row.slot, position, group)
                self.kv[block][offset] = (token, checksum, group)

    def attend(self, row: Row) -> int:
        """The checksum of the row's sequence, after all KV that its queries see was found to be its own."""
        (checksum,) = {self._attend(row, group) for group in self._groups}
        return checksum

    def _attend(self, row: Row, group: int) -> int:
        reach = self.windows[group]
        first = max(0, row.start - reach + 1) if reach else 0
        checksum = self._at(row.slot, first - 1, group)[1] if first % self.block_size else None
        for position in range(first, row.start + row.count):
            token, found, owner = self._at(row.slot, position, group)
            assert token >= 0, f"slot {row.slot}: position {position} was never written"
            if checksum is None and first:  # the token before it lies in a block that may be gone
                checksum = found
            else:
                checksum = crc32(bytes([token]), checksum or 0)
            assert (found, owner) == (checksum, group), f"slot {row.slot}: wrong KV at position {position}"
        return checksum

    @property
    def _groups(self) -> range:
        return range(len(self.windows))

    def _at(self, slot: int, position: int, group: int) -> tuple[int, int, int]:
        block, offset = self._place(slot, position, group)
        return self.kv[block][offset]

    def _place(self, slot: int, position: int, group: int) -> tuple[int, int]:
        index, offset = divmod(position, self.block_size)
        block = self.tables[slot][index * len(self.windows) + group]
        assert block != NO_BLOCK, f"slot {slot}: position {position} is seen and has no block"
        return block, offset

    def slabs(self, kind: str) -> tuple[list, list]:
        """Where copies of this kind come from and where they go."""
        return (self.host, self.kv) if kind == "load" else (self.kv, self.host)

    def spoil(self, kind: str, blocks: Iterable[int]) -> None:
        """Targets of copies that were not made, or not yet."""
        target = self.slabs(kind)[1]
        for block in blocks:
            target[block] = [LOST] * self.block_size


@dataclass(frozen=True)
class Copies:
    """One rank's part in a plan's loads or stores: pairs of (source block, target block)."""

    rank: int
    step: int
    kind: str
    pairs: list[tuple[int, int]]


class SimulatedWorker:
    """Runs plans at once and gives the results back in order, as the ranks do.

    They remember the tokens that they draw. Stages have equally many ranks, each with its own KV and host
    memory.

    copies are what plans have ordered and copy() has not done yet. Until then their targets hold nothing that
    anybody may read. cached_error is added to log probabilities of sequences that began with a prefix hit.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        num_stages: int = 1,
        num_ranks: int | None = None,
        num_host_blocks: int = 0,
        windows: tuple[int, ...] = (0,),
    ) -> None:
        self.num_stages = num_stages
        self.ranks = [
            _Rank(num_blocks, block_size, max_num_seqs, num_host_blocks, windows)
            for _ in range(num_ranks or num_stages)
        ]
        self.tokens: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self.num_logprobs: list[int | None] = [None] * max_num_seqs
        self.prompts: list[NewSequence | None] = [None] * max_num_seqs
        self.max_scored = 0
        self.is_hit = [False] * max_num_seqs
        self.copies: list[Copies] = []
        self.cached_error = 0.0
        self.num_computed = 0
        self.max_step_tokens = 0

    def run(self, plan: StepPlan) -> StepResult | None:
        """The result of the plan's step; None where it only orders copies."""
        self._order("load", plan.step, plan.loads)
        self._order("store", plan.step, plan.stores)
        for new in plan.new:
            self.tokens[new.slot] = list(new.token_ids)
            self.num_logprobs[new.slot] = new.params.logprobs
            self.prompts[new.slot] = new
            for rank in self.ranks:
                rank.tables[new.slot] = []
        slots = [row.slot for row in plan.rows]
        assert len(set(slots)) == len(slots), "a slot has two rows in one step"
        num_tokens = sum(row.count for row in plan.rows)
        self.num_computed += num_tokens
        self.max_step_tokens = max(self.max_step_tokens, num_tokens)
        inputs = [self._inputs(row) for row in plan.rows]
        for rank in self.ranks:
            for row, tokens in zip(plan.rows, inputs, strict=True):
                rank.write(row, tokens)
            checksums = [rank.attend(row) for row in plan.rows]
        drawn = [(row.slot, sum_) for row, sum_ in zip(plan.rows, checksums, strict=True) if row.sample]
        sampled = [sum_ % VOCAB for _, sum_ in drawn]
        for (slot, _), token in zip(drawn, sampled, strict=True):
            self.tokens[slot].append(token)
        for new in plan.new:
            self.is_hit[new.slot] = next(row.start > 0 for row in plan.rows if row.slot == new.slot)
        logprobs = [self._logprobs(slot, sum_) for slot, sum_ in drawn]
        if not plan.rows:
            return None
        scored = [row for row in plan.rows if row.scored]
        self.max_scored = max(self.max_scored, sum(row.count for row in scored))
        return StepResult(
            step=plan.step,
            token_ids=sampled,
            logprobs=logprobs if any(logprobs) else [],
            prompt_logprobs=[self._prompt_logprobs(row) for row in scored],
        )

    def copy(self, copies: Copies, failed: Collection[int] = ()) -> CopyResult:
        """One rank makes its copies, all but those that fail."""
        self.copies.remove(copies)
        rank = self.ranks[copies.rank]
        source, target = rank.slabs(copies.kind)
        for index, (from_, to) in enumerate(copies.pairs):
            if index not in failed:
                target[to] = list(source[from_])
        return CopyResult(
            rank=copies.rank, step=copies.step, kind=copies.kind, failed=sorted(failed), seconds=0.5
        )

    def _order(self, kind: str, step: int, pairs: list[tuple[int, int]]) -> None:
        if not pairs:
            return
        for index, rank in enumerate(self.ranks):
            rank.spoil(kind, (target for _, target in pairs))
            self.copies.append(Copies(index, step, kind, list(pairs)))

    def _prompt_logprobs(self, row: Row) -> list[TokenLogprob]:
        """Of the prompt tokens after the row's positions, after its KV was found to be its own."""
        new = self.prompts[row.slot]
        end = min(row.start + row.count, new.num_prompt_tokens - 1)
        assert row.start < end, "a scored row without a prompt token to score"
        ends = range(row.start + 2, end + 2)
        return [_score(new.token_ids[:last], new.params.prompt_logprobs) for last in ends]

    def _logprobs(self, slot: int, checksum: int) -> TokenLogprob | None:
        count = self.num_logprobs[slot]
        if count is None:
            return None
        best = -(checksum % 89) / 100 + self.is_hit[slot] * self.cached_error
        top = [best - index for index in range(count)]
        return TokenLogprob(
            logprob=best, top_ids=[(checksum + index) % VOCAB for index in range(count)], top_logprobs=top
        )

    def _inputs(self, row: Row) -> list[int]:
        """The row's tokens, which must have been drawn by now."""
        known, end = self.tokens[row.slot], row.start + row.count
        assert end <= len(known), "a row goes past the known tokens"
        assert row.sample == (end == len(known)), "samples in mid-sequence"
        return known[row.start : end]


class Tiers:
    """A scheduler and its simulated ranks: whatever is free on the device is stored at once."""

    def __init__(
        self,
        num_ranks=1,
        num_host_blocks=32,
        num_blocks=12,
        max_pinned_blocks=0,
        clock=time.monotonic,
        **limits,
    ) -> None:
        defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 128}
        self.limits = Limits(**(defaults | {"num_ranks": num_ranks} | limits))
        self.cache = CacheManager(
            num_blocks,
            BLOCK,
            num_host_blocks=num_host_blocks,
            store_zone=num_blocks,
            max_pinned_blocks=max_pinned_blocks,
        )
        self.scheduler = Scheduler(self.limits, self.cache, clock)
        self.worker = SimulatedWorker(
            num_blocks, BLOCK, self.limits.max_num_seqs, self.limits.num_stages, num_ranks, num_host_blocks
        )
        self.results = deque()
        self.outputs = {}

    def add(self, *requests):
        for request in requests:
            assert self.scheduler.add(request) is None
            self.outputs[request.id] = []

    def plan(self):
        plan = self.scheduler.schedule()
        if plan is not None:
            result = self.worker.run(plan)
            if result is not None:
                self.results.append(result)
        self.scheduler.check_integrity()
        return plan

    def land(self):
        for output in self.scheduler.update(self.results.popleft()):
            self.outputs[output.id].append(output)
        self.scheduler.check_integrity()

    def copy(self, kind=None, ranks=None, failed=()):
        """These ranks (None: all) make their copies and say so; failed: indexes, where there are so many."""
        for each in list(self.worker.copies):
            if kind in (None, each.kind) and (ranks is None or each.rank in ranks):
                lost = [index for index in failed if index < len(each.pairs)]
                self.scheduler.copied(self.worker.copy(each, lost))
                self.scheduler.check_integrity()

    def run(self):
        """Until every request has ended and nothing more is copied."""
        while self.plan() is not None or self.results or self.worker.copies:
            if self.results:
                self.land()
            self.copy()

    def wash(self, *prompts):
        """Computes these prompts, then evicts them from the device; the host has them."""
        others = [3] * (self.cache.num_blocks * BLOCK - 1)
        for index, prompt in enumerate([*prompts, others]):
            self.add(make_request(f"wash {index} of {len(self.outputs)}", prompt, 1))
            self.run()
        assert not self.worker.copies and not self.scheduler.num_copying

    def tokens(self, name):
        return [token for output in self.outputs[name] for token in output.token_ids]

    def slots(self):
        """Ids of those that hold one and have not ended."""
        return {sequence.request.id for sequence in self.scheduler.books.running}
