"""All that is served, on a CUDA device in fp32 without compiled layers and graphs: the tokens of generate.

Run it where there is a GPU, in one process (DS_SERVE_TEST_ALL=1: every architecture):

    python -m pytest tests/gpu/test_models_cuda.py -q --tb=line -p no:warnings

Elsewhere see conftest.py. Copies between the tiers are timed: -s shows GB/s.
"""

from __future__ import annotations

import os
import queue
from contextlib import contextmanager

import pytest
import torch
import transformers
from architectures import SERVED, is_known, tiny
from test_window_tokens import LONG
from test_window_tokens import MODELS as WINDOWED
from tiny_models import build, mixed_prompts, oracles, run_all, save
from tiny_quantised import quantise
from transformers import AutoConfig, AutoModelForCausalLM

from ds_serve import checking
from ds_serve.config import Settings
from ds_serve.rank import build_local_engine
from ds_serve.worker.copier import Copier

ON_CPU = os.environ.get("DS_SERVE_TEST_CUDA") == "cpu"
if not ON_CPU and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

DEVICE = "cpu" if ON_CPU else "cuda"
PLAIN = {
    "device": DEVICE, "dtype": "float32", "attention": "reference", "compile": "off", "graphs": "off",
    "num_blocks": 200, "max_num_batched_tokens": 23,
}  # fmt: skip
PROMPTS = mixed_prompts(8)
LENGTHS = [2 + (5 * index) % 11 for index in range(8)]
SOME = [
    "bloom", "cohere_qk_norm", "deepseek_v3", "falcon_rw", "gemma3_text", "gpt_oss", "gptj", "llama4_text",
    "mpt", "olmo2", "opt", "phi3", "qwen3_moe",
]  # fmt: skip
NAMES = SERVED if os.environ.get("DS_SERVE_TEST_ALL") == "1" else SOME


@contextmanager
def running(**settings):
    """An engine; after its requests its books are whole and all blocks free."""
    engine = build_local_engine(Settings(**PLAIN | settings))
    try:
        assert engine.info.device.startswith(DEVICE)
        yield engine
        stats = engine.stats()
    finally:
        engine.close()
    engine.scheduler.check_integrity()
    assert stats.num_free_blocks == stats.num_blocks


@pytest.mark.parametrize("name", NAMES)
def test_each_architecture(name, tmp_path):
    if not is_known(name):
        pytest.skip(f"transformers {transformers.__version__} has no {name} that is right")
    model = tiny(name)
    with running(model=save(model, tmp_path)) as engine:
        assert run_all(engine, PROMPTS, LENGTHS) == oracles(model, PROMPTS, LENGTHS)


@pytest.mark.parametrize("latent_cache", ["auto", "off"])
def test_latents_and_whole_keys(latent_cache, tmp_path):
    model = tiny("deepseek_v3")
    with running(model=save(model, tmp_path), latent_cache=latent_cache) as engine:
        assert run_all(engine, PROMPTS, LENGTHS) == oracles(model, PROMPTS, LENGTHS)
        latent, whole = 4 * (16 + 8), 4 * 8 * (16 + 8 + 16)  # numbers of a token, in four layers
        assert engine.info.bytes_per_block == 16 * 4 * (latent if latent_cache == "auto" else whole)


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_in_a_pool_that_could_not_hold_whole_sequences(name, tmp_path):
    model = build(name, **WINDOWED[name])
    with running(model=save(model, tmp_path), max_num_batched_tokens=16) as engine:
        assert run_all(engine, LONG, 12) == oracles(model, LONG, [12] * len(LONG))
        assert any(engine.info.windows)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "qwen3", "mixtral"])
def test_adapters_beside_one_another(name, tmp_path):
    pytest.importorskip("peft", reason="adapters are made, and their answers given, by peft")
    from tiny_adapters import Served

    served = Served(name, tmp_path)
    with running(**served.settings) as engine:
        assert run_all(engine, served.prompts, served.lengths, served.adapters) == served.wanted


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_quantised_checkpoints(kind, tmp_path):
    """Of the methods that need no package: their weights become dense."""
    folder, prompts = quantise(kind, tmp_path), mixed_prompts(8, longest=40)
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = config.quantization_config | {"dequantize": True}
    oracle = AutoModelForCausalLM.from_pretrained(folder, config=config).eval()
    with running(model=folder) as engine:
        assert run_all(engine, prompts, 6) == oracles(oracle, prompts, [6] * 8)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "bloom", "gpt_oss"])
def test_check_finds_the_same_model(name, tmp_path):
    model = tiny(name)
    certificate = checking.check(Settings(**PLAIN | {"model": save(model, tmp_path)}))
    assert certificate.matches, certificate.table()
    assert certificate.device.startswith(DEVICE)


@pytest.mark.parametrize("checksums", [False, True])
def test_the_host_tier_gives_back_what_was_evicted(checksums, tmp_path):
    model, lengths = build("llama"), [4 + (7 * index) % 17 for index in range(32)]
    prompts = mixed_prompts(32)
    tier = {"host_cache": 2**25, "host_checksums": checksums, "num_blocks": 40, "block_size": 4}
    wanted = oracles(model, prompts, lengths)
    with running(model=save(model, tmp_path), **tier | {"max_num_batched_tokens": 64}) as engine:
        for _ in range(3):
            assert run_all(engine, prompts, lengths) == wanted
        assert engine.stats().loaded_blocks > 0


@pytest.mark.parametrize("scattered", [False, True])
def test_copies_of_2_mib_arrive_and_how_fast(scattered):
    """512 blocks each way; a real device moves 51 GB/s even where no two of them are neighbours."""
    count, elems = (8, 2**10) if ON_CPU else (512, 2**20)
    slab = torch.zeros(count, elems, dtype=torch.float16, device=DEVICE)
    host = torch.arange(count, dtype=torch.float32)[:, None].expand(count, elems).half().contiguous()
    results: queue.SimpleQueue = queue.SimpleQueue()
    copier = Copier(slab, host, 0, results.put, results.put)
    try:
        order = [(block, (block * 211 + 3) % count if scattered else block) for block in range(count)]
        for kind, pairs in (("load", order), ("store", [(there, here) for here, there in order])):
            for step in range(3):
                copier.start(step, *([pairs, []] if kind == "load" else [[], pairs]))
                result = results.get(timeout=60)
                assert not isinstance(result, BaseException), result
            moved = count * elems * 2
            print(f"\n{kind}, scattered {scattered}: {moved / result.seconds / 1e9:.1f} GB/s")
            if kind == "load":
                assert slab[[there for _, there in order], 0].tolist() == host[:, 0].tolist()
                wanted = host[:, 0].tolist()
                host.zero_()
        assert host[:, 0].tolist() == wanted and host[:, -1].tolist() == wanted
    finally:
        copier.close()
