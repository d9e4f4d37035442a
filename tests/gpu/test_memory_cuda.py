"""Memory on a CUDA device: as much is in use as the settings say, a step fits beside KV, a plan foretells it.

Run it where there is a GPU: python -m pytest -s tests/gpu/test_memory_cuda.py. The model has the shape of
Llama-3.1-8B with fewer layers. Each engine runs in a process of its own, which is this file as a script:

    test_memory_cuda.py MODEL '{"device_memory_utilization": 0.5}'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if __name__ != "__main__" and (not torch.cuda.is_available() or "DS_SERVE_TEST_CUDA" in os.environ):
    pytest.skip("needs a CUDA device with memory of its own", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

from deepspeed.accelerator import get_accelerator
from tiny_models import run_all
from transformers import AutoModelForCausalLM, LlamaConfig

from ds_serve.config import Settings
from ds_serve.planning import Machine, make_plan
from ds_serve.rank import build_local_engine

CONFIG = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=4, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, dtype="bfloat16",
)  # fmt: skip
STARTS_S = 300  # kernels may be compiled
GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape_of_8b")
    with torch.device("cuda"):
        AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).save_pretrained(path)
    torch.cuda.empty_cache()
    return str(path)


def engine(folder: str, **settings) -> subprocess.CompletedProcess:
    command = [sys.executable, __file__, folder, json.dumps(settings)]
    return subprocess.run(command, capture_output=True, text=True, timeout=STARTS_S)


def found_by(folder: str, **settings) -> dict:
    done = engine(folder, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(STARTS_S)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_as_much_is_in_use_as_the_share_says_and_no_more(share, folder):
    others = torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]
    found = found_by(folder, device_memory_utilization=share)
    print(f"share {share}: {found} (before: {others / GIB:.2f} GiB by others)")
    assert found["used"] <= (share + 0.005) * found["total"]
    assert found["used"] >= (share - 0.02) * found["total"]


@pytest.mark.timeout(STARTS_S)
def test_more_for_kv_than_there_is_is_refused_with_the_numbers(folder):
    total = torch.cuda.mem_get_info()[1]
    done = engine(folder, kv_cache_memory=total)
    assert done.returncode == 1
    assert "ModelLoadError" in done.stderr and f"KV is to have {total} bytes" in done.stderr
    assert "Give KV less" in done.stderr


@pytest.mark.timeout(STARTS_S)
def test_a_plan_foretells_what_the_allocator_gives(folder):
    plan = make_plan(Settings(model=folder), Machine.of(Settings(model=folder), None))
    found = found_by(folder)
    [share] = plan.shares
    print(f"planned {share}; {plan.blocks} blocks; found {found}")
    assert plan.fits
    assert abs(found["weights"] - share.weights) <= 0.01 * share.weights
    kv = found["num_blocks"] * share.kv_bytes_per_block
    assert abs(kv - share.kv) <= 0.03 * found["total"]


def main(folder: str, settings: str) -> None:
    """Serves the largest steps that there may be, then prints what is in use, in bytes."""
    weights = {}
    from ds_serve.worker import worker as module

    usual = module.kv_room

    def watched(*args):
        weights["bytes"] = torch.cuda.memory_allocated()
        return usual(*args)

    module.kv_room = watched
    running = build_local_engine(Settings(model=folder, max_num_seqs=64, **json.loads(settings)))
    prompts = [[1 + (7 * index + place) % 1000 for place in range(1024)] for index in range(64)]
    run_all(running, prompts, 8, temperature=1.0, top_p=0.9, presence_penalty=1.0)
    free, total = torch.cuda.mem_get_info()
    print(
        json.dumps(
            {
                "total": total,
                "used": total - free,
                "weights": weights["bytes"],
                "num_blocks": running.info.num_blocks,
                "max_model_len": running.info.max_model_len,
                "peak": get_accelerator().max_memory_allocated(),
            }
        )
    )
    running.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
