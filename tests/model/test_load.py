"""Loading: what is read, how often, and what is refused with a sentence."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import safetensors
import torch
from tiny_models import build, mixed_prompts, oracle, run_all, save
from transformers import AutoConfig, AutoModelForCausalLM

from ds_serve.attention.interface import UnsupportedModelError
from ds_serve.config import Settings
from ds_serve.model.loader import ModelLoadError, load
from ds_serve.rank import build_local_engine


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save(build("llama"), tmp_path_factory.mktemp("llama"))


def test_goes_through_deepspeed_and_reads_each_tensor_once(llama, monkeypatch):
    import deepspeed
    import transformers.modeling_utils as modeling

    reads: Counter[str] = Counter()
    initialised = []
    real_open, real_init = safetensors.safe_open, deepspeed.init_inference

    class Counting:
        def __init__(self, *args, **kwargs):
            self.file = real_open(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def get_slice(self, name):
            reads[name] += 1
            return self.file.get_slice(name)

        def get_tensor(self, name):
            reads[name] += 1
            return self.file.get_tensor(name)

        def __getattr__(self, name):
            return getattr(self.file, name)

    def init(model, **kwargs):
        initialised.append(kwargs)
        return real_init(model, **kwargs)

    monkeypatch.setattr(modeling, "safe_open", Counting)
    monkeypatch.setattr(deepspeed, "init_inference", init)
    model = load(Settings(model=llama))
    with real_open(Path(llama) / "model.safetensors", "pt") as file:
        assert reads == Counter(file.keys())
    assert len(initialised) == 1 and not initialised[0]["replace_with_kernel_inject"]
    assert all(parameter.device.type == "cpu" for parameter in model.stage.module.parameters())


def test_dtype_is_the_checkpoints_unless_asked(llama):
    assert load(Settings(model=llama)).dtype == torch.float32
    assert load(Settings(model=llama, dtype="bfloat16")).dtype == torch.bfloat16


def test_every_tensor_is_transformers_own(tmp_path):
    """In half precision too, where DeepSpeed would cast rotary frequencies: long prompts then go wrong."""
    folder = save(build("llama", torch.bfloat16), tmp_path)
    wanted = tensors(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))
    found = tensors(load(Settings(model=folder, injection="off")).stage.module)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)  # dtypes too
    assert {torch.bfloat16, torch.float32} == {tensor.dtype for tensor in found.values()}


def tensors(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def test_a_missing_directory_and_other_formats_are_refused(tmp_path):
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        load(Settings(model=str(tmp_path / "none")))
    model = build("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="safetensors"):
        load(Settings(model=str(tmp_path)))


def test_a_checkpoint_that_lacks_tensors_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save(build("llama"), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"layers\.1\.mlp\.up_proj"):
        load(Settings(model=str(tmp_path)))


@pytest.mark.parametrize(
    ("architecture", "config", "words"),
    [
        ("mamba", {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, "state"),
        (
            "codegen",
            {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
            "AttentionInterface",
        ),
        ("t5", {"vocab_size": 60, "d_model": 32, "d_ff": 32, "num_layers": 2, "num_heads": 4}, "encoder"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        (
            "lfm2",
            {
                "vocab_size": 60, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 4, "layer_types": ["conv", "full_attention"],
            },
            "conv",
        ),
    ],
)  # fmt: skip
def test_models_that_cannot_be_paged_are_refused(architecture, config, words, tmp_path):
    if architecture == "llama":
        model = build("llama", **config)
    elif architecture == "t5":
        from transformers import T5Config, T5ForConditionalGeneration

        model = T5ForConditionalGeneration(T5Config(**config))
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **config))
    with pytest.raises(UnsupportedModelError, match=words):
        load(Settings(model=save(model, tmp_path)))


def test_a_model_whose_paged_logits_differ_is_refused(llama, monkeypatch):
    """The probe at load catches what no flag tells: here, attention that forgets its scaling."""
    from ds_serve.attention.reference import ReferenceBackend

    right = ReferenceBackend.forward

    def wrong(self, *args, scale, **kwargs):
        return right(self, *args, scale=2 * scale, **kwargs)

    monkeypatch.setattr(ReferenceBackend, "forward", wrong)
    with pytest.raises(UnsupportedModelError, match="differ"):
        load(Settings(model=llama, attention="reference"))


def test_longrope_is_frozen_by_the_longest_length(tmp_path):
    """Short and long requests in one batch do not change each other's positions."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    }  # fmt: skip
    folder = save(build("llama", rope_parameters=rope), tmp_path)
    prompts = mixed_prompts(8, longest=30)
    short = AutoModelForCausalLM.from_pretrained(folder).eval()
    wanted = [oracle(short, prompt, 2) for prompt in prompts]
    engine = build_local_engine(Settings(model=folder, num_blocks=64, max_model_len=32))
    assert run_all(engine, prompts, 2) == wanted
    engine.close()
    engine = build_local_engine(Settings(model=folder, num_blocks=64, max_model_len=128))
    alone = [run_all(engine, [prompt], 2)[0] for prompt in prompts]
    assert run_all(engine, [*prompts, [5] * 100], 2)[:8] == alone
    engine.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_model_len": 600}, "512"),
        ({"max_model_len": 200, "num_blocks": 4}, "num_blocks"),
        ({"kv_cache_memory": 10}, "block"),
        ({"device": "cuda"}, "cuda"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(llama, settings, words):
    with pytest.raises(ModelLoadError, match=words):
        build_local_engine(Settings(model=llama, **settings))


def test_a_small_pool_shortens_the_longest_request(llama):
    engine = build_local_engine(Settings(model=llama, num_blocks=4))
    assert engine.info.max_model_len == 64
    engine.close()


def test_remote_code_is_not_run_unless_asked(tmp_path):
    save(build("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelLoadError, match="trust_remote_code"):
        load(Settings(model=str(tmp_path)))
    assert not (tmp_path / "ran").exists()
