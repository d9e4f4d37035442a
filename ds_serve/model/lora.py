"""LoRA adapters beside a model's linears: several at once, each for its own tokens of the packed batch.

attach() wraps each linear that an adapter changes, on its rank: y + scale * (x A^T) B^T for the tokens whose
number (AdapterRows) is that adapter's. Runs after the model was cut into shards, since it must know each
linear's cut, and before injection, which leaves what is wrapped as it is. Knows no request and no slot.
Called by the loader; adapter_files.py has read which linears there are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from ds_serve.attention.context import current_batch
from ds_serve.attention.interface import UnsupportedModelError
from ds_serve.model.adapter_files import Adapter
from ds_serve.model.errors import ModelLoadError
from ds_serve.model.repairs import ATTENTION, Heads, share
from ds_serve.model.sharding import role_of
from ds_serve.model.stage import Elsewhere, stack_name
from ds_serve.parallel.grid import Grid


class LinearWithAdapters(nn.Module):
    """A linear and what adapters add to it.

    parts: (number of the adapter, A [rank, in], B [out, rank] times its scale), by number. Of all adapters A
    and B lie in one matrix each, so that a step has two products however many adapters it holds: the rows
    of A that are not a token's own are zeroed between them. reduce sums over the tensor shards that have
    parts of the inputs.
    """

    def __init__(
        self,
        name: str,
        base: nn.Module,
        parts: list[tuple[int, torch.Tensor, torch.Tensor]],
        num_adapters: int,
        reduce: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        super().__init__()
        self.name, self.base, self.reduce = name, base, reduce
        ranks = [0] * num_adapters
        for number, a, _ in parts:
            ranks[number - 1] = len(a)
        self.ends = [0, *accumulate(ranks)]  # adapter n has ranks ends[n - 1] .. ends[n] - 1
        device, self.num_inputs = parts[0][1].device, parts[0][1].shape[1]
        owners = torch.repeat_interleave(torch.arange(1, num_adapters + 1), torch.tensor(ranks)).to(device)
        self.register_buffer("owners", owners, persistent=False)  # [all ranks]: whose each one is
        self.register_buffer("a", torch.cat([a for _, a, _ in parts]), persistent=False)
        self.register_buffer("b", torch.cat([b.t() for _, _, b in parts]), persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        raise UnsupportedModelError(
            f"{self.name}: the model reads this linear's weight itself, so no adapter can change it"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]; where there is a batch, its tokens in their order."""
        y, batch = self.base(x), current_batch.get()
        if batch is None:
            return y
        if x.numel() != batch.num_tokens * self.num_inputs:
            raise UnsupportedModelError(
                f"{self.name}: the model calls this linear for {x.numel() // self.num_inputs} of "
                f"{batch.num_tokens} tokens, so no adapter can change it"
            )
        rows = batch.adapters
        if rows is None:
            return y
        own = slice(self.ends[rows.first - 1], self.ends[rows.last])
        if own.start == own.stop:
            return y
        low = x.reshape(-1, self.num_inputs) @ self.a[own].t()
        # Not a product with zeros: another's numbers may be beyond those that are finite.
        low.masked_fill_(rows.of_token[:, None] != self.owners[own], 0)
        if self.reduce is not None:
            low = self.reduce(low)
        return torch.addmm(y.reshape(-1, y.shape[-1]), low, self.b[own]).view_as(y)


def attach(model: PreTrainedModel, adapters: list[Adapter], grid: Grid, device: torch.device) -> None:
    """Wraps the linears of model, one stage's tensor shard, that adapters (1, 2, ... in order) change.

    ModelLoadError naming adapter and linear where it is not known how the linear is cut.
    """
    cuts = Cuts.of(model, grid)
    with ExitStack() as files:
        opened = [files.enter_context(safe_open(each.file, framework="pt")) for each in adapters]
        for name in dict.fromkeys(linear for each in adapters for linear in each.updates):
            base = _find(model, name)
            if base is None:
                continue
            parts = []
            for number, (adapter, file) in enumerate(zip(adapters, opened, strict=True), 1):
                update = adapter.updates.get(name)
                if update is not None:
                    a, b = file.get_tensor(update.a), file.get_tensor(update.b).float() * update.scale
                    try:
                        a, b = cuts.own(name, base, a.to(device, model.dtype), b.to(device, model.dtype))
                        _check_finite(a, b)
                    except ModelLoadError as error:
                        raise ModelLoadError(f"adapter {adapter.name!r}: {name}: {error}") from None
                    parts.append((number, a, b))
            reduce = grid.all_reduce if cuts.role(name) == "ROW" else None
            model.set_submodule(name, LinearWithAdapters(name, base, parts, len(adapters), reduce))


def _find(model: PreTrainedModel, name: str) -> nn.Module | None:
    """The module of this name, None where it is another stage's."""
    module: nn.Module | None = model
    for part in name.split("."):
        if isinstance(module, Elsewhere):
            return None
        module = getattr(module, part, None)
        if module is None:
            raise ModelLoadError(f"adapters change {name}, which {type(model).__name__}, as served, lacks")
    return None if isinstance(module, Elsewhere) else module


def _check_finite(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if not tensor.isfinite().all():
            raise ModelLoadError(f"it has numbers that are not finite in {tensor.dtype}")


# -- tensor shards -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Cuts:
    """How sharding.py cuts the linears of the layers in stack, by name; heads None: it does not."""

    stack: str
    heads: Heads | None

    @classmethod
    def of(cls, model: PreTrainedModel, grid: Grid) -> Cuts:
        if grid.place.tp == 1:
            return cls("", None)
        return cls(stack_name(model), Heads.of(model.config.get_text_config(decoder=True), grid.place))

    def role(self, name: str) -> str | None:
        """The linear's role in sharding.py; "WHOLE" also where nothing is cut, None where it is unknown."""
        if self.heads is None or not name.startswith(f"{self.stack}."):
            return "WHOLE"
        role = role_of(self._within_layer(name))
        return "COLUMN" if role == "QKV" and self.heads.interleaved else role

    def own(
        self, name: str, base: nn.Module, a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This shard's part of A [rank, in] and B [out, rank]; base is its part of the linear itself."""
        role, within = self.role(name), self._within_layer(name)
        in_attention = re.match(ATTENTION, within) is not None
        if self.heads is None or role == "WHOLE":
            return a, b
        if role == "ROW":
            a = (self._queries(a.t()) if in_attention else self._evenly(a.t())).t()
        elif role == "QKV":
            b = self._qkv(b)
        elif role == "PAIR":
            b = torch.cat([self._evenly(half) for half in b.chunk(2)])
        elif role == "COLUMN" and not in_attention:
            b = self._evenly(b)
        elif role == "COLUMN" and self.heads.interleaved and self.heads.kv_copies > 1:
            raise ModelLoadError(
                f"it goes head by head, and there are fewer key-value heads than the {self.heads.place.tp} "
                "tensor shards; use a smaller tensor_parallel"
            )
        elif role == "COLUMN" and self.heads.interleaved:
            b = self._keys(b)
        elif role == "COLUMN":
            b = self._keys(b) if within.endswith(("k_proj", "v_proj")) else self._queries(b)
        else:
            raise ModelLoadError("it is not known how it is cut into tensor shards; use tensor_parallel=1")
        found, there = (len(b), a.shape[1]), tuple(base.weight.shape)
        if found != there:
            raise ModelLoadError(
                f"a part of {found} does not fit the linear's of {there}; use tensor_parallel=1"
            )
        return a, b

    def _within_layer(self, name: str) -> str:
        return name.removeprefix(f"{self.stack}.").partition(".")[2]

    # Rows for the outputs of a whole linear (or its inputs, where those are cut) -> this shard's of them.

    def _evenly(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[share(len(rows), self.heads.place)]

    def _queries(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(0, (self.heads.query, -1))[self.heads.own_query].flatten(0, 1)

    def _keys(self, rows: torch.Tensor) -> torch.Tensor:
        """Where there are fewer key-value heads than shards, each is copied."""
        heads = self.heads
        each = rows.unflatten(0, (heads.kv // heads.kv_copies, -1))
        return each.repeat_interleave(heads.kv_copies, 0)[heads.own_kv].flatten(0, 1)

    def _qkv(self, rows: torch.Tensor) -> torch.Tensor:
        heads, kv = self.heads, self.heads.kv // self.heads.kv_copies
        size = len(rows) // (heads.query + 2 * kv)
        q, k, v = rows.split([heads.query * size, kv * size, kv * size])
        return torch.cat([self._queries(q), self._keys(k), self._keys(v)])
