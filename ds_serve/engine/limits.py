"""What one step and one request may take, and why a request can never run.

Used by the scheduler for every step and at admission. Knows the sizes of things, and neither queue nor clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_serve.cache.manager import CacheManager
from ds_serve.messages import Request

# In a pipeline all prompt tokens at hand are cut into this many chunks for each stage. One would leave stages
# idle while the first chunk comes and the last goes, on two stages a third of the time; two leave a fifth.
# More would cost a GPU more than they bring: a stage reads its weights for every step, whatever that holds.
CHUNKS_PER_STAGE = 2

# For the same reason chunks are not cut below this: reading the weights and sending takes as long as
# computing tens of tokens does on a CPU, and about 200 on a GPU.
MIN_CHUNK_TOKENS = 128


@dataclass(frozen=True)
class Limits:
    """In sequences, tokens, steps, pipeline stages and ranks. vocab_size None: token ids are not checked.

    copy_s_per_block, prefill_s_per_token   measured at start; 0: unknown, and whatever the host has is loaded
    bytes_per_block                         on all ranks together
    audit_share                             share of prefix hits that are computed again and compared
    max_overtaken                           how often a waiting request lets better cached ones go first
    max_scored_tokens                       prompt tokens in a step with log-probabilities asked for: each
                                            takes a row of logits, 150 MB for 256 of 150,000 token ids
    adapters                                names of the LoRA adapters, in the order of the settings
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_queue: int = 10_000
    max_steps_in_flight: int = 1
    vocab_size: int | None = None
    num_stages: int = 1
    num_ranks: int = 1
    copy_s_per_block: float = 0.0
    prefill_s_per_token: float = 0.0
    bytes_per_block: int = 0
    audit_share: float = 0.0
    max_overtaken: int = 4
    max_scored_tokens: int = 256
    adapters: tuple[str, ...] = ()

    @property
    def num_batches(self) -> int:
        """Micro-batches that the work is spread over: as many as stages, where so many may be in flight."""
        return min(self.num_stages, self.max_steps_in_flight)

    def chunk_tokens(self, num_prompt_tokens: int) -> int:
        """Tokens of prompt chunks in one step at most, of num_prompt_tokens to compute in all."""
        if self.num_batches == 1:
            return self.max_num_batched_tokens
        return max(MIN_CHUNK_TOKENS, -(-num_prompt_tokens // (CHUNKS_PER_STAGE * self.num_batches)))

    def adapter_number(self, name: str) -> int:
        """What workers know an adapter by: from 1, and 0 for none. ValueError for an unknown name."""
        return self.adapters.index(name) + 1 if name else 0

    def loads_pay(self, block_size: int) -> bool:
        """Whether a block of block_size tokens is loaded from the host faster than it is computed."""
        if not self.copy_s_per_block or not self.prefill_s_per_token:
            return True
        return self.copy_s_per_block < self.prefill_s_per_token * block_size


def refusal(request: Request, limits: Limits, cache: CacheManager) -> str | None:
    """Why a request can never run here, in a sentence that says what was asked and what there is, or None."""
    prompt, params = request.prompt_token_ids, request.params
    if not prompt:
        return "the prompt has no token"
    if request.adapter and request.adapter not in limits.adapters:
        there = ", ".join(limits.adapters) or "none"
        return f"adapter {request.adapter!r} is not loaded here; loaded: {there}"
    vocab = limits.vocab_size
    if vocab is not None:
        if min(prompt) < 0 or max(prompt) >= vocab:
            return f"the prompt has token ids outside of the vocabulary of {vocab}"
        if any(token >= vocab for token in params.logit_bias):
            return f"logit_bias has token ids outside of the vocabulary of {vocab}"
    total = len(prompt) + params.max_tokens
    if total > limits.max_model_len:
        return (
            f"too long: a prompt of {len(prompt)} tokens and max_tokens of {params.max_tokens} need {total}, "
            f"and this server holds {limits.max_model_len} at most"
        )
    needed = cache.windows.most_blocks(total - 1)  # the last token is sampled, its KV never written
    if needed > cache.num_blocks:
        return f"can never fit: it needs {needed} KV blocks, and there are {cache.num_blocks}"
    return _pin_refusal(request, cache)


def _pin_refusal(request: Request, cache: CacheManager) -> str | None:
    if not request.cache_key:
        return None
    if request.params.prompt_logprobs is not None:
        return "its prompt cannot be pinned: with prompt_logprobs a prompt is not cached"
    if request.pin != "must":
        return None
    if not cache.prefix_caching:
        return "its prompt cannot be pinned: prefix caching is off"
    blocks = cache.pin_size(len(request.prompt_token_ids))
    if blocks > cache.pins.max_blocks:
        return f"its prompt cannot be pinned: {blocks} KV blocks, and {cache.pins.max_blocks} may be pinned"
    return None
