"""Quantised checkpoints over ranks: all in stages, in tensor shards those whose weights become dense."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
from launch import run_ranks
from tiny_models import mixed_prompts, oracles
from tiny_quantised import KINDS, largest_gap, quantise
from transformers import AutoModelForCausalLM

PROMPTS = mixed_prompts(6, longest=40)
LENGTHS = [6] * len(PROMPTS)
BOUND = 0.01  # as in tests/model/test_quantised.py
PART = {(1, 2): ["torchao-int8", "compressed-tensors-w8a8"], (2, 1): ["compressed-tensors-w4a16", "fp8"]}


@pytest.mark.parametrize("grid", PART)
def test_greedy_tokens_are_transformers_own(grid, tmp_path):
    kinds = PART[grid]
    if os.environ.get("DS_SERVE_TEST_ALL") == "1":
        kinds = [kind for kind in KINDS if grid[0] == 1 or KINDS[kind][2]]
    kinds = [kind for kind in kinds if importlib.util.find_spec(KINDS[kind][0])]
    if not kinds:
        pytest.skip("no package of these methods is installed")
    folders = {kind: quantise(kind, tmp_path / kind) for kind in kinds}
    settings = {"tensor_parallel": grid[0], "pipeline_parallel": grid[1], "all_reduce": "group"}
    cases = [
        {
            "name": kind,
            "prompts": PROMPTS,
            "lengths": LENGTHS,
            "settings": {"model": folder} | settings,
            "variants": [
                {"name": "all", "rounds": 1, "settings": {"num_blocks": 64, "max_num_batched_tokens": 32}}
            ],
        }
        for kind, folder in folders.items()
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).parent / "matrix_run.py"
    run_ranks(script, grid[0] * grid[1], str(tmp_path / "cases.json"), str(tmp_path / "results"))
    records = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    assert [record["name"] for record in records] == kinds
    for record in records:
        assert "error" not in record, record
        (found,) = record["all"]["rounds"]
        model = AutoModelForCausalLM.from_pretrained(folders[record["name"]]).eval()
        if KINDS[record["name"]][1]:
            assert largest_gap(model, PROMPTS, found) < BOUND, record["name"]
        else:
            assert found == oracles(model, PROMPTS, LENGTHS), record["name"]
