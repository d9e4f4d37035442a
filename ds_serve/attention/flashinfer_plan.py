"""FlashInfer's wrappers for layers of one kind, planned once a step from the rows on the host.

Nothing here waits for a step's kernels. A plan's copies go to the device on the stream of its kernels, so
they overtake no earlier step; before the page-locked memory of a plan is written again, its copies are
waited for, which are done once the step before that plan's has ended. FlashInfer's work space on the
device lives from a kernel to the one that merges its parts, or from a plan to its step's end: wrappers
share it where they never have plans at the same time. Knows no model. Used by flashinfer.py.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from ds_serve.attention.context import HostRows

# Query heads a KV head: up to so many decode runs on CUDA cores, above on tensor cores (the fa2 kernel).
CUDA_CORE_GROUP = 2
GRAPH_INT_BYTES = 1 << 20  # of plans of captured graphs: a few integers a row
MIN_FLOAT_BYTES = 32 << 20
CTAS_PER_SM = 16  # of 128 threads, at most


class Kind(NamedTuple):
    """What layers have in common that share a plan. group is the layout's."""

    heads: int
    kv_heads: int
    dim: int
    scale: float
    window: int | None
    softcap: float | None
    group: int

    @property
    def tensor_cores(self) -> bool:
        return self.heads // self.kv_heads > CUDA_CORE_GROUP

    def __str__(self) -> str:
        text = f"{self.heads} heads, {self.kv_heads} KV heads of {self.dim}"
        return text + (f", window {self.window}" if self.window is not None else "")


class Pages(NamedTuple):
    """The blocks that rows see: row r's are indices[indptr[r] : indptr[r + 1]], the last of them filled up to
    last[r] tokens. int32 each."""

    indptr: np.ndarray
    indices: np.ndarray
    last: np.ndarray


def pages_of(rows: HostRows, group: int, window: int | None, block_size: int, first: int, end: int) -> Pages:
    """The pages of rows first .. end-1. Leading blocks that a window hides from all of a row's tokens are
    left out: what they held may be gone, and positions count from the context's end."""
    lengths = rows.context_len[first:end]
    hidden = np.zeros_like(lengths)
    if window is not None:
        counts = np.diff(rows.query_start[first : end + 1])
        hidden = np.maximum(lengths - counts - window + 1, 0) // block_size
    ends = -(-lengths // block_size)
    indptr = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(ends - hidden, out=indptr[1:])
    columns = np.arange(ends.max(), dtype=np.int32)
    seen = (columns >= hidden[:, None]) & (columns < ends[:, None])
    indices = rows.tables[group][first:end, : len(columns)][seen]
    return Pages(indptr, indices, ((lengths - 1) % block_size + 1).astype(np.int32))


class Resources:
    """What all wrappers of a device use: the library, its backend for rows of several tokens, work space."""

    def __init__(self, library: ModuleType, device: torch.device, prefill: str) -> None:
        """prefill: fa2 or fa3, which needs no work space for results."""
        self.library, self.device, self.prefill = library, device, prefill
        self._num_sms = 132
        if device.type == "cuda":
            self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._floats: torch.Tensor | None = None

    def floats(self, kind: Kind, graph_rows: int = 0) -> torch.Tensor:
        """uint8, large enough for what FlashInfer's plans put there: parts of results that are merged later.

        One kernel fills it and the next one empties it, so all wrappers of a stream share it. What has
        grown leaves the older, smaller one to the wrappers that have it.
        """
        group, width = kind.heads // kind.kv_heads, 4 * (kind.dim + 1)
        tile = 16 if group <= 16 else 64
        graph_tiles = -(-graph_rows * group // tile) + graph_rows
        need = max(
            CTAS_PER_SM * self._num_sms * group * width,  # decode on CUDA cores: a row for each CTA
            2 * self._num_sms * group * tile * width,  # on tensor cores: two tiles of rows on each processor
            kind.heads * graph_tiles * tile * width,  # in a graph: every tile
            0 if self.prefill == "fa3" else 2 * self._num_sms * group * 128 * width,
        )
        if self._floats is None or self._floats.numel() < need:
            size = max(need, MIN_FLOAT_BYTES)
            self._floats = torch.zeros(size, dtype=torch.uint8, device=self.device)
        return self._floats


class Staging:
    """Page-locked int32 memory for the arrays of a plan; written again only when its copies are done."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._size = device, 0
        self._sent: torch.cuda.Event | None = None

    def put(self, *arrays: np.ndarray) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The arrays, one after another: all of them, and each. Waits for the last plan's copies."""
        if self._sent is not None:
            self._sent.synchronize()
        lengths = [len(array) for array in arrays]
        size = sum(lengths)
        if size > self._size:
            self._size = 2 * size
            pinned = self._device.type == "cuda"
            self._memory = torch.empty(self._size, dtype=torch.int32, pin_memory=pinned)
        whole = self._memory[:size]
        np.concatenate(arrays, out=whole.numpy())
        return whole, whole.split(lengths)

    def sent(self) -> None:
        """All copies from here, and from FlashInfer's own page-locked memory, are on the stream."""
        if self._device.type == "cuda":
            self._sent = self._sent or torch.cuda.Event()
            self._sent.record()


class Planner:
    """Plans and runs the attention of layers of one kind, over rows whose keys and values are written."""

    def __init__(self, resources: Resources, kind: Kind, dtype: torch.dtype, block_size: int) -> None:
        self.resources, self.kind, self.block_size = resources, kind, block_size
        # Of every FlashInfer plan; its window counts the keys left of the query's own.
        self.sizes = (kind.heads, kind.kv_heads, kind.dim, block_size)
        self.options = {
            "window_left": -1 if kind.window is None else kind.window - 1,
            "logits_soft_cap": kind.softcap,
            "sm_scale": kind.scale,
            "q_data_type": dtype,
            "kv_data_type": dtype,
        }
        self._decode: Any = None
        self._prefill: Any = None
        self._decode_staging = Staging(resources.device)
        self._prefill_staging = Staging(resources.device)
        self._graphs = _Graphs(self)
        self._planned: HostRows | None = None
        self._num_decodes = 0

    def is_planned(self, rows: HostRows) -> bool:
        return rows is (self._graphs.planned if rows.graph else self._planned)

    @torch.inference_mode(False)  # what a plan keeps must be writable in and out of inference mode
    def plan(self, rows: HostRows, width: int) -> None:
        """All that run needs, on the host and the device. width: of the block tables of rows' graph."""
        if rows.graph:
            self._graphs.plan(rows, width)
            return
        self._planned = None
        counts = np.diff(rows.query_start)
        several = np.flatnonzero(counts != 1)
        self._num_decodes = decodes = int(several[0]) if len(several) else len(counts)
        if decodes:
            self._plan_decode(self.pages(rows, 0, decodes))
        if decodes < len(counts):
            self._plan_prefill(rows.query_start[decodes:] - decodes, self.pages(rows, decodes, len(counts)))
        self._planned = rows

    def run(
        self, rows: HostRows, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor
    ) -> None:
        """q [T,H,D] over keys and values [blocks, block_size, Hk, D] into out [T,H,D]. rows are planned."""
        if rows.graph:
            self._graphs.wrappers[rows.graph].run(q, (keys, values), out=out)
            return
        decodes = self._num_decodes
        if decodes:
            self._decode.run(q[:decodes], (keys, values), out=out[:decodes])
        if decodes < len(q):
            self._prefill.run(q[decodes:], (keys, values), out=out[decodes:])

    def pages(self, rows: HostRows, first: int, end: int) -> Pages:
        return pages_of(rows, self.kind.group, self.kind.window, self.block_size, first, end)

    def new_decode(self, graph_rows: int = 0, **graph: Any) -> Any:
        """A decode wrapper; graph: FlashInfer's arguments for one of a captured graph of graph_rows rows."""
        return self.resources.library.BatchDecodeWithPagedKVCacheWrapper(
            self.resources.floats(self.kind, graph_rows),
            "NHD",
            use_tensor_cores=self.kind.tensor_cores,
            **graph,
        )

    def _plan_decode(self, pages: Pages) -> None:
        self._decode = self._decode or self.new_decode()
        _, (indptr, indices, last) = self._decode_staging.put(*pages)
        self._decode.plan(indptr, indices, last, *self.sizes, **self.options)
        self._decode_staging.sent()

    def _plan_prefill(self, query_start: np.ndarray, pages: Pages) -> None:
        self._prefill = self._prefill or self.resources.library.BatchPrefillWithPagedKVCacheWrapper(
            self.resources.floats(self.kind), "NHD", backend=self.resources.prefill
        )
        _, (starts, indptr, indices, last) = self._prefill_staging.put(query_start, *pages)
        self._prefill.plan(starts, indptr, indices, last, *self.sizes, causal=True, **self.options)
        self._prefill_staging.sent()


class _Graphs:
    """Decode wrappers of captured graphs, one for each number of rows.

    What their kernels read of a plan lies in one buffer and one work space for all sizes: a size's integers
    come there right before its replay, on the replay's stream.
    """

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        device = planner.resources.device
        self._staging = Staging(device)
        self._buffer = torch.empty(0, dtype=torch.int32, device=device)
        self._ints = torch.empty(0, dtype=torch.uint8, device=device)
        self._buffers: dict[int, torch.Tensor] = {}
        self.wrappers: dict[int, Any] = {}
        self.planned: HostRows | None = None

    def plan(self, rows: HostRows, width: int) -> None:
        self.planned = None
        count, planner = rows.graph, self._planner
        indptr, indices, last = planner.pages(rows, 0, count)
        is_new = count not in self.wrappers
        if is_new:
            self._add(count, width)
        buffer, wrapper = self._buffers[count], self.wrappers[count]
        size = len(indptr) + len(last) + len(indices)
        if size > len(buffer):
            raise RuntimeError(
                f"FlashInfer: a step of {len(indices)} blocks does not fit a graph of {count} rows that was "
                f"captured with block tables of {width}: give its batch tables as wide as they may become"
            )
        whole, (indptr, last, _) = self._staging.put(indptr, last, indices)
        buffer[:size].copy_(whole, non_blocking=True)
        on_device = buffer[2 * count + 1 : size]
        if is_new:
            wrapper.plan(indptr, on_device, last, *planner.sizes, **planner.options)
        else:  # the same without copies, which are done
            planner.resources.library.fast_decode_plan(
                wrapper,
                indptr,
                on_device,
                last,
                *planner.sizes,
                **planner.options,
                global_override_indptr_cpu=indptr,
            )
        self._staging.sent()
        self.planned = rows

    def _add(self, count: int, width: int) -> None:
        """A wrapper for graphs of count rows, with its place in buffer and work space."""
        capacity, device = 2 * count + 1 + count * width, self._buffer.device
        if capacity > len(self._buffer):
            self._buffer = torch.zeros(capacity, dtype=torch.int32, device=device)
        if not len(self._ints):
            self._ints = torch.empty(GRAPH_INT_BYTES, dtype=torch.uint8, device=device)
        buffer, planner = self._buffer[:capacity], self._planner
        wrapper = planner.new_decode(
            count,
            use_cuda_graph=True,
            paged_kv_indptr_buffer=buffer[: count + 1],
            paged_kv_last_page_len_buffer=buffer[count + 1 : 2 * count + 1],
            paged_kv_indices_buffer=buffer[2 * count + 1 :],
        )
        wrapper.reset_workspace_buffer(planner.resources.floats(planner.kind, count), self._ints)
        self._buffers[count], self.wrappers[count] = buffer, wrapper
