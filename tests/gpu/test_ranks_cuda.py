"""Tensor and pipeline parallel on two CUDA devices: the tokens of generate, over NCCL and over peer memory.

Run it where there are two GPUs: python -m pytest tests/gpu
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

if torch.cuda.device_count() < 2:
    pytest.skip("needs two CUDA devices", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
sys.path.insert(0, str(Path(__file__).parents[1] / "ranks"))

from test_matrix import MODELS, launch_grid, models  # noqa: F401 (models is a fixture)


@pytest.mark.timeout(500)
@pytest.mark.parametrize(("grid", "all_reduce"), [((2, 1), "peer"), ((2, 1), "group"), ((1, 2), "auto")])
def test_tokens_are_those_of_generate(grid, all_reduce, models, tmp_path):  # noqa: F811
    settings = {"device": "cuda", "all_reduce": all_reduce}
    records = launch_grid(grid, settings, list(MODELS), models, tmp_path)
    assert records.keys() == MODELS.keys()
    failed = {}
    for name, record in records.items():
        wanted = models(name).wanted
        runs = [] if "error" in record else [*record["hits"]["rounds"], *record["preempted"]["rounds"]]
        if not runs or any(tokens != wanted for tokens in runs):
            failed[name] = record.get("error", "other tokens")
    assert not failed
