"""All-reduce over peer memory on CUDA: values, 200 in a row, in a graph; its time beside NCCL's (pytest -s).

Run it where there are GPUs: python -m pytest tests/gpu/test_peer_cuda.py -s. One GPU shows the values, two
also what Grid makes of it and the times, from which parallel/peer.py's MAX_BYTES is to be set.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "ranks"))

from launch import run_ranks

SCRIPT = Path(__file__).with_name("peer_cuda_run.py")


def records(lines: list[str]) -> list[dict[str, int]]:
    print("\n".join(line for line in lines if " us" in line))
    return [json.loads(line)["wrong"] for line in lines if line.startswith("{")]


@pytest.mark.timeout(300)
def test_two_ranks_on_one_gpu():
    found = records(run_ranks(SCRIPT, 2, "one", timeout=240))
    assert found == [{"sizes": 0, "in a row": 0, "graph": 0}] * 2


@pytest.mark.timeout(300)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus():
    found = records(run_ranks(SCRIPT, 2, timeout=240))
    assert found == [{"sizes": 0, "in a row": 0, "graph": 0, "grid": 0}] * 2
