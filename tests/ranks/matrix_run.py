"""Started on every rank by the launcher: runs the cases of a JSON file through engines over all ranks.

    matrix_run.py CASES RESULTS

Rank 0 writes one record a case: the tokens of each round, and the engine's accounts after each. A variant
with a file as "scores" leaves log-probabilities of its prompts there. The engines come one after another in
the same processes, as in a user's script with several pipelines.
"""

from __future__ import annotations

import json
import queue
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

import msgspec
import torch
from safetensors.torch import save_file
from tiny_models import VOCAB, drain, run_all

from ds_serve.config import Settings
from ds_serve.launch import ranks
from ds_serve.messages import Request, SamplingParams, Stats
from ds_serve.rank import build_local_engine, follow

MAX_LOGPROBS = 100  # that a request may ask for


def run_case(case: dict) -> dict:
    """Each variant's engine serves all prompts `rounds` times, or the prompts of each of its
    `phases`, lists of indexes; its books are whole afterwards."""
    everything = list(range(len(case["prompts"])))
    record: dict = {"name": case["name"]}
    for variant in case["variants"]:
        engine = build_local_engine(Settings(**case["settings"], **variant["settings"]))
        rounds, accounts = [], []
        for phase in variant.get("phases") or [everything] * variant["rounds"]:
            prompts, lengths = ([case[name][index] for index in phase] for name in ("prompts", "lengths"))
            if "scores" in variant:
                tokens, scores = run_scored(engine, prompts, lengths)
                save_file({"logprobs": scores}, variant["scores"])
                rounds.append(tokens)
            else:
                adapters = [case["adapters"][index] for index in phase] if "adapters" in case else None
                rounds.append(run_all(engine, prompts, lengths, adapters))
            accounts.append(settled(engine))
        stats = accounts[-1]
        engine.close()
        engine.scheduler.check_integrity()
        record[variant["name"]] = {
            "rounds": rounds,
            "blocks_lost": stats.num_blocks - stats.num_free_blocks,
            "preemptions": stats.num_preemptions,
            "cached_tokens": stats.cached_tokens,
            "steps": stats.num_steps,
            "windows": list(engine.info.windows),
            "copying": engine.scheduler.num_copying,
            "stats": [msgspec.structs.asdict(each) for each in accounts],
        }
    return record


def run_scored(engine, prompts: list[list[int]], lengths: list[int]) -> tuple[list, torch.Tensor]:
    """Each prompt's tokens, and [tokens, VOCAB] of the first half of the prompts: log-probabilities at each
    token but a prompt's first, of the likeliest, as many as a request may ask for, and NaN for the others."""
    outputs = [queue.SimpleQueue() for _ in prompts]
    for index, each in enumerate(outputs):
        scored = MAX_LOGPROBS if index < len(prompts) // 2 else None
        params = SamplingParams(max_tokens=lengths[index], temperature=0.0, prompt_logprobs=scored)
        engine.submit(Request(id=f"r{index}", prompt_token_ids=prompts[index], params=params), each.put)
    tokens, rows = [], []
    for each in outputs:
        first = each.get(timeout=120)
        for entry in first.prompt_logprobs or ():
            rows.append(torch.full((VOCAB,), torch.nan))
            rows[-1][entry.top_ids] = torch.tensor(entry.top_logprobs)
        if first.error:
            raise AssertionError(first.error)
        tokens.append([*first.token_ids, *(drain(each) if first.finish_reason is None else [])])
    return tokens, torch.stack(rows)


def settled(engine) -> Stats:
    """The accounts once an engine without requests copies no more. Each look is a turn of its loop, in which
    it orders what is due."""
    looks: list[int] = []
    while len(looks) < 3 or len(set(looks[-3:])) > 1 or engine.scheduler.num_copying:
        stats = engine.stats()
        looks.append(stats.stored_blocks)
    return stats


def main() -> int:
    rank_env = ranks()
    if rank_env is not None and rank_env.rank > 0:
        return follow()
    cases, results = (Path(name) for name in sys.argv[1:])
    with results.open("w") as out:
        for case in json.loads(cases.read_text()):
            try:
                record = run_case(case)
            except Exception as error:
                record = {"name": case["name"], "error": f"{type(error).__name__}: {error}"}
            out.write(json.dumps(record) + "\n")
            out.flush()
            print(record["name"], record.get("error", "done"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
