"""Models whose layers see a window only, in pools that could not hold whole sequences: generate's tokens."""

from __future__ import annotations

import os
import queue
from contextlib import contextmanager

import pytest
import torch
from tiny_models import build, drain, oracles, run_all, save

from ds_serve.attention.backends import select_backend
from ds_serve.attention.context import AttentionBatch
from ds_serve.attention.layout import KVLayout, LayerKV
from ds_serve.config import Settings
from ds_serve.messages import Request, SamplingParams
from ds_serve.rank import build_local_engine

ALL = pytest.mark.skipif(os.environ.get("DS_SERVE_TEST_ALL") != "1", reason="make test-all")
SLIDING, FULL = "sliding_attention", "full_attention"
MODELS = {
    "mistral": {"sliding_window": 20},
    "gemma2": {"sliding_window": 20, "num_hidden_layers": 4},
    "gemma3_text": {
        "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 20, "num_hidden_layers": 6,
        "layer_types": [SLIDING, SLIDING, FULL] * 2,
    },
    "gpt_oss": {"sliding_window": 20, "num_hidden_layers": 4},
    "llama4_text": {
        "head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1,
        "attention_chunk_size": 20, "num_hidden_layers": 4,
    },
    "qwen2": {
        "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1, "num_hidden_layers": 3,
    },
}  # fmt: skip
# How far each group's layers see.
WINDOWS = {
    "mistral": (20,),
    "gemma2": (0, 20),
    "gemma3_text": (0, 20, 20),
    "gpt_oss": (0, 20),
    "llama4_text": (0, 20, 20, 20),
    "qwen2": (0, 20, 20),
}


def prompt(name: int, length: int) -> list[int]:
    return [3 + (7 * name + 31 * name * position + position * position) % 150 for position in range(length)]


LONG = [prompt(name, length) for name, length in enumerate([150, 161, 30, 160])]
SHORT = [prompt(name, 1 + name % 5) for name in range(8)]


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """(architecture, model directory, the model)."""
    model = build(request.param, **MODELS[request.param])
    return request.param, save(model, tmp_path_factory.mktemp(request.param)), model


@contextmanager
def running(folder, **settings):
    """An engine; at the end its books are whole, and every block is free."""
    engine = build_local_engine(Settings(model=folder, max_num_seqs=8, **settings))
    try:
        yield engine
        engine.scheduler.check_integrity()
        assert engine.stats().num_free_blocks == engine.stats().num_blocks
    finally:
        engine.close()


def num_full(name: str) -> int:
    return sum(not reach for reach in WINDOWS[name])


@pytest.mark.parametrize("attention", ["cpu", pytest.param("reference", marks=ALL)])
def test_long_prompts_where_their_whole_kv_would_not_fit(case, attention):
    """Chunked, twice: the second time what is left of them in the cache is hit, holes and all."""
    name, folder, model = case
    lengths = [12] * len(LONG)
    wanted = oracles(model, LONG, lengths)
    whole = 11 * len(WINDOWS[name])  # blocks of 16 that one of the long ones takes without windows
    num_blocks = 22 * num_full(name) + 6 * (len(WINDOWS[name]) - num_full(name))
    with running(folder, attention=attention, num_blocks=num_blocks, max_num_batched_tokens=16) as engine:
        assert engine.info.windows == WINDOWS[name]
        assert num_blocks < 2 * whole
        assert run_all(engine, LONG, lengths) == wanted
        assert engine.stats().num_preemptions == 0
        last = LONG[-1]
        assert run_all(engine, [last], 12) == [wanted[-1]]
        assert engine.stats().cached_tokens >= 144
        longer = last + wanted[-1] + prompt(9, 20)
        assert run_all(engine, [longer], 5) == oracles(model, [longer], [5])
        assert engine.stats().cached_tokens >= 144 + 160


@pytest.mark.parametrize("steps_in_flight", [2, pytest.param(1, marks=ALL)])
def test_preempted(case, steps_in_flight):
    name, folder, model = case
    wanted = oracles(model, SHORT, [36] * len(SHORT))
    num_groups = len(WINDOWS[name])
    num_blocks = 14 * num_full(name) + 12 * (num_groups - num_full(name))
    few = {"num_blocks": num_blocks, "max_num_batched_tokens": 8, "block_size": 4, "attention": "reference"}
    with running(folder, steps_in_flight=steps_in_flight, **few) as engine:
        assert run_all(engine, SHORT, 36) == wanted
        assert engine.stats().num_preemptions > 0


def test_off_keeps_all_blocks(tmp_path):
    model = build("mistral", **MODELS["mistral"])
    folder, wanted = save(model, tmp_path), oracles(model, LONG[:1], [8])
    with running(folder, window_blocks="off", num_blocks=10) as engine:
        assert engine.info.windows == (0,)
        assert engine.info.max_model_len == 160
        assert run_all(engine, LONG[:1], 8) == wanted
    with running(folder, num_blocks=10, max_num_batched_tokens=16) as engine:
        assert engine.info.max_model_len == 512, "the model's"
        outputs = queue.SimpleQueue()
        params = SamplingParams(max_tokens=300, temperature=0.0)
        engine.submit(Request(id="long", prompt_token_ids=LONG[0], params=params), outputs.put)
        assert drain(outputs) == oracles(model, LONG[:1], [300])[0]


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("local", [{"window": 20}, {"chunk": 24}], ids=str)
def test_what_lies_where_an_entry_is_gone_is_never_read(name, local):
    """Two groups of layers; the second one's first entries point at a block of NaN."""
    layout = KVLayout((LayerKV(2, 16, 16), LayerKV(2, 16, 16, reach=24)), 16, torch.float32, groups=(0, 1))
    generator = torch.Generator().manual_seed(0)
    slab, backend = layout.allocate(12, "cpu"), select_backend("cpu", torch.float32, 16, name)
    start, end, hole = 72, 77, 11
    past = torch.randn(2, end, 2, 16, generator=generator)
    query = torch.randn(end, 4, 16, generator=generator)

    def run(begin, stop, table):
        positions = torch.arange(begin, stop)
        group = positions, torch.tensor([table]).int()
        batch = AttentionBatch(
            slab=slab,
            layout=layout,
            slot_mapping=positions + 16 * 5,
            query_start=torch.tensor([0, stop - begin]).int(),
            context_len=torch.tensor([stop]).int(),
            block_tables=torch.arange(5, 10).int()[None],
            positions=positions,
            num_tokens=stop - begin,
            more_groups=(group,),
        )
        k, v = past[:, begin:stop]
        return backend.forward(1, query[begin:stop], k, v, batch, scale=0.25, **local)

    wanted = run(0, end, [0, 1, 2, 3, 4])[start:]
    slab[hole] = float("nan")
    slab[0:3] = float("nan")  # given to somebody else
    found = run(start, end, [hole, hole, hole, 3, 4])
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not slab[5:10].any(), "group 0's blocks are not touched"
