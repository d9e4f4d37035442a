"""FlashInfer on a CUDA device: attention beside the reference in fp32, captured steps, and times.

Run it where there is a Hopper GPU: python -m pytest tests/gpu/test_flashinfer_cuda.py -s
The first run compiles five of FlashInfer's modules at once, which takes minutes; with DS_SERVE_TEST_ALL=1
heads of 64 and 256 columns too.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("flashinfer")
pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

import test_kv_write
from paged_sequences import Inputs, Layer, Sequences, compare_steps
from tiny_models import build, mixed_prompts, run_all, save

from ds_serve.attention import flashinfer_plan
from ds_serve.attention.backends import select_backend
from ds_serve.attention.context import AttentionBatch, HostRows
from ds_serve.attention.flashinfer import start_builds
from ds_serve.config import Settings
from ds_serve.rank import build_local_engine

LLAMA = Layer(heads=32, kv_heads=8, dim=128, options={"scale": 128**-0.5})
GEMMA = Layer(heads=16, kv_heads=4, dim=128, options={"scale": 0.1, "softcap": 20.0, "window": 50})
PLAIN = Layer(heads=16, kv_heads=4, dim=128, options={"scale": 0.1})
BOUND = 3e-2  # outputs are averages of unit normals, rounded to bf16
LAYERS = {
    "llama": [LLAMA, LLAMA],
    "no groups": [Layer(heads=4, kv_heads=4, dim=128, options={"scale": 0.1})],
    "window and full": [GEMMA, PLAIN],
    "groups of layers": [replace(GEMMA, group=1), PLAIN],
}
# What start_builds takes: columns, query heads a KV head, window, cap.
SHAPES = [(128, 4, False, False), (128, 1, False, False), (128, 4, True, True)]
if os.environ.get("DS_SERVE_TEST_ALL") == "1":
    LAYERS["dim 64, one KV head"] = [Layer(heads=8, kv_heads=1, dim=64)]
    LAYERS["dim 256"] = [Layer(heads=8, kv_heads=1, dim=256, options={"scale": 0.06})]
    SHAPES += [(64, 8, False, False), (256, 8, False, False)]
DEVICE = torch.device("cuda", torch.cuda.current_device())
BEGAN = time.perf_counter()
BUILDS = [thread for shape in SHAPES for thread in start_builds(DEVICE, torch.bfloat16, *shape)]


@pytest.fixture(autouse=True)
def _no_fallback():
    """Whatever goes to the reference fails its test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".* use the plain PyTorch attention")
        yield


def started(layers: list[Layer], num_blocks: int = 128) -> Sequences:
    backend = select_backend(DEVICE, torch.bfloat16, 16)
    assert backend.name == "flashinfer"
    return Sequences(layers, backend, torch.bfloat16, DEVICE, num_blocks)


def grown(layers: list[Layer], rows: int, held: int, count: int) -> Sequences:
    """Sequences with held tokens of random keys and values each, and room for count more."""
    sequences = started(layers, rows * -(-(held + count) // 16) + 8)
    sequences.rows([(row, held) for row in range(rows)])
    return sequences


def microseconds(run: Callable[[], object], rounds: int = 50) -> float:
    run()
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    for _ in range(rounds):
        run()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) * 1e3 / rounds


def keep_device_busy(seconds: float) -> None:
    torch.cuda._sleep(int(seconds * 1.7e9))  # in cycles


def test_builds():
    """Prints what the first run of all pays, and the next one does not."""
    for thread in BUILDS:
        thread.join()
        print(f"\n{thread.name}: after {time.perf_counter() - BEGAN:.1f} s")


def test_kernel_writes_the_bits_of_index_put():
    test_kv_write.compare(
        [*test_kv_write.CASES, (1, 8, 128, 128, torch.bfloat16), (2048, 8, 128, 128, torch.bfloat16)], "cuda"
    )


@pytest.mark.parametrize("with_host", [True, False], ids=["host", "no host"])
@pytest.mark.parametrize("layers", list(LAYERS))
def test_steps_are_those_of_the_reference(layers, with_host):
    compare_steps(started(LAYERS[layers]), with_host, BOUND)


@pytest.mark.parametrize("rows, held, count", [(64, 599, 1), (1, 8191, 1), (1, 7680, 512), (3, 1300, 700)])
def test_real_shapes(rows, held, count):
    sequences = grown([LLAMA], rows, held, count)
    batch = sequences.step([(row, count) for row in range(rows)])
    sequences.compare(batch, sequences.qkv(batch.num_tokens), BOUND)


@pytest.mark.parametrize("prefill", ["fa2", "fa3"])
def test_both_prefill_kernels(prefill):
    sequences = grown([LLAMA, replace(LLAMA, options=GEMMA.options)], 2, 700, 200)
    sequences.backend._resources.prefill = prefill
    batch = sequences.step([(0, 1), (1, 200)])
    sequences.compare(batch, sequences.qkv(batch.num_tokens), BOUND)


class Graph:
    """A step of count one-token rows, captured."""

    def __init__(self, sequences: Sequences, count: int, width: int) -> None:
        self.sequences, self.count, self.width = sequences, count, width
        self.batch = self.padded([])
        self.inputs = sequences.qkv(count)
        for _ in range(2):
            sequences.backend.prepare(self.batch)
            sequences.run(self.batch, self.inputs)
        sequences.backend.prepare(self.batch)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = sequences.run(self.batch, self.inputs)

    def padded(self, counts: list[tuple[int, int]]) -> AttentionBatch:
        sequences = self.sequences
        host, slots = sequences.rows(counts, pad=self.count - len(counts), width=self.width)
        host = HostRows(host.query_start, host.context_len, host.tables, graph=self.count)
        return sequences.batch(host, slots)

    def step(self, counts: list[tuple[int, int]]) -> tuple:
        """A step to launch: its batch, its inputs, and how many of its tokens are no padding."""
        return self.padded(counts), self.sequences.qkv(self.count), len(counts)

    def launch(self, step: AttentionBatch, inputs: Inputs, tokens: int) -> tuple:
        """What Sequences.check wants of the step. Waits for nothing."""
        for static, given in zip(self.inputs, inputs, strict=True):
            for x, y in zip(static, given, strict=True):
                x.copy_(y)
        for index in range(len(self.sequences.layers)):
            self.batch.tables(index)[0].copy_(step.tables(index)[0])
        self.sequences.backend.prepare(step)
        self.graph.replay()
        return step, inputs, [out.clone() for out in self.out], BOUND, tokens

    def replay(self, counts: list[tuple[int, int]]) -> None:
        self.sequences.check(*self.launch(*self.step(counts)))


@pytest.mark.parametrize("layers", list(LAYERS))
def test_captured_steps(layers):
    sequences = started(LAYERS[layers])
    large, small = Graph(sequences, 6, 32), Graph(sequences, 4, 32)
    start = sequences.step([(0, 40), (1, 3), (2, 16), (3, 31), (4, 1)])
    sequences.compare(start, sequences.qkv(start.num_tokens), BOUND)
    large.replay([(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)])
    small.replay([(2, 1), (0, 1)])
    mixed = sequences.step([(3, 1), (5, 300)])
    sequences.compare(mixed, sequences.qkv(mixed.num_tokens), BOUND)
    small.replay([(5, 1), (3, 1), (1, 1), (0, 1)])
    large.replay([(4, 1)])


def test_steps_launched_ahead_of_a_late_device():
    """The host plans and launches many steps while the device is busy with something before them."""
    sequences = started(LAYERS["groups of layers"])
    graph = Graph(sequences, 4, 32)
    start = sequences.step([(0, 40), (1, 300), (2, 16)])
    sequences.compare(start, sequences.qkv(start.num_tokens), BOUND)
    steps = []
    for index in range(6):
        steps.append(graph.step([(0, 1), (1, 1), (2, 1)][: 1 + index % 3]))
        mixed = sequences.step([(1, 1), (2, 1), (0, 5 + index)])
        steps.append((mixed, sequences.qkv(mixed.num_tokens), None))
    launched = []
    keep_device_busy(0.2)
    for step, inputs, tokens in steps:
        if step.host.graph:
            launched.append(graph.launch(step, inputs, tokens))
        else:
            sequences.backend.prepare(step)
            launched.append((step, inputs, sequences.run(step, inputs), BOUND, tokens))
    for step in launched[:-1]:
        sequences.check(*step, slab=False)  # the slab is as the last of them left it
    sequences.check(*launched[-1])


def test_an_engine_answers_as_with_the_reference(tmp_path):
    """In bf16, where near ties fall either way: of each answer's first four tokens most are the same."""
    folder = save(build("llama", torch.bfloat16, head_dim=128, num_key_value_heads=2), tmp_path)
    prompts, answers = mixed_prompts(32), []
    for attention in ("flashinfer", "reference"):
        settings = Settings(
            model=folder,
            attention=attention,
            num_blocks=64,
            max_num_batched_tokens=64,
            device="cuda",
            compile="off",
            graphs="off",
        )
        engine = build_local_engine(settings)
        answers.append(run_all(engine, prompts, 16))
        engine.close()
    same = [
        a == b for ours, wanted in zip(*answers, strict=True) for a, b in zip(ours[:4], wanted, strict=False)
    ]
    print(f"\n{sum(same)} of {len(same)} tokens are the same")
    assert sum(same) >= 0.75 * len(same)


@pytest.mark.parametrize("rows", [64, 256])
@pytest.mark.parametrize("cores", ["tensor cores", "CUDA cores"])
def test_times_of_decode(rows, cores, monkeypatch):
    monkeypatch.setattr(flashinfer_plan, "CUDA_CORE_GROUP", 2 if cores == "tensor cores" else 4)
    sequences = grown([LLAMA], rows, 576, 1)
    batch = sequences.step([(row, 1) for row in range(rows)])
    inputs = sequences.qkv(rows)
    sequences.compare(batch, inputs, BOUND)
    planner = next(iter(sequences.backend._planners.values()))
    keys, values = regions(sequences)
    q = inputs[0][0]
    out = q.new_empty(q.shape)
    attend = microseconds(lambda: planner.run(batch.host, q, keys, values, out))
    both = microseconds(lambda: sequences.run(batch, inputs))
    floor = rows * 577 * 8 * 128 * 2 * 2 / 4.27e6
    print(f"\ndecode {rows} x 577, {cores}: {attend:.1f} us, with write {both:.1f} us; floor {floor:.1f} us")


@pytest.mark.parametrize("prefill", ["fa2", "fa3"])
@pytest.mark.parametrize("count, length", [(16, 8192), (512, 8192), (2048, 2048), (8192, 8192)])
def test_times_of_prefill(prefill, count, length):
    sequences = grown([LLAMA], 1, length - count, count)
    sequences.backend._resources.prefill = prefill
    batch, inputs = sequences.step([(0, count)]), sequences.qkv(count)
    taken = microseconds(lambda: sequences.run(batch, inputs), 10)
    flops = 4 * 32 * 128 * (count * length - count * (count - 1) / 2)
    print(f"\nprefill {count} of {length}, {prefill}: {taken:.0f} us, {flops / taken / 1e6:.0f} TFLOP/s")


@pytest.mark.parametrize("rows", [1, 64, 256])
def test_times_of_plans(rows):
    """A plan of a graph must not wait for the device; others say whether they do."""
    sequences = grown([LLAMA], rows, 576, 16)
    graph = Graph(sequences, rows, 64)
    backend = sequences.backend
    steps = {
        "graph": graph.padded([(row, 1) for row in range(rows)]),
        "decode": sequences.step([(row, 1) for row in range(rows)]),
        "mixed": sequences.step([(row, 1) for row in range(rows - 1)] + [(rows - 1, 8)]),
    }
    for name, step in steps.items():
        idle, busy = [], []
        for _ in range(5):
            backend.prepare(step)
            torch.cuda.synchronize()
            began = time.perf_counter()
            backend.prepare(step)
            idle.append(time.perf_counter() - began)
            torch.cuda.synchronize()
            keep_device_busy(0.1)
            began = time.perf_counter()
            backend.prepare(step)
            busy.append(time.perf_counter() - began)
            torch.cuda.synchronize()
        took, late = np.median(idle) * 1e6, np.median(busy) * 1e6
        print(f"\nplan of {name}, {rows} rows: {took:.0f} us; {late:.0f} us while the device is busy")
        assert name != "graph" or late < 20_000


def regions(sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
    layout, layer = sequences.layout, sequences.layers[0]
    size = 16 * layer.kv_heads * layer.dim
    return tuple(
        sequences.slab[:, offset : offset + size].unflatten(1, (16, layer.kv_heads, layer.dim))
        for offset in (layout.k_offset(0), layout.v_offset(0))
    )
