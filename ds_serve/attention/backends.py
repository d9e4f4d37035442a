"""Which code attends: the Backend protocol, and the choice among the backends for a device and dtype.

Called once by the worker when it builds its model. A backend keeps no state of a request: all it needs
comes with the batch.
"""

from __future__ import annotations

import warnings
from typing import Literal, Protocol

import torch

from ds_serve.attention import cpu
from ds_serve.attention.context import AttentionBatch
from ds_serve.attention.reference import ReferenceBackend

Preference = Literal["auto", "reference", "cpu", "flashinfer"]


class Backend(Protocol):
    """Paged attention over one slab.

    captures: whether forward, as things stand, can be captured in a CUDA graph: it waits for nothing.
    reads_tables: whether forward reads block_tables, query_start and context_len of a batch that has host. A
    backend that does not needs block_tables' width still: a graph's are to be as wide as they may become.
    """

    name: str
    captures: bool
    reads_tables: bool

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
    device = torch.device(device)
    if prefer == "reference":
        return ReferenceBackend()
    if prefer not in ("auto", "cpu", "flashinfer"):
        raise ValueError(f"prefer: must be 'auto', 'reference', 'cpu' or 'flashinfer', got {prefer!r}")
    if prefer == "flashinfer" or (prefer == "auto" and device.type == "cuda"):
        return _on_cuda(device, dtype, prefer)
    reason = cpu.unavailable_reason(device, dtype, block_size)
    if reason is None:
        return cpu.CpuBackend()
    if prefer == "cpu":
        raise RuntimeError(f"attention backend 'cpu' cannot run here: {reason}")
    return ReferenceBackend()


def _on_cuda(device: torch.device, dtype: torch.dtype, prefer: Preference) -> Backend:
    from ds_serve.attention import flashinfer  # imports triton, which takes its time

    reason = flashinfer.unavailable_reason(device, dtype)
    if reason is None:
        return flashinfer.FlashInferBackend(device, dtype)
    if prefer == "flashinfer":
        raise RuntimeError(f"attention backend 'flashinfer' cannot run here: {reason}")
    warnings.warn(
        f"attention is plain PyTorch, which is slow, and not FlashInfer: {reason}",
        RuntimeWarning,
        stacklevel=3,
    )
    return ReferenceBackend()
