"""One rank's part of a model without its weights: how large it is, what it caches, what a step takes beside.

The loader's own code cuts the model. Its tensors have sizes and no memory (torch's FakeTensorMode), and its
tensor shards a process group that sends nothing, so one process can ask for any rank of any grid. What is
refused at load for its names and sizes is refused here too, what is refused for its numbers (the parity
probe) is not. Knows no device and no KV pool. Called by planning.py.
"""

from __future__ import annotations

import contextlib
import json
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
import torch.distributed
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from safetensors import safe_open
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel

from ds_serve.attention.interface import install, probe_layers
from ds_serve.attention.latent import use_latents
from ds_serve.attention.layout import KVLayout
from ds_serve.attention.reference import ReferenceBackend
from ds_serve.config import Settings
from ds_serve.model.adapters import adapt, plain_attention
from ds_serve.model.loader import longest, read_stage
from ds_serve.model.quantised import kept
from ds_serve.model.sharding import shard
from ds_serve.model.stage import Stage, stack_name
from ds_serve.parallel.grid import Grid
from ds_serve.parallel.place import Place

# Where a step of the real size cannot run without numbers, one of so many tokens runs on zeros.
TOKENS_ON_ZEROS = 64


@dataclass(frozen=True)
class DryRank:
    """What one rank would hold.

    weight_bytes: parameters and buffers, once; LoRA adapters not among them. layout: all layers in one group.
    step_bytes: the most that tensors of a step of max_num_batched_tokens tokens hold at once, num_sampled
    rows of logits among them, as transformers' code runs; without what attention itself and the sampler take.
    """

    place: Place
    layers: range
    model_class: str
    dtype: torch.dtype
    weight_bytes: int
    layout: KVLayout
    step_bytes: int


def dry_rank(settings: Settings, config: PreTrainedConfig, place: Place, num_sampled: int) -> DryRank:
    """place's part of the model of config, as the loader would make it: on shard 0 the largest of a stage.

    Raises what loading raises for a model or a grid that is not served. Not in a process with ranks.
    """
    with _no_accelerator(), _silent_group(place) as grid, torch.no_grad():
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        stage = _stage(settings, config, grid, _sized, mode)
        weight_bytes = _quantised_bytes(settings, config, stage) or _bytes_of(stage.module)
        tokens = settings.max_num_batched_tokens
        try:
            with mode:
                layout, step_bytes = _run(stage, settings, config, tokens, num_sampled)
        except (DataDependentOutputException, DynamicOutputShapeException):
            few = min(TOKENS_ON_ZEROS, tokens)
            stage = _stage(settings, config, grid, _zeros, contextlib.nullcontext())
            layout, step_bytes = _run(stage, settings, config, few, num_sampled)
            step_bytes = step_bytes * tokens // few
    name = type(stage.module).__name__
    return DryRank(place, stage.layers, name, stage.dtype, weight_bytes, layout, step_bytes)


def _stage(
    settings: Settings,
    config: PreTrainedConfig,
    grid: Grid,
    make: Callable[[torch.Tensor], torch.Tensor],
    mode: contextlib.AbstractContextManager,
) -> Stage:
    """grid.place's part of the model, with what make gives inside mode in place of each tensor."""
    module, layers = read_stage(settings, config, grid.place, _no_weights)
    with mode:
        return Stage(shard(_replace(module, make), grid), grid.place, layers)


def _run(
    stage: Stage, settings: Settings, config: PreTrainedConfig, num_tokens: int, num_sampled: int
) -> tuple[KVLayout, int]:
    """The stage's KV layout, and the most bytes that a step of so many tokens holds at once."""
    module = stage.module
    adapt(module, stage.place, lambda: longest(config, settings))
    if settings.latent_cache == "auto":
        use_latents(module)
    install(module, ReferenceBackend())
    _shorten_experts(module)
    ids = torch.zeros(1, num_tokens, dtype=torch.long)
    positions, sampled = torch.arange(num_tokens), torch.arange(min(num_sampled, num_tokens))
    hidden = None
    if not stage.place.is_first_stage:
        hidden = torch.zeros(1, num_tokens, stage.hidden_size, dtype=stage.dtype)
    with _Held(module) as held:
        shapes = probe_layers(module, lambda: stage(ids, positions, sampled, hidden), stage.layers)
    layout = KVLayout(tuple(shapes), settings.block_size, stage.dtype, stage.first_layer)
    return layout, held.most


# -- a model without weights -------------------------------------------------------------------


def _no_weights(settings: Settings, config: PreTrainedConfig, model_class: type) -> PreTrainedModel:
    """model_class on the meta device, its tensors of the dtypes in which read_weights would give them."""
    dtype = getattr(torch, settings.dtype) if settings.dtype != "auto" else config.dtype or _found(settings)
    attention = plain_attention(config)
    with torch.device("meta"):
        if hasattr(model_class, "from_config"):
            module = model_class.from_config(
                config,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=settings.trust_remote_code,
            )
        else:
            module = model_class._from_config(config, dtype=dtype, attn_implementation=attention)
    wide = "|".join(map(re.escape, module._get_dtype_plan(dtype)))
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if wide and re.search(rf"(?:^|\.)(?:{wide})(?:\.|$)", name):
            tensor.data = tensor.data.to(torch.float32)
    return module.eval().requires_grad_(False)


def _found(settings: Settings) -> torch.dtype:
    """The dtype of the checkpoint's first floating tensor."""
    for file in sorted(Path(settings.model).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it has no iterator)
                dtype = tensors.get_slice(name).get_dtype()
                if dtype in _DTYPES:
                    return _DTYPES[dtype]
    return torch.float32


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _sized(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    """One zero, seen from everywhere: numbers to run on that take no memory."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _replace(module: PreTrainedModel, make: Callable[[torch.Tensor], torch.Tensor]) -> PreTrainedModel:
    """module with what make gives in place of its tensors; tied ones stay one."""
    made: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = make(tensor)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(new, requires_grad=False) if is_parameter else new
                tensors[name] = made[id(tensor)]
    module.to = lambda *args, **kwargs: module  # init_inference moves it to the device
    return module


def _shorten_experts(module: nn.Module) -> None:
    """Which token goes to which expert is a matter of numbers; together they hold as much."""
    for part in module.modules():
        inner, own = getattr(part, "mlp", None), part._parameters
        if isinstance(inner, nn.Module) and {"w1", "v1", "w2"} <= inner._parameters.keys():  # DBRX
            part.forward = _only_sizes(3 * [inner.ffn_hidden_size])
        elif {"gate_up_proj", "down_proj"} <= own.keys():
            part.forward = _only_sizes([max(each.shape[1:]) for each in own.values() if each is not None])


def _only_sizes(widths: list[int]):
    def forward(hidden: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        chosen = [each for each in args if isinstance(each, torch.Tensor) and not each.is_floating_point()]
        each_token = chosen[0].shape[-1] if chosen and chosen[0].dim() == 2 else 1
        tokens = hidden.numel() // hidden.shape[-1] * each_token
        held = [hidden.new_empty(tokens, width) for width in widths]
        del held
        return torch.empty_like(hidden)

    return forward


# -- what is held ------------------------------------------------------------------------------


def _bytes_of(module: nn.Module) -> int:
    """Of all parameters and buffers; a view, as of a tied embedding's rows, counts once."""
    storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in _tensors(module)}
    return sum(storages.values())


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _quantised_bytes(settings: Settings, config: PreTrainedConfig, stage: Stage) -> int | None:
    """Of a checkpoint that stays quantised, from its files; None for others.

    What belongs to no layer counts on the first stage and on the last.
    """
    if kept(config) is None:
        return None
    place = stage.place
    stack = stack_name(stage.module).rpartition(".")[2] if place.pp > 1 else None
    total = 0
    for file in Path(settings.model).glob("*.safetensors"):
        with open(file, "rb") as tensors:
            header = json.loads(tensors.read(int.from_bytes(tensors.read(8), "little")))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            start, end = tensor["data_offsets"]
            number = re.search(rf"(?:^|\.){stack}\.(\d+)\.", name) if stack else None
            here = int(number[1]) in stage.layers if number else place.is_first_stage or place.is_last_stage
            total += (end - start) * here
    return total


class _Held(TorchDispatchMode):
    """Counts the bytes of tensors that come and go inside it, those of module not among them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {each.untyped_storage()._cdata for each in _tensors(module)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor):
                self._add(each.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


# -- a process that stands for any rank --------------------------------------------------------


class _SilentGrid(Grid):
    """A rank's place and shards for who cuts a model; nothing is sent, so there is nothing to set up."""

    def __init__(self, place: Place) -> None:
        self.place = place
        first = place.stage * place.tp
        self._shards = torch.distributed.new_group(range(first, first + place.tp)) if place.tp > 1 else None

    @property
    def tensor_group(self):
        return self._shards

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@contextlib.contextmanager
def _silent_group(place: Place) -> Iterator[Grid]:
    """The grid of place, whose shards' process group is torch's fake one while inside."""
    if place.tp == 1:
        yield _SilentGrid(place)
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.distributed.is_initialized():
        raise RuntimeError("a plan is made in a process without ranks, and this one is a rank")
    torch.distributed.init_process_group(
        "fake", rank=place.rank, world_size=place.world_size, store=FakeStore()
    )
    comm, builders = deepspeed.comm.comm, deepspeed.ops.__compatible_ops__
    before = comm.cdb, builders.get("deepspeed_shm_comm")
    builders["deepspeed_shm_comm"] = False  # it would wait for the others
    try:
        with contextlib.redirect_stdout(None):
            deepspeed.init_distributed(verbose=False)
        yield _SilentGrid(place)
    finally:
        torch.distributed.destroy_process_group()
        comm.cdb, builders["deepspeed_shm_comm"] = before


@contextlib.contextmanager
def _no_accelerator() -> Iterator[None]:
    """Inside it DeepSpeed works on the CPU, whatever this machine has: a plan takes nothing of a device."""
    before = get_accelerator()
    set_accelerator(CPU_Accelerator())
    try:
        yield
    finally:
        set_accelerator(before)
