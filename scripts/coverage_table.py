"""Makes docs/models.md of what the tests of architectures recorded.

    DS_SERVE_TEST_ALL=1 DS_SERVE_COVERAGE=results.jsonl \\
        python -m pytest tests/ranks/test_architectures.py tests/model/test_refusals.py
    python scripts/coverage_table.py results.jsonl > docs/models.md

A line of results is a model on a grid with its largest difference, or a refusal with its sentence; of
several for one model and grid the last counts. Runs no model.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import sys
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

GRIDS = {(1, 1): "tp=1", (2, 1): "tp=2", (4, 1): "tp=4", (1, 2): "pp=2", (2, 2): "tp2 x pp2"}
HEAD = """# Models

Which architectures of transformers are served, and which are refused. Made by `scripts/coverage_table.py`
(its docstring has the commands) from a run on {date} with {versions}.

Each row is a tiny model of four layers with random weights, in float32 on CPU. Eight requests of mixed
lengths run at once, their prompts in chunks, and their greedy tokens are those of transformers' `generate`.
A number is the largest difference of a log-probability from transformers' model, over the tokens of four
prompts and the hundred likeliest of 160 tokens. Random weights show that the computation is the same; they
say nothing of a trained model's answers. Models of images or sound are served as text models. With
transformers 5.17 moshi is refused, and beam, flint, kolibri1 and moss_transcribe_diarize do not exist.

| grid | served | refused | failed |
|---|---|---|---|
{counts}

| architecture | class | {grids} |
|---|---{lines}|
"""
REFUSED_SOMEWHERE = """
## Refused on some grids

What these say where a tensor-parallel or pipeline-parallel grid is asked for; on one rank they are served.

"""
REFUSED = """
## Refused

| architecture | what is said at load |
|---|---|
"""
OTHERS = """
## The other names in transformers' list of causal language models

The same class as a row above: {same}.

Not tried: {others}.
"""


def cell(record: dict | None) -> str:
    if record is None:
        return "untried"
    if "refused" in record:
        return "refused"
    if record["error"] or not record["same_tokens"]:
        return "**fails**"
    return f"{record['difference']:.0e}"


def counts(served: dict[str, dict]) -> str:
    lines = []
    for grid, title in GRIDS.items():
        cells = [cell(row.get(grid)) for row in served.values()]
        refused, failed = cells.count("refused"), cells.count("**fails**")
        right = len(cells) - refused - failed - cells.count("untried")
        lines.append(f"| {title} | {right} | {refused} | {failed} |")
    return "\n".join(lines)


def document(records: list[dict], versions: str, date: str) -> str:
    """records as tests/ranks/test_architectures.py and tests/model/test_refusals.py write them."""
    served: dict[str, dict] = {}
    refused, classes = {}, {}
    for record in records:
        classes[record["name"]] = record["model"]
        if "grid" in record:
            served.setdefault(record["name"], {})[tuple(record["grid"])] = record
        else:
            refused[record["name"]] = record["refused"]
    text = HEAD.format(
        date=date, versions=versions, counts=counts(served),
        grids=" | ".join(GRIDS.values()), lines="|---" * len(GRIDS),
    )  # fmt: skip
    for name in sorted(served):
        cells = " | ".join(cell(served[name].get(grid)) for grid in GRIDS)
        text += f"| {name} | {classes[name]} | {cells} |\n"
    text += REFUSED_SOMEWHERE
    for name in sorted(served):
        said = {each["refused"] for each in served[name].values() if "refused" in each}
        text += "".join(f"- {name}: {sentence}\n" for sentence in sorted(said))
    text += REFUSED
    for name in sorted(refused):
        text += f"| {name} | {refused[name].replace('|', ' ')} |\n"
    names = {name: kind for name, kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name not in classes}
    same = [name for name, kind in names.items() if kind in {classes[each] for each in served}]
    return text + OTHERS.format(
        same=", ".join(sorted(same)), others=", ".join(sorted(set(names) - set(same)))
    )


def main() -> None:
    records = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    packages = ("transformers", "torch", "deepspeed")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(document(records, versions, datetime.date.today().isoformat()), end="")


if __name__ == "__main__":
    main()
