"""Stages of a cut model, run one after another in this process, against the whole model."""

from __future__ import annotations

from collections import Counter

import pytest
import safetensors
import torch
from architectures import tiny
from test_attention_interface import ragged
from tiny_models import VOCAB, build, save
from transformers import AutoConfig, AutoModelForCausalLM

from ds_serve.attention.builder import load_ops
from ds_serve.attention.context import use_batch
from ds_serve.attention.interface import UnsupportedModelError
from ds_serve.config import Settings
from ds_serve.model.loader import LoadedModel, ModelLoadError, load
from ds_serve.model.stage import cut_points, stack_name
from ds_serve.parallel.grid import Grid
from ds_serve.parallel.place import Place

MODELS = {
    "llama": {},
    "llama_tied": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": {},
    "gemma2": {},
    "gpt2": {},
    "gpt_oss": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16,
    },
}  # fmt: skip
FUSABLE = {"num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 32: what the fused layers take


def load_stages(folder: str, stages: int, **settings) -> list[LoadedModel]:
    settings = Settings(model=folder, pipeline_parallel=stages, **settings)
    return [load(settings, Grid(Place(rank, 1, stages))) for rank in range(stages)]


def run(models: list[LoadedModel], prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits [length, V] of two prompts, through all stages in three packed steps."""
    slabs = [model.layout.allocate(8, "cpu") for model in models]
    tables, found = ([3, 5, 1], [7, 2]), ([], [])
    for step in ([(0, 0, 18)], [(0, 18, 19), (1, 0, 12)], [(1, 12, 20), (0, 19, 37)]):
        ids = torch.cat([prompts[s][start:end] for s, start, end in step])[None]
        rows, hidden = [(start, end, tables[s]) for s, start, end in step], None
        for model, slab in zip(models, slabs, strict=True):
            batch = ragged(rows, model.layout, slab)
            batch.sampled = torch.arange(ids.shape[1])
            with torch.inference_mode(), use_batch(batch):
                hidden = model.stage(ids, batch.positions, batch.sampled, hidden)
        for (s, start, end), part in zip(step, hidden.split([e - b for _, b, e in step]), strict=True):
            assert len(part) == end - start
            found[s].append(part)
    return [torch.cat(parts) for parts in found]


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in (37, 20)]


@pytest.fixture(scope="module", params=list(MODELS))
def case(request, tmp_path_factory):
    """(model, its directory) in fp32."""
    model = build(request.param.removesuffix("_tied"), **MODELS[request.param])
    return model, save(model, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("stages", [2, 3])
def test_stages_one_after_another_are_the_whole_model(case, stages):
    model, folder = case
    models = load_stages(folder, stages)
    for found, ids in zip(run(models, prompts()), prompts(), strict=True):
        with torch.inference_mode():
            wanted = model(ids[None], use_cache=False).logits[0]
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert [layer for each in models for layer in each.stage.layers] == list(range(3))


@pytest.mark.parametrize("stages", [2, 3])
def test_a_stage_holds_its_own_parameters_only(case, stages):
    """Also: a tied weight is on the first and on the last stage, and there the head's alone."""
    model, folder = case
    held: Counter[str] = Counter()
    for loaded in load_stages(folder, stages):
        parameters = dict(loaded.stage.module.named_parameters())
        assert all(parameter.device.type == "cpu" for parameter in parameters.values())
        held.update(parameters.keys())
        layers = {name.split(".layers.")[-1].split(".h.")[-1].split(".")[0] for name in parameters}
        assert {int(index) for index in layers if index.isdigit()} == set(loaded.stage.layers)
    assert held == Counter(name for name, _ in model.named_parameters(remove_duplicate=False))


def test_a_stage_reads_its_own_tensors_only_and_once(tmp_path, monkeypatch):
    import transformers.modeling_utils as modeling

    folder, reads, real_open = save(build("llama"), tmp_path), Counter(), safetensors.safe_open

    class Slice:
        def __init__(self, name, slice_):
            self.name, self.slice = name, slice_

        def __getitem__(self, index):
            reads[self.name] += 1
            return self.slice[index]

        def __getattr__(self, name):
            return getattr(self.slice, name)

    class File:
        def __init__(self, *args, **kwargs):
            self.file = real_open(*args, **kwargs)

        def get_slice(self, name):
            return Slice(name, self.file.get_slice(name))

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(modeling, "safe_open", File)
    for rank in range(2):
        reads.clear()
        loaded = load(Settings(model=folder, pipeline_parallel=2), Grid(Place(rank, 1, 2)))
        assert reads == Counter(name for name, _ in loaded.stage.module.named_parameters())


def test_stages_balance_parameters_unless_told_otherwise(tmp_path):
    folder = save(build("llama", num_hidden_layers=6), tmp_path)
    assert [loaded.stage.num_layers for loaded in load_stages(folder, 2)] == [3, 3]
    models = load_stages(folder, 3, stage_layers=[1, 3, 2])
    assert [loaded.stage.first_layer for loaded in models] == [0, 1, 4]
    assert [loaded.layout.first_layer for loaded in models] == [0, 1, 4]
    assert [len(loaded.layout.layers) for loaded in models] == [1, 3, 2]
    # A heavy head, as of a small model with a large vocabulary, leaves the last stage fewer layers.
    assert cut_points([10, 10, 10, 10, 10, 30], 2, None) == [range(4), range(4, 6)]
    assert cut_points([10, 1, 1, 90], 3, None)[-1] == range(3, 4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pipeline_parallel": 2, "stage_layers": [1, 1]}, "stage_layers 1,1 are 2 layers.* has 3"),
        ({"stage_layers": [2]}, "stage_layers 2 are 2 layers.* has 3"),
        ({"pipeline_parallel": 4}, "pipeline_parallel is 4.* 3 layers"),
        ({"pipeline_parallel": 4, "stage_layers": [1, 1, 1, 1]}, "stage_layers 1,1,1,1 are 4 layers"),
    ],
)
def test_stages_that_do_not_fit_the_layers_are_refused(tmp_path, settings, words):
    settings = Settings(model=save(build("llama"), tmp_path), **settings)
    for rank in range(settings.world_size):
        with pytest.raises(ModelLoadError, match=words):
            load(settings, Grid(Place(rank, 1, settings.world_size)))


def test_a_lacking_tensor_is_told_by_the_stage_that_wants_it(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save(build("llama"), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = Settings(model=folder, pipeline_parallel=2)
    load(settings, Grid(Place(0, 1, 2)))
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight"):
        load(settings, Grid(Place(1, 1, 2)))


def test_a_model_whose_layers_read_more_than_one_hidden_state_is_refused(tmp_path):
    config = AutoConfig.for_model(
        "gemma3n_text", vocab_size=VOCAB, vocab_size_per_layer_input=VOCAB, hidden_size=64, head_dim=16,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        hidden_size_per_layer_input=16, num_kv_shared_layers=0, altup_num_inputs=2, laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    folder = save(AutoModelForCausalLM.from_config(config), tmp_path)
    for rank in range(2):
        with pytest.raises(UnsupportedModelError, match="pipeline_parallel=1"):
            load(Settings(model=folder, pipeline_parallel=2), Grid(Place(rank, 1, 2)))


def test_a_model_whose_layers_read_the_embeddings_besides_is_refused(tmp_path, monkeypatch):
    """Later stages have none: what stands for them is not a number, which then shows."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    right = LlamaRotaryEmbedding.forward

    def reads_embeddings(self, x, position_ids):
        cos, sin = right(self, x, position_ids)
        return cos + 0.1 * x.mean(-1, keepdim=True), sin

    settings = Settings(model=save(build("llama"), tmp_path), pipeline_parallel=2)
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", reads_embeddings)
    load(settings, Grid(Place(0, 1, 2)))
    with pytest.raises(UnsupportedModelError, match="read the token embeddings"):
        load(settings, Grid(Place(1, 1, 2)))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_probe_at_load_watches_each_stage(tmp_path, monkeypatch, rank):
    from ds_serve.attention.reference import ReferenceBackend

    right = ReferenceBackend.forward

    def wrong(self, *args, scale, **kwargs):
        return right(self, *args, scale=2 * scale, **kwargs)

    settings = Settings(model=save(build("llama"), tmp_path), pipeline_parallel=2, attention="reference")
    monkeypatch.setattr(ReferenceBackend, "forward", wrong)
    with pytest.raises(UnsupportedModelError, match="differ"):
        load(settings, Grid(Place(rank, 1, 2)))


def test_a_later_stage_asks_for_hidden_states(tmp_path):
    stage = load_stages(save(build("llama"), tmp_path), 2)[1].stage
    with pytest.raises(ValueError, match="hidden"):
        stage(torch.zeros(1, 2, dtype=torch.long), torch.arange(2), torch.arange(2), None)


def test_a_model_that_gives_all_tokens_logits_is_asked_for_the_sampled_ones(tmp_path):
    """Whisper's decoder ignores logits_to_keep."""
    model = tiny("whisper")
    loaded = load(Settings(model=save(model, tmp_path)))
    ids = prompts()[0][None]
    batch = ragged([(0, 37, [3, 5, 1])], loaded.layout, loaded.layout.allocate(8, "cpu"))
    with torch.inference_mode(), use_batch(batch):
        for sampled in (torch.tensor([4, 36]), torch.randperm(37)):
            found = loaded.stage(ids, batch.positions, sampled, None)
            torch.testing.assert_close(found, model(ids).logits[0, sampled], atol=1e-4, rtol=1e-4)


def test_the_layers_are_the_decoders_not_a_towers_with_as_many():
    assert stack_name(tiny("gemma3")) == "model.language_model.layers"


@pytest.mark.skipif(
    load_ops() is None or not torch.ops.ds_serve.has_avx512_bf16(), reason="needs AVX512-BF16"
)
@pytest.mark.parametrize("tied", [False, True])
def test_stages_with_fused_layers_stay_close(tmp_path, tied):
    folder = save(build("llama", torch.bfloat16, tie_word_embeddings=tied, **FUSABLE), tmp_path)
    fused = load_stages(folder, 2, stage_layers=[2, 1])
    plain = load_stages(folder, 2, stage_layers=[2, 1], injection="off")
    assert [(loaded.injection.injected, loaded.injection.kept) for loaded in fused] == [(2, 0), (3, 0)]
    for found, wanted in zip(run(fused, prompts()), run(plain, prompts()), strict=True):
        assert (found - wanted).float().norm() < 0.03 * wanted.float().norm()
