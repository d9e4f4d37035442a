"""`ds-serve check` over ranks: each grid is one launch, of right models and of wrong ones.

A wrong head split and a permuted expert are named by their layer, on whichever stage and shard they are.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launch import run_ranks
from sharding_cases import EXPERTS, FUSED, Case
from tiny_models import build, save

SCRIPT = Path(__file__).with_name("check_run.py")
LAYERS = {"num_hidden_layers": 4}
MODELS = {
    "llama": Case("llama", LAYERS | {"tie_word_embeddings": True}),
    "mixtral": Case("mixtral", EXPERTS | LAYERS),
    "fused": Case("llama", FUSED["fused-llama"].overrides | LAYERS),
}
# grid -> (model, spoil, dtype) of one launch
WRONG = {
    (2, 1): [("llama", ["heads", 1], "float32"), ("fused", ["fused gate and up", 2], "bfloat16")],
    (1, 2): [("mixtral", ["experts", 3], "float32")],
    (2, 2): [("llama", ["heads", 2], "bfloat16"), ("mixtral", ["experts", 0], "float32")],
}
RIGHT = {
    (2, 1): [("mixtral", None, "float32")],
    (1, 2): [("llama", None, "float32")],
    (2, 2): [("fused", None, "bfloat16"), ("mixtral", None, "float32")],
}


@pytest.mark.parametrize("grid", WRONG, ids=lambda grid: f"tp{grid[0]}-pp{grid[1]}")
def test_right_models_match_and_wrong_layers_are_named(grid, tmp_path):
    tp, pp = grid
    cases = RIGHT[grid] + WRONG[grid]
    settings = []
    for index, (name, spoil, dtype) in enumerate(cases):
        model = build(MODELS[name].architecture, getattr(torch, dtype), **MODELS[name].overrides)
        if spoil:
            model.config.spoil = spoil
        settings.append(
            {
                "model": save(model, tmp_path / str(index)), "tensor_parallel": tp, "pipeline_parallel": pp,
                "num_blocks": 64, "all_reduce": "group",
            }
        )  # fmt: skip
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings))
    lines = run_ranks(SCRIPT, tp * pp, str(file))
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(found) == len(cases), lines
    for record, (_, spoil, _) in zip(found, cases, strict=True):
        assert "error" not in record, record
        names = [row["name"] for row in record["rows"]]
        assert names == ["embedding", *(f"layer {index}" for index in range(4)), "head"]
        assert [memory["rank"] for memory in record["memory"]] == list(range(tp * pp))
        if spoil is None:
            assert record["verdict"] == "match", record
            assert record["greedy"]["tokens"] == 128 and not record["greedy"]["mismatches"]
            continue
        fused = spoil[0].startswith("fused") and {row["done"] for row in record["rows"][1:5]} != {"fused"}
        if fused:
            pytest.skip("the fused layers need AVX512-BF16")
        assert record["verdict"] == "mismatch", record
        assert record["reason"].startswith(f"layer {spoil[1]} (")
        wrong = [row["name"] for row in record["rows"] if row["verdict"] == "local"]
        assert wrong == [f"layer {spoil[1]}"]
