"""Decode steps that are replayed: the same tokens as without, and nothing left over from the step before."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import fake_flashinfer
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from late_device import late_device
from recorded_graphs import CpuRecorder, recorded_graphs
from tiny_models import build, mixed_prompts, oracles, run_all, save

from ds_serve import demo
from ds_serve.attention import flashinfer
from ds_serve.attention.context import use_batch
from ds_serve.attention.cpu import CpuBackend
from ds_serve.attention.flashinfer import FlashInferBackend
from ds_serve.attention.reference import ReferenceBackend
from ds_serve.config import Settings
from ds_serve.model import loader
from ds_serve.model.loader import load
from ds_serve.parallel.grid import Grid
from ds_serve.parallel.place import Place
from ds_serve.text.codec import TextCodec
from ds_serve.text.grammar import Grammars
from ds_serve.worker import graphs
from ds_serve.worker.graphs import GraphRunner, graph_sizes
from ds_serve.worker.inputs import TokenPool, upload
from ds_serve.worker.trial import trial_step

PROMPTS = mixed_prompts(16, longest=30)
LENGTHS = [4 + (7 * index) % 29 for index in range(len(PROMPTS))]
TIGHT = {"num_blocks": 24, "max_num_batched_tokens": 64, "max_num_seqs": 20}
FEW_BLOCKS = {"llama": 24, "gemma2": 60}  # of 4 tokens; one group of layers, and three
if os.environ.get("DS_SERVE_TEST_ALL") == "1":
    FEW_BLOCKS |= {"qwen3": 24, "gpt2": 24}


@given(st.integers(1, 4096))
def test_a_graph_of_a_size_serves_the_sizes_below(most):
    sizes = graph_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most and len(sizes) <= 35
    for smaller, size in zip([0, *sizes], sizes, strict=False):
        assert size - smaller - 1 <= max(7, (smaller + 1) / 4)


@pytest.fixture(scope="module", params=FEW_BLOCKS)
def case(request, tmp_path_factory):
    model = build(request.param)
    folder = save(model, tmp_path_factory.mktemp(request.param))
    return folder, FEW_BLOCKS[request.param], oracles(model, PROMPTS, LENGTHS)


def replayed(engine, wanted: list, replays: Counter):
    """The accounts of an engine that gives the wanted tokens, twice, and replays most of its steps."""
    recorded = replays.total()
    assert run_all(engine, PROMPTS, LENGTHS) == wanted
    assert run_all(engine, PROMPTS, LENGTHS) == wanted
    stats = engine.stats()
    assert replays.total() - recorded > stats.num_steps / 2
    return stats


def test_preempted_with_flashinfer_s_plans(case, engine_of, monkeypatch):
    def select(device, dtype, block_size, prefer):
        return FlashInferBackend(device, dtype, fake_flashinfer)

    monkeypatch.setattr(flashinfer, "DTYPES", (torch.float32,))
    monkeypatch.setattr(flashinfer, "HEAD_DIMS", (8, 16))
    monkeypatch.setattr(loader, "select_backend", select)
    folder, num_blocks, wanted = case
    with recorded_graphs() as replays, late_device(step_s=0.001):
        engine = engine_of(
            model=folder, num_blocks=num_blocks, block_size=4, max_num_batched_tokens=64, max_num_seqs=20
        )
        stats = replayed(engine, wanted, replays)
    assert stats.num_preemptions > 0


def test_prefixes_from_the_host_with_the_op_for_cpus(case, engine_of):
    folder, _, wanted = case
    with recorded_graphs() as replays, late_device(step_s=0.001):
        engine = engine_of(model=folder, num_blocks=24, max_num_seqs=11, host_cache=2**20)
        stats = replayed(engine, wanted, replays)
    assert stats.cached_tokens_host > 0


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0, "top_p": 0.8, "seed": 3},
        {"temperature": 0.7, "top_k": 20, "seed": 3, "presence_penalty": 0.7, "repetition_penalty": 1.2},
        {"logit_bias": {5: 4.0}, "min_tokens": 4, "eos_token_ids": (5,), "logprobs": 2},
    ],
)
def test_draws_are_those_of_eager_steps(params, llama, engine_of):
    wanted = run_all(engine_of(model=llama, **TIGHT), PROMPTS, LENGTHS, **params)
    with recorded_graphs() as replays:
        engine = engine_of(model=llama, **TIGHT)
        recorded = replays.total()
        assert run_all(engine, PROMPTS, LENGTHS, **params) == wanted
    assert replays.total() - recorded > 5


def test_grammars_hold_in_replayed_steps(engine_of):
    codec = TextCodec(demo.model_path())
    grammar = Grammars(codec.tokenizer).regex("[a-f]{9}-[0-9]{5}")
    prompts = [codec.encode_chat([{"role": "user", "content": f"What is {n}?"}]) for n in range(6)]
    params = {"grammar": grammar, "eos_token_ids": (1,), "temperature": 0.8, "seed": 1}
    settings = {"model": demo.model_path(), "dtype": "float32", "num_blocks": 60, "max_num_seqs": 5}
    wanted = run_all(engine_of(**settings), prompts, 20, **params)
    with recorded_graphs() as replays:
        engine = engine_of(**settings)
        recorded = replays.total()
        assert run_all(engine, prompts, 20, **params) == wanted
    assert replays.total() - recorded > 5


# -- one step after another --------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save(build("llama"), tmp_path_factory.mktemp("llama"))


class Steps:
    """A GraphRunner of a model, and plain steps beside it, over one slab of random numbers."""

    def __init__(self, folder: str, num_seqs: int) -> None:
        self.model = model = load(Settings(model=folder))
        self.num_blocks = 2 * num_seqs + 1
        self.slab = model.layout.allocate(self.num_blocks + 1, "cpu")
        self.pool = TokenPool(num_seqs, torch.device("cpu"))
        self.runner = GraphRunner(model, model.layout, self.slab, self.pool, (num_seqs, 4, 1))
        assert self.runner.record(Grid(Place()), CpuRecorder())
        assert not self.slab[:-1].any()
        self.slab.normal_()
        self.pool.tokens.random_(model.vocab_size)

    def step(self, count: int):
        model = self.model
        return trial_step(count + 1, self.num_blocks, 16, 1, model.max_model_len, model.vocab_size)

    @torch.inference_mode()
    def plain(self, step) -> torch.Tensor:
        inputs = upload(step, self.slab, self.model.layout, self.pool)
        batch = inputs.attention
        with use_batch(batch):
            return self.model.stage(inputs.input_ids, batch.positions, batch.sampled, None)

    @torch.inference_mode()
    def replayed(self, step) -> torch.Tensor:
        return self.runner.replay(self.runner.upload(step)).clone()


@pytest.fixture
def steps(llama):
    with recorded_graphs() as replays:
        steps = Steps(llama, 13)
        steps.replays = replays
        yield steps


def test_a_batch_that_shrinks_and_grows_keeps_nothing_of_the_step_before(steps):
    steps.replays.clear()
    for count in (9, 3, 9, 1, 12, 2):
        step = steps.step(count)
        assert step.num_rows == count and (step.drawn_in >= 0).any()
        wanted = steps.plain(step)
        torch.testing.assert_close(steps.replayed(step), wanted, rtol=1e-4, atol=1e-4)
    assert steps.replays == {13: 3, 4: 1, 1: 1, 2: 1}


def test_padding_writes_to_the_scratch_block_and_other_rows_do_not(steps):
    for count, padded in ((3, True), (4, False)):
        before, step = steps.slab.normal_().clone(), steps.step(count)
        steps.replayed(step)
        changed = (steps.slab != before).any(1).nonzero().flatten().tolist()
        own = {int(slot) // 16 for slot in step.slot_mappings[0]}
        assert changed == sorted(own | ({steps.num_blocks} if padded else set()))


def test_backends_see_padding_as_one_token_in_the_scratch_block(steps):
    with torch.inference_mode():
        batch = steps.runner.upload(steps.step(3)).attention
    rows, scratch = batch.host, steps.num_blocks
    assert rows.graph == len(rows.context_len) == len(batch.context_len) == batch.num_tokens == 4
    assert rows.query_start.tolist() == batch.query_start.tolist() == [0, 1, 2, 3, 4]
    assert rows.context_len.tolist() == batch.context_len.tolist() and rows.context_len[3] == 1
    assert rows.tables[0][3, 0] == batch.block_tables[3, 0] == scratch
    assert batch.slot_mapping[3] == 16 * scratch


def test_a_replay_reads_the_pool_when_it_runs(steps):
    step = steps.step(4)
    first = steps.replayed(step)
    steps.pool.tokens.add_(1).remainder_(steps.model.vocab_size)
    torch.testing.assert_close(steps.replayed(step), steps.plain(step), rtol=1e-4, atol=1e-4)
    from_pool = torch.from_numpy(step.drawn_in >= 0)
    changed = (steps.replayed(step) - first).abs().amax(1) > 1e-3
    assert changed[from_pool].all() and not changed[~from_pool].any()


def test_only_decode_steps_without_adapters_are_replayed(steps):
    step = steps.step(3)
    assert steps.runner.takes(step)
    assert not steps.runner.takes(replace(step, adapters=step.adapters + 1))
    assert not steps.runner.takes(replace(step, scored=[(0, 1)]))
    assert not steps.runner.takes(replace(step, slots=step.slots[1:]))


# -- where graphs cannot be had ----------------------------------------------------------------


def served(engine_of, replays, folder: str, **settings) -> tuple[list, list[str]]:
    """Tokens of an engine that replays nothing, and warnings about graphs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = engine_of(model=folder, **TIGHT, **settings)
        replays.clear()
        tokens = run_all(engine, PROMPTS, LENGTHS)
    assert not replays
    return tokens, [str(each.message) for each in caught if "graphs" in str(each.message)]


@pytest.fixture(scope="module")
def tokens(llama):
    from ds_serve.rank import build_local_engine

    engine = build_local_engine(Settings(model=llama, **TIGHT))
    found = run_all(engine, PROMPTS, LENGTHS)
    engine.close()
    return found


def test_a_forward_pass_that_waits_for_the_device_runs_eagerly(llama, tokens, engine_of, monkeypatch):
    forward = GraphRunner._forward

    def asking(self, batch):
        assert batch.context_len.max().item() > 0
        forward(self, batch)

    with recorded_graphs() as replays:
        monkeypatch.setattr(GraphRunner, "_forward", asking)
        found, [warning] = served(engine_of, replays, llama)
    assert found == tokens
    assert "without CUDA graphs" in warning and "not permitted when stream is capturing" in warning


def test_rows_read_on_the_host_are_not_recorded(llama, tokens, engine_of):
    """The plain attention reads them, and a graph would keep those of the recorded step."""
    with recorded_graphs((ReferenceBackend,)) as replays:
        found, [warning] = served(engine_of, replays, llama, attention="reference")
    assert found == tokens
    assert "differs from the plain step" in warning


def test_a_graph_that_computes_something_else_is_not_used(llama, tokens, engine_of, monkeypatch):
    forward = GraphRunner._forward

    def forgetful(self, batch):
        batch.block_tables = batch.block_tables.flip(0)
        forward(self, batch)

    with recorded_graphs() as replays:
        monkeypatch.setattr(GraphRunner, "_forward", forgetful)
        found, [warning] = served(engine_of, replays, llama)
    assert found == tokens
    assert "differs from the plain step" in warning


def test_a_backend_that_waits_and_graphs_off_need_no_warning(llama, tokens, engine_of):
    with recorded_graphs(()) as replays:
        assert served(engine_of, replays, llama) == (tokens, [])
    with recorded_graphs() as replays:
        assert served(engine_of, replays, llama, graphs="off") == (tokens, [])


def test_a_failed_recording_raises_the_first_error_and_leaves_its_stream(monkeypatch):
    left, states = [], []
    numbers = SimpleNamespace(graphsafe_set_state=states.append)
    fresh = SimpleNamespace(graphsafe_get_state=lambda: "fresh")

    @contextlib.contextmanager
    def stream(which):
        try:
            yield
        finally:
            left.append(which)

    class Graph:
        def __init__(self, graph, pool, stream, capture_error_mode):
            assert capture_error_mode == "thread_local"

        def __enter__(self):
            """Begins."""

        def __exit__(self, *error):
            raise RuntimeError("operation failed due to a previous error during capture")

    for name, stand_in in {
        "Stream": lambda device: "its stream", "graph_pool_handle": lambda: "pool", "stream": stream,
        "mem_get_info": lambda device: (0, 0), "CUDAGraph": object, "graph": Graph,
        "default_generators": [numbers], "current_device": lambda: 0,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    recorder = graphs.recorder_of(torch.device("cuda"))
    monkeypatch.setattr(torch, "Generator", lambda device: fresh)
    with pytest.raises(ZeroDivisionError):
        recorder.record(lambda: 1 // 0)
    assert left == ["its stream"] and states == ["fresh"]


def test_a_cpu_has_no_graphs():
    assert graphs.recorder_of(torch.device("cpu")) is None
    assert not CpuBackend.captures
