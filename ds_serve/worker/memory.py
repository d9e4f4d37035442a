"""How much of a device's memory is free for KV, and what is said where memory runs out.

On an accelerator a step of the largest size runs before KV has any memory, and what it and everything else
take is measured: so later steps fit beside KV. On a CPU it is a share of what the machine has free. Knows no
queue of requests. Called by the worker and by cluster.py.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil
import torch
from deepspeed.accelerator import get_accelerator

from ds_serve.attention.context import AttentionBatch, use_batch
from ds_serve.attention.layout import KVLayout
from ds_serve.config import Settings
from ds_serve.messages import SamplingParams
from ds_serve.model.errors import ModelLoadError
from ds_serve.model.loader import LoadedModel
from ds_serve.parallel.grid import Grid
from ds_serve.parallel.place import Place
from ds_serve.windows import Windows
from ds_serve.worker.sampler import Sampler

logger = logging.getLogger(__name__)

DEFAULT_KV_SHARE = 0.3
DEFAULT_KV_LIMIT = 4 * 2**30

DEFAULT_UTILIZATION = 0.9
# For CUDA graphs, which are recorded once KV has its memory, and for what the allocator cannot use.
RESERVE = 2**30

MAX_SCORED = 256  # rows of logits that a step may have beside those it draws from: Limits.max_scored_tokens
SHORTEST = 2048  # tokens; a model whose steps do not fit beside KV for these is refused

SMALLER_STEPS = "a smaller max_num_batched_tokens, max_num_seqs or max_model_len"
MORE_ROOM = (
    f"more tensor_parallel or pipeline_parallel, {SMALLER_STEPS}, or a quantised checkpoint; "
    "`ds-serve plan` says what fits"
)


class OutOfMemory(RuntimeError):
    """A step did not fit into the device's memory; the message says what to change."""


@dataclass(frozen=True)
class Room:
    """bytes: free for KV on this rank. longest: tokens of the longest sequence whose steps fit beside it."""

    bytes: int
    longest: int


class Meter:
    """This rank's accelerator, in bytes. The tests put another one in its place."""

    def total(self) -> int:
        return torch.cuda.mem_get_info()[1]

    def free(self) -> int:
        """What no process holds. DeepSpeed's available_memory knows of others only where pynvml is there."""
        return torch.cuda.mem_get_info()[0]

    def grown(self, run: Callable[[], None]) -> int:
        """By how much run makes torch's share grow at its peak; given back to the device at the end."""
        device = get_accelerator()
        self._settle()
        device.reset_peak_memory_stats()
        before = device.memory_reserved()
        run()
        device.synchronize()
        grown = device.max_memory_reserved() - before
        self._settle()
        return grown

    def _settle(self) -> None:
        gc.collect()
        get_accelerator().synchronize()
        get_accelerator().empty_cache()


def host_room(settings: Settings, ranks_here: int) -> int:
    """Bytes for KV by default where the model is on a CPU."""
    return min(DEFAULT_KV_LIMIT, int(psutil.virtual_memory().available * DEFAULT_KV_SHARE / ranks_here))


def kv_room(
    model: LoadedModel,
    layout: KVLayout,
    windows: Windows,
    settings: Settings,
    grid: Grid,
    meter: Meter | None = None,
) -> Room:
    """What this rank has for KV. A collective.

    On an accelerator, where the longest sequences leave too little, steps of shorter ones are tried, unless
    max_model_len says that they are wanted. ModelLoadError names the numbers where nothing is left.
    """
    if meter is None and model.device.type == "cpu":
        if settings.device_memory_utilization is not None:
            raise ModelLoadError(
                "device_memory_utilization is an accelerator's, and the model is on the CPU: give "
                "kv_cache_memory"
            )
        return Room(host_room(settings, grid.ranks_here), model.max_model_len)
    meter, longest = meter or Meter(), model.max_model_len
    wanted = wanted_bytes(layout, settings)
    while True:
        used = _measure(model, layout, settings, grid.place, longest, meter)
        if wanted is None:
            held = windows.longest(max(0, used.left) // layout.bytes_per_block, longest)
            is_enough = 2 * held >= longest
        else:
            is_enough = wanted <= used.left_at_most
        [all_have_enough] = grid.minimum([is_enough])
        if all_have_enough or settings.max_model_len is not None or longest <= SHORTEST:
            break
        longest = max(longest // 2, SHORTEST)
    if wanted is not None and wanted > used.left_at_most:
        raise ModelLoadError(
            f"{grid.place}: KV is to have {wanted} bytes, but {used}. Give KV less, {MORE_ROOM}"
        )
    if wanted is None and used.left < layout.bytes_per_block:
        raise ModelLoadError(
            f"{grid.place}: nothing is left for KV: {used}. Give more device_memory_utilization, {MORE_ROOM}"
        )
    logger.info("%s: memory: %s", grid.place, used)
    return Room(used.left, longest)


def wanted_bytes(layout: KVLayout, settings: Settings) -> int | None:
    """What the settings give KV on a rank; None where it gets what is left."""
    if settings.num_blocks is not None:
        return settings.num_blocks * layout.bytes_per_block
    return settings.kv_cache_memory


@dataclass(frozen=True)
class _Used:
    """Where a device's memory goes, in bytes. held: all that is in use while no step runs, by any process."""

    total: int
    share: float
    held: int
    step: int
    num_tokens: int
    longest: int

    @property
    def left(self) -> int:
        return int(self.share * self.total) - self.held - self.step - RESERVE

    @property
    def left_at_most(self) -> int:
        """Where KV's size is given, it alone counts, not the share."""
        return self.total - self.held - self.step - RESERVE

    def __str__(self) -> str:
        return (
            f"of {_gib(self.total)}, {self.share:.0%} of it to be used, weights, libraries and other "
            f"processes hold {_gib(self.held)}, a step of {self.num_tokens} tokens after {self.longest} "
            f"takes {_gib(self.step)}, {_gib(RESERVE)} is kept for graphs, {_gib(max(0, self.left))} is left "
            "for KV"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _measure(
    model: LoadedModel, layout: KVLayout, settings: Settings, place: Place, longest: int, meter: Meter
) -> _Used:
    run = functools.partial(largest_step, model, layout, settings, place, longest)
    share = settings.device_memory_utilization or DEFAULT_UTILIZATION
    try:
        meter.grown(run)  # what the first one compiles and sets up is no later one's
        step = meter.grown(run)
    except Exception as error:
        # Shards sum in each layer: one that gives up alone would leave the others waiting.
        if not is_out_of_memory(error) or place.tp > 1 or settings.max_model_len is not None:
            raise
        step = meter.total()
    held = meter.total() - meter.free()
    return _Used(meter.total(), share, held, step, settings.max_num_batched_tokens, longest)


@torch.inference_mode()
def largest_step(
    model: LoadedModel, layout: KVLayout, settings: Settings, place: Place, longest: int
) -> None:
    """A step of as many tokens, rows and logits as there may be, at the end of sequences of longest tokens,
    and a draw with much that a request can ask for. All shards of a stage run it together."""
    device, stage = model.device, model.stage
    batch = _largest_batch(layout, settings, longest, device)
    ids = torch.arange(batch.num_tokens, device=device)[None] % model.vocab_size
    hidden = None
    if not place.is_first_stage:
        hidden = torch.randn(1, batch.num_tokens, stage.hidden_size, device=device).to(stage.dtype)
    sampler = _busy_sampler(model, len(batch.context_len)) if place.samples else None
    with use_batch(batch):
        output = stage(ids, batch.positions, batch.sampled, hidden)
    if sampler is not None:
        rows = list(range(len(batch.context_len)))
        sampler.sample(output[: len(rows)], rows, [1] * len(rows))


def _largest_batch(
    layout: KVLayout, settings: Settings, longest: int, device: torch.device
) -> AttentionBatch:
    """All rows lie in one and the same block, over and over: what it holds afterwards is of no use."""
    rows = min(settings.max_num_seqs, settings.max_num_batched_tokens)
    counts, more = [1] * rows, settings.max_num_batched_tokens - rows
    for row in range(rows):
        taken = min(more, longest - 1)
        counts[row], more = 1 + taken, more - taken
    ends = torch.tensor(counts).cumsum(0)
    num_tokens = int(ends[-1])
    positions = torch.cat([torch.arange(longest - count, longest) for count in counts]).to(device)
    slots = positions % layout.block_size
    table = torch.zeros(rows, -(-longest // layout.block_size), dtype=torch.int32, device=device)
    last = ends - 1
    scored = torch.arange(min(MAX_SCORED, num_tokens))
    return AttentionBatch(
        slab=layout.allocate(1, device),
        layout=layout,
        slot_mapping=slots,
        query_start=torch.cat([torch.zeros(1, dtype=torch.long), ends]).to(device, torch.int32),
        context_len=torch.full((rows,), longest, dtype=torch.int32, device=device),
        block_tables=table,
        positions=positions,
        num_tokens=num_tokens,
        sampled=torch.cat([last, scored]).to(device),
        more_groups=((slots, table),) * max(layout.groups, default=0),
    )


def _busy_sampler(model: LoadedModel, rows: int) -> Sampler:
    sampler = Sampler(rows, model.vocab_size, model.device)
    for row in range(rows):
        params = SamplingParams(
            max_tokens=2, top_p=0.9, min_p=0.01, presence_penalty=1.0, logprobs=20, seed=row
        )
        sampler.admit(row, params, [0], 1)
    return sampler


# -- what is said ------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Of a device or of the host: torch has a type for the former only."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


@contextlib.contextmanager
def told_at_start(place: Place) -> Iterator[None]:
    """Inside it running out of memory is a ModelLoadError that says what to change."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ModelLoadError(
            f"{place}: the model, its KV memory and its largest step do not fit ({_first(error)}). Give KV "
            f"less (kv_cache_memory, num_blocks, device_memory_utilization), {MORE_ROOM}"
        ) from error


def told_in_step(launch):
    """Decorates Worker.launch(plan): running out of memory is an OutOfMemory that names the step."""

    @functools.wraps(launch)
    def told(self, plan):
        try:
            return launch(self, plan)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            tokens = sum(row.count for row in plan.rows)
            raise OutOfMemory(
                f"{self.place}: step {plan.step} of {tokens} tokens in {len(plan.rows)} requests ran out of "
                f"memory ({_first(error)}). Start again with less for KV (kv_cache_memory, num_blocks, "
                f"device_memory_utilization) or {SMALLER_STEPS}"
            ) from error

    return told


def _first(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
