"""The command `ds-serve plan`: what a model takes on each rank and what is left for KV, before it is loaded.

Sizes of weights and KV, and what a step holds, are those of the loader's own code without numbers
(model/dry.py); how KV is cut and counted is the worker's (worker/sizes.py). What only a start can measure is
estimated, and said to be. Reads config.json and the checkpoint's headers; takes nothing of a device. Called
by cli.py.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import transformers
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedConfig

from ds_serve.attention.interface import UnsupportedModelError
from ds_serve.attention.layout import KVLayout
from ds_serve.config import Settings
from ds_serve.model.adapter_files import WEIGHTS, read_adapters
from ds_serve.model.dry import DryRank, dry_rank
from ds_serve.model.errors import ModelLoadError
from ds_serve.model.loader import longest, read_config, skeleton
from ds_serve.model.quantised import kept
from ds_serve.parallel.place import Place
from ds_serve.windows import Windows
from ds_serve.worker.memory import (
    DEFAULT_UTILIZATION,
    MAX_SCORED,
    RESERVE,
    Room,
    host_room,
    wanted_bytes,
)
from ds_serve.worker.sizes import grouping_of, num_blocks, windows_of

FITS, TOO_LARGE = 0, 1  # exit codes

LIBRARIES = 2**30  # of an accelerator: contexts, workspaces, buffers of collectives: a guess
SAMPLER_BYTES = 48  # for each row and entry of the vocabulary: measured with penalties, filters and logprobs
MORE_RANKS = (2, 4, 8, 16)  # how many times as many are tried
GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """memory: bytes of each accelerator, or the host's where there is none. count: accelerators, if known."""

    accelerator: bool
    memory: int
    count: int | None = None

    @classmethod
    def of(cls, settings: Settings, device_memory: int | None) -> Machine:
        """This machine, or one whose accelerators have device_memory bytes.

        ModelLoadError where settings ask for what is not there.
        """
        if device_memory is not None:
            return cls(True, device_memory)
        found = get_accelerator()
        name = found.device_name()
        if settings.device not in ("auto", name):
            raise ModelLoadError(
                f"device {settings.device} was asked for, but DeepSpeed's accelerator is {name}; to plan for "
                "another machine give --device-memory"
            )
        if name == "cpu":
            return cls(False, psutil.virtual_memory().total)
        return cls(True, found.total_memory(), found.device_count())


@dataclass(frozen=True)
class Share:
    """One stage's ranks, in bytes for each rank: none of its shards takes more.

    left: for KV by default, negative where the rest does not fit. kv: what KV gets.
    """

    stage: int
    first_layer: int
    last_layer: int
    weights: int
    step: int
    reserve: int
    left: int
    kv: int
    kv_bytes_per_block: int


@dataclass(frozen=True)
class Plan:
    """What fits. tokens: in the cache at once. max_model_len: what is served, limit: what the model or the
    settings have. requests: of limit tokens at once. problems: why it does not fit; none where it does."""

    model: str
    model_class: str
    dtype: str
    tensor_parallel: int
    pipeline_parallel: int
    accelerator: bool
    memory: int
    utilization: float | None
    quantised: str | None
    shares: list[Share]
    kv_bytes_per_token: int
    blocks: int
    tokens: int
    limit: int
    max_model_len: int
    requests: int
    host_tokens: int
    problems: list[str]
    proposals: list[str]

    @property
    def fits(self) -> bool:
        return not self.problems

    def to_json(self) -> str:
        return json.dumps({"fits": self.fits} | asdict(self), indent=2)

    def table(self) -> str:
        """The plan as lines of text."""
        return "\n".join([*self._head(), "", *self._rows(), "", *self._sums(), *self._verdict()])

    def _head(self) -> Iterator[str]:
        where = "on this CPU"
        if self.accelerator:
            where = f"on accelerators of {_size(self.memory)}, {self.utilization:.0%} of which may be used"
        yield (
            f"{self.model}: {self.model_class}, {self.dtype}, tp {self.tensor_parallel} x pp "
            f"{self.pipeline_parallel}, {where}"
        )
        if self.quantised:
            yield f"quantised by {self.quantised}: weights are the checkpoint's bytes"

    def _rows(self) -> Iterator[str]:
        columns = ("each rank of", "layers", "weights", "step*", "reserve*", "left for KV*", "KV")
        rows = [
            (
                f"stage {each.stage}", f"{each.first_layer}-{each.last_layer}", _size(each.weights),
                _size(each.step), _size(each.reserve), _size(each.left), _size(each.kv),
            )
            for each in self.shares
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        for row in (columns, *rows):
            yield "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
        yield "* estimated; the start measures it" if self.accelerator else "* estimated"

    def _sums(self) -> Iterator[str]:
        yield (
            f"KV: {self.kv_bytes_per_token} bytes a token over all ranks; {self.blocks} blocks hold "
            f"{self.tokens} tokens, {self.requests} requests of {self.limit} at once"
        )
        if self.host_tokens:
            yield f"host cache: {self.host_tokens} tokens"
        if self.fits and self.max_model_len < self.limit:
            yield f"max_model_len will be {self.max_model_len}: so much of one request KV holds"

    def _verdict(self) -> Iterator[str]:
        yield "fits" if self.fits else "does not fit: " + "; ".join(self.problems)
        for proposal in self.proposals:
            yield f"  try {proposal}"


def run(settings: Settings, device_memory: int | None, as_json: bool) -> int:
    """Prints the plan and returns the exit code. Raises what loading raises for a model not served."""
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    plan = make_plan(settings, Machine.of(settings, device_memory))
    if not plan.fits:
        plan = replace(plan, proposals=list(_proposals(settings, plan)))
    print(plan.to_json() if as_json else plan.table())
    return FITS if plan.fits else TOO_LARGE


def make_plan(settings: Settings, machine: Machine) -> Plan:
    """What settings take on a machine, without proposals."""
    if not machine.accelerator and settings.device_memory_utilization is not None:
        raise ModelLoadError(
            "device_memory_utilization is an accelerator's, and this plan is for the CPU: give "
            "kv_cache_memory, or --device-memory to plan for another machine"
        )
    config = read_config(settings)
    tp, pp = settings.tensor_parallel, settings.pipeline_parallel
    num_sampled = settings.max_num_seqs + MAX_SCORED
    ranks = [dry_rank(settings, config, Place(stage * tp, tp, pp), num_sampled) for stage in range(pp)]
    limit = longest(config, settings)
    layouts, windows = _groups(ranks, settings, limit)
    sampler = SAMPLER_BYTES * settings.max_num_seqs * config.get_text_config(decoder=True).vocab_size
    shares = []
    for rank, layout in zip(ranks, layouts, strict=True):
        kept_bytes = rank.weight_bytes + _adapter_bytes(settings, config)
        step = rank.step_bytes + (sampler if rank.place.is_last_stage else 0)
        default, kv = _kv(layout, windows, settings, machine, kept_bytes + step, limit)
        ends = rank.layers.start, rank.layers.stop - 1
        reserve, per_block = _reserve(machine), layout.bytes_per_block
        shares.append(Share(rank.place.stage, *ends, kept_bytes, step, reserve, default, kv, per_block))
    blocks = max(0, min(share.kv // share.kv_bytes_per_block for share in shares))
    held = windows.longest(blocks, limit)
    bytes_per_block = [share.kv_bytes_per_block for share in shares]
    host_blocks = settings.host_cache // settings.world_size // max(bytes_per_block)
    return Plan(
        model=settings.name,
        model_class=ranks[0].model_class,
        dtype=str(ranks[0].dtype).removeprefix("torch."),
        tensor_parallel=tp,
        pipeline_parallel=pp,
        accelerator=machine.accelerator,
        memory=machine.memory,
        utilization=_utilization(settings) if machine.accelerator else None,
        quantised=kept(config),
        shares=shares,
        kv_bytes_per_token=tp * sum(bytes_per_block) * windows.num_groups // settings.block_size,
        blocks=blocks,
        tokens=blocks * settings.block_size // windows.num_groups,
        limit=limit,
        max_model_len=held,
        requests=blocks // windows.most_blocks(limit),
        host_tokens=host_blocks * settings.block_size,
        problems=_problems(shares, settings, machine, held, limit),
        proposals=[],
    )


def _utilization(settings: Settings) -> float:
    return settings.device_memory_utilization or DEFAULT_UTILIZATION


def _adapter_bytes(settings: Settings, config: PreTrainedConfig) -> int:
    """Of all LoRA adapters' files: a rank holds its part of them."""
    read_adapters(settings.adapters, lambda: skeleton(settings, config))
    return sum((Path(folder) / WEIGHTS).stat().st_size for folder in settings.adapters.values())


def _groups(ranks: list[DryRank], settings: Settings, limit: int) -> tuple[list[KVLayout], Windows]:
    """Each stage's layout with the groups of its layers, as the workers agree on them."""
    layers = [(rank.place.stage, kv) for rank in ranks for kv in rank.layout.layers]
    grouping = grouping_of(
        [kv.reach for _, kv in layers],
        [kv.num_kv_heads * (kv.k_dim + (0 if kv.v_in_k else kv.v_dim)) for _, kv in layers],
        [stage for stage, _ in layers],
        settings,
        limit,
    )
    layouts = [
        replace(rank.layout, groups=tuple(grouping.groups[layer] for layer in rank.layers)) for rank in ranks
    ]
    return layouts, windows_of(grouping, settings)


def _reserve(machine: Machine) -> int:
    return RESERVE + LIBRARIES if machine.accelerator else 0


def _kv(
    layout: KVLayout, windows: Windows, settings: Settings, machine: Machine, taken: int, limit: int
) -> tuple[int, int]:
    """What is left for KV by default on a rank where the rest takes so many bytes, and what KV gets."""
    left = host_room(settings, settings.world_size)
    if machine.accelerator:
        left = int(machine.memory * _utilization(settings)) - taken - _reserve(machine)
    wanted = wanted_bytes(layout, settings)
    if wanted is not None:
        return left, wanted
    if left < layout.bytes_per_block:
        return left, 0
    return left, num_blocks(layout, windows, settings, Room(left, limit)) * layout.bytes_per_block


# -- does it fit -------------------------------------------------------------------------------


def _problems(shares: list[Share], settings: Settings, machine: Machine, held: int, limit: int) -> list[str]:
    """Why it does not fit; none where it does."""
    if machine.accelerator:
        found = [each for share in shares for each in _too_large(share, settings, machine)]
    else:
        found = _too_large_for_host(shares, settings, machine)
    if machine.count is not None and settings.world_size > machine.count:
        found.append(
            f"{settings.world_size} ranks take an accelerator each, and this machine has {machine.count}"
        )
    if settings.max_model_len is not None and held < limit:
        found.append(f"KV holds {held} tokens of a request, and max_model_len is {limit}")
    elif not held and not found:
        found.append("KV holds no block of each group of layers")
    return found


def _too_large(share: Share, settings: Settings, machine: Machine) -> list[str]:
    used, most = share.weights + share.step + share.reserve, int(machine.memory * _utilization(settings))
    taken = f"stage {share.stage}: weights, a step and the reserve take {_size(used)}"
    if not share.kv:
        return [f"{taken} of the {_size(most)} that may be used"]
    if used + share.kv > machine.memory:
        return [f"{taken}, KV is to have {_size(share.kv)}, of {_size(machine.memory)}"]
    return []


def _too_large_for_host(shares: list[Share], settings: Settings, machine: Machine) -> list[str]:
    taken = sum(share.weights + share.step + share.kv for share in shares) * settings.tensor_parallel
    taken += settings.host_cache
    if taken <= machine.memory:
        return []
    return [f"all ranks together take {_size(taken)}, and this machine has {_size(machine.memory)}"]


# -- what would fit ----------------------------------------------------------------------------


def _proposals(settings: Settings, plan: Plan) -> Iterator[str]:
    """Changes with which the plan fits, each tried."""
    machine = Machine(plan.accelerator, plan.memory)

    def fits(**changes) -> bool:
        try:
            return make_plan(settings.model_copy(update=changes), machine).fits
        except (ModelLoadError, UnsupportedModelError):
            return False

    if plan.max_model_len and settings.max_model_len and fits(max_model_len=plan.max_model_len):
        yield f"--max-model-len {plan.max_model_len}"
    free = min(plan.memory - share.weights - share.step - share.reserve for share in plan.shares)
    if settings.kv_cache_memory and free > 0 and fits(kv_cache_memory=free):
        yield f"--kv-cache-memory {free}"
    if not plan.accelerator:
        yield "a machine with more memory, or a smaller checkpoint (docs/quantised.md)"
        return
    fewer = settings.max_num_batched_tokens // 4
    if fewer and fits(max_num_batched_tokens=fewer):
        yield f"--max-num-batched-tokens {fewer}"
    for name, flag in (("tensor_parallel", "tp"), ("pipeline_parallel", "pp")):
        stages = {} if flag == "tp" else {"stage_layers": None}
        numbers = [factor * getattr(settings, name) for factor in MORE_RANKS]
        number = next((each for each in numbers if fits(**{name: each}, **stages)), None)
        if number is not None:
            yield f"--{flag} {number}"
    if plan.quantised is None:
        yield "a checkpoint quantised to 8 or 4 bits (docs/quantised.md)"


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if abs(size) >= GIB else f"{size / 2**20:.1f} MiB"
