"""How much memory a rank takes while it loads its part of a model: hardly more than that part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from launch import run_ranks
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

MIB = 1 << 20
LAYERS_A_FILE = 4
CONFIG = LlamaConfig(
    hidden_size=2048, intermediate_size=5632, num_hidden_layers=10, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=16384, max_position_embeddings=512, dtype="bfloat16",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A directory with 1 GB of bf16 in several safetensors files; each matrix is part of one noise."""
    folder = tmp_path_factory.mktemp("large")
    CONFIG.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(CONFIG).named_parameters()}
    largest = max(shape.numel() for shape in shapes.values())
    noise = torch.empty(largest, dtype=torch.bfloat16).normal_(std=0.02)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in shapes.items():
        index = name.split(".layers.")[-1].split(".")[0]
        file = f"model-{int(index) // LAYERS_A_FILE if index.isdigit() else 'rest'}.safetensors"
        tensor = (
            torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else noise[: shape.numel()].view(shape)
        )
        files.setdefault(file, {})[name] = tensor.clone()
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 10**9
    yield str(folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_a_rank_takes_little_more_than_its_shard(checkpoint, tmp_path, tp, pp):
    """In anonymous memory above that of the bare imports, at the peak, layers fused where they can be."""
    script = Path(__file__).parent / "memory_run.py"
    run_ranks(script, tp * pp, checkpoint, str(tp), str(pp), str(tmp_path), timeout=120)
    for rank in range(tp * pp):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        taken = found["peak"] - found["before"]
        print(f"tp {tp} x pp {pp}, rank {rank}: {taken // MIB} MiB for {found['shard'] // MIB} MiB; {found}")
        assert found["shard"] > 0.4e9
        assert taken <= 1.25 * found["shard"] + 200 * MIB, found
