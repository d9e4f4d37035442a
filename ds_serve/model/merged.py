"""Linears of one input whose weights lie in one tensor, and the compiler's pass that makes them one product.

merge() puts q, k and v (gate and up, ..) of a module into one weight; each stays a module of its own, whose
weight is a slice of it, so that eager code is right as it was and nothing is held twice. one_product() finds
the slices of a weight that a traced layer multiplies by the same input, and multiplies once. sum_rows() gives
DeepSpeed's row-parallel linears a sum that a compiled layer may hold. Knows no layer and no model. Called by
compiled.py.
"""

from __future__ import annotations

import operator
from collections import defaultdict

import torch
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from ds_serve.attention.opaque import ShardSum

# Names of linears that models give the same input; where one does not, they stay products of their own.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


class MergedLinear(nn.Module):
    """The weight [outputs of all, inputs] of several linears and, where any of them has one, their bias."""

    def __init__(self, linears: list[nn.Module]) -> None:
        super().__init__()
        weight, bias = torch.cat([linear.weight.detach() for linear in linears]), None
        if any(linear.bias is not None for linear in linears):
            bias = torch.cat(
                [
                    linear.weight.new_zeros(len(linear.weight))
                    if linear.bias is None
                    else linear.bias.detach()
                    for linear in linears
                ]
            )
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))


class SiblingLinear(nn.Module):
    """One of the linears of a MergedLinear: rows start .. end - 1 of it."""

    def __init__(self, merged: MergedLinear, start: int, end: int) -> None:
        super().__init__()
        self.merged, self.start, self.end = merged, start, end
        self.in_features, self.out_features = merged.weight.shape[1], end - start

    @property
    def weight(self) -> torch.Tensor:
        return self.merged.weight[self.start : self.end]

    @property
    def bias(self) -> torch.Tensor | None:
        return None if self.merged.bias is None else self.merged.bias[self.start : self.end]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class SummedLinear(nn.Module):
    """A row-parallel linear, DeepSpeed's LinearAllreduce: the shards' products are summed, then the bias is
    added. It holds the tensors of linear, not copies."""

    def __init__(self, linear: LinearAllreduce, shard_sum: ShardSum) -> None:
        super().__init__()
        self.weight, self.bias, self.shard_sum = linear.weight, linear.bias, shard_sum

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.shard_sum(F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def merge(layer: nn.Module) -> int:
    """Merges the sibling linears in layer, in place; how many weights were made of several.

    Memory grows by one such weight while it is made. Whatever is no plain linear stays as it is.
    """
    found = 0
    for parent in list(layer.modules()):
        for names in SIBLINGS:
            linears = [parent._modules.get(name) for name in names]
            if _are_alike(linears):
                merged, start = MergedLinear(linears), 0
                for name, linear in zip(names, linears, strict=True):
                    end = start + len(linear.weight)
                    setattr(parent, name, SiblingLinear(merged, start, end).train(linear.training))
                    start = end
                found += 1
    return found


def sum_rows(layer: nn.Module, shard_sum: ShardSum) -> None:
    """Swaps layer's LinearAllreduce for the same computation by shard_sum, in place."""
    for name, module in list(layer.named_modules()):
        if type(module) is LinearAllreduce and not _has_hooks(module):
            layer.set_submodule(name, SummedLinear(module, shard_sum).train(module.training))


def _are_alike(linears: list[nn.Module | None]) -> bool:
    if not all(type(linear) in (nn.Linear, LinearLayer) and not _has_hooks(linear) for linear in linears):
        return False
    if any(getattr(linear, "gather_output", False) for linear in linears):
        return False
    tensors = [parameter for linear in linears for parameter in linear.parameters()]
    if any(type(tensor) is not nn.Parameter or not tensor.dtype.is_floating_point for tensor in tensors):
        return False
    return (
        len({(t.dtype, t.device) for t in tensors})
        == len({linear.weight.shape[1] for linear in linears})
        == 1
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


# -- the pass ----------------------------------------------------------------------------------


def one_product(traced: GraphModule) -> int:
    """Makes products of one input by slices of one weight a single product of which slices are taken.

    traced is what torch.compile hands to its backend, changed in place; how many products are fewer. Slices
    must be neighbours: what lies between them would be computed for nothing.
    """
    products = defaultdict(list)
    for node in traced.graph.nodes:
        slices = _slices(node)
        if slices is not None:
            products[node.args[0], slices[0], slices[1]].append((slices[2], slices[3], node))
    fewer = 0
    for (x, weight, bias), parts in products.items():
        starts, ends = [start for start, _, _ in parts], [end for _, end, _ in parts]
        if len(parts) < 2 or sorted(starts)[1:] != sorted(ends)[:-1]:
            continue
        _multiply_once(traced, x, weight, bias, parts)
        fewer += len(parts) - 1
    if fewer:
        traced.recompile()
    return fewer


def _slices(node: Node) -> tuple[Node, Node | None, int, int] | None:
    """(weight, bias, start, end) of a product by rows start .. end - 1 of a weight and the same of a bias."""
    if node.op != "call_function" or node.target is not F.linear or len(node.args) + len(node.kwargs) > 3:
        return None
    given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    weight, bias = _slice(given["weight"]), given.get("bias")
    if weight is None:
        return None
    if bias is None:
        return weight[0], None, weight[1], weight[2]
    found = _slice(bias)
    return None if found is None or found[1:] != weight[1:] else (weight[0], found[0], weight[1], weight[2])


def _slice(node: object) -> tuple[Node, int, int] | None:
    """(tensor, start, end) where node is tensor[start:end] of plain numbers."""
    if not isinstance(node, Node) or node.target is not operator.getitem:
        return None
    tensor, index = node.args
    index = index[0] if isinstance(index, tuple) and len(index) == 1 else index
    if not isinstance(index, slice) or index.step not in (None, 1):
        return None
    if not isinstance(index.start, int) or not isinstance(index.stop, int):
        return None
    return tensor, index.start, index.stop


def _multiply_once(
    traced: GraphModule, x: Node, weight: Node, bias: Node | None, parts: list[tuple[int, int, Node]]
) -> None:
    low, high = min(start for start, _, _ in parts), max(end for _, end, _ in parts)
    graph = traced.graph
    with graph.inserting_before(parts[0][2]):
        rows = [
            None if tensor is None else graph.call_function(operator.getitem, (tensor, slice(low, high)))
            for tensor in (weight, bias)
        ]
        product = graph.call_function(F.linear, (x, *rows))
    for start, end, node in parts:
        with graph.inserting_before(node):
            part = graph.call_function(operator.getitem, (product, (..., slice(start - low, end - low))))
        node.replace_all_uses_with(part)
        part.meta.update(node.meta)
        slices = [each for each in node.all_input_nodes if each is not x]
        graph.erase_node(node)
        for each in slices:
            if not each.users:
                graph.erase_node(each)
