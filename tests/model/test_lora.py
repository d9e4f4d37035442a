"""Adapters against peft: in one batch, each request gets the greedy tokens of its own adapter.

Bad and unsupported adapters are refused by name, before any weight is read.
"""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import CASES, EVERYTHING, MORE, NAMES, Served, adapt, make
from tiny_models import build, mixed_prompts, oracles, run_all, save
from tiny_quantised import KINDS, quantise
from transformers import AutoModelForCausalLM

from ds_serve.attention.builder import load_ops
from ds_serve.config import Settings
from ds_serve.model.adapter_files import read_adapters
from ds_serve.model.errors import ModelLoadError
from ds_serve.model.loader import load
from ds_serve.model.lora import Cuts
from ds_serve.model.repairs import Heads
from ds_serve.parallel.place import Place
from ds_serve.rank import build_local_engine

TEST_ALL = os.environ.get("DS_SERVE_TEST_ALL") == "1"
TESTED = [*CASES, *MORE] if TEST_ALL else list(CASES)
# Those that are not made dense; peft itself cannot tell the sizes of compressed-tensors' w4a16.
QUANTISED = [kind for kind, (_, _, dense) in KINDS.items() if not dense] if TEST_ALL else ["torchao-int8"]


@pytest.fixture(scope="module", params=TESTED)
def served(request, tmp_path_factory):
    return Served(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def start(engine_of):
    """Starts an engine of a Served, with a large pool unless settings say otherwise."""
    return lambda served, **settings: engine_of(**served.settings | {"num_blocks": 400} | settings)


def ask(engine, served):
    return run_all(engine, served.prompts, served.lengths, served.adapters)


def test_each_request_gets_its_own_adapters_tokens(served, start):
    """Chunked; then once more, now with every prefix in the cache of its own adapter."""
    engine = start(served, max_num_batched_tokens=29)
    assert ask(engine, served) == served.wanted
    before = engine.stats().cached_tokens
    assert ask(engine, served) == served.wanted
    hits = engine.stats().cached_tokens - before
    assert hits >= sum((len(prompt) - 1) // 16 * 16 for prompt in served.prompts)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Served("llama", tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_preempted_requests_keep_their_adapter(llama, start, steps_in_flight):
    engine = start(
        llama, num_blocks=24, block_size=4, max_num_batched_tokens=64, steps_in_flight=steps_in_flight
    )
    assert ask(engine, llama) == llama.wanted
    assert engine.stats().num_preemptions > 0


def test_a_prefix_is_not_found_across_adapters(llama, start):
    engine, prompt = start(llama), list(range(3, 52))
    for number, adapter in enumerate(["", *NAMES]):
        run_all(engine, [prompt], 2, [adapter])
        assert engine.stats().cached_tokens == number * 48
        run_all(engine, [prompt], 2, [adapter])
    assert engine.info.adapters == NAMES


def test_a_server_with_adapters_serves_the_model_itself_as_before(llama, start):
    with_, without = start(llama), start(llama, adapters={})
    assert run_all(with_, llama.prompts, 6) == run_all(without, llama.prompts, 6)


def test_an_unknown_adapter_is_refused_by_the_engine(llama, start):
    with pytest.raises(AssertionError, match="'it' is not loaded here; loaded: fr, de"):
        run_all(start(llama), [[5]], 2, ["it"])


def test_wrapped_layers_are_not_injected_and_the_report_says_why(tmp_path):
    wide = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    if load_ops() is None or not torch.ops.ds_serve.has_avx512_bf16():
        pytest.skip("the fused layers need AVX512-BF16")
    folder = save(build("qwen3", torch.bfloat16, **wide), tmp_path / "model")
    make("qwen3", tmp_path / "de", 1, **wide)
    report = load(Settings(model=folder, adapters={"de": str(tmp_path / "de")})).injection
    assert report.reasons == {"linear of class LinearWithAdapters": 1}
    assert report.injected == 4  # two layers, the last norm, the head


@pytest.mark.parametrize("kind", QUANTISED)
def test_adapters_of_a_quantised_model(kind, tmp_path, start):
    pytest.importorskip(KINDS[kind][0])
    folder = quantise(kind, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model = adapt(model, tmp_path / "de", 1, EVERYTHING | {"target_modules": ["q_proj", "o_proj", "up_proj"]})
    prompts = mixed_prompts(6)
    wanted = oracles(model, prompts, [6] * 6)
    served = SimpleNamespace(settings={"model": folder, "adapters": {"de": str(tmp_path / "de")}})
    engine = start(served)
    assert run_all(engine, prompts, 6, ["de"] * 6) == wanted
    assert run_all(engine, prompts, 6) != wanted


# -- refusals ----------------------------------------------------------------------------------


@pytest.fixture
def adapter(llama, tmp_path):
    """A copy of the first adapter's folder to spoil, and a way to change its configuration and tensors."""
    folder = tmp_path / "a"
    shutil.copytree(llama.settings["adapters"]["fr"], folder)

    def change(config=(), tensors=None):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(config)))
        if tensors is not None:
            found = load_file(folder / "adapter_model.safetensors")
            tensors(found)
            save_file(found, folder / "adapter_model.safetensors")
        return folder

    return change


def read(folder, architecture="llama"):
    return read_adapters({"fr": str(folder)}, lambda: build(architecture))


def test_a_good_adapter_is_read(adapter):
    [found] = read(adapter({"lora_dropout": 0.5, "revision": "main", "loftq_config": {}}))
    assert len(found.updates) == 9 and found.name == "fr"
    assert found.updates["model.layers.2.self_attn.o_proj"].scale == 2.0
    assert read_adapters({}, lambda: 1 / 0) == []


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"invented_tomorrow": 3}, "invented_tomorrow is 3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the model's own"),
        ({"auto_mapping": {"base_model_class": "GPT2LMHeadModel"}}, "was made for GPT2LMHeadModel, .* Llama"),
        ({"target_modules": ["q_proj", "frob"]}, "LlamaForCausalLM has no linear frob$"),
        ({"target_modules": r".*\.frob"}, "has no linear '.*frob'"),
        ({"target_modules": "(q_proj"}, "no regular expression"),
        ({"target_modules": None}, "has no linear None"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head, an embedding or the head"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens, an embedding or the head"),
        ({"target_modules": ["self_attn"]}, "no linear but LlamaAttention"),
        ({"exclude_modules": ["v_proj"]}, "has 6 tensors that adapter_config.json does not tell of"),
        ({"layers_to_transform": [0, 1]}, "has 6 tensors that"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, "lacks 6 tensors: .*k_proj.lora_A"),
        ({"r": 5}, r"lora_A.weight is \[4, 64\], and \[5, 64\] would fit"),
        ({"rank_pattern": {"0.*o_proj": 2}}, r"0.self_attn.o_proj.lora_A.weight is \[4, 64\], and \[2, 64\]"),
        ({"r": 0}, "rank 0"),
        ({"lora_alpha": "much"}, "alpha 'much'"),
    ],
)
def test_unsupported_adapters_are_refused_by_name(adapter, config, why):
    folder = adapter(config)
    with pytest.raises(ModelLoadError, match=rf"adapter 'fr' \({folder}\): .*{why}"):
        read(folder)


def rename(tensors):
    tensors["base_model.model.model.embed_tokens.weight"] = tensors.popitem()[1]


def to_int(tensors):
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 64).int()


@pytest.mark.parametrize(
    ("spoil", "why"), [(rename, "lacks 1 tensors"), (dict.clear, "lacks 18"), (to_int, "tensors of I32")]
)
def test_spoiled_tensors_are_refused(adapter, spoil, why):
    with pytest.raises(ModelLoadError, match=why):
        read(adapter({}, spoil))


def test_bad_folders_are_refused(adapter, tmp_path):
    folder = adapter()
    with pytest.raises(ModelLoadError, match="no directory with adapter_config.json"):
        read(tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        read(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="not JSON"):
        read(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelLoadError, match="no directory with adapter_model.safetensors"):
        read(folder)


def test_another_base_is_refused(adapter, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MistralForCausalLM"]}))
    with pytest.raises(ModelLoadError, match="made for MistralForCausalLM, and the model is Llama"):
        read(adapter({"auto_mapping": None, "base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(ModelLoadError, match="has no linear o_proj, q_proj, v_proj"):
        read(adapter({"base_model_name_or_path": "some/where"}), "gpt2")


def test_a_bad_adapter_ends_the_start_by_name(adapter, llama):
    def spoil(tensors):
        tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"][3, 1] = float("inf")

    bad = {"bad": str(adapter({}, spoil))}
    with pytest.raises(ModelLoadError, match=r"'bad': model\.layers\.1\.self_attn\.v_proj.* not finite"):
        build_local_engine(Settings(**llama.settings | {"adapters": llama.settings["adapters"] | bad}))


def test_what_cannot_be_cut_into_shards_is_refused():
    linear, a, b = torch.nn.Linear(64, 64), torch.ones(4, 64), torch.ones(64, 4)
    cuts = Cuts("model.layers", Heads.of(build("llama").config, Place(0, 2, 1)))
    with pytest.raises(ModelLoadError, match="not known how it is cut"):
        cuts.own("model.layers.0.self_attn.frob", linear, a, b)
    with pytest.raises(ModelLoadError, match=r"a part of \(32, 64\) does not fit the linear's of \(64, 64\)"):
        cuts.own("model.layers.0.self_attn.q_proj", linear, a, b)
    one_kv = build("falcon", multi_query=True, parallel_attn=True, new_decoder_architecture=False).config
    cuts = Cuts("transformer.h", Heads.of(one_kv, Place(0, 2, 1)))
    with pytest.raises(ModelLoadError, match="fewer key-value heads than the 2 tensor shards"):
        cuts.own("transformer.h.0.self_attention.query_key_value", linear, a, b)
