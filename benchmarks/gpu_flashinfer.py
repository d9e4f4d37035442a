"""What FlashInfer takes for one layer of Llama-3.1-8B over the block-major slab: its kernels, and its plan().

Decode by each of its ways, prefill by fa2 and fa3, mixed batches; results are compared with each other, as
speed without that says nothing. plan() is time of the host. Used by gpu_kernels.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import torch
from gpu_clock import Clock, Line

HEADS, KV_HEADS, DIM, PAGE, LAYERS = 32, 8, 128, 16, 32
CONTEXT = 576
WORKSPACE_BYTES = 256 * 2**20
TOLERANCE = 2e-2


@dataclass
class Rows:
    """Rows of a step over a slab [blocks, LAYERS, 2, PAGE, KV_HEADS, DIM], as FlashInfer wants them."""

    queries: list[int]
    contexts: list[int]
    slab: torch.Tensor

    def __post_init__(self) -> None:
        device = self.slab.device
        blocks = -(-np.array(self.contexts) // PAGE)
        self.indptr = torch.from_numpy(np.concatenate([[0], np.cumsum(blocks)]).astype(np.int32))
        self.starts = torch.from_numpy(np.concatenate([[0], np.cumsum(self.queries)]).astype(np.int32))
        self.last = torch.from_numpy(((np.array(self.contexts) - 1) % PAGE + 1).astype(np.int32))
        self.pages = torch.randperm(len(self.slab))[: int(self.indptr[-1])].to(torch.int32)
        self.q = torch.randn(sum(self.queries), HEADS, DIM, dtype=torch.bfloat16, device=device)
        self.out = torch.empty_like(self.q)
        self.device = device

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.slab[:, index % LAYERS, 0], self.slab[:, index % LAYERS, 1]

    def floor_us(self, clock: Clock) -> float:
        pairs = sum(q * (c - (q - 1) / 2) for q, c in zip(self.queries, self.contexts, strict=True))
        num_bytes = 4 * KV_HEADS * DIM * sum(self.contexts) + 4 * HEADS * DIM * sum(self.queries)
        return clock.floor_us(num_bytes, 4 * HEADS * DIM * pairs)

    def plain(self, row: int) -> torch.Tensor:
        """Row's attention of layer 0 in float32, of its last query: [HEADS, DIM]."""
        pages = self.pages[self.indptr[row] : self.indptr[row + 1]].long().to(self.device)
        keys, values = (
            each[pages].flatten(0, 1)[: self.contexts[row]].float().repeat_interleave(HEADS // KV_HEADS, 1)
            for each in self.layer(0)
        )
        q = self.q[self.starts[row + 1] - 1].float()
        scores = torch.einsum("hd,khd->hk", q, keys) * DIM**-0.5
        return torch.einsum("hk,khd->hd", scores.softmax(-1), values)


def decode(rows: Rows, tensor_cores: bool, graph: bool = True):
    """A planned decode wrapper, and its plan as a call."""
    import flashinfer

    size, device = len(rows.contexts), rows.device
    buffers = {}
    if graph:
        like = {"dtype": torch.int32, "device": device}
        buffers = {
            "paged_kv_indptr_buffer": torch.empty(size + 1, **like),
            "paged_kv_indices_buffer": torch.empty(len(rows.slab), **like),
            "paged_kv_last_page_len_buffer": torch.empty(size, **like),
        }
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(device), "NHD", use_cuda_graph=graph, use_tensor_cores=tensor_cores, **buffers
    )

    def plan() -> None:
        wrapper.plan(
            rows.indptr, rows.pages, rows.last, HEADS, KV_HEADS, DIM, PAGE,
            sm_scale=DIM**-0.5, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
        )  # fmt: skip

    plan()
    return wrapper, plan


def prefill(rows: Rows, backend: str):
    import flashinfer

    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(rows.device), "NHD", backend=backend)

    def plan() -> None:
        wrapper.plan(
            rows.starts, rows.indptr, rows.pages, rows.last, HEADS, KV_HEADS, DIM, PAGE, causal=True,
            sm_scale=DIM**-0.5, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
        )  # fmt: skip

    plan()
    return wrapper, plan


def xqa(rows: Rows) -> Callable[[int], torch.Tensor]:
    import flashinfer

    device, size = rows.device, len(rows.contexts)
    pages = int((rows.indptr[1:] - rows.indptr[:-1]).max())
    tables = torch.zeros(size, pages, dtype=torch.int32)
    for row in range(size):
        mine = rows.pages[rows.indptr[row] : rows.indptr[row + 1]]
        tables[row, : len(mine)] = mine
    tables = tables.to(device)
    lengths = torch.tensor(rows.contexts, dtype=torch.uint32, device=device)
    workspace = _workspace(device)
    return lambda index: flashinfer.decode.xqa_batch_decode_with_kv_cache(
        rows.q, rows.layer(index), workspace, tables, lengths, max(rows.contexts), bmm1_scale=DIM**-0.5
    )


def attention(clock: Clock, dry: bool) -> Iterator[Line]:
    """Decode, then prefill and mixed batches."""
    sizes = (1, 3) if dry else (1, 64, 256)
    slab = _slab(clock, max(sizes) * -(-CONTEXT // PAGE) + 2048 // PAGE)
    for size in sizes:
        rows = Rows([1] * size, [CONTEXT] * size, slab)
        ways = {
            "decode": lambda rows=rows: decode(rows, False),
            "decode, tensor cores": lambda rows=rows: decode(rows, True),
            "decode, tensor cores, no graph": lambda rows=rows: decode(rows, True, graph=False),
            "fa3 as decode": lambda rows=rows: prefill(rows, "fa3"),
            "xqa": lambda rows=rows: (xqa(rows), None),
        }
        for name, make in ways.items():
            yield from _timed(clock, rows, f"{name}, {size} x {CONTEXT}", make)
        yield from fast_plans(clock, rows)
    for queries, contexts in (
        ([2048], [2048]),
        ([8192], [8192]),
        ([512], [8192]),
        ([1] * 63 + [512], [CONTEXT] * 64),
    ):
        if dry:
            queries, contexts = (
                [min(each, 32) for each in queries[:3]],
                [min(each, 64) for each in contexts[:3]],
            )
        rows = Rows(queries, contexts, slab)
        for backend in ("fa2", "fa3"):
            name = f"{backend}, {len(queries)} rows, last {queries[-1]} of {contexts[-1]}"
            yield from _timed(clock, rows, name, lambda rows=rows, backend=backend: prefill(rows, backend))


def fast_plans(clock: Clock, rows: Rows) -> Iterator[Line]:
    """plan() for a wrapper whose buffers the caller has filled: host time without the copies."""
    import flashinfer

    for tensor_cores in (False, True):
        wrapper, _ = decode(rows, tensor_cores)

        def plan(wrapper=wrapper) -> None:
            flashinfer.fast_decode_plan(
                wrapper, rows.indptr, rows.pages, rows.last, HEADS, KV_HEADS, DIM, PAGE, sm_scale=DIM**-0.5,
                q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
                global_override_indptr_cpu=rows.indptr,
            )  # fmt: skip

        which = ", tensor cores" if tensor_cores else ""
        yield Line(f"fast_decode_plan{which}, {len(rows.contexts)} rows, host", clock.host_us(plan))


def _timed(clock: Clock, rows: Rows, name: str, make: Callable) -> Iterator[Line]:
    """Time on the device and of plan(); a way that fails or is wrong says so in its own line."""
    try:
        made, plan = make()
        call = made if plan is None else lambda index: made.run(rows.q, rows.layer(index), out=rows.out)
        found = call(0)
        for row in {0, len(rows.contexts) - 1}:
            right = rows.plain(row)
            error = ((found[rows.starts[row + 1] - 1].float() - right).norm() / right.norm()).item()
            if not error < TOLERANCE:
                raise ValueError(f"row {row} is off by {error:.2g}")
        plan_us = f"plan {clock.host_us(plan):.0f} us" if plan else ""
        yield Line(name, clock.us(call, LAYERS), rows.floor_us(clock), plan_us)
    except Exception as error:
        yield Line(name, float("nan"), note=f"FAILED {type(error).__name__}: {str(error)[:120]}")


def compile_all(device: torch.device) -> None:
    """Lets FlashInfer compile its kernels, all at once, for a process that will use them."""
    slab = torch.zeros(64, LAYERS, 2, PAGE, KV_HEADS, DIM, dtype=torch.bfloat16, device=device)
    rows = Rows([1, 1], [20, 20], slab)
    makes = [
        lambda: decode(rows, False),
        lambda: decode(rows, True),
        lambda: prefill(rows, "fa3"),
        lambda: xqa(rows)(0),
    ]
    with ThreadPoolExecutor(len(makes)) as pool:
        wait([pool.submit(make) for make in makes])  # who fails will fail again, and say why


def write(clock: Clock, dry: bool) -> Iterator[Line]:
    """A layer's keys and values into the slab, by ours."""
    from ds_serve.attention.kv_write import write_kv

    slab = _slab(clock, 4 if dry else 2048 // PAGE)
    for tokens in (1, 32) if dry else (1, 64, 256, 2048):
        kv = torch.randn(tokens, 2 * KV_HEADS, DIM, dtype=torch.bfloat16, device=clock.device)
        slots = torch.randperm(len(slab) * PAGE, device=clock.device)[:tokens]

        def call(index: int, kv=kv, slots=slots) -> None:
            keys, values = slab[:, index % LAYERS, 0], slab[:, index % LAYERS, 1]
            write_kv(kv[:, :KV_HEADS], kv[:, KV_HEADS:], keys, values, slots)

        yield Line(f"kv write, {tokens} tokens", clock.us(call, LAYERS), clock.floor_us(2 * 2 * kv.numel()))


def _slab(clock: Clock, blocks: int) -> torch.Tensor:
    slab = torch.empty(blocks, LAYERS, 2, PAGE, KV_HEADS, DIM, dtype=torch.bfloat16, device=clock.device)
    return slab.normal_()


def _workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
