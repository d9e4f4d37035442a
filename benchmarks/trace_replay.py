"""Prefix hit rates of the engine on a trace of real requests, beside those that are known of its cache sizes.

    python benchmarks/trace_replay.py TRACE --device-blocks 1000 --host-blocks 2000
    python benchmarks/trace_replay.py TRACE --device-blocks 1000 --host-blocks 2000 --real smollm2-135m

TRACE is JSON lines, also gzipped: {"in_len", "out_len", "block", "hash_ids"} in order of arrival; equal ids
mean equal prompts up to the end of their block of `block` tokens. The engine's own loop, scheduler and cache
serve it with ranks that compute nothing and answer at once; with --real a model computes, and times to the
first token are printed too. Requests come one at a time unless --concurrency says otherwise.

Rates are prompt tokens found / prompt tokens, in %. The references serve each request at once, hold full
blocks only and find at most all but the last token: LRU of the device alone; demote, where what the device
evicts moves to the host and back at a hit; Belady's order, which knows the future, of the device and of both;
an endless cache.
"""

from __future__ import annotations

import argparse
import gzip
import heapq
import json
import math
import queue
import random
import statistics
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_serve.cache.manager import CacheManager
from ds_serve.engine.limits import Limits
from ds_serve.engine.loop import Closed, EngineLoop
from ds_serve.engine.scheduler import Scheduler
from ds_serve.messages import CopyResult, Output, Request, SamplingParams, Stats, StepPlan, StepResult

NULL_VOCAB = 50_000


@dataclass(frozen=True)
class Prompt:
    """keys: its full blocks, of the engine's size; num_findable: how many of them a cache may give back."""

    num_tokens: int
    num_outputs: int
    keys: list[Hashable]
    num_findable: int
    ids: list[int]
    id_tokens: int


def read_trace(path: str, block: int | None, limit: int | None) -> tuple[list[Prompt], int]:
    """The trace's prompts, and the engine's block size in tokens: block, or the trace's own."""
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as lines:
        rows = [json.loads(line) for line in lines if line.strip()][:limit]
    if not rows or any("hash_ids" not in row for row in rows):
        raise SystemExit(f"{path}: every line must have hash_ids: without them no prefix is known")
    size = block or rows[0]["block"]
    return [_prompt(row, size, path) for row in rows], size


def _prompt(row: dict, size: int, path: str) -> Prompt:
    ids, id_tokens, num_tokens = row["hash_ids"], row["block"], row["in_len"]
    if size % id_tokens and id_tokens % size:
        raise SystemExit(f"{path}: blocks of {size} and of {id_tokens} tokens do not divide each other")
    ends = range(size, num_tokens + 1, size)
    # The id in which a block ends names all that comes before; its part tells smaller blocks apart.
    keys = [(ids[(end - 1) // id_tokens], (end - 1) % id_tokens) for end in ends]
    return Prompt(num_tokens, row["out_len"], keys, (num_tokens - 1) // size, ids, id_tokens)


class TokenSource:
    """A prompt's tokens: each id's are its own, what goes beyond the ids is the request's own."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._known: dict[int, list[int]] = {}

    def tokens(self, index: int, prompt: Prompt) -> list[int]:
        tokens: list[int] = []
        for each in prompt.ids:
            if each not in self._known:
                self._known[each] = self._draw(each, prompt.id_tokens)
            tokens += self._known[each]
        tokens += self._draw(f"tail{index}", prompt.num_tokens - len(tokens))
        return tokens[: prompt.num_tokens]

    def _draw(self, seed: int | str, count: int) -> list[int]:
        draw = random.Random(seed)
        return [draw.randrange(self._vocab_size) for _ in range(count)]


# -- what is known of caches of these sizes ------------------------------------------------------


def lru(prompts: Sequence[Prompt], sizes: Sequence[float]) -> list[int]:
    """Blocks found in each tier; what a tier has no room for moves to the next, a hit goes to the first."""
    tiers: list[OrderedDict[Hashable, None]] = [OrderedDict() for _ in sizes]
    found = [0] * len(sizes)
    for prompt in prompts:
        for key in prompt.keys[: prompt.num_findable]:
            holder = next((index for index, tier in enumerate(tiers) if key in tier), None)
            if holder is None:
                break
            found[holder] += 1
        for key in reversed(prompt.keys):
            for tier in tiers:
                tier.pop(key, None)
            tiers[0][key] = None
        for index, (tier, size) in enumerate(zip(tiers, sizes, strict=True)):
            while len(tier) > size:
                key, _ = tier.popitem(last=False)
                if index + 1 < len(tiers):
                    tiers[index + 1][key] = None
    return found


def belady(prompts: Sequence[Prompt], size: int) -> int:
    """Blocks found where those go first whose next use is farthest, the deeper one of equals."""
    uses: dict[Hashable, deque[float]] = {}
    for now, prompt in enumerate(prompts):
        for key in prompt.keys:
            uses.setdefault(key, deque()).append(now)
    held: dict[Hashable, float] = {}  # key -> its next use
    farthest: list[tuple[float, int, Hashable]] = []
    found = 0
    for prompt in prompts:
        for key in prompt.keys[: prompt.num_findable]:
            if key not in held:
                break
            found += 1
        for depth, key in enumerate(prompt.keys):
            uses[key].popleft()
            held.pop(key, None)
            if uses[key]:
                held[key] = uses[key][0]
                heapq.heappush(farthest, (-held[key], -depth, key))
        while len(held) > size:
            use, _, key = heapq.heappop(farthest)
            if held.get(key) == -use:
                del held[key]
    return found


# -- the engine ----------------------------------------------------------------------------------


class NullRanks:
    """One rank that answers every plan at once, and computes and copies nothing."""

    def __init__(self) -> None:
        self._results: deque[StepResult | CopyResult] = deque()

    def submit(self, plan: StepPlan) -> None:
        for kind, pairs in (("load", plan.loads), ("store", plan.stores)):
            if pairs:
                self._results.append(CopyResult(rank=0, step=plan.step, kind=kind))
        if plan.rows:
            tokens = [0] * sum(row.sample for row in plan.rows)
            self._results.append(StepResult(step=plan.step, token_ids=tokens))

    def collect(self) -> StepResult | CopyResult:
        return self._results.popleft()

    def check(self) -> None:
        pass

    def busy_s(self) -> list[float]:
        return []

    def close(self) -> None:
        pass


class Feeder:
    """An inbox that keeps so many requests open; an empty engine gets one when it has nothing left to do."""

    def __init__(self, num_requests: int, make: Callable[[int], Request], concurrency: int) -> None:
        self._left = deque(range(num_requests))
        self._make = make
        self._concurrency = concurrency
        self._num_open = 0
        self.outputs: list[Output] = []

    def receive(self, wait: bool) -> list[Request]:
        if wait and not self._left and not self._num_open:
            raise Closed
        requests = []
        while self._left and self._num_open < self._concurrency and (wait or self._num_open):
            requests.append(self._make(self._left.popleft()))
            self._num_open += 1
        return requests

    def deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            if output.finish_reason:
                self._num_open -= 1
                self.outputs.append(output)


def replay_null(
    prompts: Sequence[Prompt], block: int, make: Callable[[int], Request], args: argparse.Namespace
) -> tuple[list[Output], Stats]:
    zone = args.store_zone
    if zone is None:  # as ds_serve/rank.py has it
        zone = min(2 * (-(-args.step_tokens // block) + args.concurrency), args.device_blocks // 4)
    cache = CacheManager(
        args.device_blocks,
        block,
        num_host_blocks=args.host_blocks,
        store_zone=zone if args.host_blocks else 0,
    )
    longest = max(prompt.num_tokens + prompt.num_outputs for prompt in prompts) + 1
    limits = Limits(args.concurrency, args.step_tokens, longest, max_steps_in_flight=args.steps_in_flight)
    scheduler = Scheduler(limits, cache)
    feeder = Feeder(len(prompts), make, args.concurrency)
    EngineLoop(scheduler, NullRanks(), feeder, feeder.deliver).run()
    scheduler.check_integrity()
    return feeder.outputs, scheduler.stats()


def replay_real(
    prompts: Sequence[Prompt], block: int, make: Callable[[int], Request], args: argparse.Namespace
) -> tuple[list[Output], Stats]:
    from shapes import directory

    from ds_serve.config import Settings
    from ds_serve.rank import build_local_engine

    model = directory(args.real)
    settings = Settings(
        model=model,
        block_size=block,
        num_blocks=args.device_blocks,
        host_cache=args.host_blocks * _bytes_per_block(model, block),
        max_num_seqs=args.concurrency,
        max_num_batched_tokens=args.step_tokens,
        max_model_len=max(prompt.num_tokens + prompt.num_outputs for prompt in prompts) + 1,
        num_threads=args.threads,
    )
    engine = build_local_engine(settings)
    done: queue.SimpleQueue[Output] = queue.SimpleQueue()
    outputs: list[Output] = []
    for index in range(len(prompts)):
        if index >= args.concurrency:
            outputs.append(done.get())
        engine.submit(make(index), lambda output: output.finish_reason and done.put(output))
    while len(outputs) < len(prompts):
        outputs.append(done.get())
    stats = engine.stats()
    engine.close()
    return outputs, stats


def _bytes_per_block(model: str, block: int) -> int:
    """Of bf16 keys and values in all layers."""
    config = json.loads((Path(model) / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    num_kv_heads = config.get("num_key_value_heads", heads)
    return 4 * config["num_hidden_layers"] * num_kv_heads * head_dim * block


def vocab_of(model: str | None) -> int:
    if model is None:
        return NULL_VOCAB
    from shapes import directory

    return json.loads((Path(directory(model)) / "config.json").read_text())["vocab_size"]


# -- what is printed -----------------------------------------------------------------------------


def references(prompts: Sequence[Prompt], block: int, device: int, host: int) -> dict[str, list[float]]:
    """Rates in %, by tier where there are two."""
    both = lru(prompts, [device, host])
    found = {
        "LRU, device alone": lru(prompts, [device]),
        "LRU, demote": [sum(both), *both],
        "Belady, device alone": [belady(prompts, device)],
        "Belady, both": [belady(prompts, device + host)],
        "endless": lru(prompts, [math.inf]),
    }
    total = sum(prompt.num_tokens for prompt in prompts)
    return {name: [100 * each * block / total for each in blocks] for name, blocks in found.items()}


def engine_rates(outputs: Sequence[Output]) -> list[float]:
    total = sum(output.num_prompt_tokens for output in outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    host = sum(output.num_host_tokens for output in outputs)
    return [100 * each / total for each in (cached, cached - host, host)]


def print_rates(rates: dict[str, list[float]]) -> None:
    print(f"{'hit rate in % of prompt tokens':32s}{'all':>8s}{'device':>8s}{'host':>8s}")
    for name, values in rates.items():
        print(f"{name:32s}" + "".join(f"{value:8.2f}" for value in values))


def print_counters(stats: Stats) -> None:
    names = "evictions lost_blocks host_evictions stored_blocks loaded_blocks failed_copies num_preemptions"
    print("   ".join(f"{name} {getattr(stats, name)}" for name in names.split()))


def print_times(outputs: Sequence[Output]) -> None:
    """Times to the first token from when a request was queued, by what was found."""
    kinds: dict[str, list[Output]] = {"cold": [], "device hit": [], "host hit": []}
    for output in outputs:
        hit = "host hit" if output.num_host_tokens else "device hit"
        kinds[hit if output.num_cached_tokens else "cold"].append(output)
    print(f"{'time to first token':20s}{'requests':>9s}{'median ms':>10s}{'prompt':>8s}{'computed':>9s}")
    for kind, those in kinds.items():
        if those:
            times = [1e3 * (output.times[2] - output.times[0]) for output in those]
            prompt = statistics.mean(output.num_prompt_tokens for output in those)
            computed = prompt - statistics.mean(output.num_cached_tokens for output in those)
            print(f"{kind:20s}{len(those):9d}{statistics.median(times):10.1f}{prompt:8.0f}{computed:9.0f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--device-blocks", type=int, required=True)
    parser.add_argument("--host-blocks", type=int, default=0)
    parser.add_argument("--block", type=int, help="tokens of a block (default: the trace's)")
    parser.add_argument("--requests", type=int, help="only the first so many")
    parser.add_argument("--outputs", action="store_true", help="generate out_len tokens (default: 1)")
    parser.add_argument("--concurrency", type=int, default=1, help="requests open at once")
    parser.add_argument("--step-tokens", type=int, default=512, help="tokens of one step at most")
    parser.add_argument("--steps-in-flight", type=int, default=2)
    parser.add_argument(
        "--store-zone", type=int, help="blocks of the write-behind zone (default: the engine's)"
    )
    parser.add_argument("--real", metavar="MODEL", help="a directory or a shape of benchmarks/shapes.py")
    parser.add_argument("--threads", type=int, default=2, help="of the real model")
    return parser.parse_args()


def main() -> None:
    args = parse()
    prompts, block = read_trace(args.trace, args.block, args.requests)
    source = TokenSource(vocab_of(args.real))

    def make(index: int) -> Request:
        max_tokens = max(1, prompts[index].num_outputs) if args.outputs else 1
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        tokens = source.tokens(index, prompts[index])
        return Request(id=str(index), prompt_token_ids=tokens, params=params)

    began = time.perf_counter()
    outputs, stats = (replay_real if args.real else replay_null)(prompts, block, make, args)
    seconds = time.perf_counter() - began
    failed = [output for output in outputs if output.finish_reason == "error"]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(outputs)} requests failed, the first: {failed[0].error}")
    print(
        f"{Path(args.trace).name}: {len(outputs)} requests, {args.concurrency} at once, in {seconds:.1f} s; "
        f"blocks of {block} tokens, {args.device_blocks} on the device, {stats.num_host_blocks} on the host"
    )
    known = references(prompts, block, args.device_blocks, args.host_blocks)
    print_rates({"this engine": engine_rates(outputs)} | known)
    print_counters(stats)
    if args.real:
        print_times(outputs)


if __name__ == "__main__":
    main()
