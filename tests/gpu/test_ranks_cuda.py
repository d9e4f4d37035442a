"""Tensor and pipeline parallel on two CUDA devices over NCCL: the tokens of generate.

Run it where there are two GPUs: python -m pytest tests/gpu
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

if torch.cuda.device_count() < 2:
    pytest.skip("needs two CUDA devices", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
sys.path.insert(0, str(Path(__file__).parents[1] / "ranks"))

import launch
from test_matrix import LENGTHS, MODELS, PROMPTS, VARIANTS, models  # noqa: F401 (models is a fixture)


@pytest.mark.timeout(500)
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_tokens_are_those_of_generate(tp, pp, models, tmp_path):  # noqa: F811
    shape = {"tensor_parallel": tp, "pipeline_parallel": pp, "dtype": "float32", "device": "cuda"}
    cases = [
        {
            "name": name,
            "prompts": PROMPTS,
            "lengths": LENGTHS,
            "settings": {"model": models(name)[0]} | shape,
            "variants": VARIANTS,
        }
        for name in MODELS
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    results = tmp_path / "results.jsonl"
    launch.run_ranks(
        Path(launch.__file__).with_name("matrix_run.py"),
        2,
        str(tmp_path / "cases.json"),
        str(results),
        timeout=450,
    )
    failed = {}
    for record in map(json.loads, results.read_text().splitlines()):
        wanted = models(record["name"])[1]
        runs = [] if "error" in record else [*record["hits"]["rounds"], *record["preempted"]["rounds"]]
        if not runs or any(tokens != wanted for tokens in runs):
            failed[record["name"]] = record.get("error", "other tokens")
    assert not failed
