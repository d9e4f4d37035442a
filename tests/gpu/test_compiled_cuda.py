"""Compiled layers on a CUDA device: the tokens of generate in fp32, and logits in bf16 beside eager ones.

Inductor compiles each model here for half a minute or so. What a layer takes: benchmarks/gpu_layer.py.
"""

from __future__ import annotations

import gc
import time

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from architectures import LATENT, MIXED, ROUTED
from tiny_models import build, mixed_prompts, oracles, run_all, save

from ds_serve.attention.context import use_batch
from ds_serve.config import Settings
from ds_serve.model import compiled
from ds_serve.model.certificate import COMPILED
from ds_serve.model.loader import load
from ds_serve.model.parity import Probe, chunk
from ds_serve.rank import build_local_engine

TWO = {"num_hidden_layers": 2}
MODELS = {
    "llama": TWO | {"attention_bias": True, "mlp_bias": True},
    "qwen3": TWO,
    "gemma3_text": TWO | {"head_dim": 16} | MIXED | {"layer_types": MIXED["layer_types"][:2]},
    "phi3": TWO,
    "mixtral": TWO | {"num_local_experts": 4},
    "deepseek_v3": TWO | ROUTED | LATENT | {"n_routed_experts": 8, "n_group": 2},
}
PROMPTS = mixed_prompts(32)
LENGTHS = [4 + (7 * index) % 17 for index in range(32)]


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_generate(name, tmp_path, monkeypatch):
    backends, made = [], compiled._Backend.__init__

    def watched(self):
        made(self)
        backends.append(self)

    monkeypatch.setattr(compiled._Backend, "__init__", watched)
    model = build(name, **MODELS[name])
    wanted = oracles(model, PROMPTS, LENGTHS)
    engine = build_local_engine(Settings(model=save(model, tmp_path), num_blocks=600, compile="on"))
    try:
        assert run_all(engine, PROMPTS, LENGTHS) == wanted
    finally:
        engine.close()
    assert backends[0].num_graphs >= 2 and backends[0].num_late == 0


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3_text"])
def test_bf16_logits_are_near_the_eager_ones(name, tmp_path, monkeypatch):
    """Prints the seconds of a start with an empty cache of compiled code, and of one that finds it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64}
    folder = save(build(name, torch.bfloat16, **MODELS[name] | sizes), tmp_path / "model")
    logits = {}
    for how, mode in (("cold", "on"), ("warm", "on"), ("eager", "off")):
        torch._dynamo.reset()
        gc.collect()
        began = time.perf_counter()
        model = load(Settings(model=folder, compile=mode))
        print(f"\n{name} {how}: loaded in {time.perf_counter() - began:.1f} s", end="")
        done = {why for layer, why in model.injection.choices.items() if layer.startswith("layer")}
        assert (done == {COMPILED}) == (mode == "on"), done
        logits[how] = _logits(model)
        del model
    for how in ("cold", "warm"):
        difference = (logits[how] - logits["eager"]).norm(dim=-1) / logits["eager"].norm(dim=-1)
        assert difference.median() < 0.03, (how, difference)


def _logits(model) -> torch.Tensor:
    """Of 200 tokens in one step, then of single ones."""
    device, steps = model.device, [(0, 200), (200, 201), (201, 202)]
    probe, slab, found = Probe.of(model.stage, device, 202), model.layout.allocate(16, device), []
    for start, end in steps:
        with torch.inference_mode(), use_batch(chunk(model.layout, slab, start, end)):
            found.append(probe.run(model.stage, start, end).float())
    return torch.cat(found)
