"""The architectures over grids of ranks: generate's greedy tokens, and how far log-probabilities are from it.

`make test` takes ten that together cover the mechanisms over three grids, `make test-all` all of them over
five (DS_SERVE_TEST_ALL=1). Where DS_SERVE_COVERAGE names a file, each result is added to it as a line of
JSON, for scripts/coverage_table.py.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import pytest
import torch
from architectures import SERVED, is_known, refused_on, tiny
from launch import run_ranks
from safetensors.torch import load_file
from tiny_models import mixed_prompts, oracles, save
from transformers import AutoConfig, AutoModelForCausalLM

from ds_serve.attention.interface import UnsupportedModelError
from ds_serve.config import Settings
from ds_serve.model.adapters import plain_attention
from ds_serve.model.loader import load
from ds_serve.parallel.grid import Grid
from ds_serve.parallel.place import Place

PROMPTS = mixed_prompts(8)
LENGTHS = [2 + (5 * index) % 11 for index in range(8)]
CHUNKED = {"num_blocks": 200, "max_num_batched_tokens": 23, "dtype": "float32", "all_reduce": "group"}

ALL = os.environ.get("DS_SERVE_TEST_ALL") == "1"
GRIDS = [(1, 1), (2, 1), (1, 2)] + ([(2, 2), (4, 1)] if ALL else [])
TEN = [
    "bloom", "cohere_qk_norm", "deepseek_v3", "gemma3_text", "gpt_oss", "llama4_text", "olmo2", "opt", "phi3",
    "qwen3_moe",
]  # fmt: skip
NAMES = [name for name in (SERVED if ALL else TEN) if is_known(name)]
AT_ONCE = 12  # models in one launch
LAUNCH_S = 600
MAX_DIFFERENCE = 1e-3  # of a log-probability; wrong weights give 1 and more


class Saved:
    """One of SERVED in folder, with what transformers makes of the prompts in fp32."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = save(tiny(name), folder)
        plain = plain_attention(AutoConfig.from_pretrained(folder))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=plain)
        self.kind = type(model.eval()).__name__
        self.tokens = oracles(model, PROMPTS, LENGTHS)
        with torch.inference_mode():
            logits = [model(torch.tensor([p]), use_cache=False).logits[0, :-1] for p in PROMPTS[:4]]
        self.logprobs = torch.cat(logits).log_softmax(-1)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Builds a model at its first use: name -> Saved."""
    return functools.cache(lambda name: Saved(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def records(saved, tmp_path_factory):
    """(grid, name) -> its record. One launch a grid for AT_ONCE models."""

    @functools.cache
    def launched(grid: tuple[int, int], names: tuple[str, ...]) -> dict[str, dict]:
        try:
            return launch(grid, names, saved, tmp_path_factory.mktemp("grid"))
        except AssertionError as error:  # not launched again for each of its models
            return dict.fromkeys(names, {"error": str(error)})

    def get(grid: tuple[int, int], name: str) -> dict:
        names = [each for each in NAMES if refused_on(each, *grid) is None]
        start = names.index(name) // AT_ONCE * AT_ONCE
        return launched(grid, tuple(names[start : start + AT_ONCE]))[name]

    return get


def launch(grid: tuple[int, int], names: tuple[str, ...], saved, folder: Path) -> dict[str, dict]:
    tp, pp = grid
    cases = [
        {
            "name": name,
            "prompts": PROMPTS,
            "lengths": LENGTHS,
            "settings": CHUNKED
            | {"model": saved(name).folder, "tensor_parallel": tp, "pipeline_parallel": pp},
            "variants": [
                {"name": "run", "rounds": 1, "settings": {}, "scores": str(folder / f"{name}.scores")}
            ],
        }
        for name in names
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    script, results = Path(__file__).with_name("matrix_run.py"), folder / "results.jsonl"
    run_ranks(script, tp * pp, str(folder / "cases.json"), str(results), timeout=LAUNCH_S)
    found = {record["name"]: record for record in map(json.loads, results.read_text().splitlines())}
    for name in names:
        if "error" not in found[name]:
            scores = load_file(folder / f"{name}.scores")["logprobs"]
            differences = (scores - saved(name).logprobs).abs()
            found[name]["difference"] = differences[~scores.isnan()].max().item()
    return found


def refusal(folder: str, tp: int, pp: int) -> str:
    """What a rank of the grid says that does not load the model; the first shards of all stages are tried."""
    settings = Settings(model=folder, dtype="float32", tensor_parallel=tp, pipeline_parallel=pp)
    for rank in range(0, tp * pp, tp):
        try:
            load(settings, Grid(Place(rank, tp, pp)))
        except UnsupportedModelError as error:
            return str(error)
    raise AssertionError(f"{folder} loads on {tp} x {pp} ranks")


def note(name: str, grid: tuple[int, int], **result) -> None:
    """A line in the file that DS_SERVE_COVERAGE names, if it does."""
    if path := os.environ.get("DS_SERVE_COVERAGE"):
        with open(path, "a") as out:
            out.write(json.dumps({"name": name, "grid": grid} | result) + "\n")


def cells(runs: bool) -> list:
    return [
        pytest.param(grid, name, id=f"tp{grid[0]}-pp{grid[1]}-{name}")
        for grid in GRIDS
        for name in NAMES
        if (refused_on(name, *grid) is None) == runs
    ]


@pytest.mark.timeout(LAUNCH_S + 60)
@pytest.mark.parametrize(("grid", "name"), cells(runs=True))
def test_tokens_equal_generate(grid, name, saved, records):
    record, wanted = records(grid, name), saved(name)
    same = "error" not in record and record["run"]["rounds"] == [wanted.tokens]
    difference, error = record.get("difference"), record.get("error")
    note(name, grid, model=wanted.kind, same_tokens=same, difference=difference, error=error)
    assert error is None, error
    assert same
    assert difference < MAX_DIFFERENCE
    assert record["run"]["blocks_lost"] == 0


@pytest.mark.skipif(not ALL, reason="the ten run on every grid")
@pytest.mark.parametrize(("grid", "name"), cells(runs=False))
def test_what_cannot_be_cut_is_refused(grid, name, saved):
    # Shards need a process group to be cut: what only stages refuse is asked of stages without shards.
    tp = grid[0] if refused_on(name, grid[0], 1) else 1
    found = refusal(saved(name).folder, tp, grid[1])
    note(name, grid, model=saved(name).kind, refused=found)
    assert refused_on(name, *grid) in found
