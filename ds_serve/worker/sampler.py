"""Chooses each row's next token from its logits, for a whole batch at once.

Knows slots, logits and SamplingParams; knows no text, no blocks and no model. The worker of the
last stage calls it: `admit` when a sequence takes a slot, `begin` before a step's forward pass, `sample`
behind it, `append` after that.

The order is transformers' own (GenerationMixin._get_logits_processor): logit bias, repetition
penalty, end tokens masked before min_tokens, temperature, top-k, top-p, min-p. Presence and
frequency penalties, which transformers has not, follow the repetition penalty, by OpenAI's formula, and what
a grammar forbids (constraint.py) is masked before the temperature. Log-probabilities are of the raw logits,
before all of these.

The arithmetic of a draw is in draw.py: a row's token depends on nothing but its seed, its position
and its logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ds_serve.messages import SamplingParams
from ds_serve.worker.constraint import Constraints
from ds_serve.worker.draw import (
    NUCLEUS_CANDIDATES,
    Filter,
    argmax,
    least_kept,
    penalised,
    pick,
    pick_above,
    uniforms,
    unset_bits,
)
from ds_serve.worker.put import put
from ds_serve.worker.sampled import Logprobs, SampleOutput, ScoreOutput

MIN_TEMPERATURE = 1e-30  # below it float32 would divide by zero; by then the draw is greedy anyway
MAX_PLANS = 32


@dataclass(frozen=True)
class _Slot:
    params: SamplingParams
    num_prompt_tokens: int
    table_row: int | None  # row of the penalty tables, for a slot that has a penalty


@dataclass(frozen=True)
class _Plan:
    """What sampling a list of slots needs besides the logits; derived once while the list stays the same.

    Row indices count the batch's rows, but for `filtered` and `unfiltered`, which count the random ones.
    None stands for "no row wants it".
    """

    bias: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None  # rows, ids, values, one entry a bias
    penalty: tuple[torch.Tensor, ...] | None  # rows, table rows, then repetition, presence, frequency [P, 1]
    ends: tuple[np.ndarray, np.ndarray, np.ndarray] | None  # rows, ids, first position where allowed
    random: torch.Tensor | None
    random_rows: np.ndarray  # the same on the host
    seeds: np.ndarray  # uint64, one a random row
    temperature: torch.Tensor | None  # [random, 1]
    filter: Filter | None  # of the rows filtered
    filtered: torch.Tensor | None
    unfiltered: torch.Tensor | None
    logprob_rows: tuple[tuple[int, int], ...]
    logprob_index: torch.Tensor | None
    grammars: tuple[torch.Tensor, torch.Tensor] | None  # rows that have one, and the same as bool [R]

    @property
    def edits_logits(self) -> bool:
        return any(edit is not None for edit in (self.bias, self.penalty, self.ends, self.grammars))


class Sampler:
    """Sampling state of `max_slots` slots, and the vectorised step over any list of them.

    Logits may be wider than `vocab_size` (a vocabulary padded for sharding): the rest is cut.
    Raises ValueError naming the parameter where a slot or a biased token id does not exist, or where a
    sequence has a grammar and there are no constraints.
    """

    def __init__(
        self,
        max_slots: int,
        vocab_size: int,
        device: torch.device | str = "cpu",
        constraints: Constraints | None = None,
    ):
        self.max_slots = max_slots
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._constraints = constraints
        self._slots: dict[int, _Slot] = {}
        self._plans: dict[tuple[int, ...], _Plan] = {}
        self._free_table_rows: list[int] = []
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=self.device)  # of output tokens
        self._seen = torch.zeros(0, vocab_size, dtype=torch.bool, device=self.device)  # in prompt or output

    # -- slots ---------------------------------------------------------------------------------

    def admit(self, slot: int, params: SamplingParams, token_ids: list[int], num_prompt_tokens: int) -> None:
        """A sequence takes a slot, replacing what it held. token_ids are its prompt and output so far.

        Penalties count output from num_prompt_tokens on, so a preempted sequence may come back.
        """
        if not 0 <= slot < self.max_slots:
            raise ValueError(f"slot: must be in [0, {self.max_slots}), got {slot}")
        if not 0 <= num_prompt_tokens <= len(token_ids):
            raise ValueError(
                f"num_prompt_tokens: must be in [0, {len(token_ids)}] (token_ids), got {num_prompt_tokens}"
            )
        outside = [token for token in params.logit_bias if token >= self.vocab_size]
        if outside:
            raise ValueError(
                f"logit_bias: token ids {outside} are outside the vocabulary of {self.vocab_size}"
            )
        if params.grammar and self._constraints is None:
            raise ValueError("grammar: this sampler has no constraints")
        self.release(slot)
        if params.grammar:
            self._constraints.admit(slot, params, token_ids[num_prompt_tokens:])
        table_row = None
        if params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
            table_row = self._take_table_row(token_ids, num_prompt_tokens)
        self._slots[slot] = _Slot(params, num_prompt_tokens, table_row)

    def release(self, slot: int) -> None:
        """Forgets a slot. admit does so by itself; calling this earlier frees the penalty tables' row."""
        if self._constraints is not None:
            self._constraints.release(slot)
        old = self._slots.pop(slot, None)
        if old is not None and old.table_row is not None:
            self._free_table_rows.append(old.table_row)
        self._plans.clear()

    def close(self) -> None:
        """Ends the constraints' thread. May be called twice."""
        if self._constraints is not None:
            self._constraints.close()

    def append(self, slots: list[int], token_ids: torch.Tensor | list[int]) -> None:
        """Counts one output token a slot, where a penalty will ask for it. The constraints are told apart."""
        plan = self._plan(slots)
        if plan.penalty is None:
            return
        rows, table_rows = plan.penalty[:2]
        tokens = torch.as_tensor(token_ids, dtype=torch.long, device=self.device)[rows]
        self._counts[table_rows, tokens] += 1
        self._seen[table_rows, tokens] = True

    def _take_table_row(self, token_ids: list[int], num_prompt_tokens: int) -> int:
        if not self._free_table_rows:
            size = len(self._counts)
            grown = min(max(2 * size, 4), self.max_slots)
            more = (grown - size, self.vocab_size)
            self._counts = torch.cat([self._counts, self._counts.new_zeros(more)])
            self._seen = torch.cat([self._seen, self._seen.new_zeros(more)])
            self._free_table_rows = list(range(grown - 1, size - 1, -1))
        row = self._free_table_rows.pop()
        tokens = np.asarray(token_ids, dtype=np.int64)
        outside = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
        if len(outside):
            self._free_table_rows.append(row)
            raise ValueError(
                f"token_ids: {outside[:8].tolist()} are outside the vocabulary of {self.vocab_size}"
            )
        counts = np.bincount(tokens[num_prompt_tokens:], minlength=self.vocab_size)
        seen = np.zeros(self.vocab_size, dtype=bool)
        seen[tokens] = True
        self._counts[row], self._seen[row] = put([counts, seen], self.device)
        return row

    # -- the step ------------------------------------------------------------------------------

    def begin(self, slots: list[int]) -> None:
        """Starts what needs no logits yet. May be left out where none of the slots has a grammar."""
        if self._constraints is not None:
            self._constraints.begin(slots)

    def sample(self, logits: torch.Tensor, slots: list[int], positions: list[int]) -> SampleOutput:
        """One token a row. logits [R, V >= vocab_size] of any float type, left as they are.

        positions[i] is the index in its sequence of the token to be drawn: the number before it.
        """
        if logits.dim() != 2 or logits.shape[0] != len(slots) or logits.shape[1] < self.vocab_size:
            raise ValueError(
                f"logits: must be [{len(slots)}, at least {self.vocab_size}], got {list(logits.shape)}"
            )
        if len(positions) != len(slots):
            raise ValueError(f"positions: must be {len(slots)}, one a slot, got {len(positions)}")
        plan = self._plan(slots)
        at = np.asarray(positions, dtype=np.int64)
        raw = logits[:, : self.vocab_size].float()
        scores = self._edit(raw, plan, at) if plan.edits_logits else raw
        tokens, valid = argmax(scores)
        stuck = None
        if plan.grammars is not None:
            stuck = scores.gather(1, tokens[:, None]).squeeze(1).isneginf() & plan.grammars[1]
        if plan.random is not None:
            # A copy to overwrite: the one made already, where there is one that serves nothing else.
            spare = len(plan.random_rows) == len(slots) and scores.data_ptr() != logits.data_ptr()
            rows = scores if spare and not plan.logprob_rows else scores.index_select(0, plan.random)
            drawn = self._draw(rows, plan, at)
            tokens = tokens.index_copy(0, plan.random, drawn)
        tokens = torch.where(valid, tokens, 0)
        if not plan.logprob_rows:
            return SampleOutput(tokens, valid, stuck)
        counts = [count for _, count in plan.logprob_rows]
        logprobs = _logprobs(raw[plan.logprob_index], tokens[plan.logprob_index], counts)
        return SampleOutput(tokens, valid, stuck, [row for row, _ in plan.logprob_rows], logprobs)

    def score(self, logits: torch.Tensor, targets: torch.Tensor, rows: list[tuple[int, int]]) -> ScoreOutput:
        """Log-probabilities of given tokens: of as many of each of rows, (slot, number of tokens).

        logits [N, V >= vocab_size] of any float type, targets int64 [N], those of all rows one after another.
        Each has as many alternatives as its slot's prompt_logprobs asks for.
        """
        counts = [self._slots[slot].params.prompt_logprobs or 0 for slot, size in rows for _ in range(size)]
        logprobs = _logprobs(logits[:, : self.vocab_size].float(), targets, counts)
        return ScoreOutput(logprobs, [size for _, size in rows])

    def _edit(self, raw: torch.Tensor, plan: _Plan, positions: np.ndarray) -> torch.Tensor:
        """Scores after bias, penalties and all masks, [R, V]; raw itself where none applies now."""
        scores = raw
        if plan.bias is not None:
            rows, ids, values = plan.bias
            scores = scores.index_put((rows, ids), values, accumulate=True)
        if plan.penalty is not None:
            scores = penalised(scores, plan.penalty, self._seen, self._counts)
        if plan.ends is not None:
            rows, ids, allowed_from = plan.ends
            early = positions[rows] < allowed_from
            if early.any():
                index = (self._index(rows[early]), self._index(ids[early]))
                scores = scores.index_put(index, scores.new_full((), -torch.inf))
        if plan.grammars is not None:
            rows = plan.grammars[0]
            forbidden = unset_bits(self._constraints.masks(), self.vocab_size, self.device)
            if len(rows) == len(scores):
                scores = scores.masked_fill(forbidden, -torch.inf)
            else:
                some = scores.index_select(0, rows).masked_fill_(forbidden, -torch.inf)
                scores = scores.index_copy(0, rows, some)
        return scores

    def _draw(self, scores: torch.Tensor, plan: _Plan, positions: np.ndarray) -> torch.Tensor:
        """Token ids int64 [R] of the random rows' scores [R, V], which are overwritten."""
        distance = scores.sub_(scores.amax(-1, keepdim=True)).div_(plan.temperature)
        (uniform,) = put([uniforms(plan.seeds, positions[plan.random_rows])], self.device)
        if plan.filter is None:
            return pick(distance, uniform)
        if plan.unfiltered is None:
            return pick_above(distance, uniform, least_kept(distance, plan.filter))
        drawn = torch.empty_like(plan.random)
        some = distance[plan.filtered]
        drawn[plan.filtered] = pick_above(some, uniform[plan.filtered], least_kept(some, plan.filter))
        drawn[plan.unfiltered] = pick(distance[plan.unfiltered], uniform[plan.unfiltered])
        return drawn

    # -- what a list of slots asks for ---------------------------------------------------------

    def _plan(self, slots: list[int]) -> _Plan:
        key = tuple(slots)
        plan = self._plans.get(key)
        if plan is None:
            unknown = [slot for slot in key if slot not in self._slots]
            if unknown:
                raise ValueError(f"slots: {unknown} hold no sequence")
            if len(set(key)) != len(key):
                raise ValueError(f"slots: {list(key)} names one twice")
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            plan = self._plans[key] = self._make_plan([self._slots[slot] for slot in key])
        return plan

    def _make_plan(self, batch: list[_Slot]) -> _Plan:
        params = [slot.params for slot in batch]
        random = [row for row, p in enumerate(params) if not p.greedy]
        drawn = [params[row] for row in random]
        filtered = [row for row, p in enumerate(drawn) if self._filters(p)]
        unfiltered = [row for row, p in enumerate(drawn) if not self._filters(p)]
        logprob_rows = tuple((row, p.logprobs) for row, p in enumerate(params) if p.logprobs is not None)
        return _Plan(
            bias=self._plan_bias(params),
            penalty=self._plan_penalty(batch),
            ends=self._plan_ends(batch),
            random=self._index(random) if random else None,
            random_rows=np.asarray(random, dtype=np.int64),
            seeds=np.asarray([p.seed for p in drawn], dtype=np.int64).view(np.uint64),
            temperature=self._column([max(p.temperature, MIN_TEMPERATURE) for p in drawn])
            if random
            else None,
            filter=self._plan_filter([drawn[row] for row in filtered]) if filtered else None,
            filtered=self._index(filtered) if filtered else None,
            unfiltered=self._index(unfiltered) if unfiltered else None,
            logprob_rows=logprob_rows,
            logprob_index=self._index([row for row, _ in logprob_rows]),
            grammars=self._plan_grammars(params),
        )

    def _filters(self, params: SamplingParams) -> bool:
        return 0 < params.top_k < self.vocab_size or params.top_p < 1.0 or params.min_p > 0.0

    def _plan_filter(self, params: list[SamplingParams]) -> Filter:
        top_k = [min(p.top_k, self.vocab_size) or self.vocab_size for p in params]
        unbounded = [k == self.vocab_size for k in top_k]
        nucleus = [row for row, p in enumerate(params) if unbounded[row] and p.top_p < 1.0]
        bounds = [k for k in top_k if k < self.vocab_size] + [NUCLEUS_CANDIDATES] * bool(nucleus)
        return Filter(
            top_k=self._index(top_k)[:, None],
            top_p=self._column([p.top_p if p.top_p < 1.0 else np.inf for p in params], np.float64),
            min_distance=self._column([np.log(p.min_p) if p.min_p > 0 else -np.inf for p in params]),
            unbounded=self._column(unbounded, np.bool_) if any(unbounded) else None,
            nucleus=self._index(nucleus) if nucleus else None,
            num_candidates=min(max(bounds, default=0), self.vocab_size),
        )

    def _plan_bias(self, params: list[SamplingParams]) -> tuple[torch.Tensor, ...] | None:
        entries = [(row, *item) for row, p in enumerate(params) for item in p.logit_bias.items()]
        if not entries:
            return None
        rows, ids, values = zip(*entries, strict=True)
        return self._index(rows), self._index(ids), self._column(values).squeeze(1)

    def _plan_penalty(self, batch: list[_Slot]) -> tuple[torch.Tensor, ...] | None:
        rows = [row for row, slot in enumerate(batch) if slot.table_row is not None]
        if not rows:
            return None
        names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        columns = [self._column([getattr(batch[row].params, name) for row in rows]) for name in names]
        return self._index(rows), self._index([batch[row].table_row for row in rows]), *columns

    def _plan_grammars(self, params: list[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor] | None:
        has_grammar = [bool(p.grammar) for p in params]
        if not any(has_grammar):
            return None
        return self._index(np.flatnonzero(has_grammar)), self._index(has_grammar, np.bool_)

    def _plan_ends(self, batch: list[_Slot]) -> tuple[np.ndarray, ...] | None:
        # An end token outside the vocabulary cannot be sampled, and so needs no mask.
        entries = [
            (row, token, slot.num_prompt_tokens + slot.params.min_tokens)
            for row, slot in enumerate(batch)
            if slot.params.min_tokens > 0
            for token in slot.params.end_token_ids
            if 0 <= token < self.vocab_size
        ]
        return tuple(np.asarray(entries, dtype=np.int64).T) if entries else None

    def _index(self, values, dtype: type = np.int64) -> torch.Tensor:
        return put([np.asarray(values, dtype=dtype)], self.device)[0]

    def _column(self, values, dtype: type = np.float32) -> torch.Tensor:
        return self._index(values, dtype)[:, None]


def _logprobs(raw: torch.Tensor, tokens: torch.Tensor, counts: list[int]) -> Logprobs:
    """Of tokens int64 [L], and of as many others as counts says, by their logits raw [L, V]."""
    logprobs = raw.log_softmax(-1)
    chosen = logprobs.gather(1, tokens[:, None]).squeeze(1)
    top = logprobs.topk(min(max(counts, default=0), raw.shape[1]))
    return Logprobs(counts, chosen, top.indices, top.values)
