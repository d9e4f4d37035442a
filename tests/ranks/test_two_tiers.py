"""The prefix cache in two tiers gives the greedy tokens of generate, over several grids of ranks.

Each grid is one launch. Small pools, so that prefixes leave the device and come back from the host's memory.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import matrix_run
import pytest
from launch import run_ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

from tiny_models import VOCAB, build, oracles, run_all, save

from ds_serve.config import Settings
from ds_serve.model.errors import ModelLoadError
from ds_serve.rank import build_local_engine

GRIDS = [(1, 1), (2, 1), (1, 2), (2, 2)]
LAYERS, BLOCK = 4, 16
BYTES_PER_BLOCK = LAYERS * 2 * 4 * 8 * BLOCK * 4  # K and V of 4 heads of 8, fp32: all ranks together
LAUNCH_S = 240


def _prompts() -> tuple[list[list[int]], list[int], dict[str, list[int]]]:
    """Prompts, their output lengths, and the indexes of those that are sent together."""
    rng = random.Random(5)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, VOCAB) for _ in range(count)]

    documents = [tokens(8 * BLOCK) for _ in range(8)]
    groups = {
        "main": [document + tokens(9 + 3 * each) for document in documents[:2] for each in range(3)],
        "others": [document + tokens(7 + 5 * each) for document in documents[2:] for each in range(2)],
        "heads": [document[: 4 * BLOCK + 3] for document in documents[:2]],
        "short": [document[:20] + tokens(1 + each % 3) for each, document in enumerate(documents[:6] * 2)],
    }
    prompts, lengths, indexes = [], [], {}
    for name, group in groups.items():
        indexes[name] = list(range(len(prompts), len(prompts) + len(group)))
        prompts += group
        lengths += len(group) * [20 if name == "short" else 8]
    return prompts, lengths, indexes


PROMPTS, LENGTHS, GROUPS = _prompts()
HALF = GROUPS["main"][:1]  # alone, so that the accounts are those of one request
PHASES = ["cold", "device", "others", "host", "others again", "heads", "half", "all"]
PHASE_PROMPTS = [
    GROUPS["main"], GROUPS["main"], GROUPS["others"], GROUPS["main"], GROUPS["others"], GROUPS["heads"], HALF,
    list(range(len(PROMPTS))),
]  # fmt: skip
VARIANTS = [
    {
        "name": "tiers",
        "phases": PHASE_PROMPTS,
        "settings": {
            "num_blocks": 40, "block_size": BLOCK, "max_num_seqs": 4, "max_num_batched_tokens": 64,
            "host_cache": 200 * BYTES_PER_BLOCK,
        },
    },
    {
        "name": "preempted",
        "phases": 2 * [GROUPS["short"]],
        "settings": {
            "num_blocks": 30, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32,
            "attention": "reference", "host_cache": 100 * BYTES_PER_BLOCK // 4, "host_checksums": True,
        },
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(folder, greedy continuations of PROMPTS by generate in fp32)."""
    llama = build("llama", num_hidden_layers=LAYERS)
    return save(llama, tmp_path_factory.mktemp("llama")), oracles(llama, PROMPTS, LENGTHS)


@pytest.fixture(scope="module", params=GRIDS, ids=lambda grid: f"tp{grid[0]}-pp{grid[1]}")
def record(request, model, tmp_path_factory):
    """What became of the variants on one grid."""
    tp, pp = request.param
    shape = {"tensor_parallel": tp, "pipeline_parallel": pp, "dtype": "float32", "all_reduce": "group"}
    case = {
        "name": "llama",
        "prompts": PROMPTS,
        "lengths": LENGTHS,
        "settings": {"model": model[0]} | shape,
        "variants": VARIANTS,
    }
    if tp * pp == 1:
        return matrix_run.run_case(case)
    folder = tmp_path_factory.mktemp("tiers")
    cases, results = folder / "cases.json", folder / "results.jsonl"
    cases.write_text(json.dumps([case]))
    run_ranks(Path(matrix_run.__file__), tp * pp, str(cases), str(results), timeout=LAUNCH_S)
    return json.loads(results.read_text())


def _new(run: dict, name: str, phase: str) -> int:
    """How much an account has grown in a phase."""
    at = PHASES.index(phase)
    return run["stats"][at][name] - (run["stats"][at - 1][name] if at else 0)


def _check(run: dict, phases: list[list[int]], wanted: list[list[int]]) -> None:
    for found, phase in zip(run["rounds"], phases, strict=True):
        assert found == [wanted[index] for index in phase]
    assert run["blocks_lost"] == run["copying"] == 0
    assert run["stats"][-1]["failed_copies"] == 0


@pytest.mark.timeout(LAUNCH_S + 60)
def test_tokens_are_those_of_generate_whatever_tier_a_prefix_comes_from(record, model):
    assert "error" not in record, record
    run = record["tiers"]
    _check(run, PHASE_PROMPTS, model[1])
    stats = run["stats"][-1]
    assert stats["num_host_blocks"] == 200
    assert stats["bytes_per_block"] == BYTES_PER_BLOCK
    document = 8 * BLOCK
    assert _new(run, "cached_tokens_host", "device") == 0
    assert _new(run, "cached_tokens", "device") >= 6 * document
    assert _new(run, "cached_tokens_host", "host") >= document
    assert _new(run, "loaded_blocks", "host") >= 8
    of_host = _new(run, "cached_tokens_host", "half")
    assert 0 < of_host < _new(run, "cached_tokens", "half")
    assert stats["stored_blocks"] > 0 and stats["num_loads"] > 0 and stats["load_s"] > 0


@pytest.mark.timeout(LAUNCH_S + 60)
def test_tokens_are_those_of_generate_with_preemption_and_checksums(record, model):
    assert "error" not in record, record
    run = record["preempted"]
    _check(run, 2 * [GROUPS["short"]], model[1])
    assert run["preemptions"] > 0
    assert run["stats"][-1]["cached_tokens_host"] > 0


# -- one rank, in this process -----------------------------------------------------------------------


def _start(model, **settings):
    return build_local_engine(Settings(model=model[0], dtype="float32", **VARIANTS[0]["settings"] | settings))


def _main_after_others(engine, model, before_return=lambda: None) -> None:
    for group in ("main", "others", "main"):
        prompts, lengths = ([each[index] for index in GROUPS[group]] for each in (PROMPTS, LENGTHS))
        assert run_all(engine, prompts, lengths) == [model[1][index] for index in GROUPS[group]]
        matrix_run.settled(engine)
        if group == "others":
            before_return()


def test_host_blocks_that_were_changed_are_computed_again(model):
    engine = _start(model, host_checksums=True)
    host_bytes = engine._loop._ranks.worker._copier._sums._rows

    def corrupt() -> None:
        host_bytes[::2, 5] ^= 1

    _main_after_others(engine, model, corrupt)
    stats = engine.stats()
    engine.close()
    engine.scheduler.check_integrity()
    assert stats.failed_copies > 0
    assert stats.num_free_blocks == stats.num_blocks


def test_an_error_of_the_copier_ends_the_engine_with_its_reason(model, monkeypatch):
    engine = _start(model)
    monkeypatch.setattr("ds_serve.worker.copier.neighbours", lambda pairs: 1 / 0)
    with pytest.raises(AssertionError, match="ZeroDivisionError: division by zero"):
        _main_after_others(engine, model)
    engine.close()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"host_cache": BYTES_PER_BLOCK - 1}, f"holds no block of {BYTES_PER_BLOCK} bytes on rank 0"),
        ({"host_cache": 2**60}, f"host_cache of {2**60} bytes is {2**60} for each of the 1 ranks here, and"),
        ({"prefix_caching": False}, "host_cache keeps prefixes, and prefix_caching is off"),
    ],
)
def test_a_host_cache_that_cannot_be_is_refused(model, settings, said):
    with pytest.raises(ModelLoadError, match=said):
        _start(model, **settings)
