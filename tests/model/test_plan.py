"""`ds-serve plan` says of a model that is not loaded what the engine finds once it has loaded it.

DS_SERVE_TEST_ALL=1 plans every architecture that is served, on one rank, two shards and two stages.
"""

from __future__ import annotations

import json
import os

import pytest
import torch
from architectures import SERVED, refused_on, tiny
from tiny_adapters import adapt
from tiny_models import save
from tiny_quantised import quantise

from ds_serve import cli, planning
from ds_serve.config import Settings
from ds_serve.model.dry import dry_rank
from ds_serve.model.errors import ModelLoadError
from ds_serve.model.loader import UnsupportedModelError, load, read_config
from ds_serve.parallel.place import Place
from ds_serve.planning import GIB, Machine, make_plan
from ds_serve.rank import build_local_engine

ALL = os.environ.get("DS_SERVE_TEST_ALL") == "1"
SOME = ["llama_tied", "gemma2", "deepseek_v3", "dbrx", "jetmoe"]
NAMES = list(SERVED) if ALL else SOME
AS_READ = {"injection": "off", "compile": "off"}
H200 = Machine(True, 141 * 10**9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The directory of a model by its name in architectures.py."""
    made = {}

    def find(name: str) -> str:
        if name not in made:
            made[name] = save(tiny(name), tmp_path_factory.mktemp(name))
        return made[name]

    return find


def held_bytes(module: torch.nn.Module) -> int:
    """Of all parameters and buffers, memory that two share once."""
    spans = sorted(
        {(t.data_ptr(), t.data_ptr() + t.nbytes) for t in [*module.parameters(), *module.buffers()]}
    )
    total = end = 0
    for start, stop in spans:
        total, end = total + max(0, stop - max(start, end)), max(end, stop)
    return total


@pytest.mark.parametrize("name", NAMES)
def test_weights_and_kv_are_those_that_loading_finds(name, folder):
    settings = Settings(model=folder(name), **AS_READ)
    planned = dry_rank(settings, read_config(settings), Place(), 8)
    loaded = load(settings)
    assert planned.weight_bytes == held_bytes(loaded.stage.module)
    assert planned.layout == loaded.layout
    assert planned.model_class == type(loaded.stage.module).__name__
    assert planned.step_bytes > 0


@pytest.mark.parametrize("grid", [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("name", NAMES if ALL else ["deepseek_v3", "jetmoe"])
def test_shards_and_stages_have_their_part_or_are_refused_as_at_load(name, grid, folder):
    tp, pp = grid
    directory = folder(name)
    settings = Settings(model=directory, tensor_parallel=tp, pipeline_parallel=pp, max_num_batched_tokens=64)
    config, word = read_config(settings), refused_on(name, tp, pp)
    places = [Place(stage * tp, tp, pp) for stage in range(pp)]
    if word is not None and "hidden states" not in word and word != "per_layer_model_projection":
        with pytest.raises(UnsupportedModelError, match=word):
            [dry_rank(settings, config, place, 8) for place in places]
        return
    if word is not None:
        return  # refused for its numbers, which a plan has not
    ranks = [dry_rank(settings, config, place, 8) for place in places]
    alone = Settings(model=directory, max_num_batched_tokens=64)
    whole = dry_rank(alone, read_config(alone), Place(), 8)
    assert sum(len(rank.layout.layers) for rank in ranks) == len(whole.layout.layers)
    total = sum(rank.weight_bytes for rank in ranks) * tp
    # Shards repeat embeddings, norms and towers of images, which in tiny models are the largest parts.
    assert all(rank.weight_bytes < whole.weight_bytes for rank in ranks) and total >= whole.weight_bytes
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_what_stays_wide_in_bfloat16_is_counted_wide(name, tmp_path):
    settings = Settings(model=save(tiny(name).to(torch.bfloat16), tmp_path), **AS_READ)
    planned = dry_rank(settings, read_config(settings), Place(), 8)
    assert planned.weight_bytes == held_bytes(load(settings).stage.module)
    assert planned.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes",
    [{}, {"host_cache": 10**6}, {"kv_cache_memory": 10**6}, {"num_blocks": 40}, {"max_model_len": 100}],
)
def test_blocks_and_lengths_are_those_of_the_engine(changes, folder):
    settings = Settings(model=folder("gemma2"), max_num_batched_tokens=32, max_num_seqs=4, **changes)
    plan = make_plan(settings, Machine.of(settings, None))
    engine = build_local_engine(settings)
    info = engine.info
    engine.close()
    assert plan.fits and plan.blocks == info.num_blocks and plan.max_model_len == info.max_model_len
    assert plan.shares[0].kv_bytes_per_block == info.bytes_per_block
    assert plan.host_tokens == info.num_host_blocks * info.block_size


def test_an_accelerator_has_what_the_rest_leaves_of_its_share(folder):
    plan = make_plan(Settings(model=folder("llama_tied"), max_num_seqs=4), H200)
    [share] = plan.shares
    assert share.left == int(0.9 * 141 * 10**9) - share.weights - share.step - share.reserve
    assert plan.fits and plan.blocks == 2 * 4 * (512 // 16) and plan.requests == 8


def test_what_does_not_fit_says_why_and_proposes_what_was_tried(folder, capsys, monkeypatch):
    monkeypatch.setattr(planning, "MORE_RANKS", (2,))
    directory = folder("llama_tied")
    small = Settings(model=directory, num_blocks=8, max_model_len=512)
    assert planning.run(small, 8 * GIB, False) == 1
    text = capsys.readouterr().out
    assert "does not fit: KV holds 128 tokens of a request, and max_model_len is 512" in text
    assert "try --max-model-len 128" in text
    monkeypatch.setattr(planning, "MORE_RANKS", ())
    greedy = Settings(model=directory, kv_cache_memory="7GiB")
    assert planning.run(greedy, 8 * GIB, True) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["fits"] and "KV is to have 7.00 GiB, of 8.00 GiB" in told["problems"][0]
    [memory] = [each.split()[1] for each in told["proposals"] if each.startswith("--kv-cache-memory")]
    assert make_plan(Settings(model=directory, kv_cache_memory=memory), Machine(True, 8 * GIB)).fits
    [problem] = make_plan(Settings(model=directory), Machine(True, 2 * GIB)).problems
    assert problem.startswith("stage 0: weights, a step and the reserve take 2.0")


def test_more_ranks_than_accelerators_are_a_problem(folder):
    plan = make_plan(Settings(model=folder("gemma2"), tensor_parallel=2), Machine(True, 141 * 10**9, 1))
    assert plan.problems == ["2 ranks take an accelerator each, and this machine has 1"]


def test_adapters_are_counted_and_refused_as_at_load(folder, tmp_path):
    adapter = adapt(tiny("llama_tied"), tmp_path / "fr", 0, {"r": 4, "target_modules": ["q_proj", "v_proj"]})
    size = sum(each.nbytes for name, each in adapter.named_parameters() if "lora_" in name)
    without = make_plan(Settings(model=folder("llama_tied")), H200).shares[0].weights
    settings = Settings(model=folder("llama_tied"), adapters={"fr": str(tmp_path / "fr")})
    assert 0 <= make_plan(settings, H200).shares[0].weights - without - size < 0.5 * size
    settings = Settings(model=folder("gemma2"), adapters={"fr": str(tmp_path / "nowhere")})
    with pytest.raises(ModelLoadError, match="nowhere"):
        make_plan(settings, H200)


@pytest.mark.parametrize("kind", ["bitsandbytes-int8", "fp8"])
def test_a_quantised_checkpoint_is_counted_as_it_is_served(kind, tmp_path):
    """By its files' tensors where it stays quantised, as a dense model where it becomes one."""
    directory = quantise(kind, tmp_path)
    plan = make_plan(Settings(model=directory), H200)
    loaded = load(Settings(model=directory, **AS_READ))
    whole = held_bytes(loaded.stage.module)
    assert (plan.quantised is None) == (kind == "fp8")
    assert abs(plan.shares[0].weights - whole) <= (0 if kind == "fp8" else 0.1 * whole)
    assert (
        dry_rank(Settings(model=directory), read_config(Settings(model=directory)), Place(), 8).layout
        == loaded.layout
    )


def test_settings_that_do_nothing_here_are_refused(folder):
    settings = Settings(model=folder("llama_tied"), device_memory_utilization=0.5)
    with pytest.raises(ModelLoadError, match="--device-memory"):
        make_plan(settings, Machine.of(settings, None))
    with pytest.raises(ModelLoadError, match="--device-memory"):
        Machine.of(Settings(model="m", device="cuda"), None)


def test_the_command_line(folder, capsys):
    directory = folder("llama_tied")
    assert cli.main(["plan", directory, "--tp", "2", "--device-memory", "141GB", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] and told["tensor_parallel"] == 2 and len(told["shares"]) == 1
    assert cli.main(["plan", directory]) == 0
    assert "fits" in capsys.readouterr().out.splitlines()[-1]
    assert cli.main(["plan", "/nowhere"]) == 2
    assert "/nowhere: no directory with a config.json" in capsys.readouterr().err
