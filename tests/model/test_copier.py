"""Copies between two slabs: what arrives where, in which order, what is refused, and how it ends.

On a CUDA device the same tests run with the device's slab there.
"""

from __future__ import annotations

import queue
import threading

import pytest
import torch

from ds_serve.messages import CopyResult
from ds_serve.worker import copier as copier_module
from ds_serve.worker.copier import Copier, neighbours

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ELEMS = 96
SOON_S = 30  # where something must happen; only a failing test waits so long


class Bench:
    """A device slab whose block b holds b everywhere, a host slab whose block b holds 100 + b."""

    def __init__(self, device: str, blocks: int = 32, host_blocks: int = 48, checksums: bool = False) -> None:
        self.slab = torch.arange(blocks).bfloat16()[:, None].repeat(1, ELEMS).to(device)
        self.host = (100 + torch.arange(host_blocks)).bfloat16()[:, None].repeat(1, ELEMS)
        self.results: queue.SimpleQueue = queue.SimpleQueue()
        self.copier = Copier(self.slab, self.host, 3, self.results.put, self.results.put, checksums)

    def run(self, step: int, loads=(), stores=()) -> list[CopyResult]:
        self.copier.start(step, loads, stores)
        return [self.results.get(timeout=SOON_S) for _ in range(bool(loads) + bool(stores))]

    def device_blocks(self) -> list[int]:
        assert (self.slab == self.slab[:, :1]).all()
        return self.slab[:, 0].int().tolist()

    def host_blocks(self) -> list[int]:
        assert (self.host == self.host[:, :1]).all()
        return self.host[:, 0].int().tolist()


@pytest.fixture(params=DEVICES)
def open_bench(request):
    benches = []

    def open_bench(**options) -> Bench:
        benches.append(Bench(request.param, **options))
        return benches[-1]

    yield open_bench
    for bench in benches:
        bench.copier.close()


@pytest.mark.parametrize(
    ("pairs", "runs"),
    [
        ([], []),
        ([(4, 9)], [(4, 9, 1)]),
        ([(4, 9), (5, 10), (6, 11)], [(4, 9, 3)]),
        ([(6, 11), (4, 9), (5, 10)], [(4, 9, 3)]),  # in any order
        ([(4, 9), (5, 11), (6, 12)], [(4, 9, 1), (5, 11, 2)]),  # neighbours on one side only
        ([(4, 9), (5, 8), (6, 7)], [(4, 9, 1), (5, 8, 1), (6, 7, 1)]),
        ([(0, 1), (1, 2), (3, 4), (4, 5)], [(0, 1, 2), (3, 4, 2)]),
    ],
)
def test_neighbours_on_both_sides_are_one_run(pairs, runs):
    assert neighbours(pairs) == runs


def test_blocks_arrive_where_they_should_and_nowhere_else(open_bench):
    bench = open_bench()
    device, host = bench.device_blocks(), bench.host_blocks()
    loads, stores = [(40, 0), (41, 1), (7, 30)], [(5, 9), (6, 10), (31, 0), (2, 47)]
    load, store = bench.run(8, loads, stores)
    assert (load.rank, load.step, load.kind, load.failed) == (3, 8, "load", [])
    assert (store.rank, store.step, store.kind, store.failed) == (3, 8, "store", [])
    assert 0 < load.seconds < SOON_S and 0 < store.seconds < SOON_S
    for source, target in loads:
        device[target] = 100 + source
    for source, target in stores:
        host[target] = source
    assert bench.device_blocks() == device
    assert bench.host_blocks() == host


def test_a_list_that_is_empty_has_no_result(open_bench):
    bench = open_bench()
    bench.copier.start(1, [], [])
    bench.copier.start(2, [], [(0, 0)])
    bench.copier.start(3, [(0, 1)], [])
    bench.copier.close()
    found = [bench.results.get_nowait() for _ in range(2)]
    assert [(result.step, result.kind) for result in found] == [(2, "store"), (3, "load")]
    assert bench.results.empty()


def test_plans_are_copied_in_their_order(open_bench):
    """Each step reads what the one before has written: a chain through both slabs."""
    bench = open_bench()
    for step in range(31):
        bench.copier.start(step, [(step, step + 1)] if step else [], [(step + 1, step + 1)])
        # step + 1 on the device now holds what host block `step` held, and goes to host block step + 1
    bench.copier.close()
    steps = [(0, "store"), *((step, kind) for step in range(1, 31) for kind in ("load", "store"))]
    assert [(each.step, each.kind) for each in iter_now(bench.results)] == steps
    assert bench.device_blocks()[1:] == 31 * [1]
    assert bench.host_blocks()[1:32] == 31 * [1]


def iter_now(results: queue.SimpleQueue):
    while not results.empty():
        yield results.get_nowait()


def test_start_does_not_wait(open_bench):
    """The copier is held inside its first delivery, while further plans are started."""
    bench, held, found = open_bench(), threading.Event(), []

    def deliver(result):
        assert held.wait(SOON_S)
        found.append(result.step)

    copier = Copier(bench.slab, torch.zeros(4, ELEMS).bfloat16(), 0, deliver, bench.results.put)
    for step in range(5):
        copier.start(step, [], [(step, 0)])
    assert found == []
    held.set()
    copier.close()
    assert found == [0, 1, 2, 3, 4]
    assert bench.results.empty()


def test_stores_come_after_what_was_computed_before(open_bench):
    """On a CUDA device the computing stream is far behind when the copy is started."""
    bench = open_bench()
    big = torch.ones(2000, 2000, device=bench.slab.device)
    for _ in range(3 if bench.slab.device.type == "cpu" else 200):
        big = big @ big / 2000
    bench.slab[3] += big[0, 0].to(bench.slab.dtype)
    [store] = bench.run(1, stores=[(3, 7)])
    assert bench.host_blocks()[7] == 4


# -- checksums ---------------------------------------------------------------------------------------


def test_a_corrupted_host_block_fails_and_is_not_loaded(open_bench):
    bench = open_bench(checksums=True)
    [stored] = bench.run(1, stores=[(5, 20), (6, 21), (7, 22)])
    assert stored.failed == []
    bench.host.view(torch.uint8)[21, 2 * ELEMS - 1] ^= 1  # one bit
    [loaded] = bench.run(2, loads=[(20, 0), (21, 1), (22, 2)])
    assert loaded.failed == [1]
    assert bench.device_blocks()[:4] == [5, 1, 7, 3]
    [again] = bench.run(3, stores=[(6, 21)])  # stored anew it is good
    [loaded] = bench.run(4, loads=[(21, 1), (22, 8)])
    assert loaded.failed == []
    assert bench.device_blocks()[:4] == [5, 6, 7, 3]


def test_with_checksums_what_was_never_stored_is_not_loaded(open_bench):
    bench = open_bench(checksums=True)
    [loaded] = bench.run(1, loads=[(0, 0)])
    assert loaded.failed == [0]
    assert bench.device_blocks()[0] == 0


def test_without_checksums_nobody_looks(open_bench):
    bench = open_bench()
    bench.run(1, stores=[(5, 20)])
    bench.host[20] = 99
    [loaded] = bench.run(2, loads=[(20, 0)])
    assert loaded.failed == []
    assert bench.device_blocks()[0] == 99


# -- ends --------------------------------------------------------------------------------------------


def test_close_in_the_middle_finishes_what_was_started(open_bench):
    bench = open_bench()
    for step in range(200):
        bench.copier.start(step, [(40, 0)], [(step % 30 + 1, step % 40)])
    bench.copier.close()
    assert len(list(iter_now(bench.results))) == 400
    assert not bench.copier._thread.is_alive()
    bench.copier.close()
    with pytest.raises(RuntimeError, match="step 200: the copier is closed"):
        bench.copier.start(200, [(0, 0)], [])


@pytest.mark.parametrize(
    ("loads", "stores", "said"),
    [
        ([(48, 0)], [], "step 7, load: source blocks 48 to 48, but there are 48 blocks"),
        ([(0, 1), (0, 32)], [], "step 7, load: target blocks 1 to 32, but there are 32 blocks"),
        ([], [(-1, 0)], "step 7, store: source blocks -1 to -1, but there are 32 blocks"),
    ],
)
def test_blocks_that_do_not_exist_fail_the_rank(open_bench, loads, stores, said):
    bench = open_bench()
    [error] = bench.run(7, loads, stores)
    assert isinstance(error, ValueError) and str(error) == said


def test_an_error_of_the_copier_is_reported(open_bench, monkeypatch):
    bench = open_bench()
    monkeypatch.setattr(copier_module, "neighbours", lambda pairs: 1 / 0)
    [error] = bench.run(1, loads=[(0, 0)])
    assert isinstance(error, ZeroDivisionError)


def test_the_speed_is_measured_on_slabs_of_any_size(open_bench):
    for sizes in ({"blocks": 1}, {"host_blocks": 1, "checksums": True}, {"blocks": 200, "host_blocks": 90}):
        bench = open_bench(**sizes)
        assert 0 < bench.copier.load_seconds() < 1
        assert bench.results.empty()
