"""Compiled layers over tensor shards and pipeline stages: the tokens of transformers' generate."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from architectures import MIXED
from launch import run_ranks
from sharding_cases import MLA
from tiny_models import build, mixed_prompts, oracles, save

ALL = os.environ.get("DS_SERVE_TEST_ALL") == "1"
NUM_REQUESTS = 12
LENGTHS = [4 + (7 * index) % 17 for index in range(NUM_REQUESTS)]
PROMPTS = mixed_prompts(NUM_REQUESTS)
LAYERS = {"num_hidden_layers": 4}
SCRIPT = Path(__file__).with_name("compiled_run.py")
MODELS = {
    "llama": ("llama", LAYERS | {"attention_bias": True, "mlp_bias": True}),
    "mixtral": ("mixtral", LAYERS | {"num_local_experts": 4}),
    "qwen3": ("qwen3", LAYERS),
    "gemma3_text": ("gemma3_text", LAYERS | {"head_dim": 16} | MIXED),
    "phi3": ("phi3", LAYERS),
    "olmo2": ("olmo2", LAYERS),
    "gpt2": ("gpt2", {"n_layer": 4}),
    "deepseek_v3": ("deepseek_v3", LAYERS | MLA),
}
GRIDS = [(2, 1), (1, 2), (2, 2)] if ALL else [(2, 1), (1, 2)]
NAMES = {(2, 1): ["llama", "mixtral"], (1, 2): ["gemma3_text"]}


@pytest.mark.parametrize("tp,pp", GRIDS)
def test_tokens_of_generate(tp, pp, tmp_path):
    names = list(MODELS) if ALL else NAMES[tp, pp]
    cases, wanted = [], {}
    for name in names:
        kind, overrides = MODELS[name]
        model = build(kind, **overrides)
        cases.append(
            {
                "name": name,
                "prompts": PROMPTS,
                "lengths": LENGTHS,
                "settings": {
                    "model": save(model, tmp_path / name), "tensor_parallel": tp, "pipeline_parallel": pp,
                    "compile": "on", "num_blocks": 600,
                },
                "variants": [{"name": "once", "rounds": 1, "settings": {}}],
            }
        )  # fmt: skip
        with torch.inference_mode():
            wanted[name] = oracles(model, PROMPTS, LENGTHS)
    (tmp_path / "cases").write_text(json.dumps(cases))
    lines = run_ranks(
        Path(__file__).with_name("compiled_run.py"),
        tp * pp,
        str(tmp_path / "cases"),
        str(tmp_path / "results"),
    )
    records = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    for record, name in zip(records, names, strict=True):
        assert "error" not in record, (name, record)
        assert record["once"]["rounds"] == [wanted[name]], name
    told = [line for line in lines if " compiled " in line]
    assert len(told) == tp * pp * len(names)
    assert [line for line in lines if line.startswith("late")] == ["late graphs 0"] * tp * pp
    for line in told:  # each stage has half of four layers, or all
        assert line.split()[3] == str(4 // pp), line
