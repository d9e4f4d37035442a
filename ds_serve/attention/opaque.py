"""What a compiled decoder layer may not look into: the attention call, and the sum over tensor shards.

torch.compile sees two ops, torch.ops.ds_serve_paged.attend and .all_reduce, with shapes and nothing else. At
run time attend finds its backend by a number and its batch in context.py; the layer is the number of calls so
far in the step, since each layer calls attention once and in order (interface.probe_layers has shown it). So
nothing of a layer's own is in the compiled code, and one code serves all layers of a kind. Knows no model.
Used by interface.py, and by model/ for sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch

from ds_serve.attention.context import get_batch

_LIBRARY = torch.library.Library("ds_serve_paged", "DEF")
_LIBRARY.define(
    "attend(Tensor q, Tensor k, Tensor? v, int backend, float scale, int? window, int? chunk, "
    "float? softcap, Tensor? sinks, Tensor? key_bias, SymInt v_dim) -> Tensor"
)
_LIBRARY.define("all_reduce(Tensor(a!) x, int shards) -> ()")

_numbered: WeakValueDictionary[int, Any] = WeakValueDictionary()
_dry = False


class Reducer(Protocol):
    """What sums a contiguous tensor over the tensor shards, in place: parallel/grid.py's Grid."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor: ...


def number_of(thing: Any) -> int:
    """The number under which an op finds thing, a backend or a Reducer, for as long as thing lives.

    The lowest one free: a compiled graph holds it, and that of a second start should be the first one's.
    """
    for number, known in list(_numbered.items()):
        if known is thing:
            return number
    number = next(number for number in range(len(_numbered) + 1) if number not in _numbered)
    _numbered[number] = thing
    return number


class ShardSum:
    """Sums over tensor shards, in place, in eager code and in compiled layers. reducer: see Reducer."""

    def __init__(self, reducer: Reducer) -> None:
        self.reducer, self.number = reducer, number_of(reducer)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The contiguous tensor x itself, summed."""
        if torch.compiler.is_compiling():
            torch.ops.ds_serve_paged.all_reduce(x, self.number)
            return x
        return self.reducer.all_reduce(x)


@contextlib.contextmanager
def without_sums() -> Iterator[None]:
    """Inside it compiled layers sum nothing: a shard can try one without the others. For one thread only."""
    global _dry
    _dry = True
    try:
        yield
    finally:
        _dry = False


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    backend: int,
    scale: float,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    v_dim: int,
) -> torch.Tensor:
    """Backend.forward of the batch's next layer: q [T,H,Dk], k [T,Hk,Dk], v [T,Hk,v_dim] -> [T,H,v_dim]."""
    batch = get_batch()
    layer = batch.num_calls
    batch.num_calls += 1
    if k.shape[1] == 0:
        return q.new_zeros(q.shape[0], q.shape[1], v_dim)
    out = _numbered[backend].forward(
        layer, q, k, v, batch,
        scale=scale, window=window, chunk=chunk, softcap=softcap, sinks=sinks, key_bias=key_bias,
    )  # fmt: skip
    return out.contiguous()  # as the compiler was told


def _attend_shape(q, k, v, backend, scale, window, chunk, softcap, sinks, key_bias, v_dim):
    return q.new_empty(q.shape[0], q.shape[1], v_dim)


def _all_reduce(x: torch.Tensor, shards: int) -> None:
    if not _dry:
        _numbered[shards].all_reduce(x)


_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
_LIBRARY.impl("all_reduce", _all_reduce, "CompositeExplicitAutograd")
torch.library.register_fake("ds_serve_paged::attend", _attend_shape, lib=_LIBRARY)
torch.library.register_fake("ds_serve_paged::all_reduce", lambda x, shards: None, lib=_LIBRARY)
