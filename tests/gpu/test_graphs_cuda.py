"""CUDA graphs of decode steps: what they compute beside the same kernels without graphs, and their times.

Run it where there is a GPU, with FlashInfer: python -m pytest tests/gpu/test_graphs_cuda.py -s
"""

from __future__ import annotations

import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("flashinfer")

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
sys.path.insert(0, str(Path(__file__).parents[1] / "ranks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import graphs_cuda_run
from gaps import worst_gap
from gpu_model import config_of, directory
from graphs_cuda_run import LENGTHS, PROMPTS, count_replays, replays
from launch import run_ranks
from tiny_models import build, run_all, save

from ds_serve.attention.context import use_batch
from ds_serve.config import Settings
from ds_serve.messages import NewSequence, Row, SamplingParams
from ds_serve.model.loader import load
from ds_serve.parallel.grid import Grid
from ds_serve.parallel.place import Place
from ds_serve.rank import build_local_engine
from ds_serve.worker.graphs import GraphRunner, recorder_of
from ds_serve.worker.inputs import TokenPool, upload
from ds_serve.worker.slots import HostStep, SlotTable
from ds_serve.worker.trial import trial_step

HEADS = {"head_dim": 64}  # FlashInfer has no smaller ones
# A token drawn at random lies 2 nats and more below the best; rounding to bf16 costs a few hundredths.
GAP = 0.25
COMPILE = os.environ.get("DS_SERVE_TEST_COMPILE", "auto")
count_replays()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save(build("llama", torch.bfloat16, **HEADS), tmp_path_factory.mktemp("llama"))


class Steps:
    """A GraphRunner of a model over a slab of random numbers; run() is what it records, without a graph."""

    def __init__(self, settings: Settings, num_blocks: int, shape: tuple[int, int, int]) -> None:
        self.model = model = load(settings)
        self.num_blocks, self.shape = num_blocks, shape
        self.slab = model.layout.allocate(num_blocks + 1, model.device)
        self.pool = TokenPool(shape[0], model.device)
        self.runner = GraphRunner(model, model.layout, self.slab, self.pool, shape)
        began, self.recorder = time.perf_counter(), recorder_of(model.device)
        assert self.runner.record(Grid(Place()), self.recorder)
        self.seconds = time.perf_counter() - began
        self.slab.normal_()
        self.pool.tokens.random_(model.vocab_size)

    def trial(self, count: int, number: int) -> HostStep:
        model = self.model
        return trial_step(
            count + 1, self.num_blocks, 16, 1, model.max_model_len, model.vocab_size, number
        )  # fmt: skip

    @torch.inference_mode()
    def replay(self, step: HostStep) -> torch.Tensor:
        return self.runner.replay(self.runner.upload(step))

    @torch.inference_mode()
    def run(self, step: HostStep) -> torch.Tensor:
        batch = self.runner.upload(step).attention
        self.model.backend.prepare(batch)
        self.runner._forward(batch)
        return self.runner._read(step.num_rows)

    @torch.inference_mode()
    def plain(self, step: HostStep) -> torch.Tensor:
        inputs = upload(step, self.slab, self.model.layout, self.pool)
        batch = inputs.attention
        self.model.backend.prepare(batch)
        with use_batch(batch):
            return self.model.stage(inputs.input_ids, batch.positions, batch.sampled, None)


def test_many_replays_without_a_wait_are_the_same_kernels_one_by_one(llama):
    """What is uploaded for a later step must not reach an earlier one, which may not have begun."""
    steps = Steps(Settings(model=llama, max_num_seqs=40, compile=COMPILE), 200, (40, 4, 1))
    trials = [steps.trial(1 + 13 * number % 40, number) for number in range(400)]
    slab = steps.slab.clone()
    torch.cuda.synchronize()
    found = [steps.replay(step).clone() for step in trials]
    torch.cuda.synchronize()
    kept = steps.slab.clone()
    steps.slab.copy_(slab)
    for step, replayed in zip(trials, found, strict=True):
        wanted = steps.run(step)
        torch.cuda.synchronize()
        error = ((replayed.float() - wanted.float()).norm() / wanted.float().norm()).item()
        assert error <= 1e-2, f"{step.num_rows} rows: {error}"
    assert torch.equal(kept[:-1], steps.slab[:-1]) or (kept - steps.slab)[:-1].abs().max() < 0.1


def test_a_replay_gives_what_the_plain_step_gives(llama):
    steps = Steps(Settings(model=llama, max_num_seqs=40, compile=COMPILE), 200, (40, 4, 1))
    for number, count in enumerate((9, 3, 9, 1, 39, 2, 40, 17)):
        step = steps.trial(count, number)
        wanted = steps.plain(step).float()
        error = ((steps.replay(step).float() - wanted).norm() / wanted.norm()).item()
        assert error <= 3e-2, f"{count} rows: {error}"


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "qwen3_moe"])
def test_tokens_are_among_the_likeliest(architecture, tmp_path):
    """Preempted and with hits; a family that cannot be captured must serve too, and says why."""
    more = {}
    if architecture == "qwen3_moe":
        more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    folder = save(build(architecture, torch.bfloat16, **HEADS | more), tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = build_local_engine(
            Settings(model=folder, num_blocks=60, max_num_seqs=20, max_num_batched_tokens=64, compile=COMPILE)
        )
    replays.clear()
    gaps = [worst_gap(engine, PROMPTS, LENGTHS) for _ in range(2)]
    stats = engine.stats()
    engine.close()
    about = [str(each.message) for each in caught if "graphs" in str(each.message)]
    print(f"\n{architecture}: gaps {gaps}, {replays.total()} of {stats.num_steps} steps replayed {about}")
    assert max(gaps) <= GAP
    assert replays.total() > stats.num_steps / 3 or about
    assert stats.num_free_blocks == stats.num_blocks
    if architecture == "llama":
        assert not about


def test_a_forward_pass_that_waits_for_the_device_runs_eagerly(llama, monkeypatch):
    forward = GraphRunner._forward

    def asking(self, batch):
        int(self._integers[0])
        forward(self, batch)

    monkeypatch.setattr(GraphRunner, "_forward", asking)
    with pytest.warns(RuntimeWarning, match="without CUDA graphs"):
        engine = build_local_engine(Settings(model=llama, num_blocks=60, compile=COMPILE))
    replays.clear()
    gap = worst_gap(engine, PROMPTS, LENGTHS)
    engine.close()
    assert gap <= GAP and not replays
    assert torch.rand(8, device="cuda").unique().numel() > 4  # a failed capture leaves its mark on these
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_float32_has_no_graphs_and_serves(llama):
    settings = Settings(model=llama, num_blocks=60, dtype="float32", compile=COMPILE)
    engine = build_local_engine(settings)
    replays.clear()
    assert len(run_all(engine, PROMPTS[:4], 5)) == 4 and not replays
    engine.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.timeout(500)
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_over_two_devices(tp, pp, tmp_path):
    folder = save(build("llama", torch.bfloat16, **HEADS | {"num_hidden_layers": 4}), tmp_path)
    lines = run_ranks(Path(graphs_cuda_run.__file__), 2, folder, str(tp), str(pp), timeout=480)
    (gap,) = (float(line.split()[1]) for line in lines if line.startswith("gap "))
    counts = [int(line.split()[1]) for line in lines if line.startswith("replays ")]
    print(f"\ntp={tp} pp={pp}: gap {gap}, replays {counts}")
    assert gap <= GAP
    assert len(counts) == 2 and counts[0] == counts[1] > 20


# -- times -----------------------------------------------------------------------------------------


def decode_step(rows: int, context: int, width: int) -> HostStep:
    """rows sequences of context tokens, the last of which is this step's, each in blocks of its own."""
    table, plan = SlotTable(rows, context, 16), []
    for slot in range(rows):
        token_ids = [(slot * 31 + each) % 500 for each in range(context)]
        params = SamplingParams(max_tokens=1)
        table.admit(NewSequence(slot=slot, token_ids=token_ids, num_prompt_tokens=context, params=params))
        blocks = list(range(slot * width, slot * width + -(-context // 16)))
        plan.append(Row(slot=slot, start=context - 1, count=1, new_block_ids=blocks, sample=True))
    return table.gather(plan)


def milliseconds(work: Callable[[], object]) -> tuple[float, float]:
    """(a step, the host's part of it), medians of five times twenty steps that are launched in a row."""
    steps, host = [], []
    for _ in range(6):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(20):
            work()
        host.append((time.perf_counter() - began) / 20 * 1e3)
        torch.cuda.synchronize()
        steps.append((time.perf_counter() - began) / 20 * 1e3)
    return statistics.median(steps[1:]), statistics.median(host[1:])


def test_times():
    """Four layers of Llama-3.1-8B's shape, contexts of 576 tokens."""
    width, most = 40, 256
    folder = directory(config_of(False, 4), torch.device("cuda"))
    settings = Settings(model=folder, max_num_seqs=most, max_model_len=width * 16, compile=COMPILE)
    before = torch.cuda.mem_get_info()[0]
    steps = Steps(settings, most * width, (most, width, 1))
    taken = steps.recorder.bytes_taken() / 2**20
    print(f"\n{len(steps.runner.sizes)} graphs {steps.runner.sizes}: {steps.seconds:.1f} s, {taken:.0f} MiB")
    print(f"model, slab and graphs: {(before - torch.cuda.mem_get_info()[0]) / 2**30:.2f} GiB")
    print(f"{'rows':>5} {'plain ms':>9} {'(host)':>8} {'graph ms':>9} {'(host)':>8}")
    for rows in (1, 64, 65, 256):
        step = decode_step(rows, 576, width)
        plain, graph = (milliseconds(partial(run, step)) for run in (steps.plain, steps.replay))
        print(f"{rows:>5} {plain[0]:9.3f} {plain[1]:8.3f} {graph[0]:9.3f} {graph[1]:8.3f}")
        assert graph[0] < plain[0]
