"""Times one attention call: the C++ op, the reference and torch's SDPA, a JSON line a case.

`python benchmarks/attention.py [--threads 2] [--seconds 1] [--case prefill] [--ways cpu,sdpa]`. Times are
the minimum and the median of interleaved calls, in milliseconds: wall time, or with one thread that
thread's CPU time, which holds on a busy machine too. SDPA gets contiguous K and V of each sequence and no
paging to do (prefill: is_causal; decode: one call a row), so it bounds what a gather and SDPA could reach.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ds_serve.attention.backends import select_backend
from ds_serve.attention.context import AttentionBatch
from ds_serve.attention.layout import KVLayout, LayerKV

HEADS, KV_HEADS, DIM = 9, 3, 64


def make_batch(layer: LayerKV, counts: list[int], lengths: list[int], dtype: torch.dtype) -> AttentionBatch:
    """Rows of counts[i] new tokens at the end of lengths[i], in blocks of a shuffled pool."""
    layout = KVLayout([layer], 16, dtype)
    need = [-(-length // 16) for length in lengths]
    slab = layout.allocate(sum(need), "cpu")
    slab.copy_(torch.randn(slab.shape) * 0.5)
    pool = torch.randperm(sum(need)).tolist()
    tables = [[pool.pop() for _ in range(n)] for n in need]
    positions = [list(range(c - n, c)) for n, c in zip(counts, lengths, strict=True)]
    slots = [t[p // 16] * 16 + p % 16 for t, row in zip(tables, positions, strict=True) for p in row]
    start = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    return AttentionBatch(
        slab=slab,
        layout=layout,
        slot_mapping=torch.tensor(slots),
        query_start=start,
        context_len=torch.tensor(lengths, dtype=torch.int32),
        block_tables=torch.tensor([t + [0] * (max(need) - len(t)) for t in tables], dtype=torch.int32),
        positions=torch.tensor(sum(positions, [])),
        num_tokens=sum(counts),
    )


def sdpa(counts: list[int], lengths: list[int], dtype: torch.dtype) -> Callable[[], None]:
    """The same work by scaled_dot_product_attention; whole prompts or single tokens only."""
    inputs = []
    for count, length in zip(counts, lengths, strict=True):
        if count not in (1, length):
            return None
        q = torch.randn(1, HEADS, count, DIM, dtype=dtype)
        k, v = (torch.randn(1, KV_HEADS, length, DIM, dtype=dtype) for _ in "kv")
        inputs.append((q, k, v, count > 1))

    def call() -> None:
        for q, k, v, causal in inputs:
            F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return call


def measure(calls: dict[str, Callable[[], None]], seconds: float) -> dict[str, dict[str, float]]:
    """Minimum and median of each, called in turn so that noise meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end:
        for name, call in calls.items():
            for _ in range(2):  # the second finds the caches as it left them
                begin = clock()
                call()
                elapsed = clock() - begin
            times[name].append(elapsed * 1e3)
    return {
        n: {"min_ms": round(min(t), 4), "median_ms": round(statistics.median(t), 4)} for n, t in times.items()
    }


def run_case(
    name: str, counts: list[int], lengths: list[int], dtype: torch.dtype, seconds: float, ways: set[str]
) -> dict:
    batch = make_batch(LayerKV(KV_HEADS, DIM, DIM), counts, lengths, dtype)
    q, k, v = (
        torch.randn(h, sum(counts), DIM, dtype=dtype).transpose(0, 1) for h in (HEADS, KV_HEADS, KV_HEADS)
    )
    calls: dict[str, Callable[[], None]] = {}
    for prefer in ("cpu", "reference"):
        backend = select_backend("cpu", dtype, 16, prefer)
        calls[prefer] = lambda backend=backend: backend.forward(0, q, k, v, batch, scale=DIM**-0.5)
    other = sdpa(counts, lengths, dtype)
    if other is not None:
        calls["sdpa"] = other
    calls = {name: call for name, call in calls.items() if name in ways}
    keys = sum(n * (c - n) + n * (n + 1) // 2 for n, c in zip(counts, lengths, strict=True))
    macs = keys * HEADS * 2 * DIM
    result = measure(calls, seconds)
    return {
        "case": name,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "gmac": round(macs / 1e9, 4),
        **{
            name: {**times, "gmac_per_s": round(macs / times["min_ms"] / 1e6, 1)}
            for name, times in result.items()
        },
    }


CASES = {
    "prefill 1024": ([1024], [1024]),
    "prefill 128": ([128], [128]),
    "chunk of 256 at 1024": ([256], [1280]),
    "decode 16 at 192": ([1] * 16, [192] * 16),
    "decode 1 at 1024": ([1], [1024]),
    "decode 32 at 1024": ([1] * 32, [1024] * 32),
    "decode 15 at 192 and a chunk of 256": ([1] * 15 + [256], [192] * 15 + [512]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case and each way")
    parser.add_argument("--case", help="only cases whose name contains this")
    parser.add_argument("--ways", default="cpu,reference,sdpa", help="which to time")
    arguments = parser.parse_args()
    ways = set(arguments.ways.split(","))
    torch.set_num_threads(arguments.threads)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32):
            for name, (counts, lengths) in CASES.items():
                if arguments.case is None or arguments.case in name:
                    print(
                        json.dumps(run_case(name, counts, lengths, dtype, arguments.seconds, ways)),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
