"""Replayed decode steps give the tokens of generate over shards and stages, collectives and all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from launch import run_ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

from tiny_models import build, mixed_prompts, oracles, save

PROMPTS = mixed_prompts(12, longest=30)
LENGTHS = [4 + (7 * index) % 17 for index in range(len(PROMPTS))]
LAUNCH_S = 240
VARIANTS = [
    {"name": "replayed", "rounds": 2, "settings": {"num_blocks": 40, "max_num_seqs": 9, "steps_in_flight": 3}}
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    llama = build("llama", num_hidden_layers=4)
    return save(llama, tmp_path_factory.mktemp("llama")), oracles(llama, PROMPTS, LENGTHS)


@pytest.mark.timeout(LAUNCH_S + 60)
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_tokens_are_those_of_generate(tp, pp, model, tmp_path):
    case = {
        "name": "llama",
        "prompts": PROMPTS,
        "lengths": LENGTHS,
        "settings": {
            "model": model[0], "tensor_parallel": tp, "pipeline_parallel": pp, "dtype": "float32",
            "all_reduce": "group",
        },
        "variants": VARIANTS,
    }  # fmt: skip
    cases, results = tmp_path / "cases.json", tmp_path / "results.jsonl"
    cases.write_text(json.dumps([case]))
    script = Path(__file__).parent / "graph_run.py"
    lines = run_ranks(script, tp * pp, str(cases), str(results), timeout=LAUNCH_S)
    record = json.loads(results.read_text())
    assert "error" not in record, record
    assert record["replayed"]["rounds"] == [model[1]] * 2
    counts = [int(line.partition(" ")[2]) for line in lines if line.startswith("replays ")]
    assert len(counts) == tp * pp and len(set(counts)) == 1 and counts[0] > 30
