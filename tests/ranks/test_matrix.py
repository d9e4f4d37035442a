"""The same greedy tokens as transformers' generate, over every grid of ranks.

Each grid is one launch; all its models run in it, one engine after another. `make test` takes a part of the
matrix in which every grid comes up, `make test-all` the whole of it (DS_SERVE_TEST_ALL=1).
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import pytest
import torch
from launch import run_ranks
from sharding_cases import MLA
from transformers import AutoModelForCausalLM

from ds_serve.demo import model_path

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

from tiny_models import build, mixed_prompts, oracles, save

NUM_REQUESTS = 32
LENGTHS = [4 + (7 * index) % 17 for index in range(NUM_REQUESTS)]
PROMPTS = mixed_prompts(NUM_REQUESTS)

LAYERS = {"num_hidden_layers": 4}
MODELS = {
    "demo": None,
    "llama": ("llama", LAYERS),
    "llama_tied": ("llama", LAYERS | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", LAYERS),
    "mistral": ("mistral", LAYERS),
    "gemma2": ("gemma2", LAYERS),
    "gpt2": ("gpt2", {"n_layer": 4}),
    "mixtral": ("mixtral", LAYERS | {"num_local_experts": 4}),
    "qwen3_moe": (
        "qwen3_moe",
        LAYERS | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
    "deepseek_v3": ("deepseek_v3", LAYERS | MLA),
}
LAUNCH_S = 900  # a grid with all its models
GRIDS = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2)]
PART = {
    (1, 1): [],  # test_engine_tokens.py and test_architectures.py have them
    (2, 1): ["gpt2", "mixtral", "gemma2"],
    (4, 1): ["llama"],
    (1, 2): ["mistral", "gemma2"],
    (1, 4): ["llama"],
    (2, 2): ["llama_tied"],
}
WANTED = {grid: list(MODELS) for grid in GRIDS} if os.environ.get("DS_SERVE_TEST_ALL") == "1" else PART

VARIANTS = [
    {"name": "hits", "rounds": 2, "settings": {"num_blocks": 800}},
    {
        "name": "preempted",
        "rounds": 1,
        "settings": {
            "num_blocks": 24, "block_size": 4, "max_num_batched_tokens": 48, "attention": "reference",
            "window_blocks": "off",
        },
    },
]  # fmt: skip
# Models whose layers see a window: their groups of layers, and a pool that is too small for a whole sequence.
WINDOWS = {"mistral": [8], "gemma2": [0, 8]}
WINDOWED = {
    "name": "windows",
    "rounds": 1,
    "settings": {"num_blocks": 36, "block_size": 4, "max_num_batched_tokens": 16, "attention": "reference"},
}


class Saved:
    """One of MODELS, saved in folder."""

    def __init__(self, name: str, folder: Path) -> None:
        if MODELS[name] is None:
            self.folder = str(model_path())
            self._model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
            self._model.generation_config.eos_token_id = None
        else:
            architecture, overrides = MODELS[name]
            self._model = build(architecture, **overrides)
            self.folder = save(self._model, folder)

    @cached_property
    def wanted(self) -> list[list[int]]:
        """The prompts' greedy continuations by generate in fp32."""
        return oracles(self._model, PROMPTS, LENGTHS)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Saves a model at its first use: name -> Saved."""
    made: dict[str, Saved] = {}

    def get(name: str) -> Saved:
        if name not in made:
            made[name] = Saved(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def records(models, tmp_path_factory):
    """Launches a grid at its first use; the records of its models by name."""
    done: dict[tuple[int, int], dict[str, dict]] = {}

    def get(grid: tuple[int, int]) -> dict[str, dict]:
        if grid not in done:
            shape = {"all_reduce": "group"}
            done[grid] = launch_grid(grid, shape, WANTED[grid], models, tmp_path_factory.mktemp("matrix"))
        return done[grid]

    return get


def launch_grid(grid: tuple[int, int], more: dict, names: list[str], models, folder: Path) -> dict[str, dict]:
    """The records by name of these models in one launch of a grid, with more settings.

    What they are compared with is computed meanwhile: ranks wait for one another much of their time.
    """
    tp, pp = grid
    shape = {"tensor_parallel": tp, "pipeline_parallel": pp, "dtype": "float32"} | more
    cases = [
        {
            "name": name,
            "prompts": PROMPTS,
            "lengths": LENGTHS,
            "settings": {"model": models(name).folder} | shape,
            "variants": VARIANTS + [WINDOWED] * (name in WINDOWS),
        }
        for name in names
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    script, results = Path(__file__).parent / "matrix_run.py", folder / "results.jsonl"
    with ThreadPoolExecutor(1) as thread:
        arguments = str(folder / "cases.json"), str(results)
        running = thread.submit(run_ranks, script, tp * pp, *arguments, timeout=LAUNCH_S)
        for name in names:
            models(name).wanted  # noqa: B018
        running.result()
    lines = results.read_text().splitlines()
    return {record["name"]: record for record in map(json.loads, lines)}


@pytest.mark.timeout(LAUNCH_S + 60)
@pytest.mark.parametrize(
    ("grid", "name"),
    [
        pytest.param(grid, name, id=f"tp{grid[0]}-pp{grid[1]}-{name}")
        for grid in GRIDS
        for name in WANTED[grid]
    ],
)
def test_tokens_equal_generate(grid, name, models, records):
    record, wanted = records(grid)[name], models(name).wanted
    assert "error" not in record, record
    assert all(tokens == wanted for tokens in record["hits"]["rounds"])
    hit = sum((len(prompt) - 1) // 16 * 16 for prompt in PROMPTS)
    assert record["hits"]["cached_tokens"] >= hit
    assert record["preempted"]["rounds"] == [wanted]
    assert record["preempted"]["preemptions"] > 0
    if name == "deepseek_v3":  # each shard caches the latents, whole
        latents = 4 * 16 * (MLA["kv_lora_rank"] + MLA["qk_rope_head_dim"]) * 4
        assert record["hits"]["stats"][-1]["bytes_per_block"] == grid[0] * latents
    assert record["hits"]["blocks_lost"] == record["preempted"]["blocks_lost"] == 0
    if name in WINDOWS:
        assert record["windows"]["rounds"] == [wanted]
        # With a layer a stage, each of one kind only, groups would save nothing.
        assert record["windows"]["windows"] == ([0] if (grid, name) == ((1, 4), "gemma2") else WINDOWS[name])
        assert record["windows"]["blocks_lost"] == 0
