"""What a plan says of each rank's weights is what ranks have loaded: only with DS_SERVE_TEST_ALL=1."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from architectures import tiny
from launch import run_ranks
from tiny_models import save

from ds_serve.config import Settings
from ds_serve.model.dry import dry_rank
from ds_serve.model.loader import read_config
from ds_serve.parallel.place import Place

BUFFERS = 256  # bytes at most of rotary frequencies, which a rank does not count among its parameters


@pytest.mark.skipif(os.environ.get("DS_SERVE_TEST_ALL") != "1", reason="DS_SERVE_TEST_ALL=1 runs it")
@pytest.mark.parametrize(("name", "tp", "pp"), [("mixtral", 2, 1), ("gpt_oss", 2, 2), ("olmo2", 3, 1)])
def test_planned_weights_are_loaded_ones(name, tp, pp, tmp_path):
    folder = save(tiny(name), tmp_path / "model")
    script = Path(__file__).parent / "memory_run.py"
    run_ranks(script, tp * pp, folder, str(tp), str(pp), str(tmp_path), timeout=120)
    settings = Settings(model=folder, tensor_parallel=tp, pipeline_parallel=pp, max_num_batched_tokens=32)
    for rank in range(tp * pp):
        loaded = json.loads((tmp_path / f"{rank}.json").read_text())["shard"]
        planned = dry_rank(settings, read_config(settings), Place(rank, tp, pp), 4).weight_bytes
        assert 0 <= planned - loaded <= BUFFERS
