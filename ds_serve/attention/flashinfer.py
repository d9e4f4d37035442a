"""Paged attention by FlashInfer, for bf16 and fp16 on CUDA: decodes and rows of several tokens in a step.

Layers of one kind (flashinfer_plan.Kind) share a plan, made once a step on the host. A kind is tried on a
small problem before it is used; what FlashInfer cannot compute, or computes otherwise, goes to the
reference, with one warning. Inside a region tokens lie as the reference has them. The library compiles its
kernels at first use; start_builds lets that begin early. Chosen by backends.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import threading
import warnings
import weakref
from types import ModuleType

import numpy as np
import torch

from ds_serve.attention.context import AttentionBatch, HostRows
from ds_serve.attention.flashinfer_plan import Kind, Planner, Resources
from ds_serve.attention.kv_write import write_kv
from ds_serve.attention.layout import KVLayout, LayerKV
from ds_serve.attention.reference import ReferenceBackend, region

logger = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128, 256)  # those that all of FlashInfer's kernels have
MAX_RELATIVE_ERROR = 0.02
NO_POSITIONS = 0  # FlashInfer's PosEncodingMode.NONE


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if FlashInfer can run, else a sentence."""
    if device.type != "cuda":
        return f"it computes on CUDA devices, and the device is {device}"
    if dtype not in DTYPES:
        return f"it computes in bfloat16 and float16, and the dtype is {dtype}"
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer-python is not installed: pip install 'ds_serve[cuda]'"
    try:
        importlib.import_module("flashinfer")
    except Exception as error:
        return f"flashinfer-python cannot be imported: {_brief(error)}"
    return None


class FlashInferBackend:
    """See backends.Backend for the contract."""

    name = "flashinfer"

    def __init__(self, device: torch.device, dtype: torch.dtype, library: ModuleType | None = None) -> None:
        """library: a stand-in for flashinfer, for tests."""
        library = library or importlib.import_module("flashinfer")
        self._dtype = dtype
        self._resources = Resources(library, device, _prefill_backend(library, device, dtype))
        self._reference = ReferenceBackend()
        self._planners: dict[Kind, Planner] = {}
        self._refused: dict[Kind, str | None] = {}  # of the kinds that were tried
        self._warned: set[str] = set()
        self._layout: KVLayout | None = None
        self._kinds: dict[int, Kind] = {}  # of the layers of _layout that have been called
        self._plain: set[int] = set()  # the layers of _layout that the reference computes
        self._read: tuple[weakref.ref, int, HostRows] | None = None

    @property
    def captures(self) -> bool:
        return not self._plain

    @property
    def reads_tables(self) -> bool:
        return bool(self._plain)

    def prepare(self, batch: AttentionBatch) -> None:
        """Plans the step for all kinds that its layers have shown so far."""
        if batch.host is None or batch.layout is not self._layout:
            return
        for kind in dict.fromkeys(self._kinds.values()):
            self._planners[kind].plan(batch.host, batch.block_tables.shape[1])

    @torch.no_grad()
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
        layout = batch.layout
        if layout is not self._layout:
            self._layout, self._kinds, self._plain = layout, {}, set()
        kind = Kind(q.shape[1], k.shape[1], q.shape[2], scale, window, softcap, layout.groups[layer])
        reason = _unsupported(kind, layout.layers[layer], q.dtype, layout.dtype, chunk, sinks, key_bias)
        if reason is None:
            reason = self._trial(kind, layout.block_size)
        if reason is not None:
            self._fall_back(layer, kind, reason)
            return self._reference.forward(
                layer,
                q,
                k,
                v,
                batch,
                scale=scale,
                window=window,
                chunk=chunk,
                softcap=softcap,
                sinks=sinks,
                key_bias=key_bias,
            )
        self._kinds[layer] = kind
        return self._attend(layer, kind, q, k, v, batch)

    def _attend(
        self,
        layer: int,
        kind: Kind,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: AttentionBatch,
    ) -> torch.Tensor:
        layout = batch.layout
        keys = region(batch, layout.k_offset(layer), kind.kv_heads, kind.dim)
        values = region(batch, layout.v_offset(layer), kind.kv_heads, kind.dim)
        slot_mapping, _ = batch.tables(layer)
        write_kv(k, v, keys, values, slot_mapping)
        rows, planner = self._rows(layer, batch), self._planners[kind]
        if not planner.is_planned(rows):
            if q.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"FlashInfer: a graph is captured, but its batch was not planned for {kind}: run the "
                    "batch once and call prepare(batch) before the capture"
                )
            planner.plan(rows, batch.block_tables.shape[1])
        out = q.new_empty(q.shape)
        planner.run(rows, q, keys, values, out)
        return out

    def _rows(self, layer: int, batch: AttentionBatch) -> HostRows:
        """The batch's rows on the host. Where it has none, they are read once a pass through the layers."""
        if batch.host is not None:
            return batch.host
        if self._read is not None and self._read[0]() is batch and self._read[1] < layer:
            rows = self._read[2]
        else:
            tables = (batch.block_tables, *(tables for _, tables in batch.more_groups))
            rows = HostRows(
                batch.query_start.cpu().numpy(),
                batch.context_len.cpu().numpy(),
                tuple(table.cpu().numpy() for table in tables),
            )
        self._read = weakref.ref(batch), layer, rows
        return rows

    def _fall_back(self, layer: int, kind: Kind, reason: str) -> None:
        self._plain.add(layer)
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"layers of {kind} use the plain PyTorch attention, which is slow: FlashInfer {reason}",
                RuntimeWarning,
                stacklevel=2,
            )

    def _trial(self, kind: Kind, block_size: int) -> str | None:
        """None if FlashInfer computes layers of this kind rightly, else what it does instead."""
        if kind not in self._refused:
            self._planners[kind] = Planner(self._resources, kind, self._dtype, block_size)
            try:
                error = self._error(kind, block_size)
            except Exception as problem:
                logger.info("FlashInfer failed on %s", kind, exc_info=True)
                self._refused[kind] = f"fails on a small problem: {_brief(problem)}"
            else:
                wrong = f"differs from it by {error:.3g} on a small problem (at most {MAX_RELATIVE_ERROR})"
                self._refused[kind] = None if error <= MAX_RELATIVE_ERROR else wrong
        return self._refused[kind]

    def _error(self, kind: Kind, block_size: int) -> float:
        """Relative error over two decodes and two rows of several tokens, against the reference in fp32."""
        counts, lengths = np.array([1, 1, 19, 33]), np.array([3, 77, 50, 33], dtype=np.int32)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        width = -(-int(lengths.max()) // block_size)
        table = np.arange(1, 1 + 4 * width, dtype=np.int32).reshape(4, width)
        rows = HostRows(starts, lengths, (table,) * (kind.group + 1))
        generator = torch.Generator().manual_seed(0)
        shape, device = LayerKV(kind.kv_heads, kind.dim, kind.dim), self._resources.device
        layout = KVLayout((shape,), block_size, self._dtype)
        slab = torch.randn(1 + 4 * width, layout.block_elems, generator=generator).to(device, self._dtype)
        q = torch.randn(int(starts[-1]), kind.heads, kind.dim, generator=generator).to(device, self._dtype)
        positions = np.concatenate(
            [np.arange(n - count, n) for n, count in zip(lengths, counts, strict=True)]
        )
        slots = table[np.repeat(np.arange(4), counts), positions // block_size].astype(np.int64) * block_size
        batch = AttentionBatch(
            slab,
            layout,
            slot_mapping=torch.from_numpy(slots + positions % block_size).to(device),
            query_start=torch.from_numpy(starts).to(device),
            context_len=torch.from_numpy(lengths).to(device),
            block_tables=torch.from_numpy(table).to(device),
            positions=torch.from_numpy(positions).to(device),
            num_tokens=len(q),
            host=rows,
        )
        k = torch.randn(len(q), kind.kv_heads, kind.dim, generator=generator).to(device, self._dtype)
        v = torch.randn(len(q), kind.kv_heads, kind.dim, generator=generator).to(device, self._dtype)
        found = self._attend(0, kind, q, k, v, batch).float()
        batch.slab = slab.float()
        wanted = self._reference.forward(
            0,
            q.float(),
            k.float(),
            v.float(),
            batch,
            scale=kind.scale,
            window=kind.window,
            softcap=kind.softcap,
        )
        return float((found - wanted).norm() / wanted.norm())


def _unsupported(
    kind: Kind,
    shape: LayerKV,
    dtype: torch.dtype,
    slab_dtype: torch.dtype,
    chunk: int | None,
    sinks: torch.Tensor | None,
    key_bias: torch.Tensor | None,
) -> str | None:
    if dtype not in DTYPES or slab_dtype != dtype:
        return f"computes in bfloat16 and float16, not in {dtype} over a cache of {slab_dtype}"
    if shape.v_in_k:
        return "is not used for latents"
    if shape.k_dim != shape.v_dim or kind.dim not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        return f"takes heads of {sizes}, here keys have {shape.k_dim} and values {shape.v_dim} columns"
    for value, what in ((chunk, "chunked attention"), (sinks, "sinks"), (key_bias, "biases of keys")):
        if value is not None:
            return f"is not used for {what}"
    return None


def _prefill_backend(library: ModuleType, device: torch.device, dtype: torch.dtype) -> str:
    """FlashInfer's kernel for rows of several tokens: fa3 on Hopper, else fa2."""
    return library.utils.determine_attention_backend(device, NO_POSITIONS, False, False, dtype, dtype)


def start_builds(
    device: torch.device, dtype: torch.dtype, dim: int, group: int, windowed: bool, capped: bool
) -> list[threading.Thread]:
    """Begins to compile the kernels that layers of this shape need, in the background; returns at once.

    group: query heads a KV head. Whoever needs a kernel before it is there waits at FlashInfer's own lock
    of it, and compiles it itself where this fails. Compiled kernels stay in ~/.cache/flashinfer.
    """
    if unavailable_reason(device, dtype) is not None or dim not in HEAD_DIMS:
        return []
    library = importlib.import_module("flashinfer")
    types = (dtype, dtype, dtype, torch.int32, dim, dim, NO_POSITIONS, windowed, capped)
    tensor_cores = Kind(group, 1, dim, 1.0, None, None, 0).tensor_cores
    backends = {_prefill_backend(library, device, dtype)} | ({"fa2"} if tensor_cores else set())
    specs = [library.jit.gen_batch_prefill_module(backend, *types, False) for backend in sorted(backends)]
    if not tensor_cores:
        specs.append(library.jit.gen_batch_decode_module(*types))
    threads = [
        threading.Thread(target=_build, args=(spec,), name=f"build {spec.name}", daemon=True)
        for spec in specs
    ]
    for thread in threads:
        thread.start()
    return threads


def _build(spec) -> None:
    try:
        if not spec.is_aot:
            spec.build(verbose=False)
    except Exception as error:
        logger.info("%s could not be compiled ahead: %s", spec.name, _brief(error))


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
