"""Time to the first token of one prompt: cold, found on the device, and brought back from the host tier.

    python benchmarks/host_tier.py smollm2-135m --length 2048

One engine, --repeat rounds, medians. The device pool holds a few such prompts; between a device hit and a
host hit others wash it out. The copy's own time is what the ranks say of their loads.
"""

from __future__ import annotations

import argparse
import queue
import random
import statistics
import sys
import time

from shapes import directory

from ds_serve.config import Settings
from ds_serve.messages import Output, Request, SamplingParams
from ds_serve.rank import build_local_engine

POOL_PROMPTS = 4


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        blocks = POOL_PROMPTS * -(-args.length // 16) + 64
        self.engine = build_local_engine(
            Settings(
                model=directory(args.model),
                num_blocks=blocks,
                max_model_len=args.length + 64,
                host_cache=args.host_cache,
                num_threads=args.threads,
                host_checksums=args.checksums,
            )
        )
        self._rng = random.Random(0)
        self._count = 0

    def prompt(self, length: int) -> list[int]:
        return [self._rng.randrange(10, self.engine.info.vocab_size) for _ in range(length)]

    def first_token(self, prompt: list[int]) -> tuple[float, Output]:
        """(seconds to the first token, its output)."""
        outputs: queue.SimpleQueue = queue.SimpleQueue()
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        self._count += 1
        began = time.perf_counter()
        self.engine.submit(Request(id=str(self._count), prompt_token_ids=prompt, params=params), outputs.put)
        output = outputs.get(timeout=300)
        if output.error:
            raise RuntimeError(output.error)
        return time.perf_counter() - began, output

    def round(self, length: int) -> dict[str, float]:
        prompt = self.prompt(length)
        found = {"cold": self.first_token(prompt)[0]}
        found["device hit"], output = self.first_token(prompt)
        assert output.num_cached_tokens >= length - 16 and not output.num_host_tokens, output
        for _ in range(POOL_PROMPTS + 2):
            other = self.prompt(length)
            for _ in range(2):  # a scan of prompts that never come back would not wash it out
                self.first_token(other)
        before = self.engine.stats()
        found["host hit"], output = self.first_token(prompt)
        after = self.engine.stats()
        assert output.num_host_tokens > length // 2, output
        found["copy"] = after.load_s - before.load_s
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a directory, or a shape of benchmarks/shapes.py")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--host-cache", default="1GiB")
    parser.add_argument("--checksums", action="store_true")
    args = parser.parse_args()
    bench = Bench(args)
    bench.round(args.length)
    rounds = [bench.round(args.length) for _ in range(args.repeat)]
    found = {name: statistics.median(each[name] for each in rounds) * 1e3 for name in rounds[0]}
    for name, value in found.items():
        print(f"{value:8.1f} ms  {name}")
    print(
        f"{(found['host hit'] - found['copy']) / found['device hit']:8.2f} x  (host hit - copy) / device hit"
    )
    info = bench.engine.info
    print(
        f"measured at start: {info.copy_s_per_block * 1e6:.0f} us a block of "
        f"{info.bytes_per_block / 1024:.0f} KiB, {info.prefill_s_per_token * 1e6:.0f} us a token of prefill"
    )
    bench.engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
