"""All-reduce over peer memory: what goes there, what is left to the group, and what happens where it fails.

Between processes on CPU, with a file that they share in place of torch's symmetric memory (peer_run.py).
tests/gpu/test_peer_cuda.py has the real one.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launch import run_ranks
from test_matrix import LENGTHS, PROMPTS, VARIANTS, Saved

from ds_serve.parallel.peer import forbid_multicast

SCRIPT = Path(__file__).with_name("peer_run.py")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """(case, rank) -> what peer_run.py found there, on two stages of two shards."""
    lines = run_ranks(SCRIPT, 4, "sums", str(tmp_path_factory.mktemp("sums")))
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return {(record["case"], record["rank"]): record for record in found}


def test_small_tensors_are_summed_in_peer_memory_and_others_in_the_group(records):
    for rank in range(4):
        record = records["all", rank]
        assert record["connected"] and record["error"] is None and record["said"] == []
        assert record["wrong"] == 0
        assert record["taken"] > 20 and record["left"] > 4
        assert record["after"] == 0  # once it is disconnected


@pytest.mark.parametrize(
    ("case", "reason"),
    [("fails", "OSError: no memory can be mapped here"), ("wrong", "6 sums of a trial are wrong")],
)
def test_a_stage_one_of_whose_shards_fails_uses_the_group(records, case, reason):
    for rank in range(4):
        record, whole = records[case, rank], rank < 2  # rank 3 is a shard of the second stage
        assert record["connected"] == whole and record["after"] == 0
        warning = f"WARNING: stage 1 sums its shards over NCCL, not over peer memory: {reason}"
        assert record["said"] == ([warning] if rank == 2 else [])
        assert record["error"] == (None if whole else f"all_reduce: peer cannot be used: {reason}")


def test_on_a_cpu_it_is_refused(records):
    for rank in range(4):
        assert records["cpu", rank]["error"] == "all_reduce: peer cannot be used: the device is not CUDA"


def test_a_model_whose_shards_are_summed_so_gives_the_tokens_of_generate(tmp_path):
    model = Saved("llama", tmp_path / "model")
    settings = {"model": model.folder, "tensor_parallel": 2, "dtype": "float32", "all_reduce": "peer"}
    case = {
        "name": "llama",
        "prompts": PROMPTS,
        "lengths": LENGTHS,
        "settings": settings,
        "variants": VARIANTS[:1],
    }
    (tmp_path / "cases.json").write_text(json.dumps([case]))
    files = tmp_path / "cases.json", tmp_path / "results.jsonl"
    lines = run_ranks(SCRIPT, 2, "engine", str(tmp_path), *map(str, files))
    record = json.loads(files[1].read_text())
    assert "error" not in record, record
    assert all(tokens == model.wanted for tokens in record["hits"]["rounds"])
    calls = [json.loads(line)["calls"] for line in lines if line.startswith("{")]
    # Two in each of four layers, in each step.
    assert len(calls) == 2 and min(calls) >= 8 * record["hits"]["steps"]


@pytest.mark.parametrize("name", ["NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST"])
def test_multicast_is_switched_off_and_refused(name):
    off = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    environ = {"A": "b"}
    forbid_multicast(environ)
    assert environ == off | {"A": "b"}
    forbid_multicast(environ)
    with pytest.raises(ValueError, match=f"{name} is 2, but NVLink multicast must stay off"):
        forbid_multicast(off | {name: "2"})
