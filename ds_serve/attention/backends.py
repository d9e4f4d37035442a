"""Which code attends: the Backend protocol, and the choice among the backends for a device and dtype.

Called once by the worker when it builds its model. A backend keeps no state of a request: all it needs
comes with the batch.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch

from ds_serve.attention.context import AttentionBatch
from ds_serve.attention.cpu import CpuBackend, unavailable_reason
from ds_serve.attention.reference import ReferenceBackend

Preference = Literal["auto", "reference", "cpu"]


class Backend(Protocol):
    """Paged attention over one slab.

    captures: whether forward, as things stand, can be captured in a CUDA graph: it waits for nothing.
    """

    name: str
    captures: bool

    def prepare(self, batch: AttentionBatch) -> None:
        """A step's work on the host, before the model runs and outside of a captured graph.

        Called once a step for a batch that has host. Without it forward does that work at its first call.
        """

    def forward(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor | None,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None = None,
        chunk: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        key_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes the step's k [T,Hk,Dk] and v [T,Hk,Dv] into the slab, then attends causally from
        q [T,H,Dk] over each row's whole context; returns [T,H,Dv].

        layer indexes batch.layout.layers. window w: key j is visible to query i iff i-w < j <= i.
        chunk c: only keys with j//c == i//c. softcap s: scores become s*tanh(score/s). sinks [H]: one
        extra logit a head in the softmax's denominator. key_bias float32 [H, longest context or more]: added
        to the scaled score of head h and the key at position j (ALiBi); ValueError together with softcap, or
        where a row's context is longer. H is a multiple of Hk; q, k, v may have any strides but the last,
        which is 1. v is None where the layer's values are columns of its keys (LayerKV.v_in_k).
        """


def select_backend(
    device: torch.device | str, dtype: torch.dtype, block_size: int, prefer: Preference = "auto"
) -> Backend:
    """The fastest backend that runs here, or the one asked for.

    RuntimeError if prefer names one that cannot run here, with the reason; ValueError if there is none
    of that name.
    """
    if prefer == "reference":
        return ReferenceBackend()
    if prefer not in ("auto", "cpu"):
        raise ValueError(f"prefer: must be 'auto', 'reference' or 'cpu', got {prefer!r}")
    reason = unavailable_reason(torch.device(device), dtype, block_size)
    if reason is None:
        return CpuBackend()
    if prefer == "cpu":
        raise RuntimeError(f"attention backend 'cpu' cannot run here: {reason}")
    return ReferenceBackend()
