"""One rank's worker: owns the model, the KV slab, the slots and the sampler, and runs plans in order.

Knows no queue of requests, no text and no other rank. Driven by LocalRank in this process.
"""

from __future__ import annotations

import logging

import psutil
import torch

from ds_serve.attention.context import use_batch
from ds_serve.config import Settings
from ds_serve.messages import EngineInfo, StepPlan, StepResult
from ds_serve.model.loader import LoadedModel, ModelLoadError
from ds_serve.worker.sampler import Sampler
from ds_serve.worker.slots import SlotTable, StepInputs

logger = logging.getLogger(__name__)

DEFAULT_KV_SHARE = 0.3
DEFAULT_KV_LIMIT = 4 * 2**30


class Worker:
    """step() maps a plan to its result. Steps must come in the order in which they were planned."""

    def __init__(self, model: LoadedModel, settings: Settings) -> None:
        self.model = model
        self.num_blocks = _num_blocks(model, settings)
        held = self.num_blocks * settings.block_size
        if settings.max_model_len is not None and held < settings.max_model_len:
            raise ModelLoadError(
                f"max_model_len is {settings.max_model_len}, but {self.num_blocks} KV blocks hold {held} "
                "tokens: give more kv_cache_memory or num_blocks, or a smaller max_model_len"
            )
        self.max_model_len = min(model.max_model_len, held)
        self._slab = model.layout.allocate(self.num_blocks, model.device)
        self._slots = SlotTable(settings.max_num_seqs, self.max_model_len, settings.block_size)
        self._sampler = Sampler(settings.max_num_seqs, model.vocab_size, model.device)
        logger.info(
            "KV cache: %d blocks of %d tokens (%d tokens, %.2f GiB)",
            self.num_blocks, settings.block_size, held,
            self.num_blocks * model.layout.bytes_per_block / 2**30,
        )  # fmt: skip

    def info(self, settings: Settings) -> EngineInfo:
        return EngineInfo(
            model=settings.name,
            max_model_len=self.max_model_len,
            vocab_size=self.model.vocab_size,
            block_size=settings.block_size,
            num_blocks=self.num_blocks,
            device=str(self.model.device),
            dtype=str(self.model.dtype).removeprefix("torch."),
        )

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """Runs the plan's rows through the model and draws a token for each row that samples."""
        for new in plan.new:
            self._slots.admit(new)
            self._sampler.admit(new.slot, new.params, new.token_ids, new.num_prompt_tokens)
        inputs = self._slots.build(plan.rows, self._slab, self.model.layout)
        logits = self._forward(inputs)
        if not inputs.slots:
            return StepResult(step=plan.step)
        drawn = self._sampler.sample(logits, inputs.slots, inputs.positions)
        token_ids, logprobs = drawn.to_host()
        # The next step may be planned already: an invalid token stands in as 0 until its request ends.
        usable = [max(token, 0) for token in token_ids]
        self._slots.append(inputs.slots, inputs.positions, usable)
        self._sampler.append(inputs.slots, usable)
        asked = logprobs if any(logprob is not None for logprob in logprobs) else []
        return StepResult(step=plan.step, token_ids=token_ids, logprobs=asked)

    def _forward(self, inputs: StepInputs) -> torch.Tensor:
        """Logits [S, V] of the tokens to be sampled from (one row of no use where there are none)."""
        attention = inputs.attention
        with use_batch(attention):
            return self.model.stage(inputs.input_ids, attention.positions, attention.sampled, None)


def _num_blocks(model: LoadedModel, settings: Settings) -> int:
    if settings.num_blocks is not None:
        return settings.num_blocks
    memory = settings.kv_cache_memory
    if memory is None:
        memory = min(DEFAULT_KV_LIMIT, int(psutil.virtual_memory().available * DEFAULT_KV_SHARE))
        # More than twice what a full batch of the longest requests fills would only slow the start.
        most = 2 * settings.max_num_seqs * -(-model.max_model_len // settings.block_size)
        memory = min(memory, most * model.layout.bytes_per_block)
    blocks = memory // model.layout.bytes_per_block
    if blocks < 1:
        raise ModelLoadError(
            f"kv_cache_memory of {memory} bytes holds no block of {model.layout.bytes_per_block} bytes"
        )
    return blocks
