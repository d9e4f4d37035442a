"""One rank's worker: owns its part of the model, the KV slab and the slots, and runs plans in order.

Hidden states go along the pipeline through the grid, and the last stage's first shard draws the tokens. Knows
no queue of requests and no text. Driven by LocalRank, or by cluster.py's followers.
"""

from __future__ import annotations

import logging
import time

import psutil
import torch

from ds_serve.attention.context import use_batch
from ds_serve.config import Settings
from ds_serve.messages import EngineInfo, StepPlan, StepResult
from ds_serve.model.loader import LoadedModel, ModelLoadError
from ds_serve.parallel.control import Progress
from ds_serve.parallel.grid import Grid
from ds_serve.worker.sampler import Sampler
from ds_serve.worker.slots import SlotTable, StepInputs

logger = logging.getLogger(__name__)

DEFAULT_KV_SHARE = 0.3
DEFAULT_KV_LIMIT = 4 * 2**30


class Worker:
    """step() maps a plan to its result. Steps must come in the order in which they were planned."""

    def __init__(
        self, model: LoadedModel, settings: Settings, grid: Grid, progress: Progress | None = None
    ) -> None:
        self.model, self.place = model, grid.place
        self._grid = grid
        self._progress = progress or Progress()
        # One block table serves all ranks, so the rank with the least memory sets the size.
        [self.num_blocks] = grid.minimum([_num_blocks(model, settings, grid.ranks_here())])
        held = self.num_blocks * settings.block_size
        if settings.max_model_len is not None and held < settings.max_model_len:
            raise ModelLoadError(
                f"max_model_len is {settings.max_model_len}, but {self.num_blocks} KV blocks hold {held} "
                "tokens: give more kv_cache_memory or num_blocks, or a smaller max_model_len"
            )
        self.max_model_len = min(model.max_model_len, held)
        self._slab = model.layout.allocate(self.num_blocks, model.device)
        self._slots = SlotTable(settings.max_num_seqs, self.max_model_len, settings.block_size)
        self._sampler = (
            Sampler(settings.max_num_seqs, model.vocab_size, model.device) if grid.place.samples else None
        )
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
            tensor_parallel=self.place.tp,
            pipeline_parallel=self.place.pp,
        )

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult | None:
        """Runs the plan's rows through this rank's part of the model. None but on the rank that samples."""
        progress, began = self._progress, time.perf_counter()
        progress.step, progress.phase = plan.step, "compute"
        for new in plan.new:
            self._slots.admit(new)
            if self._sampler is not None:
                self._sampler.admit(new.slot, new.params, new.token_ids, new.num_prompt_tokens)
        inputs = self._slots.build(plan.rows, self._slab, self.model.layout)
        progress.batch = inputs.attention
        hidden, waited = self._receive(inputs)
        with use_batch(inputs.attention):
            output = self.model.stage(
                inputs.input_ids, inputs.attention.positions, inputs.attention.sampled, hidden
            )
        if self.place.is_last_stage:
            result = self._draw(plan, inputs, output)
        else:
            self._grid.send_on(output)
            result = None
        progress.busy_s += time.perf_counter() - began - waited
        progress.phase = "idle"
        return result

    def _receive(self, inputs: StepInputs) -> tuple[torch.Tensor | None, float]:
        """The hidden states [1, T, H] of the stage before (None on the first), and the seconds waited."""
        if self.place.is_first_stage:
            return None, 0.0
        began = time.perf_counter()
        self._progress.phase = "receive"
        stage, count = self.model.stage, inputs.input_ids.shape[1]
        hidden = torch.empty(1, count, stage.hidden_size, dtype=stage.dtype, device=self.model.device)
        self._grid.receive(hidden)
        self._progress.phase = "compute"
        return hidden, time.perf_counter() - began

    def _draw(self, plan: StepPlan, inputs: StepInputs, logits: torch.Tensor) -> StepResult | None:
        """Draws a token for each row that samples: once, on the first shard, which tells the others."""
        token_ids, logprobs = [], []
        if self._sampler is not None and inputs.slots:
            token_ids, logprobs = self._sampler.sample(logits, inputs.slots, inputs.positions).to_host()
        # The next step may be planned already: an invalid token stands in as 0 until its request ends.
        usable = [max(token, 0) for token in token_ids]
        if self._sampler is not None:
            self._sampler.append(inputs.slots, usable)
        if self.place.pp == 1:  # in a pipeline the first stage learns tokens from the next plan
            usable = self._grid.share(usable, len(inputs.slots))
            self._slots.append(inputs.slots, inputs.positions, usable)
        if not self.place.samples:
            return None
        asked = logprobs if any(logprob is not None for logprob in logprobs) else []
        return StepResult(step=plan.step, token_ids=token_ids, logprobs=asked)


def _num_blocks(model: LoadedModel, settings: Settings, ranks_here: int) -> int:
    if settings.num_blocks is not None:
        return settings.num_blocks
    memory = settings.kv_cache_memory
    if memory is None:
        memory = min(DEFAULT_KV_LIMIT, int(psutil.virtual_memory().available * DEFAULT_KV_SHARE / ranks_here))
        # More than twice what a full batch of the longest requests fills would only slow the start.
        most = 2 * settings.max_num_seqs * -(-model.max_model_len // settings.block_size)
        memory = min(memory, most * model.layout.bytes_per_block)
    blocks = memory // model.layout.bytes_per_block
    if blocks < 1:
        raise ModelLoadError(
            f"kv_cache_memory of {memory} bytes holds no block of {model.layout.bytes_per_block} bytes"
        )
    return blocks
