"""Measures: one run against a server that was looked at before.

Knows the client, the workload and the load; prints nothing but the progress bar. run.py and mission.py
ask for runs and report them.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

from ds_serve.bench import accounts
from ds_serve.bench.client import Client, Unreachable
from ds_serve.bench.endpoints import endpoint
from ds_serve.bench.load import Load
from ds_serve.bench.options import Options
from ds_serve.bench.progress import progress
from ds_serve.bench.slo import Goal, Verdict
from ds_serve.bench.summary import Summary
from ds_serve.bench.tokens import LOWEST_ID
from ds_serve.bench.workload import DEFAULT_VOCAB, Material, Workload

DEFAULT_CONCURRENCY = 16


@dataclass(frozen=True)
class Target:
    """The server: the model to name, the bound of token ids, and the engine where it is a ds_serve."""

    model: str
    vocab: int
    engine: dict[str, Any] | None


@dataclass(frozen=True)
class Run:
    """One run's outcome. accounts: what the server's totals grew by, where it has some."""

    load: Load
    summary: Summary
    accounts: dict[str, float] | None
    verdicts: list[Verdict]

    @property
    def all_failed(self) -> bool:
        return not self.summary.good

    @property
    def met(self) -> bool:
        return all(verdict.met for verdict in self.verdicts)


async def look(client: Client, options: Options) -> Target:
    """Asks the server what it serves. Raises Unreachable where it does not answer."""
    model = options.model
    if model is None:
        names = await client.models()
        if not names:
            raise Unreachable(f"{options.url}/models lists no model: give --model")
        model = names[0]
    health = await accounts.health(client.page)
    engine = None if health is None else health.engine
    size = (engine or {}).get("vocab_size")
    vocab = options.vocab or (size if isinstance(size, int) and size > LOWEST_ID else DEFAULT_VOCAB)
    return Target(model, vocab, engine)


async def measure(
    client: Client,
    target: Target,
    options: Options,
    material: Material,
    *,
    goals: tuple[Goal, ...] = (),
    name: str = "bench",
) -> Run:
    """Warm-up, then one measured run. Raises WarmUpFailed where no warm-up request succeeds."""
    route = endpoint(options, target.model)
    workload = Workload(options, material, route)
    send = client.sender(route, streams=options.streams).send
    load = Load(send, workload.body, prompts_each=options.prompts_each)
    at_once = options.concurrency or DEFAULT_CONCURRENCY
    if options.warmup:
        await load.warm_up(options.warmup, at_once)
    workload.prepare()
    gc.collect()
    gc.freeze()  # what is there by now is not looked through again in the middle of the run
    before = await accounts.totals(client.page)
    if not load.interrupted:
        async with progress(load, options.progress, workload.requests, options.duration, name):
            if options.open_loop:
                times = workload.times()
                await load.open(times, workload.requests, options.duration, options.concurrency)
            else:
                await load.closed(at_once, workload.requests, options.duration)
    grown = accounts.difference(before, await accounts.totals(client.page))
    summary = Summary(load.records, load.ended - load.started, stream_timed=not options.several_choices)
    return Run(load, summary, grown, [goal.judge(summary) for goal in goals])
