"""Prints docs/quantised.md's table: each kind of quantised checkpoint on one rank, beside transformers.

    python scripts/quantised_table.py

Makes random checkpoints (tests/model/tiny_quantised.py), loads each, and compares logits of paged attention
and greedy tokens with those of transformers on the same checkpoint. fp32, CPU.
"""

from __future__ import annotations

import operator
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "model"))

from tiny_models import mixed_prompts, oracles, run_all
from tiny_quantised import KINDS, largest_gap, original, quantise

from ds_serve.attention.context import use_batch
from ds_serve.config import Settings
from ds_serve.model.loader import LoadedModel, load
from ds_serve.model.parity import NUM_TOKENS, Probe, _chunk
from ds_serve.rank import build_local_engine

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
PROMPTS = mixed_prompts(16)
LENGTHS = [8] * len(PROMPTS)


def held_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a parameter with its scales, whatever class it is of."""
    if hasattr(tensor, "tensor_data_names"):  # torchao
        return sum(held_bytes(getattr(tensor, name)) for name in tensor.tensor_data_names)
    state = getattr(tensor, "quant_state", None)  # bitsandbytes
    return tensor.nbytes + (state.absmax.nbytes if state is not None else 0)


def largest_difference(loaded: LoadedModel, model: torch.nn.Module) -> float:
    """Of logits, over the largest logit."""
    device = torch.device("cpu")
    probe = Probe.of(loaded.stage, device)
    slab = loaded.layout.allocate(-(-NUM_TOKENS // loaded.layout.block_size) + 1, device)
    with torch.inference_mode(), use_batch(_chunk(loaded.layout, slab, 0, NUM_TOKENS)):
        found = probe.run(loaded.stage)
    with torch.inference_mode():
        wanted = model(probe.ids).logits[0]
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def row(kind: str, folder: Path) -> str:
    path = quantise(kind, folder, **SIZES)
    loaded = load(Settings(model=path))
    held = sum(held_bytes(parameter) for parameter in loaded.stage.module.parameters())
    dense = sum(parameter.nbytes for parameter in original(kind, **SIZES).parameters())
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    engine = build_local_engine(Settings(model=path, num_blocks=256, max_num_batched_tokens=64))
    found = run_all(engine, PROMPTS, LENGTHS)
    engine.close()
    wanted = oracles(model, PROMPTS, LENGTHS)
    same = sum(map(operator.eq, found, wanted))
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return (
        f"| {kind} | {stored / dense:.0%} | {held / dense:.0%} | {largest_difference(loaded, model):.0e} "
        f"| {same} of {len(PROMPTS)} | {largest_gap(model, PROMPTS, found):.1g} |"
    )


def main() -> None:
    print("| checkpoint | file | weights in memory | largest logit difference | same answers | largest gap |")
    print("|---|---|---|---|---|---|")
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            print(row(kind, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
