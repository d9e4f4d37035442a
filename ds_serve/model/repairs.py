"""What DeepSpeed's AutoTP leaves undone when it cuts a transformers model into tensor shards, by model.

prepare() makes of a layer what AutoTP can cut, and changes nothing of what it computes. repair() cuts what
AutoTP does not see: parameters that are no linear's, and modules that count heads themselves. covers() says
which parameters these and the whole ones are. sharding.py, the only caller, refuses others, between the two.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedConfig
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.nanochat.modeling_nanochat import NanoChatRMSNorm
from transformers.pytorch_utils import Conv1D

from ds_serve.attention.interface import UnsupportedModelError
from ds_serve.attention.opaque import ShardSum
from ds_serve.model.kv_heads import KV_FIELDS, copy_kv_heads, each_parameter, fill_query_heads
from ds_serve.parallel.grid import Grid
from ds_serve.parallel.place import Place

ATTENTION = r"(?:.*\.)?(?:self_attn|attn|attention|self_attention)\."  # how a name within it begins
_HEAD_NORMS = re.compile(rf"{ATTENTION}(q_norm|k_norm|[qk]_layernorm|query_layernorm|key_layernorm)")
_LATENT_NORMS = re.compile(rf"{ATTENTION}(q_a_layernorm|kv_a_layernorm)")  # DeepSeek: before the heads
_WHOLE = re.compile(r".*\b(router|altup|laurel)\b.*|per_layer_\w+.*|(.*\.)?gate\..*")
_EXPERTS = {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}
_EXPERTS_DBRX = {"w1", "v1", "w2"}


def share(total: int, place: Place) -> slice:
    """This shard's part of total things, as even as it goes, the first getting more: DeepSpeed's rule."""
    size, more = divmod(total, place.tp)
    start = place.shard * size + min(place.shard, more)
    return slice(start, start + size + (place.shard < more))


@dataclass(frozen=True)
class Heads:
    """An attention's heads over all shards, kv_copies counted, and this shard's part of them.

    interleaved: one fused weight that goes by key-value heads, each with its queries, k and v (GPT-BigCode
    without multi-query, Falcon), in place of all of q, then k, then v.
    """

    query: int
    kv: int
    kv_copies: int
    hidden: int
    config: PreTrainedConfig
    place: Place
    interleaved: bool = False

    @classmethod
    def of(cls, config: PreTrainedConfig, place: Place) -> Heads:
        """UnsupportedModelError where the heads cannot be divided among the shards.

        Fewer key-value heads than shards are copied until each shard has one: Gemma, GPT-BigCode (1 head).
        Falcon 7B's query heads are filled up with zeros (71 heads).
        """
        query, kv = config.num_attention_heads, _kv_heads(config)
        if config.model_type == "falcon" and kv == 1 and not config.alibi:
            query += -query % place.tp
        copies = place.tp // kv if kv < place.tp else 1
        if query % kv or (kv < place.tp and (place.tp % kv or query % place.tp)):
            good = [n for n in range(2, query + 1) if n <= kv or (n % kv == 0 and query % n == 0)]
            raise UnsupportedModelError(
                f"{query} attention heads with {kv} key-value heads cannot be cut into {place.tp} tensor "
                f"shards; tensor_parallel can be {', '.join(map(str, [1, *good]))}"
            )
        interleaved = config.model_type == "falcon" or (config.model_type == "gpt_bigcode" and kv > 1)
        return cls(query, kv * copies, copies, config.hidden_size, config, place, interleaved)

    @property
    def is_filled(self) -> bool:
        """Whether some query heads are not the model's."""
        return self.query != self.config.num_attention_heads

    @property
    def own_kv(self) -> slice:
        return share(self.kv, self.place)

    @property
    def own_query(self) -> slice:
        own, group = self.own_kv, self.query // self.kv
        return slice(own.start * group, own.stop * group)

    @contextlib.contextmanager
    def in_config(self) -> Iterator[None]:
        """While AutoTP reads the number of key-value heads from the configuration, copies are counted."""
        name = next((name for name in KV_FIELDS if getattr(self.config, name, None) is not None), None)
        if name is None or self.kv_copies == 1:
            yield
            return
        saved = getattr(self.config, name)
        setattr(self.config, name, self.kv)
        try:
            yield
        finally:
            setattr(self.config, name, saved)


def _kv_heads(config: PreTrainedConfig) -> int:
    """Falcon's new layout alone goes by num_kv_heads; its older ones have one, or one for each query head."""
    grouped = config.model_type == "falcon" and config.new_decoder_architecture
    if getattr(config, "multi_query", False) and not grouped:
        return 1
    name = "num_kv_heads" if grouped else "num_key_value_heads"
    return getattr(config, name, None) or config.num_attention_heads


def is_linear(module: nn.Module) -> bool:
    """A plain matrix product: nothing quantized, nothing with a forward of its own."""
    return type(module) is nn.Linear and module.weight.dtype.is_floating_point


def covers(layer: nn.Module, name: str, parameter: str, heads: Heads) -> bool:
    """Whether module name's own parameter, no linear's, is repaired here or right when it stays whole."""
    module = layer.get_submodule(name)
    tensor = module._parameters[parameter]
    full_name = f"{name}.{parameter}"
    if _is_experts(module) or _is_experts_dbrx(module):
        return parameter in _EXPERTS | _EXPERTS_DBRX
    if parameter == "sinks" or tensor.numel() == 1:
        return True
    if _HEAD_NORMS.fullmatch(name):
        return _norm_of(name, module, layer, heads) is not None
    if _LATENT_NORMS.fullmatch(name):
        return True
    if tensor.dim() != 1 or re.match(ATTENTION, full_name):
        return False
    return len(tensor) == heads.hidden or _WHOLE.fullmatch(full_name) is not None


# -- what AutoTP can cut -----------------------------------------------------------------------


def prepare(layer: nn.Module, heads: Heads) -> None:
    """Makes a whole layer one that AutoTP can cut. UnsupportedModelError where its activations cannot be."""
    for name, module in list(layer.named_modules()):
        if getattr(module, "activation_sparsity", 0):
            raise UnsupportedModelError(
                f"{name}: activation_sparsity {module.activation_sparsity} counts over all of the MLP's "
                "activations (Gemma 3n), which are on several tensor shards; use tensor_parallel=1"
            )
        if getattr(module, "has_post_expert_norm", False):
            raise UnsupportedModelError(
                f"{name}: a norm follows each expert, whose outputs are sums over tensor shards; "
                "use tensor_parallel=1"
            )
        if _HEAD_NORMS.fullmatch(name) and _is_weightless(module) and type(module) is not NanoChatRMSNorm:
            raise UnsupportedModelError(
                f"{name}: {type(module).__name__} has no weight that tells whether it is over one head or "
                "over all, which are on several tensor shards; use tensor_parallel=1"
            )
        if getattr(module, "slow_but_exact", False) and module.pretraining_tp > 1:
            raise UnsupportedModelError(
                f"{name}: slow_but_exact with pretraining_tp {module.pretraining_tp} (BLOOM) multiplies by "
                "parts of a weight that is on several tensor shards; use tensor_parallel=1"
            )
        if isinstance(module, FalconLinear):
            module.__class__ = nn.Linear  # the same product, in a forward of its own
        if isinstance(module, Conv1D):
            _as_linear(layer, name, module)
            layer.__class__ = _same_class(type(layer))
    if heads.kv_copies > 1:
        for name, module in layer.named_modules():
            if re.fullmatch(ATTENTION, f"{name}."):
                if heads.is_filled:
                    fill_query_heads(module, heads)
                copy_kv_heads(module, heads)


def _as_linear(layer: nn.Module, name: str, conv: Conv1D) -> None:
    """GPT-2: Conv1D is a linear whose weight lies the other way round. A view: nothing is copied."""
    linear = nn.Linear(*conv.weight.shape, bias=conv.bias is not None, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach().t(), requires_grad=False)
    if conv.bias is not None:
        linear.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
    layer.set_submodule(name, linear.train(conv.training))


@functools.cache
def _same_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    """GPT-2: AutoTP takes whatever it finds in a GPT2Block for Conv1D, so layers get a class of their own."""
    if layer_class.__dict__.get("_holds_linears"):
        return layer_class
    names = {"__module__": layer_class.__module__, "_holds_linears": True}
    return type(layer_class.__name__, (layer_class,), names)


# -- what AutoTP leaves whole ------------------------------------------------------------------


def repair(layer: nn.Module, heads: Heads, grid: Grid) -> None:
    """Cuts what AutoTP leaves whole in layer, a prepared one."""
    for name, module in list(layer.named_modules()):
        if re.fullmatch(ATTENTION, f"{name}."):
            _repair_attention(module, heads)
        elif _HEAD_NORMS.fullmatch(name):
            kind, query = _norm_of(name, module, layer, heads), name.rpartition(".")[2].startswith("q")
            if kind != "whole":
                own, count = (heads.own_query, heads.query) if query else (heads.own_kv, heads.kv)
                layer.set_submodule(name, _cut_norm(kind, module, own, count, grid))
        elif _is_experts(module):
            _cut_experts(module, grid)
        elif _is_experts_dbrx(module):
            _cut_experts_dbrx(module, layer.get_submodule(name.rpartition(".")[0]), grid)


def _repair_attention(attention: nn.Module, heads: Heads) -> None:
    """gpt-oss: a sink for each head. GPT-2: where q, k and v part. Phi-3: reads heads from its config."""
    own, kv = heads.own_query, heads.own_kv
    if isinstance(getattr(attention, "sinks", None), nn.Parameter):
        attention.sinks = nn.Parameter(attention.sinks.detach()[own].clone(), requires_grad=False)
    if hasattr(attention, "split_size"):
        attention.split_size = (own.stop - own.start) * attention.head_dim
    if type(attention).__name__ in ("Phi3Attention", "Phi4MultimodalAttention"):
        counts = {"num_attention_heads": own.stop - own.start, "num_key_value_heads": kv.stop - kv.start}
        attention.config = _ConfigOfShard(attention.config, counts)


class _ConfigOfShard:
    """A model's configuration with other head counts; the rest is read from the model's own when asked."""

    def __init__(self, config: PreTrainedConfig, counts: dict[str, int]) -> None:
        self._config = config
        self.__dict__.update(counts)

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_config"], name)


# -- norms of queries and keys -----------------------------------------------------------------


def _norm_of(name: str, norm: nn.Module, layer: nn.Module, heads: Heads) -> str | None:
    """How a norm of queries or keys is cut: None if it is not known how.

    "whole": all heads share it. "rows": one for each head. "wide": one over all heads together.
    """
    if _is_weightless(norm):  # NanoChat's, over one head: prepare() refuses others
        return "whole"
    attention = layer.get_submodule(name.rpartition(".")[0])
    count = heads.query if name.rpartition(".")[2].startswith("q") else heads.kv // heads.kv_copies
    size, shape = getattr(attention, "head_dim", None), tuple(norm.weight.shape)
    if shape == (size,):
        return "whole"
    if heads.kv_copies > 1:
        return None
    if shape == (count, size):
        return "rows"
    wide = shape == (count * (size or 0),) and "RMSNorm" in type(norm).__name__
    return "wide" if wide and getattr(norm, "bias", None) is None and _is_plain_rms(norm) else None


def _is_weightless(norm: nn.Module) -> bool:
    return getattr(norm, "weight", None) is None


def _is_plain_rms(norm: nn.Module) -> bool:
    if isinstance(norm.weight, FakeTensor):  # without numbers (dry.py) the name has to do
        return True
    x = torch.randn(2, len(norm.weight), generator=torch.Generator().manual_seed(0)).to(norm.weight)
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + _epsilon(norm))
    return torch.allclose(norm(x).float(), wide * norm.weight.float(), rtol=0.02, atol=0.02)


def _epsilon(norm: nn.Module) -> float:
    return getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None) or 0.0


def _cut_norm(kind: str, norm: nn.Module, own: slice, heads: int, grid: Grid) -> nn.Module:
    """Cohere: a row of the weight for each head. OLMo 2, OLMo 3, OLMoE, MiniMax-M2: one over all heads."""
    if kind == "rows":
        each_parameter(norm, lambda tensor: tensor.detach()[own].clone())
        return norm
    size = len(norm.weight) // heads
    return ShardedRMSNorm(norm, slice(own.start * size, own.stop * size), grid)


class ShardedRMSNorm(nn.Module):
    """RMSNorm over all heads together, of which this shard has some: x [..., own] -> the same shape.

    The mean of squares is over width columns of all shards: one sum of a number for each token. In fp32
    throughout, rounded once.
    """

    def __init__(self, norm: nn.Module, columns: slice, grid: Grid) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach()[columns].clone(), requires_grad=False)
        self.epsilon, self.width, self.shard_sum = _epsilon(norm), len(norm.weight), ShardSum(grid)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        squares = self.shard_sum(wide.square().sum(-1, keepdim=True))
        return (wide * torch.rsqrt(squares / self.width + self.epsilon) * self.weight.float()).to(x.dtype)


# -- mixtures of experts -----------------------------------------------------------------------


def _is_experts(module: nn.Module) -> bool:
    """All experts' weights in one parameter of three dimensions: every mixture of transformers 5 but DBRX."""
    up, down = (module._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    return up is not None and down is not None and up.dim() == down.dim() == 3


def _is_experts_dbrx(module: nn.Module) -> bool:
    return module._parameters.keys() >= _EXPERTS_DBRX and hasattr(module, "ffn_hidden_size")


def _cut_experts(experts: nn.Module, grid: Grid) -> None:
    """Mixtral, Qwen MoE, DeepSeek, GLM MoE, OLMoE, Llama 4 and others: each shard has a part of each expert.

    gate|up may lie one after the other, or in turn (gpt-oss); its outputs last, or in the middle dimension
    (gpt-oss, Llama 4). Biases of the output are added once, on shard 0.
    """
    up, down = experts.gate_up_proj, experts.down_proj
    outputs = 2 if _gives_last(experts) else 1
    width = up.shape[outputs] // 2
    own = _share_of_width(width, grid.place)
    size = own.stop - own.start
    in_turn = not getattr(experts, "is_concatenated", True)

    def pair(tensor: torch.Tensor, dim: int) -> nn.Parameter:
        if in_turn:
            part = tensor.detach().narrow(dim, 2 * own.start, 2 * size).clone()
        else:
            part = torch.cat(
                [half.narrow(dim, own.start, size) for half in tensor.detach().chunk(2, dim)], dim
            )
        return nn.Parameter(part, requires_grad=False)

    experts.gate_up_proj = pair(up, outputs)
    own_down = down.detach().narrow(3 - outputs, own.start, size).clone()
    experts.down_proj = nn.Parameter(own_down, requires_grad=False)
    if experts._parameters.get("gate_up_proj_bias") is not None:
        experts.gate_up_proj_bias = pair(experts.gate_up_proj_bias, 1)
    if experts._parameters.get("down_proj_bias") is not None and grid.place.shard:
        bias = torch.zeros_like(experts.down_proj_bias)
        experts.down_proj_bias = nn.Parameter(bias, requires_grad=False)
    _sum_outputs(experts, size, grid)


def _share_of_width(width: int, place: Place) -> slice:
    """Whole eights where there are enough: torch's grouped product wants rows of a multiple of 16 bytes."""
    unit = 8 if width % 8 == 0 and width >= 8 * place.tp else 1
    own = share(width // unit, place)
    return slice(own.start * unit, own.stop * unit)


def _gives_last(experts: nn.Module) -> bool:
    """Whether gate_up_proj is [experts, hidden, 2 x width]; else it is [experts, 2 x width, hidden]."""
    (_, a, b), (_, c, d) = experts.gate_up_proj.shape, experts.down_proj.shape
    possible = {last for last, fits in ((True, (a, b) == (d, 2 * c)), (False, (a, b) == (2 * d, c))) if fits}
    said = getattr(experts, "is_transposed", None)
    if said is not None:
        possible &= {bool(said)}
    if len(possible) != 1:
        raise UnsupportedModelError(
            f"{type(experts).__name__}: gate_up_proj of {a}x{b} and down_proj of {c}x{d} lie in an unknown "
            "way; use tensor_parallel=1"
        )
    return possible.pop()


def _cut_experts_dbrx(weights: nn.Module, experts: nn.Module, grid: Grid) -> None:
    """DBRX: w1, v1 and w2 [experts x width, hidden] in a module of its own within the experts."""
    width = weights.ffn_hidden_size
    own = _share_of_width(width, grid.place)
    each_parameter(
        weights, lambda tensor: tensor.detach().unflatten(0, (-1, width))[:, own].flatten(0, 1).clone()
    )
    weights.ffn_hidden_size = own.stop - own.start
    _sum_outputs(experts, own.stop - own.start, grid)


def _sum_outputs(experts: nn.Module, width: int, grid: Grid) -> None:
    for name in ("intermediate_dim", "intermediate_size", "expert_dim", "ffn_hidden_size"):
        if hasattr(experts, name):
            setattr(experts, name, width)
    shard_sum = ShardSum(grid)
    experts.register_forward_hook(lambda module, args, output: shard_sum(output.contiguous()))
