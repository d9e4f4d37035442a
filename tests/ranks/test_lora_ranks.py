"""Adapters over ranks: on every shard and stage its part of each, and the tokens that peft gives on one rank.

`make test` has four ranks, two shards of two stages, `make test-all` other grids and architectures too.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from launch import run_ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

from tiny_adapters import CASES, MORE, Served

LAUNCH_S = 400
ALL = [*CASES, *MORE]
TEST_ALL = os.environ.get("DS_SERVE_TEST_ALL") == "1"
WANTED = {(2, 2): ["llama", "phi3"]}
if TEST_ALL:
    WANTED = {(2, 1): ALL, (4, 1): ["llama", "gemma", "phi3"], (1, 2): ALL, (2, 2): ALL}

VARIANTS = [
    {"name": "hits", "rounds": 2, "settings": {"num_blocks": 400, "max_num_batched_tokens": 29}},
    {
        "name": "preempted",
        "rounds": 1,
        "settings": {"num_blocks": 24, "block_size": 4, "max_num_batched_tokens": 48},
    },
]


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """Makes a model and its adapters at their first use: architecture -> Served."""
    made: dict[str, Served] = {}

    def get(name: str) -> Served:
        if name not in made:
            made[name] = Served(name, tmp_path_factory.mktemp(name), num_prompts=6)
        return made[name]

    return get


@pytest.fixture(scope="session")
def records(served, tmp_path_factory):
    """Launches a grid at its first use; the records of its architectures by name."""
    done: dict[tuple[int, int], dict[str, dict]] = {}

    def get(grid: tuple[int, int]) -> dict[str, dict]:
        if grid not in done:
            done[grid] = launch(grid, {name: served(name) for name in WANTED[grid]}, tmp_path_factory)
        return done[grid]

    return get


def launch(grid, models: dict[str, Served], tmp_path_factory) -> dict[str, dict]:
    folder, (tp, pp) = tmp_path_factory.mktemp("lora"), grid
    shape = {"tensor_parallel": tp, "pipeline_parallel": pp, "all_reduce": "group", "dtype": "float32"}
    cases = [
        {
            "name": name,
            "prompts": each.prompts,
            "lengths": each.lengths,
            "adapters": each.adapters,
            "settings": each.settings | shape,
            "variants": VARIANTS if TEST_ALL or name == "llama" else VARIANTS[:1],
        }
        for name, each in models.items()
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    results = folder / "results.jsonl"
    script = Path(__file__).with_name("matrix_run.py")
    run_ranks(script, tp * pp, str(folder / "cases.json"), str(results), timeout=LAUNCH_S)
    return {record["name"]: record for record in map(json.loads, results.read_text().splitlines())}


@pytest.mark.timeout(LAUNCH_S + 60)
@pytest.mark.parametrize(
    ("grid", "name"),
    [
        pytest.param(grid, name, id=f"tp{grid[0]}-pp{grid[1]}-{name}")
        for grid, names in WANTED.items()
        for name in names
    ],
)
def test_tokens_equal_pefts(grid, name, served, records):
    record, wanted = records(grid)[name], served(name).wanted
    assert "error" not in record, record
    assert record["hits"]["rounds"] == [wanted] * 2
    assert record["hits"]["cached_tokens"] >= sum((len(each) - 1) // 16 * 16 for each in served(name).prompts)
    assert record["hits"]["blocks_lost"] == 0
    if "preempted" in record:
        assert record["preempted"]["rounds"] == [wanted]
        assert record["preempted"]["preemptions"] > 0
        assert record["preempted"]["blocks_lost"] == 0
