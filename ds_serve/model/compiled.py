"""Decoder layers by torch.compile: any Hugging Face model's, each compared with the original at load.

compile_layers() gives each layer of a stage a compiled forward, in which attention and the sums over shards
are opaque ops (attention/opaque.py) and sibling linears one product (merged.py). One compiled code serves all
layers of a kind, and one more a single token. A layer that the compiler cannot take whole, or whose results
differ, keeps transformers' own forward, and the report says why. All that compiles does so here: the shapes
that steps have are run before anyone is served, and what would have to be compiled later runs as traced.
Hooks of a layer stay outside of its forward. Called by the loader, after injection; on all tensor shards
together. Knows no request and no step.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.fx import Graph, GraphModule
from torch.utils._pytree import tree_map_only

from ds_serve.attention.context import AttentionBatch, use_batch
from ds_serve.attention.interface import UnsupportedModelError
from ds_serve.attention.layout import KVLayout
from ds_serve.attention.opaque import ShardSum, without_sums
from ds_serve.model.fused_cpu import FusedDecoderLayer
from ds_serve.model.injection import MAX_RELATIVE_ERROR, agreed
from ds_serve.model.lora import LinearWithAdapters
from ds_serve.model.merged import merge, one_product, sum_rows
from ds_serve.model.parity import Probe, chunk, has_experts
from ds_serve.model.quantised import rounds_activations
from ds_serve.model.report import InjectionReport
from ds_serve.model.stage import Stage, stack_name
from ds_serve.parallel.grid import Grid

logger = logging.getLogger(__name__)

Mode = Literal["auto", "on", "off"]
Compile = Callable[[GraphModule, list], Callable]

# Inductor's options for the code of one token and for that of any other number of them.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {"one": {}, "many": {}},
    # Tuning by coordinate descent also makes a product of one row a kernel of inductor's own.
    "cuda": {"one": {"coordinate_descent_tuning": True}, "many": {}},
}
# Tokens of the probe's steps. The first is the size for which kernels for many tokens choose their tiles. No
# number is one that a model has as a size, since the compiler takes what is equal for the same.
LENGTHS = {"cpu": (7, 5, 1), "cuda": (61, 23, 1)}

# ||compiled - original|| / ||original - input|| over all of the probe's tokens: sums go in another order.
MAX_ERROR_FLOAT32 = 1e-4

RECOMPILE_LIMIT = 8  # entries for each kind of layers and each size, in one code object


@torch.no_grad()
def compile_layers(
    stage: Stage, layout: KVLayout, grid: Grid, report: InjectionReport, mode: Mode = "auto"
) -> None:
    """Compiles in place what decoder layers of stage it can, and puts what became of each into report.

    Attention must be installed, with layout for its KV. auto: on CUDA only. Fused layers stay.
    """
    device = next(stage.module.parameters()).device
    if mode == "off" or (mode == "auto" and device.type != "cuda"):
        return
    names = {index: f"layer {index}" for index in stage.layers}
    try:
        stack = stage.module.get_submodule(stack_name(stage.module))
    except UnsupportedModelError:
        for name in names.values():
            report.explain(name, "not compiled: the model has no list of decoder layers")
        return
    layers = {names[i]: stack[i] for i in stage.layers if not isinstance(stack[i], FusedDecoderLayer)}
    if not layers:
        return
    began = time.perf_counter()
    work = _Work(stage, layout, grid, device)
    work.run(layers, report)
    logger.info(
        "%d of %d layers compiled in %.1f s, as %d graphs",
        report.compiled, len(layers), time.perf_counter() - began, work.backend.num_graphs,
    )  # fmt: skip


def inductor(traced: GraphModule, inputs: list) -> Callable:
    """torch.compile's own compiler, with OPTIONS."""
    from torch._inductor.compile_fx import compile_fx  # takes a second to import

    tensors = [each for each in inputs if isinstance(each, torch.Tensor)]
    size = "many" if any(isinstance(each, torch.SymInt) for each in inputs) else "one"
    return compile_fx(traced, inputs, config_patches=OPTIONS.get(tensors[0].device.type, {}).get(size))


compiler: Compile = inductor  # what tests replace


class _Backend:
    """torch.compile's backend for one stage. sealed: nothing is compiled any more, a graph runs as traced."""

    def __init__(self) -> None:
        self.num_graphs = self.num_late = 0
        self.sealed = False

    def __call__(self, traced: GraphModule, inputs: list) -> Callable:
        if self.sealed:
            self.num_late += 1
            logger.warning("a decoder layer met inputs it was not compiled for: its graph runs as traced")
            return traced.forward
        self.num_graphs += 1
        merged = GraphModule(traced, _copy(traced.graph))
        if one_product(merged):
            try:
                return compiler(merged, inputs)
            except Exception as error:
                logger.warning("sibling linears stay products of their own: %s", _first_line(error))
        return compiler(traced, inputs)


def _copy(graph: Graph) -> Graph:
    copy = Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


@dataclass
class _Call:
    """A layer's call in the probe: what it got, what it gave, and where the step was."""

    start: int
    end: int
    num_calls: int
    args: tuple
    kwargs: dict[str, Any]
    given: torch.Tensor
    wanted: torch.Tensor


class _Failure(Exception):
    """A layer stays as it is; the message is the reason reported."""


class _Work:
    """Compiling one stage's layers. Steps of the probe go through the stage as requests' do."""

    def __init__(self, stage: Stage, layout: KVLayout, grid: Grid, device: torch.device) -> None:
        self.stage, self.layout, self.backend = stage, layout, _Backend()
        self.reduce = grid.all_reduce if grid.place.tp > 1 else None
        self.shard_sum = ShardSum(grid) if grid.place.tp > 1 else None
        lengths = LENGTHS.get(device.type, LENGTHS["cpu"])
        config = stage.module.config.get_text_config(decoder=True)
        if sum(lengths) > (getattr(config, "max_position_embeddings", None) or sum(lengths)):
            lengths = LENGTHS["cpu"]
        ends = [sum(lengths[: index + 1]) for index in range(len(lengths))]
        self.steps = list(zip([0, *ends], ends, strict=False))
        with torch.inference_mode():
            self.probe = Probe.of(stage, device, ends[-1])
            self.slab = layout.allocate(-(-ends[-1] // layout.block_size) + 1, device)
        self.forwards: dict[type, Callable] = {}
        self.failed: dict[tuple, str] = {}

    def run(self, layers: dict[str, nn.Module], report: InjectionReport) -> None:
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT * (1 + len(layers)))
        dynamo.accumulated_recompile_limit = max(
            dynamo.accumulated_recompile_limit, 2 * dynamo.recompile_limit
        )
        # Numbers such as a norm's epsilon are the code's, not inputs.
        with dynamo.patch(specialize_float=True):
            calls, done = self._record(layers), {}
            for name, layer in layers.items():
                try:
                    report.compile(name, self._try(layer, calls.pop(name)))
                    done[name] = layer
                except _Failure as failure:
                    report.explain(name, f"not compiled: {failure}")
            if done:
                self._settle(done, report)
        self.backend.sealed = True

    # -- what the originals do -----------------------------------------------------------------

    def _batch(self, start: int, end: int) -> AttentionBatch:
        return chunk(self.layout, self.slab, start, end)

    def _record(self, layers: dict[str, nn.Module]) -> dict[str, list[_Call]]:
        """Each layer's calls in the probe's steps."""
        calls: dict[str, list[_Call]] = {name: [] for name in layers}
        step: list = []

        def watched(name: str, forward: Callable) -> Callable:
            def call(*args, **kwargs):
                start, end, batch = step
                before, kept = batch.num_calls, _cloned(args, kwargs)
                output = forward(*args, **kwargs)
                given, wanted = _hidden(*kept), _first(output).clone()
                calls[name].append(_Call(start, end, before, *kept, given, wanted))
                return output

            return call

        watching = [(layer, name) for name, layer in layers.items() if "forward" not in vars(layer)]
        for layer, name in watching:
            layer.forward = watched(name, layer.forward)
        try:
            for start, end in self.steps:
                step[:] = start, end, self._batch(start, end)
                with torch.inference_mode(), use_batch(step[2]):
                    self.probe.run(self.stage, start, end)
        finally:
            for layer, _ in watching:
                del layer.forward
        return calls

    # -- one layer -----------------------------------------------------------------------------

    def _try(self, layer: nn.Module, calls: list[_Call]) -> float:
        """Compiles layer in place; its error. _Failure, on all shards, where it stays as it was."""
        kind = _kind(layer)
        reason = self.failed.get(kind) or _unfit(layer, calls)
        self._together(reason)
        if merge(layer):
            get_accelerator().empty_cache()  # the next one needs a larger piece than those that are free now
        if self.shard_sum is not None:
            sum_rows(layer, self.shard_sum)
        forward = MethodType(self._compiled(type(layer)), layer)
        if self.reduce is not None:
            with without_sums():  # a shard that fails must not leave others waiting for its part of a sum
                _, reason = self._outputs(forward, calls)
            self.failed |= {kind: reason} if reason else {}
            self._together(reason)
        outputs, reason = self._outputs(forward, calls)
        if reason is not None:
            self.failed[kind] = reason
        self._together(reason)
        error = _error(outputs, calls, has_experts(layer) and self.stage.dtype != torch.float32)
        reason, bound = None, self._bound()
        if not error <= bound:  # not a number is refused too
            reason = f"its relative error is {error:.2g}, above {bound:g}"
            _warn(layer, reason)
        self._together(reason)
        layer.forward = forward
        return error

    def _compiled(self, layer_class: type[nn.Module]) -> Callable:
        """The compiled forward of a class, of which the layer is an argument."""
        if layer_class not in self.forwards:
            own = layer_class.forward

            def forward(layer, *args, **kwargs):
                return own(layer, *args, **kwargs)

            # Code of its own: what another stage in this process has compiled does not count here.
            forward.__code__ = forward.__code__.replace(co_name=f"forward_of_{layer_class.__name__}")
            self.forwards[layer_class] = torch.compile(
                forward, backend=self.backend, dynamic=True, fullgraph=True
            )
        return self.forwards[layer_class]

    def _outputs(self, forward: Callable, calls: list[_Call]) -> tuple[list[torch.Tensor], str | None]:
        """The hidden states that forward gives in calls, or why it cannot."""
        outputs = []
        try:
            for call in calls:
                batch = self._batch(call.start, call.end)
                batch.num_calls = call.num_calls
                with torch.inference_mode(), use_batch(batch):
                    args, kwargs = _cloned(call.args, call.kwargs)
                    outputs.append(_first(forward(*args, **kwargs)))
        except Exception as error:
            reason = f"{type(error).__name__}: {_first_line(error)}"
            _warn(forward.__self__, reason)
            return [], reason
        return outputs, None

    def _bound(self) -> float:
        exact = self.stage.dtype == torch.float32 and not rounds_activations(self.stage.module.config)
        return MAX_ERROR_FLOAT32 if exact else MAX_RELATIVE_ERROR

    def _together(self, reason: str | None) -> None:
        """A reason of one shard is one of all."""
        reason = agreed(reason, self.reduce)
        if reason is not None:
            raise _Failure(reason)

    def _settle(self, layers: dict[str, nn.Module], report: InjectionReport) -> None:
        """Runs the steps as requests do: what would still have to be compiled is compiled now.

        Their tensors are made in inference mode or, for CUDA graphs, before: the compiler tells them apart.
        """
        made_before = Probe.of(self.stage, self.slab.device, self.steps[-1][1])
        try:
            for probe in (self.probe, made_before):
                for start, end in self.steps:
                    with torch.inference_mode(), use_batch(self._batch(start, end)):
                        probe.run(self.stage, start, end)
        except Exception as error:
            if self.reduce is not None:  # others may wait for this shard
                raise
            reason = f"not compiled: {type(error).__name__}: {_first_line(error)}"
            for name, layer in layers.items():
                del layer.forward
                report.explain(name, reason)
            _warn(self.stage.module, reason)


def _unfit(layer: nn.Module, calls: list[_Call]) -> str | None:
    """Why there is no use in trying, None if there is."""
    if "forward" in vars(layer):
        return "it has a forward of its own"
    if any(isinstance(module, LinearWithAdapters) for module in layer.modules()):
        return "it has LoRA adapters"
    return None if calls else "the model did not call it"


def _kind(layer: nn.Module) -> tuple:
    """Equal for layers of which one compiles if another does."""
    modules = [(name, type(module)) for name, module in layer.named_modules()]
    return (*modules, *((name, tuple(each.shape)) for name, each in layer.named_parameters()))


def _cloned(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A layer's arguments, of which it may change its hidden states in place."""
    args = tree_map_only(torch.Tensor, torch.clone, args)
    hidden = kwargs.get("hidden_states")
    return args, kwargs if hidden is None else kwargs | {"hidden_states": hidden.clone()}


def _hidden(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return _first(hidden)


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _error(outputs: list[torch.Tensor], calls: list[_Call], median: bool) -> float:
    """The relative error over all tokens, or the median token's: a last bit may choose another expert."""
    got, wanted, given = (
        torch.cat([each.float().reshape(-1, each.shape[-1]) for each in which])
        for which in (outputs, [call.wanted for call in calls], [call.given for call in calls])
    )
    added = (wanted - given if wanted.shape == given.shape else wanted).norm(dim=-1)
    errors = (got - wanted).norm(dim=-1) / added.square().mean().sqrt().clamp_min(1e-30)
    return float(errors.median() if median else errors.square().mean().sqrt())


def _first_line(error: Exception) -> str:
    error = getattr(error, "inner_exception", error)  # of the compiler, which dynamo wraps
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:160] if lines else "no message"


def _warn(module: nn.Module, reason: str) -> None:
    warnings.warn(f"{type(module).__name__} is not compiled: {reason}", RuntimeWarning, stacklevel=3)
