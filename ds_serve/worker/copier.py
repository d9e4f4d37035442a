"""Copies KV blocks between the device's slab and the host's, beside the steps that compute.

One thread of its own takes the plans' copies in their order. On a CPU it copies by memcpy; on a CUDA device
it sets copies going on a side stream, behind what was computed before them, and sleeps until they are done.
It looks after no block: that a source stays as it is and that nobody reads a target too early is the engine's
care, which waits for the CopyResult of every rank. Knows no plan, no key and no model. Used by the worker.
"""

from __future__ import annotations

import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from deepspeed.accelerator import get_accelerator

from ds_serve.messages import CopyResult

Kind = Literal["load", "store"]
Pairs = Sequence[tuple[int, int]]  # (source block, target block)

_MEASURED_BLOCKS = 64
_MEASURED_ROUNDS = 3


class Copier:
    """Loads (host -> device) and stores (device -> host) between two slabs [num_blocks, block_elems].

    deliver gets one CopyResult for the loads and one for the stores of a plan, if it has any; fail gets the
    error that ended the copier, if one did. Both are called on the copier's thread. With checksums a host
    block is loaded only if it is what was stored there; one that is not is not copied, and counts as failed.
    start() and close() are for one thread, the one that computes.
    """

    def __init__(
        self,
        slab: torch.Tensor,
        host_slab: torch.Tensor,
        rank: int,
        deliver: Callable[[CopyResult], None],
        fail: Callable[[BaseException], None],
        checksums: bool = False,
    ) -> None:
        on_cpu = slab.device.type == "cpu"
        self._mover = _MemoryMover(slab, host_slab) if on_cpu else _StreamMover(slab, host_slab)
        self._sizes = {"load": (len(host_slab), len(slab)), "store": (len(slab), len(host_slab))}
        self._sums = _Checksums(host_slab) if checksums else None
        self._rank, self._deliver, self._fail = rank, deliver, fail
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="ds-serve-copier", daemon=True)
        self._thread.start()
        self._closed = False

    def start(self, step: int, loads: Pairs, stores: Pairs) -> None:
        """Sets a plan's copies going behind what this thread has computed so far; returns at once.

        loads are (host block, device block), stores (device block, host block).
        """
        if self._closed:
            raise RuntimeError(f"step {step}: the copier is closed")
        if loads or stores:
            self._jobs.put(_Job(step, loads, stores, self._mover.mark()))

    def close(self) -> None:
        """Ends the thread when all that was started is done and delivered. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._jobs.put(None)
        self._thread.join()
        self._mover.close()

    def load_seconds(self) -> float:
        """Seconds that one block takes from the host to the device: of some that are no neighbours, the best
        of a few times. For before the first start(): it overwrites blocks at the beginning of both slabs."""
        count = min(*self._sizes["load"], _MEASURED_BLOCKS)
        stores = [(block, count - 1 - block) for block in range(count)]
        loads = [(host, device) for device, host in stores]
        job, best = _Job(0, loads, stores, self._mover.mark()), float("inf")
        for _ in range(_MEASURED_ROUNDS):
            self._copy(job, "store", stores)
            best = min(best, self._copy(job, "load", loads).seconds / count)
        return best

    # -- the copier's thread -----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                if job.loads:
                    self._deliver(self._copy(job, "load", job.loads))
                if job.stores:
                    self._deliver(self._copy(job, "store", job.stores))
        except BaseException as error:
            self._fail(error)

    def _copy(self, job: _Job, kind: Kind, pairs: Pairs) -> CopyResult:
        self._check(job.step, kind, pairs)
        began = time.perf_counter()
        failed = []
        if self._sums is not None and kind == "load":
            failed = [index for index, (host, _) in enumerate(pairs) if not self._sums.verify(host)]
        good = [pair for index, pair in enumerate(pairs) if index not in failed] if failed else pairs
        waited = self._mover.copy(kind, neighbours(good), job.after)
        if self._sums is not None and kind == "store":
            for _, host in pairs:
                self._sums.note(host)
        seconds = time.perf_counter() - began - waited
        return CopyResult(rank=self._rank, step=job.step, kind=kind, failed=failed, seconds=seconds)

    def _check(self, step: int, kind: Kind, pairs: Pairs) -> None:
        """A slice beyond a slab's end would be empty, and the copy would do nothing, without a word."""
        for side, size in zip((0, 1), self._sizes[kind], strict=True):
            ids = [pair[side] for pair in pairs]
            if min(ids) < 0 or max(ids) >= size:
                of = ("source", "target")[side]
                raise ValueError(
                    f"step {step}, {kind}: {of} blocks {min(ids)} to {max(ids)}, but there are {size} blocks"
                )


@dataclass(frozen=True)
class _Job:
    step: int
    loads: Pairs
    stores: Pairs
    after: object  # the mover's mark


def neighbours(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Runs (source, target, count) of blocks that are neighbours on both sides, by source."""
    runs: list[tuple[int, int, int]] = []
    for source, target in sorted(pairs):
        if runs:
            first, first_target, count = runs[-1]
            if (source, target) == (first + count, first_target + count):
                runs[-1] = (first, first_target, count + 1)
                continue
        runs.append((source, target, 1))
    return runs


class _MemoryMover:
    """Both slabs in memory. numpy copies on this thread alone and without the GIL; torch would open a second
    team of OpenMP threads for large copies, which the first one's barriers pay for."""

    def __init__(self, slab: torch.Tensor, host_slab: torch.Tensor) -> None:
        device, host = _bytes(slab), _bytes(host_slab)
        self._ways = {"load": (host, device), "store": (device, host)}

    def mark(self) -> None:
        """What was computed before is there already."""

    def copy(self, kind: Kind, runs: Iterable[tuple[int, int, int]], _after: None) -> float:
        source, target = self._ways[kind]
        for first, first_target, count in runs:
            target[first_target : first_target + count] = source[first : first + count]
        return 0.0

    def close(self) -> None:
        """There is nothing to give back."""


class _StreamMover:
    """A CUDA device and memory that this pins: copies on a side stream, behind the one that computes.

    The host slab is pinned where it lies: torch's allocator of pinned memory rounds up to powers of two.
    """

    def __init__(self, slab: torch.Tensor, host_slab: torch.Tensor) -> None:
        self._ways = {"load": (host_slab, slab), "store": (slab, host_slab)}
        self._stream = get_accelerator().Stream(device=slab.device)
        self._pinned = host_slab
        torch.cuda.check_error(
            torch.cuda.cudart().cudaHostRegister(host_slab.data_ptr(), host_slab.nbytes, 0)
        )

    def mark(self):
        """The present end of the calling thread's stream."""
        event = get_accelerator().Event()
        event.record()
        return event

    def copy(self, kind: Kind, runs: Iterable[tuple[int, int, int]], after) -> float:
        """Returns when the copies are done: the seconds of it that they had to wait for their turn."""
        source, target = self._ways[kind]
        # blocking: a thread that waits sleeps, and leaves its core to the one that computes
        turn, end = (get_accelerator().Event(enable_timing=True, blocking=True) for _ in range(2))
        began = time.perf_counter()
        with torch.inference_mode(), get_accelerator().stream(self._stream):
            self._stream.wait_event(after)
            turn.record()
            for first, first_target, count in runs:
                rows = source[first : first + count]
                target[first_target : first_target + count].copy_(rows, non_blocking=True)
            end.record()
        end.synchronize()
        return time.perf_counter() - began - turn.elapsed_time(end) / 1000

    def close(self) -> None:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._pinned.data_ptr()))


class _Checksums:
    """crc32 of each host block that was stored."""

    def __init__(self, host_slab: torch.Tensor) -> None:
        self._rows = _bytes(host_slab)
        self._sums: dict[int, int] = {}

    def note(self, block: int) -> None:
        self._sums[block] = zlib.crc32(self._rows[block])

    def verify(self, block: int) -> bool:
        """Whether the block is what was stored last; False where nothing was."""
        return self._sums.get(block) == zlib.crc32(self._rows[block])


def _bytes(slab: torch.Tensor):
    """The slab's memory as a numpy array uint8[num_blocks, bytes_per_block]."""
    return slab.view(torch.uint8).numpy()
