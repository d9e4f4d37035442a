"""This rank's tensor shard of a stage: deepspeed.init_inference told by name how each weight is cut.

Every linear of a decoder layer has one role (ROLES), and each other parameter a reason to stay whole or a
repair (repairs.py); a weight with neither is refused, since a wrong cut shows in wrong tokens only. Query
heads go with their key-value heads; other widths are cut as evenly as they go. The head is cut by vocabulary
(ShardedHead). Knows no request and no step. Called by the loader, on all ranks together.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator

import deepspeed
import torch
import torch.distributed
from deepspeed.inference.config import DeepSpeedInferenceConfig
from deepspeed.module_inject.autotp_config import AutoTPConfig, PartitionType, TPLayerSpec
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ds_serve.attention.interface import UnsupportedModelError
from ds_serve.model.adapters import cut_biases
from ds_serve.model.repairs import ATTENTION, Heads, covers, is_linear, prepare, repair
from ds_serve.model.stage import stack_name
from ds_serve.parallel.grid import Grid

# The role of a linear by its name within the decoder layer; the first that matches counts.
# COLUMN gives outputs to shards, ROW inputs (and sums), WHOLE stays on each shard; QKV is q|k|v and PAIR
# gate|up in one weight, of which each shard gets its part of each.
ROLES = {
    role: re.compile(pattern)
    for role, pattern in {
        "WHOLE": r".*\b(router|altup|laurel)\b.*|per_layer_\w+"
        rf"|(?!{ATTENTION})(.*\.)?(gate|shared_experts?_gate)"
        rf"|{ATTENTION}(q_a_proj|kv_a_proj_with_mqa)",
        "QKV": rf"{ATTENTION}(qkv_proj|Wqkv|c_attn)",
        "COLUMN": rf"{ATTENTION}(q_proj|k_proj|v_proj|q_b_proj|kv_b_proj|query_key_value)"
        rf"|(?!{ATTENTION})(.*\.)?(gate_proj|up_proj|fc1|fc_in|dense_h_to_4h|c_fc|w1|w3)",
        "ROW": rf"{ATTENTION}(o_proj|out_proj|dense|c_proj)"
        rf"|(?!{ATTENTION})(.*\.)?(down_proj|fc2|fc_out|dense_4h_to_h|c_proj|w2)",
        "PAIR": rf"(?!{ATTENTION})(.*\.)?gate_up_proj",
    }.items()
}
_KV_PROJECTIONS = ("k_proj", "v_proj")


def shard(module: PreTrainedModel, grid: Grid) -> nn.Module:
    """module with this rank's part of every decoder layer and of the head, on the accelerator's device.

    module is one stage of a causal LM; layers without parameters belong to others and are left alone. Logits
    are complete on shard 0 only. UnsupportedModelError names a weight that nobody knows how to cut, or heads
    that tensor_parallel cannot divide; module may then be half cut.
    """
    if grid.place.tp == 1:
        return _init_inference(module, tensor_parallel={"tp_size": 1})
    layers = [
        layer for layer in module.get_submodule(stack_name(module)) if any(True for _ in layer.parameters())
    ]
    heads = Heads.of(module.config.get_text_config(decoder=True), grid.place)
    for layer in layers:
        prepare(layer, heads)
        check_covered(layer, heads)
    partition = _partition(layers, heads)
    _shard_head(module, grid)
    for layer in layers:  # first, so that no whole expert goes to the device
        repair(layer, heads, grid)
        cut_biases(layer, heads)
    with _told_how(partition), heads.in_config():
        module = _init_inference(
            module,
            tensor_parallel={
                "tp_size": grid.place.tp, "tp_grain_size": 1, "mpu": grid, "tp_group": grid.tensor_group,
            },
            injection_policy={type(layer): ("",) for layer in layers},
        )  # fmt: skip
    for layer in layers:
        _let_go(layer)
    return module


def _let_go(layer: nn.Module) -> None:
    """DeepSpeed's parameters point back at their modules, for training: injection could not free a layer."""
    for parameter in layer.parameters():
        for name in ("gather_params", "_tp_partition"):
            vars(parameter).pop(name, None)


def _init_inference(module: PreTrainedModel, **how) -> nn.Module:
    with contextlib.redirect_stdout(io.StringIO()), _uncast(module):  # it prints what it does
        engine = deepspeed.init_inference(module, dtype=module.dtype, replace_with_kernel_inject=False, **how)
    return engine.module


@contextlib.contextmanager
def _uncast(module: nn.Module) -> Iterator[None]:
    """Inside it half(), float() and bfloat16() change nothing: init_inference calls one of them.

    from_pretrained gave each tensor its dtype. In bfloat16 rotary frequencies are wrong by 2^-9, at position
    2048 by whole turns, and a quantised weight would lose its scale.
    """
    names = ("half", "float", "bfloat16")
    for name in names:
        setattr(module, name, lambda: module)
    try:
        yield
    finally:
        for name in names:
            delattr(module, name)


# -- roles -------------------------------------------------------------------------------------


def role_of(name: str) -> str | None:
    """The role of a linear by its name within a decoder layer, None if it is unknown."""
    return next((role for role, pattern in ROLES.items() if pattern.fullmatch(name)), None)


def _roles(layer: nn.Module, heads: Heads) -> Iterator[tuple[str, nn.Module, str | None]]:
    """(name, module, role) of each module of a decoder layer that has a matrix as its weight."""
    for name, module in layer.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and not covers(layer, name, "weight", heads):
            role = role_of(name)
            if role == "QKV" and heads.interleaved:
                role = "COLUMN"
            yield name, module, role


def check_covered(layer: nn.Module, heads: Heads) -> None:
    """UnsupportedModelError, naming the weight, unless it is known how each weight of layer is cut."""
    who, known = type(layer).__name__, set()
    for name, module, role in _roles(layer, heads):
        if role is None or (role != "WHOLE" and not is_linear(module)):
            raise UnsupportedModelError(
                f"{who}: it is not known how {name} ({type(module).__name__} of {_size(module.weight)}) is "
                "cut into tensor shards; use tensor_parallel=1"
            )
        if role != "WHOLE" and re.match(ATTENTION, name):
            _check_heads(f"{who}: {name}", module, role, heads)
        known |= {f"{name}.weight", f"{name}.bias"}
    for full_name, parameter in layer.named_parameters():
        name, _, own = full_name.rpartition(".")
        if full_name not in known and not covers(layer, name, own, heads):
            raise UnsupportedModelError(
                f"{who}: it is not known how {full_name} ({_size(parameter)}) is cut into tensor shards; "
                "use tensor_parallel=1"
            )


def _size(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _check_heads(what: str, module: nn.Module, role: str, heads: Heads) -> None:
    """Whether an attention's linear is made of whole heads, as many as the configuration says."""
    width = module.weight.shape[1 if role == "ROW" else 0]
    count = heads.query + 2 * heads.kv if role == "QKV" else heads.query
    if what.endswith(_KV_PROJECTIONS) or (role == "COLUMN" and heads.interleaved):
        count = heads.kv
    if width % count:
        raise UnsupportedModelError(
            f"{what} of width {width} does not consist of {count} heads, as the configuration says; "
            "use tensor_parallel=1"
        )


def _partition(layers: list[nn.Module], heads: Heads) -> AutoTPConfig:
    """What DeepSpeed is told: one spec for each linear's name, which it sees relative to its layer."""
    specs: dict[str, TPLayerSpec] = {}
    for layer in layers:
        for name, module, role in _roles(layer, heads):
            shape = None
            if role == "QKV":
                size = module.weight.shape[0] // (heads.query + 2 * heads.kv)
                shape = ((heads.query * size, heads.kv * size, heads.kv * size), -1)
            elif role == "PAIR":
                shape = (2, -1)
            kind = {"WHOLE": PartitionType.SKIP, "ROW": PartitionType.ROW}.get(role, PartitionType.COLUMN)
            spec = TPLayerSpec([re.escape(f"{name}.weight") + "$"], kind, shape=shape)
            if specs.setdefault(name, spec) != spec:
                raise UnsupportedModelError(
                    f"{name} is cut as {specs[name].shape} in one layer and as {shape} in another; "
                    "use tensor_parallel=1"
                )
    return AutoTPConfig(tp_size=heads.place.tp, layer_specs=list(specs.values()), strict_mode=False)


@contextlib.contextmanager
def _told_how(partition: AutoTPConfig) -> Iterator[None]:
    """init_inference asks its configuration for a partition, and has no field that could hold one."""
    DeepSpeedInferenceConfig.get_partition_config_object = lambda self: partition
    try:
        yield
    finally:
        del DeepSpeedInferenceConfig.get_partition_config_object


# -- the head ----------------------------------------------------------------------------------


def _shard_head(module: PreTrainedModel, grid: Grid) -> None:
    head = module.get_output_embeddings()
    if head is None or not is_linear(head):
        return
    embedding = module.get_input_embeddings()
    tied = getattr(embedding, "weight", None) is head.weight
    module.set_output_embeddings(ShardedHead(head, grid, keep=tied))


class ShardedHead(nn.Module):
    """A slice of the vocabulary's rows on each shard; their logits meet on shard 0, which draws the tokens.

    x [..., hidden] -> logits [..., V] on shard 0, zeros of that shape elsewhere. A tied head is a view of
    the embedding's rows. A row of logits is computed whole, as it would be on one shard; DeepSpeed's default
    splits the input and sums the roundings of all logits. Measured (49152 x 576, bf16, 2 shards, ms at 1 /
    16 / 64 rows, gloo): this 4.3 / 5.9 / 15, all logits gathered on all shards 4.8 / 6.5 / 17, DeepSpeed's
    default 5.4 / 7.1 / 18, zeros around a slice and a sum 5.3 / 8.3 / 19, no shards 6.9 / 11 / 23.
    """

    def __init__(self, head: nn.Linear, grid: Grid, keep: bool = False) -> None:
        super().__init__()
        self.vocabulary, self.grid = head.out_features, grid
        self.rows = -(-head.out_features // grid.place.tp)  # the last shard may have fewer

        def own(tensor: torch.Tensor, keep: bool) -> nn.Parameter:
            part = tensor.detach()[grid.place.shard * self.rows :][: self.rows]
            return nn.Parameter(part if keep else part.clone(), requires_grad=False)

        weight = own(head.weight, keep)
        self.linear = nn.Linear(head.in_features, len(weight), head.bias is not None, device="meta")
        self.linear.weight = weight
        if head.bias is not None:
            self.linear.bias = own(head.bias, keep=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gather_logits(self.linear(x), self.rows, self.vocabulary, self.grid)


def gather_logits(logits: torch.Tensor, rows: int, vocabulary: int, grid: Grid) -> torch.Tensor:
    """logits [..., up to rows] of each shard -> [..., vocabulary] on shard 0, zeros elsewhere."""
    place, parts = grid.place, None
    logits = F.pad(logits, (0, rows - logits.shape[-1])).contiguous()
    if place.shard == 0:
        parts = [torch.empty_like(logits) for _ in range(place.tp)]
    if logits.numel():
        torch.distributed.gather(logits, parts, dst=place.rank - place.shard, group=grid.tensor_group)
    if parts is not None:
        return torch.cat(parts, dim=-1)[..., :vocabulary]
    return logits.new_zeros(()).expand(*logits.shape[:-1], vocabulary)
