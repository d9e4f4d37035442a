"""The engine on a CUDA device (plain paged attention there, until it has a kernel): the tokens of generate.

Run it where there is a GPU: python -m pytest tests/gpu
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

from tiny_models import ARCHITECTURES, build, mixed_prompts, oracles, run_all, save

from ds_serve.config import Settings
from ds_serve.rank import build_local_engine

LENGTHS = [4 + (7 * index) % 17 for index in range(32)]


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_tokens_are_those_of_generate(architecture, tmp_path):
    model = build(architecture)
    folder, prompts = save(model, tmp_path), mixed_prompts(32)
    wanted = oracles(model, prompts, LENGTHS)
    engine = build_local_engine(
        Settings(model=folder, num_blocks=32, block_size=4, max_num_batched_tokens=64, device="cuda")
    )
    assert run_all(engine, prompts, LENGTHS) == wanted
    assert run_all(engine, prompts, LENGTHS) == wanted
    stats = engine.stats()
    engine.close()
    engine.scheduler.check_integrity()
    assert stats.num_preemptions > 0 and stats.cached_tokens > 0
    assert stats.num_free_blocks == stats.num_blocks
