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
)
from ds_serve.model.certificate import Certificate
from ds_serve.model.loader import LoadedModel, ModelLoadError
from ds_serve.parallel.control import Progress
from ds_serve.parallel.grid import Grid
from ds_serve.worker.constraint import Constraints
from ds_serve.worker.copier import Copier
from ds_serve.worker.graphs import GraphRunner, recorder_of
from ds_serve.worker.inputs import StepInputs, TokenPool, upload
from ds_serve.worker.launched import Launched, Untold, timer
from ds_serve.worker.memory import kv_room, told_in_step
from ds_serve.worker.returning import Returning
from ds_serve.worker.sampled import SampleOutput, ScoreOutput
from ds_serve.worker.sampler import Sampler
from ds_serve.worker.sizes import cut_groups, num_blocks, num_host_blocks
from ds_serve.worker.slots import HostStep, SlotTable

logger = logging.getLogger(__name__)

# Tokens whose prefill is timed: on a CPU a token's share hardly changes from here on, elsewhere a full step's
# counts.
TIMED_TOKENS_CPU = 128
TIMED_ROUNDS = 3


class Worker:
    """launch() sets a plan going, whose result the Launched has. Plans must come in the order of planning.

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
        room = kv_room(model, layout, windows, settings, grid)
        # One block table serves all ranks, so the rank with the least memory sets the size, in each tier.
        self.num_blocks, self.num_host_blocks = grid.minimum(
            [
                num_blocks(layout, windows, settings, room),
                num_host_blocks(layout, settings, grid.ranks_here),
            ]
        )
        [self._bytes_per_block] = grid.total([layout.bytes_per_block])
        held = windows.longest(self.num_blocks, room.longest)
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
        recorder = recorder_of(model.device) if settings.graphs == "auto" else None
        # One block more than the engine knows: the graphs' scratch block.
        self._slab = layout.allocate(self.num_blocks + (recorder is not None), model.device)
        self._slots = SlotTable(
            settings.max_num_seqs, self.max_model_len, settings.block_size, windows.num_groups
        )
        self._sampler: Sampler | None = None
        if grid.place.samples:
            self._sampler = Sampler(settings.max_num_seqs, model.vocab_size, model.device, constraints)
        self._pool = TokenPool(settings.max_num_seqs, model.device)
        self._returning: Returning | None = None
        if grid.place.pp > 1 and grid.place.is_first_stage:
            self._returning = Returning(grid, self._pool, settings.max_steps_in_flight)
        self._constraints = constraints
        self._untold = None if constraints is None else Untold(constraints)
        logger.info(
            "KV cache: %d blocks of %d tokens, %.2f GiB; groups of layers see so many tokens (0: all): %s",
            self.num_blocks, settings.block_size, self.num_blocks * layout.bytes_per_block / 2**30,
            windows.reaches,
        )  # fmt: skip
        self._copier: Copier | None = None
        self._copy_s = self._prefill_s = 0.0
        if settings.host_cache:
            self._open_host_tier(settings, deliver, fail)
        self._graphs: GraphRunner | None = None
        if recorder is not None:
            graphs = GraphRunner(model, layout, self._slab, self._pool, self._slots.shape)
            self._graphs = graphs if graphs.record(grid, recorder) else None

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
        model, device = self.model, self.model.device
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
            hidden = torch.randn(1, count, model.stage.hidden_size, device=device).to(model.dtype)
        best = float("inf")
        for _ in range(TIMED_ROUNDS):
            self._slots.admit(new)
            began = time.perf_counter()
            row = Row(slot=0, start=0, count=count, new_block_ids=blocks, sample=True)
            self._compute(upload(self._slots.gather([row]), self._slab, self.layout), hidden)
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

    @property
    def runs_ahead(self) -> bool:
        """Whether launch() returns before the device has computed the step."""
        return self.model.device.type != "cpu"

    @told_in_step
    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched | None:
        """Starts the plan's copies, and sends its rows through this rank's part of the model.

        None where there are no rows.
        """
        if plan.loads or plan.stores:
            self._copier.start(plan.step, plan.loads, plan.stores)
        if not plan.rows:
            return None
        progress, clock = self._progress, timer(self.model.device)
        progress.step, progress.phase = plan.step, "compute"
        clock.begin()
        self._admit(plan.new)
        step = self._slots.gather(plan.rows)
        has_masks = self._begin_masks(step, wait=False)
        if self._returning is not None:
            with clock.waiting():
                self._returning.take(step.drawn_in)
        graphs = self._graphs if self._graphs is not None and self._graphs.takes(step) else None
        if graphs is None:
            inputs = upload(step, self._slab, self.layout, self._pool)
        else:
            inputs = graphs.upload(step)
        progress.batch = inputs.attention
        if self._returning is not None:
            self._returning.expect(inputs.slots, step.slots)
        with clock.waiting():
            hidden = self._receive(step.num_tokens, graphs)
        output = self._compute(inputs, hidden) if graphs is None else graphs.replay(inputs)
        if not has_masks:
            self._begin_masks(step, wait=True)
        drawn = scored = None
        if self.place.is_last_stage:
            drawn, scored = self._draw(step, inputs, output)
        else:
            self._grid.send_on(output)
        clock.end()
        launched = Launched(plan.step, clock, progress, drawn, scored, self.place.samples)
        if self._untold is not None:
            self._untold.add(launched, step.slots)
        return launched

    def close(self) -> None:
        """Waits for the copies that were started, and for tokens under way. May be called twice."""
        if self._returning is not None:
            self._returning.close()
        self._graphs = None  # collectives are recorded in them: they go before the groups
        if self._sampler is not None:
            self._sampler.close()
        if self._copier is not None:
            self._copier.close()

    def _admit(self, new: list[NewSequence]) -> None:
        for each in new:
            self._slots.admit(each)
            if self._sampler is not None:
                self._sampler.admit(each.slot, each.params, each.token_ids, each.num_prompt_tokens)
            if self._untold is not None:
                self._untold.forget(each.slot)

    def _begin_masks(self, step: HostStep, wait: bool) -> bool:
        """Starts computing what grammars allow; without wait only where they know all tokens: whether so."""
        if self._untold is None or not any(map(self._constraints.holds, step.slots)):
            return True
        if not self._untold.tell(wait):
            return False
        self._sampler.begin(step.slots)
        return True

    def _receive(self, count: int, graphs: GraphRunner | None) -> torch.Tensor | None:
        """The hidden states [1, count, H] of the stage before, where graphs read them; None on the first."""
        if self.place.is_first_stage:
            return None
        self._progress.phase = "receive"
        stage = self.model.stage
        if graphs is None:
            hidden = torch.empty(1, count, stage.hidden_size, dtype=stage.dtype, device=self.model.device)
        else:
            hidden = graphs.hidden(count)
        self._grid.receive(hidden)
        self._progress.phase = "compute"
        return hidden

    def _compute(self, inputs: StepInputs, hidden: torch.Tensor | None) -> torch.Tensor:
        """This stage's output: logits of the tokens sampled, or hidden states."""
        batch = inputs.attention
        self.model.backend.prepare(batch)
        with use_batch(batch):
            return self.model.stage(inputs.input_ids, batch.positions, batch.sampled, hidden)

    def _draw(
        self, step: HostStep, inputs: StepInputs, logits: torch.Tensor | None
    ) -> tuple[SampleOutput | None, ScoreOutput | None]:
        """Draws a token for each row that samples: once, on the first shard, which tells the others.

        Only there logits are read.
        """
        drawn = scored = None
        num_drawn = len(step.slots)
        if self._sampler is not None and num_drawn:
            drawn = self._sampler.sample(logits[:num_drawn], step.slots, step.drawn_at)
            self._sampler.append(step.slots, drawn.token_ids)
        if num_drawn and self.place.pp == 1:
            token_ids = torch.empty_like(inputs.slots) if drawn is None else drawn.token_ids
            self._pool.put(inputs.slots, self._grid.share_tokens(token_ids))
        elif drawn is not None:
            self._grid.way_back.send(drawn.token_ids)
        if self._sampler is not None and step.scored:
            scored = self._sampler.score(logits[num_drawn:], inputs.targets, step.scored).started()
        return None if drawn is None else drawn.started(), scored
