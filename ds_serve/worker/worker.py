"""One rank's worker: owns its part of the model, both KV slabs and the slots, and runs plans in order.

A plan's copies between the slabs are the copier's, and run beside its rows. Hidden states go along the
pipeline through the grid, and the last stage's first shard draws the tokens. Knows no queue of requests and
no text. Driven by LocalRank, or by cluster.py's followers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from deepspeed.accelerator import get_accelerator

from ds_serve.attention.context import use_batch
from ds_serve.config import Settings
from ds_serve.messages import (
    CopyResult,
    EngineInfo,
    NewSequence,
    Row,
    SamplingParams,
    StepPlan,
    StepResult,
)
from ds_serve.model.certificate import Certificate
from ds_serve.model.loader import LoadedModel, ModelLoadError
from ds_serve.parallel.control import Progress
from ds_serve.parallel.grid import Grid
from ds_serve.worker.constraint import Constraints
from ds_serve.worker.copier import Copier
from ds_serve.worker.sampler import Sampler
from ds_serve.worker.sizes import cut_groups, num_blocks, num_host_blocks
from ds_serve.worker.slots import SlotTable, StepInputs

logger = logging.getLogger(__name__)

# Tokens whose prefill is timed: on a CPU a token's share hardly changes from here on, elsewhere a full step's
# counts.
TIMED_TOKENS_CPU = 128
TIMED_ROUNDS = 3


class Worker:
    """step() maps a plan to its result. Steps must come in the order in which they were planned.

    deliver gets the results of copies, fail the copier's error: on the copier's thread. constraints are there
    where the place samples.
    """

    def __init__(
        self,
        model: LoadedModel,
        settings: Settings,
        grid: Grid,
        progress: Progress,
        deliver: Callable[[CopyResult], None],
        fail: Callable[[BaseException], None],
        constraints: Constraints | None,
    ) -> None:
        self.model, self.place = model, grid.place
        self.certificate: Certificate | None = None  # of settings.check, once there is one
        self._grid = grid
        self._progress = progress
        self.layout, self.windows = layout, windows = cut_groups(model, settings, grid)
        # One block table serves all ranks, so the rank with the least memory sets the size, in each tier.
        self.num_blocks, self.num_host_blocks = grid.minimum(
            [
                num_blocks(layout, windows, settings, model.max_model_len, grid.ranks_here),
                num_host_blocks(layout, settings, grid.ranks_here),
            ]
        )
        [self._bytes_per_block] = grid.total([layout.bytes_per_block])
        held = windows.longest(self.num_blocks, model.max_model_len)
        if settings.max_model_len is not None and held < settings.max_model_len:
            raise ModelLoadError(
                f"max_model_len is {settings.max_model_len}, but {self.num_blocks} KV blocks hold {held} "
                "tokens of a sequence: give more kv_cache_memory or num_blocks, or a smaller max_model_len"
            )
        if not held:
            raise ModelLoadError(
                f"{self.num_blocks} KV blocks are fewer than the {windows.num_groups} that a sequence begins "
                "with, one for each group of layers: give more kv_cache_memory or num_blocks"
            )
        self.max_model_len = held
        self._slab = layout.allocate(self.num_blocks, model.device)
        self._slots = SlotTable(
            settings.max_num_seqs, self.max_model_len, settings.block_size, windows.num_groups
        )
        self._sampler: Sampler | None = None
        if grid.place.samples:
            self._sampler = Sampler(settings.max_num_seqs, model.vocab_size, model.device, constraints)
        logger.info(
            "KV cache: %d blocks of %d tokens, %.2f GiB; groups of layers see so many tokens (0: all): %s",
            self.num_blocks, settings.block_size, self.num_blocks * layout.bytes_per_block / 2**30,
            windows.reaches,
        )  # fmt: skip
        self._copier: Copier | None = None
        self._copy_s = self._prefill_s = 0.0
        if settings.host_cache:
            self._open_host_tier(settings, deliver, fail)

    def _open_host_tier(
        self,
        settings: Settings,
        deliver: Callable[[CopyResult], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        """The host slab, its copier, and how fast that and the model are. All ranks do this together."""
        place = self.place
        if not self.num_host_blocks:
            raise ModelLoadError(
                f"host_cache of {settings.host_cache} bytes, split evenly over {place.world_size} ranks, "
                f"holds no block of {self.layout.bytes_per_block} bytes on {place}: give more"
            )
        # Touched here once and for all: first stores shall not pay for page faults.
        host_slab = self.layout.allocate(self.num_host_blocks, "cpu")
        checksums = settings.host_checksums
        self._copier = Copier(self._slab, host_slab, place.rank, deliver, fail, checksums)
        self._copy_s, slowest = self._grid.maximum(
            [self._copier.load_seconds(), self._prefill_seconds(settings)]
        )
        # A chunk goes through all stages, one after another, and each of them works no less than the slowest.
        self._prefill_s = slowest * place.pp
        logger.info(
            "host cache: %d blocks (%d tokens), %.2f GiB here: %d bytes split evenly over ranks (%d), of "
            "which the one with the fewest blocks counts; a block is loaded in %.3f ms, computed in %.3f ms",
            self.num_host_blocks, self.num_host_blocks * settings.block_size, host_slab.nbytes / 2**30,
            settings.host_cache, place.world_size,
            self._copy_s * 1e3, self._prefill_s * settings.block_size * 1e3,
        )  # fmt: skip

    @torch.inference_mode()
    def _prefill_seconds(self, settings: Settings) -> float:
        """Seconds for each token of a prompt chunk on this stage alone, whose shards must all do this."""
        model, stage, device = self.model, self.model.stage, self.model.device
        count = min(settings.max_num_batched_tokens, self.max_model_len)
        if device.type == "cpu":
            count = min(count, TIMED_TOKENS_CPU)
        blocks = list(range(-(-count // settings.block_size)))
        tokens = [7919 * index % model.vocab_size for index in range(count)]
        new = NewSequence(
            slot=0, token_ids=tokens, num_prompt_tokens=count, params=SamplingParams(max_tokens=1)
        )
        hidden = None
        if not self.place.is_first_stage:
            hidden = torch.randn(1, count, stage.hidden_size, device=device).to(stage.dtype)
        best = float("inf")
        for _ in range(TIMED_ROUNDS):
            self._slots.admit(new)
            began = time.perf_counter()
            row = Row(slot=0, start=0, count=count, new_block_ids=blocks, sample=True)
            inputs = self._slots.build([row], self._slab, self.layout)
            with use_batch(inputs.attention):
                stage(inputs.input_ids, inputs.attention.positions, inputs.attention.sampled, hidden)
            get_accelerator().synchronize()
            best = min(best, (time.perf_counter() - began) / count)
        self._slab[: len(blocks)].zero_()
        return best

    def info(self, settings: Settings) -> EngineInfo:
        return EngineInfo(
            model=settings.name,
            max_model_len=self.max_model_len,
            vocab_size=self.model.vocab_size,
            block_size=settings.block_size,
            num_blocks=self.num_blocks,
            num_host_blocks=self.num_host_blocks,
            bytes_per_block=self._bytes_per_block,
            copy_s_per_block=self._copy_s,
            prefill_s_per_token=self._prefill_s,
            device=str(self.model.device),
            dtype=str(self.model.dtype).removeprefix("torch."),
            tensor_parallel=self.place.tp,
            pipeline_parallel=self.place.pp,
            adapters=tuple(settings.adapters),
            windows=self.windows.reaches,
        )

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult | None:
        """Starts the plan's copies, and runs its rows through this rank's part of the model.

        None where there are no rows, and but on the rank that samples.
        """
        if plan.loads or plan.stores:
            self._copier.start(plan.step, plan.loads, plan.stores)
        if not plan.rows:
            return None
        progress, began = self._progress, time.perf_counter()
        progress.step, progress.phase = plan.step, "compute"
        for new in plan.new:
            self._slots.admit(new)
            if self._sampler is not None:
                self._sampler.admit(new.slot, new.params, new.token_ids, new.num_prompt_tokens)
        inputs = self._slots.build(plan.rows, self._slab, self.layout)
        progress.batch = inputs.attention
        if self._sampler is not None:
            self._sampler.begin(inputs.slots)
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

    def close(self) -> None:
        """Waits for the copies that were started. May be called twice."""
        if self._sampler is not None:
            self._sampler.close()
        if self._copier is not None:
            self._copier.close()

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
        token_ids, logprobs, num_drawn = [], [], len(inputs.slots)
        if self._sampler is not None and inputs.slots:
            drawn = self._sampler.sample(logits[:num_drawn], inputs.slots, inputs.positions)
            token_ids, logprobs = drawn.to_host()
        # The next step may be planned already: an invalid token stands in as 0 until its request ends.
        usable = [max(token, 0) for token in token_ids]
        if self._sampler is not None:
            self._sampler.append(inputs.slots, usable)
        if self.place.pp == 1:  # in a pipeline the first stage learns tokens from the next plan
            usable = self._grid.share(usable, num_drawn)
            self._slots.append(inputs.slots, inputs.positions, usable)
        if not self.place.samples:
            return None
        asked = logprobs if any(logprob is not None for logprob in logprobs) else []
        prompt_logprobs = []
        if inputs.scored:
            prompt_logprobs = self._sampler.score(logits[num_drawn:], inputs.targets, inputs.scored)
        return StepResult(
            step=plan.step, token_ids=token_ids, logprobs=asked, prompt_logprobs=prompt_logprobs
        )
