"""Started on two ranks: the all-reduce over peer memory on CUDA, its values, in graphs, and its time.

    peer_cuda_run.py [one]      one: both ranks on the same GPU, over gloo, without times

Each rank prints a line of JSON: {"wrong": how many sums of each check are wrong, ..}. Rank 0 of two GPUs also
prints a table of microseconds, one-shot beside NCCL, in a captured graph.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed

sys.path.insert(0, str(Path(__file__).parents[1] / "ranks"))

from saying import say

from ds_serve.parallel import peer
from ds_serve.parallel.grid import Grid, meet

KIB = 1 << 10
SIZES = [KIB, 8 * KIB, 16 * KIB, 64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, 1024 * KIB]
TIMED = [*SIZES, 2048 * KIB, 4096 * KIB, 8192 * KIB]
IN_A_ROW = 200
CALLS_TIMED = 50


def values(num_bytes: int, dtype: torch.dtype, shard: int, seed: int) -> torch.Tensor:
    """What shard gives: any rank can make it."""
    generator = torch.Generator().manual_seed(1000 * seed + shard)
    return torch.randn(num_bytes // dtype.itemsize, generator=generator).to(dtype).cuda()


def total(num_bytes: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Both shards' values, added in dtype."""
    return values(num_bytes, dtype, 0, seed) + values(num_bytes, dtype, 1, seed)


def check_sizes(memory: peer.PeerMemory, shard: int) -> int:
    wrong = 0
    for dtype in peer.DTYPES:
        for seed, size in enumerate(SIZES):
            tensor = values(size, dtype, shard, seed)
            assert memory.takes(tensor)
            memory.all_reduce(tensor)
            wrong += not torch.equal(tensor, total(size, dtype, seed))
        odd = torch.empty(size // dtype.itemsize + 1, dtype=dtype, device="cuda")[1:]  # between two words
        memory.all_reduce(odd.copy_(values(size, dtype, shard, 77)))
        wrong += not torch.equal(odd, total(size, dtype, 77))
    return wrong


def check_in_a_row(memory: peer.PeerMemory, shard: int) -> int:
    """No wait of the host in between; one rank's device is late every now and then."""
    cases = [(SIZES[i % 5], peer.DTYPES[i % 2], i) for i in range(IN_A_ROW)]
    tensors = [values(size, dtype, shard, seed) for size, dtype, seed in cases]
    for index, tensor in enumerate(tensors):
        if index % 20 == 10 * shard:
            torch.cuda._sleep(2_000_000)  # cycles: about a millisecond
        memory.all_reduce(tensor)
    return sum(not torch.equal(t, total(*case)) for t, case in zip(tensors, cases, strict=True))


def check_graph(memory: peer.PeerMemory, shard: int, large: Callable | None) -> int:
    """An odd number of sums in a graph, replayed with new inputs, and sums outside of it in between."""
    static = [torch.zeros(SIZES[i] // 2, dtype=torch.bfloat16, device="cuda") for i in range(5)]
    beyond = torch.zeros(memory.max_bytes, dtype=torch.bfloat16, device="cuda")

    def work() -> None:
        for tensor in static:
            memory.all_reduce(tensor)
        if large is not None:
            large(beyond)

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    wrong = 0
    for round_ in range(20):
        for index, tensor in enumerate(static):
            tensor.copy_(values(SIZES[index], tensor.dtype, shard, 100 * round_ + index))
        beyond.fill_(shard + 1)
        graph.replay()
        outside = values(SIZES[2], torch.float32, shard, round_)
        memory.all_reduce(outside)
        for index, tensor in enumerate(static):
            wrong += not torch.equal(tensor, total(SIZES[index], tensor.dtype, 100 * round_ + index))
        wrong += not torch.equal(outside, total(SIZES[2], torch.float32, round_))
        wrong += large is not None and not torch.equal(beyond, torch.full_like(beyond, 3))
    return wrong


def microseconds(reduce: Callable, num_bytes: int) -> float:
    """Of one sum of bfloat16, in a graph of CALLS_TIMED of them one after another; the best of five."""
    tensor = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device="cuda")
    reduce(tensor)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS_TIMED):
            reduce(tensor)
    best = float("inf")
    for _ in range(5):
        torch.distributed.barrier()
        torch.cuda.synchronize()
        began = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best / CALLS_TIMED * 1e6


def on_two_gpus() -> dict:
    meet()
    grid = Grid.make(2, 1, "peer")
    memory, shard = grid._peers, grid.place.shard

    def nccl(tensor: torch.Tensor) -> None:
        torch.distributed.all_reduce(tensor, group=grid.tensor_group)

    found = {
        "sizes": check_sizes(memory, shard),
        "in a row": check_in_a_row(memory, shard),
        "graph": check_graph(memory, shard, nccl),
    }
    tensor = values(SIZES[0], torch.bfloat16, shard, 5)  # the way that DeepSpeed's linears and models take
    grid.all_reduce(tensor)
    found["grid"] = int(not torch.equal(tensor, total(SIZES[0], torch.bfloat16, 5)))
    peer.MAX_BYTES = 2 * TIMED[-1]
    timed = peer.PeerMemory(grid.tensor_group, torch.device("cuda", torch.cuda.current_device()))
    for size in TIMED:
        line = f"{size >> 10:6d} KiB   one-shot {microseconds(timed.all_reduce, size):7.1f} us"
        line += f"   NCCL {microseconds(nccl, size):7.1f} us"
        if shard == 0:
            say(line)
    grid.close()
    return found


def on_one_gpu() -> dict:
    """Processes take turns on the GPU, so that every sum waits for a turn or two: right, and slow."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    peer.forbid_multicast(os.environ)
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("gloo")
    shard = torch.distributed.get_rank()
    group = torch.distributed.group.WORLD
    memory = peer.PeerMemory(group, torch.device("cuda", 0))
    found = {
        "sizes": check_sizes(memory, shard),
        "in a row": check_in_a_row(memory, shard),
        "graph": check_graph(memory, shard, None),
    }
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return found


def main() -> None:
    found = on_one_gpu() if sys.argv[1:] == ["one"] else on_two_gpus()
    say(json.dumps({"wrong": found}))


if __name__ == "__main__":
    main()
