"""The plain messages that pass between front, engine and workers.

Frozen msgspec structs of plain values: they cross process borders as msgpack, never as pickle.
This module knows no text, no tensors and no policy. Everything else imports it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


class _Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of every message: immutable, fields by name, defaults not sent."""


def _require(ok: bool, name: str, found: object, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{name}: must be {wanted}, got {found!r}")


class SamplingParams(_Message):
    """How one request's tokens are chosen. Names and meanings are the field's own.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 are off. Penalties count from the real
    prompt, also after preemption. A token drawn at a position is a function of (seed, position)
    and of the logits alone: the front draws a seed where the caller gave none.
    eos_token_ids end a request unless ignore_eos; stop_token_ids always do. Neither can be sampled
    before min_tokens. logprobs is the number of alternatives to report (0: the token's own only), and
    prompt_logprobs the same for the prompt's own tokens, whose request then takes nothing from the cache.
    grammar is llguidance's: output follows it to its end, and only then can an end token be drawn.

    Raises ValueError naming the parameter when one is out of range.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str = ""

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f"between 0 and max_tokens ({self.max_tokens})",
        )
        # NaN fails each of these comparisons, and so is refused too.
        _require(0.0 <= self.temperature < 1e6, "temperature", self.temperature, "finite and at least 0")
        _require(self.top_k >= 0, "top_k", self.top_k, "at least 0 (0: off)")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "in (0, 1]")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "in [0, 1]")
        _require(
            0.0 < self.repetition_penalty < 1e6, "repetition_penalty", self.repetition_penalty, "above 0"
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(-2.0 <= value <= 2.0, name, value, "in [-2, 2]")
        for token, bias in self.logit_bias.items():
            _require(token >= 0 and -100.0 <= bias <= 100.0, "logit_bias", {token: bias}, "in [-100, 100]")
        _require(-(2**63) <= self.seed < 2**63, "seed", self.seed, "a 64-bit integer")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= 100, name, value, "between 0 and 100")
        if self.grammar:  # where a grammar ends nothing but an end token is left
            _require(not self.min_tokens, "min_tokens", self.min_tokens, "0 where output follows a grammar")
            _require(not self.ignore_eos, "ignore_eos", True, "false where output follows a grammar")
            _require(bool(self.eos_token_ids), "grammar", "one", "for a model that has an end token")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Ids that end the request: stop ids, and EOS unless it is ignored."""
        return frozenset(self.stop_token_ids) | frozenset(() if self.ignore_eos else self.eos_token_ids)


def sibling_seed(seed: int, index: int) -> int:
    """The seed of a prompt's index-th sequence where one seed was given for all: seed + index in 64 bits."""
    return (seed + index + 2**63) % 2**64 - 2**63


# -- front -> engine ---------------------------------------------------------------------------


class Request(_Message, tag="request"):
    """One sequence to continue. A lower priority number goes first; salt separates tenants' caches.

    cache_key pins the prompt's full blocks on the device, once computed, for cache_ttl seconds: each use of
    the key renews it, and a newer prompt replaces an older one. pin "must" is refused where the bound on
    pinned blocks is reached; for a "hint" the pin that would expire first gives way. A key holds one prompt,
    whatever its adapter.
    adapter names one of the engine's LoRA adapters ("": none); cached prefixes are shared within it only.
    """

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    salt: str = ""
    priority: int = 0
    cache_key: str = ""
    cache_ttl: float = 300.0
    pin: Literal["hint", "must"] = "hint"
    adapter: str = ""


class Abort(_Message, tag="abort"):
    """Ends a request in any state. The engine still answers with one last Output."""

    id: str


class Unpin(_Message, tag="unpin"):
    """Releases what a request pinned under this key and salt; unknown keys are fine."""

    cache_key: str
    salt: str = ""


class StatsQuery(_Message, tag="stats_query"):
    """Asks for one Stats message."""


class Shutdown(_Message, tag="shutdown"):
    """The front wants no more answers: the engine ends, and its process with code 0."""


# -- engine -> front ---------------------------------------------------------------------------


class TokenLogprob(_Message):
    """Natural-log probability of a chosen token and of the most likely ones, best first."""

    logprob: float
    top_ids: list[int] = []
    top_logprobs: list[float] = []


class Output(_Message, tag="output"):
    """New tokens of one request, and, exactly once a request, why it ended.

    token_ids are new since the last Output; logprobs runs beside them where it was asked for.
    stop_token_id is the id that ended it, if one did (it is the last of token_ids).
    prompt_logprobs come with the first token, where asked for: of each prompt token but the first.
    num_cached_tokens counts prompt tokens that were not computed again, num_host_tokens those of them that
    came from the host tier. times are seconds on the
    engine's monotonic clock: queued, first_scheduled, first_token (0 where not yet).
    """

    id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_host_tokens: int = 0
    times: tuple[float, float, float] = (0.0, 0.0, 0.0)


class Stats(_Message, tag="stats"):
    """Gauges and totals of the engine, for /health, metrics and tests.

    active_s is the time with a step in flight, stage_busy_s how long of it each pipeline stage computed;
    what is missing to active_s is a stage's bubble. The engine's thread spent plan_s on taking in messages,
    planning and sending steps, wait_s on waiting for results, update_s on taking them in and sending outputs.
    cached_tokens_host is the part of cached_tokens that came from the host tier; load_s the seconds of
    num_loads plans' loads on the slowest rank, store_s those of num_stores plans' stores; lost_blocks were
    evicted from the device before they were stored; bytes_per_block is of all ranks together.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    num_finished: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    active_s: float = 0.0
    stage_busy_s: list[float] = []
    plan_s: float = 0.0
    wait_s: float = 0.0
    update_s: float = 0.0
    num_host_blocks: int = 0
    num_host_used: int = 0
    num_pinned_blocks: int = 0
    cached_tokens_host: int = 0
    loaded_blocks: int = 0
    stored_blocks: int = 0
    failed_copies: int = 0
    load_s: float = 0.0
    num_loads: int = 0
    store_s: float = 0.0
    num_stores: int = 0
    evictions: int = 0
    host_evictions: int = 0
    lost_blocks: int = 0
    audits: int = 0
    audit_max_difference: float = 0.0
    bytes_per_block: int = 0


class EngineInfo(_Message, tag="info"):
    """What the front must know of the engine; the first message an engine process sends.

    windows: of each group of layers, how many tokens back they see (0: all). A block holds one group's KV.
    """

    model: str
    max_model_len: int
    vocab_size: int
    block_size: int
    num_blocks: int
    device: str
    dtype: str
    num_host_blocks: int = 0
    bytes_per_block: int = 0
    copy_s_per_block: float = 0.0
    prefill_s_per_token: float = 0.0
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    adapters: tuple[str, ...] = ()
    windows: tuple[int, ...] = (0,)


class EngineFailure(_Message, tag="failure"):
    """The engine process is going down: every open request ends with this reason."""

    reason: str


FrontMessage = Request | Abort | Unpin | StatsQuery | Shutdown
EngineMessage = Output | Stats | EngineInfo | EngineFailure

# -- engine -> workers -------------------------------------------------------------------------

NO_BLOCK = -1


class NewSequence(_Message):
    """A sequence takes a slot: prompt + output so far. Replaces what the slot held before.

    adapter is the number of its LoRA adapter in the order of the settings, from 1; 0: none.
    """

    slot: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    adapter: int = 0


class Row(_Message):
    """One sequence's part in a step: positions [start, start + count) of the slot's tokens.

    Workers keep each slot's tokens (a sampled token is appended by the ranks themselves, on the way from the
    last stage to the first) and block table: new_block_ids is appended, for each block_size tokens an entry
    for each group of layers. It is NO_BLOCK where the group's layers see those tokens no more. A row with
    sample=True ends at the sequence's last token. Of a scored row the log-probabilities of the prompt tokens
    that follow its positions are asked for.
    """

    slot: int
    start: int
    count: int
    new_block_ids: list[int] = []
    sample: bool = False
    scored: bool = False


class StepPlan(_Message, tag="plan"):
    """One step, the same on every rank. Differences only: workers remember the rest.

    loads (host block, device block) and stores (device block, host block) run beside the rows; each rank
    answers each of the two lists with a CopyResult. A plan without rows has no StepResult.
    """

    step: int
    new: list[NewSequence] = []
    rows: list[Row] = []
    loads: list[tuple[int, int]] = []
    stores: list[tuple[int, int]] = []


# -- workers -> engine -------------------------------------------------------------------------


INVALID_TOKEN = -1
NO_TOKEN_FITS = -2


class StepResult(_Message, tag="result"):
    """One token for each row of the plan with sample=True, in the plan's order.

    A token is INVALID_TOKEN where the row's logits were not finite: there was nothing to draw from. It is
    NO_TOKEN_FITS where a grammar allowed none, or failed. logprobs runs beside token_ids where any of the
    rows asked for them, else it is empty. prompt_logprobs has one list for each scored row, in order, if any.
    """

    step: int
    token_ids: list[int] = []
    logprobs: list[TokenLogprob | None] = []
    prompt_logprobs: list[list[TokenLogprob]] = []


class CopyResult(_Message, tag="copied"):
    """One rank has done all loads or all stores of a plan.

    failed are indexes into the plan's list (a checksum that does not match, say); seconds is the time from
    the first copy's start to the last one's end on that rank.
    """

    rank: int
    step: int
    kind: Literal["load", "store"]
    failed: list[int] = []
    seconds: float = 0.0
