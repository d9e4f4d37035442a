"""Decode steps as CUDA graphs: a stage's forward pass is recorded for some numbers of rows, then replayed.

A graph serves steps of up to its number of rows, each row one token. The rows that a step lacks are padding,
whose keys and values go to a scratch block that the engine does not know: the slab's last. All graphs read
and write one static memory, so a step's output lies there until the next replay. What is asked beside the
forward pass (draws, adapters, scored prompts, hidden states on their way) is not in them. Knows no plan.
Made and called by the worker.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

from ds_serve.attention.context import AttentionBatch, HostRows, use_batch
from ds_serve.attention.layout import KVLayout
from ds_serve.model.loader import LoadedModel
from ds_serve.model.parity import TOLERANCE, TOLERANCE_HALF, has_experts
from ds_serve.parallel.grid import Grid
from ds_serve.worker.inputs import StepInputs, TokenPool, upload
from ds_serve.worker.put import fill, put
from ds_serve.worker.slots import HostStep
from ds_serve.worker.trial import trial_step

logger = logging.getLogger(__name__)

WARM_UPS = 2  # before a recording: what kernels and libraries do at their first call cannot be recorded
COMPARED_ROWS = 32  # of a trial step: logits in float32 are large
# Rows of int64 in the static memory: a step's fields, and from MAPPINGS on the slot mapping of each group.
TOKEN, DRAWN_IN, POSITION, SLOT, CONTEXT, MAPPINGS = range(6)


class Recorder(Protocol):
    """Keeps what a function gives the device to do."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Calls run and keeps what it asks of the device, which is not done now. What is returned does it,
        on the same memory, without run. Raises what run or the device objects to."""

    def bytes_taken(self) -> int:
        """Of the device's memory, since this recorder was made."""


class _CudaRecorder:
    """CUDA graphs that share one pool of memory: they are replayed one after another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self._free = self._free_bytes()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        graph, failure = torch.cuda.CUDAGraph(), None
        # The outer context: where a recording fails, torch's own leaves its stream the current one.
        # thread_local: other threads (the copier's, NCCL's) may go on using the device.
        try:
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    run()
                except Exception as error:
                    failure = error
        finally:
            if failure is not None:  # the end of the recording raises then too, and says less
                # That end gives torch's random numbers back to eager code, where it does not raise.
                numbers = torch.cuda.default_generators[torch.cuda.current_device()]
                numbers.graphsafe_set_state(torch.Generator(self._device).graphsafe_get_state())
                raise failure
        return graph.replay

    def bytes_taken(self) -> int:
        return self._free - self._free_bytes()

    def _free_bytes(self) -> int:
        get_accelerator().empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]


def recorder_of(device: torch.device) -> Recorder | None:
    """None where the device has no graphs."""
    return _CudaRecorder(device) if device.type == "cuda" else None


def graph_sizes(most: int) -> list[int]:
    """Rows of the graphs for steps of 1 .. most rows, in order: 35 for 4096.

    Up to 64 by eights, then four sizes between two powers of two: at most a quarter of a step is padding.
    """
    sizes = [1, 2, 4, *range(8, 65, 8)]
    while sizes[-1] < most:
        sizes += [sizes[-1] * (4 + quarter) // 4 for quarter in range(1, 5)]
    return [*(size for size in sizes if size < most), most]


class GraphRunner:
    """Graphs of one stage's decode steps: upload() a step that takes() accepts, then replay().

    slab's last block is the scratch block, shape that of the SlotTable. replay() may be called without
    waiting for the one before.
    """

    def __init__(
        self,
        model: LoadedModel,
        layout: KVLayout,
        slab: torch.Tensor,
        pool: TokenPool,
        shape: tuple[int, int, int],
    ) -> None:
        self._model, self._stage, self._backend = model, model.stage, model.backend
        self._layout, self._slab, self._pool = layout, slab, pool
        self._scratch = len(slab) - 1
        max_num_seqs, max_blocks, groups = shape
        self.sizes = graph_sizes(max_num_seqs)
        self._replays: dict[int, Callable[[], None]] = {}
        self._num_tried = 0  # blocks that trial steps have overwritten
        device = slab.device
        self._random = torch.Generator(device).manual_seed(0)
        self._num_fields = MAPPINGS + groups
        # A graph of n rows has the first n * num_fields of them as [num_fields, n]: a step is one copy.
        self._integers = torch.zeros(max_num_seqs * self._num_fields, dtype=torch.int64, device=device)
        self._order = torch.arange(max_num_seqs + 1, device=device)
        self._query_start = self._order.int()
        tables = max_num_seqs, max_blocks
        self._reads_tables = self._backend.reads_tables
        held = tables if self._reads_tables else (1, 1)
        self._tables = tuple(
            torch.zeros(held, dtype=torch.int32, device=device).expand(tables) for _ in range(groups)
        )
        self._hidden: torch.Tensor | None = None
        place = model.stage.place
        if not place.is_first_stage:
            self._hidden = torch.zeros(
                1, max_num_seqs, model.stage.hidden_size, dtype=model.stage.dtype, device=device
            )
        self._is_read = place.samples or not place.is_last_stage
        self._output: torch.Tensor | None = None  # [max_num_seqs, W], once it is known

    def takes(self, step: HostStep) -> bool:
        """Whether step can be replayed: a decode step without adapters."""
        return step.is_decode and not step.adapters.any()

    def hidden(self, count: int) -> torch.Tensor:
        """Where the hidden states [1, count, H] of the stage before must be when a step is replayed."""
        return self._hidden[:, :count]

    def upload(self, step: HostStep, rows: int | None = None) -> StepInputs:
        """step on its way to where its graph reads it: the smallest that takes it, or that of rows rows.

        What is returned holds until the next upload.
        """
        rows = rows or next(size for size in self.sizes if size >= step.num_rows)
        fill(self._integers[: rows * self._num_fields], self._packed(step, rows))
        if self._reads_tables:
            for ours, table in zip(self._tables, put(step.tables, self._slab.device), strict=True):
                ours[: step.num_rows, : table.shape[1]].copy_(table)
                ours[step.num_rows : rows, :1] = self._scratch
        fields, batch = self._fields(rows), self._batch(rows)
        batch.host = HostRows(
            np.arange(rows + 1, dtype=np.int32),
            _padded(step.context_len, rows, 1),
            tuple(_padded(table, rows, self._scratch) for table in step.tables),
            graph=rows,
        )
        slots = fields[SLOT, : step.num_rows]
        return StepInputs(fields[TOKEN][None], batch, slots, targets=slots[:0])

    def replay(self, inputs: StepInputs) -> torch.Tensor | None:
        """The stage's output as Stage gives it, for the step's own rows, to be read before the next replay.

        None where nobody wants it: on shards after the first of the last stage.
        """
        self._backend.prepare(inputs.attention)
        self._replays[inputs.attention.num_tokens]()
        return self._read(len(inputs.slots))

    def _packed(self, step: HostStep, rows: int) -> np.ndarray:
        """int64[num_fields, rows] as the static memory has it."""
        packed, own = np.zeros((self._num_fields, rows), dtype=np.int64), slice(step.num_rows)
        packed[TOKEN, own], packed[POSITION, own], packed[SLOT, own] = (
            step.token_ids, step.positions, step.slots,
        )  # fmt: skip
        packed[DRAWN_IN] = -1
        packed[DRAWN_IN, own] = step.drawn_in
        packed[CONTEXT].view(np.int32)[:rows] = _padded(step.context_len, rows, 1)
        packed[MAPPINGS:] = self._scratch * self._layout.block_size
        packed[MAPPINGS:, own] = step.slot_mappings
        return packed

    def _fields(self, rows: int) -> torch.Tensor:
        return self._integers[: rows * self._num_fields].view(self._num_fields, rows)

    def _batch(self, rows: int) -> AttentionBatch:
        """What a graph of rows rows attends to; host is still to be set."""
        fields = self._fields(rows)
        (slot_mapping, tables), *more = zip(
            fields[MAPPINGS:], (table[:rows] for table in self._tables), strict=True
        )
        return AttentionBatch(
            slab=self._slab,
            layout=self._layout,
            slot_mapping=slot_mapping,
            query_start=self._query_start[: rows + 1],
            context_len=fields[CONTEXT].view(torch.int32)[:rows],
            block_tables=tables,
            positions=fields[POSITION],
            num_tokens=rows,
            sampled=self._order[:rows],
            more_groups=tuple(more),
        )

    def _read(self, count: int) -> torch.Tensor | None:
        if not self._is_read:
            return None
        output = self._output[:count]
        return output if self._stage.place.is_last_stage else output[None]

    # -- recording ---------------------------------------------------------------------------------

    def _forward(self, batch: AttentionBatch) -> None:
        """What is recorded. batch is a _batch."""
        rows, fields = batch.num_tokens, self._fields(batch.num_tokens)
        batch.num_calls = 0
        token_ids = self._pool.fill(fields[TOKEN], fields[DRAWN_IN])
        hidden = None if self._hidden is None else self.hidden(rows)
        with use_batch(batch):
            output = self._stage(token_ids[None], batch.positions, batch.sampled, hidden)
        if self._is_read:
            output = output.reshape(rows, -1)
            if self._output is None:
                self._output = output.new_empty(len(self._order) - 1, output.shape[1])
            self._output[:rows].copy_(output)

    @torch.inference_mode()
    def record(self, grid: Grid, recorder: Recorder) -> bool:
        """Records graphs of all sizes and compares each with the plain forward pass. All ranks together.

        For before the first step: it overwrites blocks and the pool, which are zeros afterwards. False where
        attention on a rank cannot be recorded, or, with a warning, where something else cannot: no rank has
        graphs then.
        """
        began, is_recorded = time.perf_counter(), False
        self._pool.tokens.random_(self._model.vocab_size, generator=self._random)
        for rows in reversed(self.sizes):  # the largest first: what it leaves of the pool serves the others
            is_recorded = self._record_size(rows, grid, recorder)
            if not is_recorded:
                self._replays.clear()
                break
        self._slab[: self._num_tried].zero_()
        self._pool.tokens.zero_()
        if is_recorded:
            logger.info(
                "graphs of decode steps: %d, of up to %d rows, recorded in %.1f s, %.2f GiB",
                len(self.sizes), self.sizes[-1], time.perf_counter() - began, recorder.bytes_taken() / 2**30,
            )  # fmt: skip
        return is_recorded

    def _record_size(self, rows: int, grid: Grid, recorder: Recorder) -> bool:
        """A graph recorded with one step and tried on another. Ranks go from one stage to the next together,
        since the others would wait for ever in the sums over shards of one that has failed."""
        problem = self._agreed(grid, self._warm_up, rows)
        if problem is None and not all(grid.gather(self._backend.captures)):
            # Some backends know it once layers have called them; they have warned of what is slow.
            logger.info("no graphs of decode steps: attention %s waits for the device", self._backend.name)
            return False
        problem = problem or self._agreed(grid, self._record_one, rows, recorder)
        problem = problem or self._agreed(grid, self._compare, rows)
        if problem is not None and grid.place.rank == 0:
            warnings.warn(
                f"decode steps run without CUDA graphs, which is slower: for {rows} rows {problem}",
                RuntimeWarning,
                stacklevel=2,
            )
        return problem is None

    def _agreed(self, grid: Grid, phase: Callable[..., str | None], *args: object) -> str | None:
        """The first problem that a rank has with a phase of recording."""
        try:
            problem = phase(*args)
        except Exception as error:
            lines = str(error).strip().splitlines()
            problem = f"recording failed: {type(error).__name__}: {lines[0][:200] if lines else ''}"
        return next(filter(None, grid.gather(problem)), None)

    def _warm_up(self, rows: int) -> None:
        step = self._trial(rows, 0)
        self._slab[: self._num_tried].normal_(generator=self._random)
        batch = self.upload(step, rows).attention
        for _ in range(WARM_UPS):
            self._backend.prepare(batch)
            self._forward(batch)

    def _record_one(self, rows: int, recorder: Recorder) -> None:
        batch = self.upload(self._trial(rows, 0), rows).attention
        self._backend.prepare(batch)
        self._replays[rows] = recorder.record(lambda: self._forward(batch))

    def _compare(self, rows: int) -> str | None:
        """What is wrong with a replay of another step than the recorded one."""
        step = self._trial(rows, 1)
        hidden = None if self._hidden is None else self.hidden(step.num_rows).normal_(generator=self._random)
        inputs = upload(step, self._slab, self._layout, self._pool)
        batch = inputs.attention
        self._backend.prepare(batch)
        with use_batch(batch):
            output = self._stage(inputs.input_ids, batch.positions, batch.sampled, hidden)
        if self._is_read:
            wanted = _compared(output)
            self._output.fill_(torch.nan)
        output = self.replay(self.upload(step, rows))
        if not self._is_read:
            return None
        differences = (_compared(output) - wanted).abs().amax(-1) / wanted.abs().max().clamp_min(1e-6)
        # As in parity.py: where roundings differ, some tokens take other experts.
        difference = differences.quantile(0.25 if has_experts(self._stage.module) else 0.5).item()
        bound = TOLERANCE if self._stage.dtype == torch.float32 else TOLERANCE_HALF
        if difference <= bound:
            return None
        return (
            f"a replay differs from the plain step by {difference:.2g} of the largest output, above {bound:g}"
        )

    def _trial(self, rows: int, number: int) -> HostStep:
        model, size, groups = self._model, self._layout.block_size, len(self._tables)
        step = trial_step(
            rows, self._scratch, size, groups, model.max_model_len, model.vocab_size, number
        )  # fmt: skip
        self._num_tried = max(self._num_tried, 1 + max(int(table.max()) for table in step.tables))
        return step


def _compared(output: torch.Tensor) -> torch.Tensor:
    """float32 [up to COMPARED_ROWS, W] of a stage's output."""
    output = output.flatten(0, -2)
    return output[:: -(-len(output) // COMPARED_ROWS)].to(torch.float32, copy=True)


def _padded(array: np.ndarray, rows: int, value: int) -> np.ndarray:
    """array with value in the rows that it lacks."""
    if len(array) == rows:
        return array
    padded = np.full((rows, *array.shape[1:]), value, dtype=array.dtype)
    padded[: len(array)] = array
    return padded
