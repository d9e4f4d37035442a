"""The mission profile: requests of one token with a cached prompt, one by one and in batches.

Knows the two loads and the goals that stand beside them; run.py calls it. The goals are for a machine of four
cores, so they are rows to compare with: the exit code follows --slo alone.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ds_serve.bench.client import Client
from ds_serve.bench.lengths import Lengths
from ds_serve.bench.measure import Run, Target, measure
from ds_serve.bench.options import Options
from ds_serve.bench.prompts import Repeated
from ds_serve.bench.workload import Material, material

AT_ONCE = 64
BATCH = 32
DISTINCT = 64  # prompts
CACHED = 128  # tokens of a prompt; a server computes at least the last one, from which the new token comes
SINGLE_TPS, SINGLE_P99_S, BATCH_TPS = 2000, 0.050, 1000


async def mission(client: Client, target: Target, options: Options) -> int:
    """Measures both, prints their rows and tables, and saves them where asked. Returns the exit code."""
    from ds_serve.bench.run import GOOD, INTERRUPTED, MISSED, save
    from ds_serve.bench.tables import summary_table, verdict_lines

    rows = []
    met = True
    for name, load in _loads(options).items():
        goals = options.slo if name == "single" else ()
        prompts = Material(Repeated(material(load, target.vocab).source, DISTINCT))
        done = await measure(client, target, load, prompts, goals=goals, name=name)
        print(f"{name}: {summary_table(done.summary, open_loop=False, accounts=done.accounts)}\n")
        if done.verdicts:
            print(f"{verdict_lines(done.verdicts)}\n")
        if options.out is not None:
            save(Path(options.out) / name, load, target, done)
        if done.load.interrupted:
            return INTERRUPTED
        rows.append(_row(name, done))
        met = met and done.met and not done.all_failed
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"a transaction is one prompt, cached, and one token; measured from a machine with {cores} cores")
    print("\n".join(rows))
    return GOOD if met else MISSED


def _loads(options: Options) -> dict[str, Options]:
    """Both loads, by name; the warm-up sends every prompt at least once."""
    length = options.input_tokens or Lengths("fixed", CACHED + 1)
    at_once = options.concurrency or AT_ONCE
    requests = options.requests or 4000
    base = replace(
        options,
        profile=None,
        stream=False,
        input_tokens=length,
        output_tokens=Lengths("fixed", 1),
        shared_prefix=0,
    )
    batch = min(BATCH, at_once)
    warmup = max(options.warmup, 4 * DISTINCT)
    return {
        "single": replace(base, concurrency=at_once, requests=requests, warmup=warmup),
        "batch": replace(
            base,
            endpoint="batch",
            batch_size=batch,
            concurrency=max(1, at_once // batch),
            requests=max(1, requests // batch),
            warmup=warmup // batch + 1,
        ),
    }


def _row(name: str, done: Run) -> str:
    tps, p99 = done.summary.rate(done.summary.prompts), done.summary.figure("e2e", "p99")
    if name == "single":
        goal = f"{SINGLE_TPS:,} TPS with TP99 {1000 * SINGLE_P99_S:.0f} ms (goal, 4 cores)"
        met = tps >= SINGLE_TPS and p99 <= SINGLE_P99_S
        return f"single: {goal}; measured {tps:,.0f} TPS with TP99 {1000 * p99:.1f} ms: {_word(met)}"
    met = tps >= BATCH_TPS
    return f"batch:  {BATCH_TPS:,} TPS (goal, 4 cores); measured {tps:,.0f} TPS: {_word(met)}"


def _word(met: bool) -> str:
    return "reached" if met else "not reached"
