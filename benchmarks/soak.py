"""Thousands of requests of a trace through small pools, one in ten aborted: nothing lost, nothing leaked.

    python benchmarks/soak.py TRACE --requests 20000

TRACE is a file of shared prefixes (JSON lines with in_len, out_len, block, hash_ids; .gz too), gone through
again and again with the ids shifted, so that prefixes come back within a pass and not for ever. Lengths are
cut to fit the demo model. --checked requests, spread over the run, are compared with an engine without a
cache. Ends with code 1 where a request got no end or two, a block is missing, tokens differ, or memory
grew by more than --growth MiB after the first fifth.
"""

from __future__ import annotations

import argparse
import gzip
import json
import queue
import random
import sys
import threading
import time
from pathlib import Path

import psutil

from ds_serve.config import Settings
from ds_serve.demo import model_path
from ds_serve.messages import Request, SamplingParams
from ds_serve.rank import build_local_engine

LONGEST = 320  # prompt tokens
CHUNK = 16  # tokens of a trace's block, here


def requests(path: Path, count: int, vocab: int, num_chunks: int):
    """(prompt, number of output tokens) of count requests."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    for number in range(count):
        turn, index = divmod(number, len(rows))
        row = rows[index]
        prompt: list[int] = []
        for hash_id in row.get("hash_ids", [])[:num_chunks]:
            rng = random.Random(f"{turn // 2} {hash_id}")
            prompt += [rng.randrange(5, vocab) for _ in range(CHUNK)]
        rng = random.Random(f"tail {number}")
        prompt += [rng.randrange(5, vocab) for _ in range(1 + row["in_len"] % 29)]
        yield prompt[:LONGEST], 1 + row["out_len"] % 12


class Soak:
    """Keeps --concurrency requests open and counts how each ends."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.engine = build_local_engine(self._settings(args, host_cache=args.host_cache))
        self._args = args
        self._rng = random.Random(1)
        self._slots = threading.Semaphore(args.concurrency)
        self._ends: queue.SimpleQueue = queue.SimpleQueue()
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}
        self.twice: list[str] = []

    @staticmethod
    def _settings(args: argparse.Namespace, **more) -> Settings:
        return Settings(
            model=model_path(), dtype="float32", num_blocks=args.blocks, max_num_seqs=16,
            max_num_batched_tokens=256, num_threads=args.threads, **more,
        )  # fmt: skip

    def run(self) -> list[tuple[int, float]]:
        """(requests done, resident MiB) every thousand requests."""
        memory, process = [], psutil.Process()
        vocab = self.engine.info.vocab_size
        source = requests(self._args.trace, self._args.requests, vocab, LONGEST // CHUNK)
        every = max(1, self._args.requests // self._args.checked)
        self.checked: dict[str, tuple[list[int], int]] = {}
        for number, (prompt, length) in enumerate(source):
            self._slots.acquire()
            name = f"r{number}"
            checked = number % every == 0
            if checked:
                self.checked[name] = (prompt, length)
            self._submit(name, prompt, length)
            if not checked and self._rng.random() < 0.1:
                threading.Timer(self._rng.random() * 0.05, self.engine.abort, [name]).start()
            if number % 1000 == 999:
                memory.append((number + 1, process.memory_info().rss / 2**20))
        for _ in range(self._args.concurrency):
            self._slots.acquire()
        return memory

    def _submit(self, name: str, prompt: list[int], length: int) -> None:
        params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
        found: list[int] = []

        def take(output) -> None:
            found.extend(output.token_ids)
            if output.finish_reason is not None:
                if name in self.ended:
                    self.twice.append(name)
                self.ended[name] = output.finish_reason
                if name in self.checked:
                    self.tokens[name] = found
                self._slots.release()

        self.engine.submit(Request(id=name, prompt_token_ids=prompt, params=params), take)

    def cold(self) -> dict[str, list[int]]:
        """The checked requests' tokens by an engine without a cache, one after another."""
        engine = build_local_engine(self._settings(self._args, prefix_caching=False))
        found = {}
        for name, (prompt, length) in self.checked.items():
            outputs: queue.SimpleQueue = queue.SimpleQueue()
            params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
            engine.submit(Request(id=name, prompt_token_ids=prompt, params=params), outputs.put)
            tokens: list[int] = []
            while True:
                output = outputs.get(timeout=60)
                tokens += output.token_ids
                if output.finish_reason is not None:
                    break
            found[name] = tokens
        engine.close()
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=24)
    parser.add_argument("--blocks", type=int, default=120, help="device blocks of 16 tokens")
    parser.add_argument("--host-cache", default="24MiB")
    parser.add_argument("--checked", type=int, default=200)
    parser.add_argument("--growth", type=float, default=64, help="MiB")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    soak, began = Soak(args), time.perf_counter()
    memory = soak.run()
    seconds = time.perf_counter() - began
    time.sleep(1.5)  # stores that are due when the engine falls idle
    stats = soak.engine.stats()
    soak.engine.close()
    soak.engine.scheduler.check_integrity()
    cold = soak.cold()
    different = [name for name, tokens in cold.items() if soak.tokens.get(name) != tokens]
    settled = [size for done, size in memory if done > args.requests // 5] or [0.0]
    growth = max(settled) - settled[0]
    ends = {reason: list(soak.ended.values()).count(reason) for reason in sorted(set(soak.ended.values()))}
    missing = stats.num_blocks - stats.num_free_blocks - stats.num_pinned_blocks
    print(f"{args.requests} requests in {seconds:.0f} s, ends {ends}, preemptions {stats.num_preemptions}")
    print(
        f"cached tokens {stats.cached_tokens / max(1, stats.prompt_tokens):.1%} of {stats.prompt_tokens} "
        f"({stats.cached_tokens_host / max(1, stats.prompt_tokens):.1%} from the host), "
        f"{stats.stored_blocks} blocks stored, {stats.loaded_blocks} loaded, {stats.lost_blocks} lost"
    )
    print(f"memory {settled[0]:.0f} MiB after a fifth, at most {growth:.0f} more later")
    print(f"{len(cold)} compared with a cold engine, {len(different)} differ; {missing} blocks missing")
    wrong = soak.twice or len(soak.ended) != args.requests or missing or different or growth > args.growth
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
