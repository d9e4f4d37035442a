"""Offline speed of the engine beside transformers' own generate_batch, in one run; prints one JSON line.

    python benchmarks/offline.py smollm2-135m --prompts 16 --in 128 --out 64

single_ms is the time between two tokens of a lone request; tokens_per_s counts output tokens of N requests at
once over the whole time, prefill included; ttft_* are of one prompt of --long tokens, first cold, then as a
prefix hit. Medians over --repeat rounds, in which both engines take turns, since these machines are noisy.
floor_single_ms is the time to read the weights once at the measured speed of memory, floor_ttft_ms the
arithmetic of the long prompt at the measured speed of a large bf16 product.
"""

from __future__ import annotations

import argparse
import json
import logging
import queue
import random
import statistics
import time

import torch
from shapes import directory
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from ds_serve.config import Settings
from ds_serve.messages import Request, SamplingParams
from ds_serve.rank import build_local_engine


class Ours:
    """The engine in this process, as the pipeline uses it."""

    def __init__(self, folder: str, threads: int, **settings) -> None:
        self.engine = build_local_engine(Settings(model=folder, num_threads=threads, **settings))
        self._count = 0

    def run(self, prompts: list[list[int]], out: int) -> tuple[float, list[float]]:
        """(seconds, first prompt's token times) of all prompts at once, out tokens each."""
        outputs: queue.SimpleQueue = queue.SimpleQueue()
        times: list[float] = []
        params = SamplingParams(max_tokens=out, temperature=0.0, ignore_eos=True)
        first = f"b{self._count}"
        start = time.perf_counter()
        for prompt in prompts:
            request = Request(id=f"b{self._count}", prompt_token_ids=prompt, params=params)
            self.engine.submit(request, lambda output: outputs.put((time.perf_counter(), output)))
            self._count += 1
        running = len(prompts)
        while running:
            now, output = outputs.get()
            if output.error:
                raise RuntimeError(output.error)
            if output.id == first:
                times += [now - start] * len(output.token_ids)
            running -= output.finish_reason is not None
        return time.perf_counter() - start, times


class Transformers:
    """generate_batch with a manager that lives on, so that it can share prefixes."""

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", attn_implementation="sdpa"
        ).eval()
        self.settings = ContinuousBatchingConfig(
            page_size=16, num_blocks=1024, max_batch_tokens=2048, use_cuda_graph=False
        )

    def run(self, prompts: list[list[int]], out: int) -> tuple[float, list[float]]:
        config = GenerationConfig(max_new_tokens=out, do_sample=False, eos_token_id=-1, pad_token_id=0)
        start = time.perf_counter()
        results = self.model.generate_batch(
            prompts,
            generation_config=config,
            continuous_batching_config=self.settings,
            record_timestamps=True,
            persistent_manager=True,
        )
        elapsed = time.perf_counter() - start
        assert all(len(result.generated_tokens) == out for result in results.values())
        times = next(iter(results.values())).timestamps
        return elapsed, [each - start for each in times]


def measure(peer, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """One round of every figure, with prompts that this peer has not seen."""
    rng = random.Random(seed)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(10, args.vocab) for _ in range(length)]

    elapsed, times = peer.run([prompt(args.length)], args.out)
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    figures = {"single_ms": statistics.median(gaps) * 1e3}
    elapsed, _ = peer.run([prompt(args.length) for _ in range(args.prompts)], args.out)
    figures["tokens_per_s"] = args.prompts * args.out / elapsed
    long = prompt(args.long)
    figures["ttft_cold_ms"] = peer.run([long], 1)[0] * 1e3
    figures["ttft_hit_ms"] = peer.run([long], 1)[0] * 1e3
    return figures


def floors(model: torch.nn.Module, long: int) -> dict[str, float]:
    """What memory and arithmetic allow, measured here: both numbers in ms."""
    weights = sum(
        p.numel() * p.element_size() for p in model.parameters()
    )  # a tied head counts once, as read
    block = torch.empty(256 << 20, dtype=torch.uint8).random_()
    words = block.view(torch.int64)
    read = min(_timed(lambda: words.sum()) for _ in range(5)) / block.numel()
    side = 2048
    a, b = (torch.randn(side, side, dtype=torch.bfloat16) for _ in range(2))
    multiply = min(_timed(lambda: a @ b) for _ in range(5)) / side**3
    config = model.config
    head = config.vocab_size * config.hidden_size
    layers = sum(p.numel() for p in model.parameters()) - head
    attention = config.num_hidden_layers * config.hidden_size * long**2  # causal half of QK and of PV
    return {
        "floor_single_ms": weights * read * 1e3,
        "floor_ttft_ms": (layers * long + attention) * multiply * 1e3,
        "memory_gb_s": 1 / read / 1e9,
        "product_gmac_s": 1 / multiply / 1e9,
    }


def _timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="a model directory, or the name of a shape in shapes.py")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--in", type=int, default=128, dest="length")
    parser.add_argument("--out", type=int, default=64)
    parser.add_argument("--long", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--steps-in-flight", type=int, default=2)
    parser.add_argument("--only-ours", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    folder = directory(args.model)
    plain = Transformers(folder)
    args.vocab = plain.model.config.vocab_size
    peers = {"ds_serve": Ours(folder, args.threads, steps_in_flight=args.steps_in_flight)}
    if not args.only_ours:
        peers["generate_batch"] = plain
    rounds = {name: [] for name in peers}
    for index in range(args.repeat + 1):
        for name, peer in peers.items():
            rounds[name].append(measure(peer, args, seed=index))
    line: dict = {"model": args.model, "prompts": args.prompts, "in": args.length, "out": args.out}
    for name, each in rounds.items():  # the first round warms up
        line[name] = {key: round(statistics.median(r[key] for r in each[1:]), 2) for key in each[0]}
    line |= {key: round(value, 2) for key, value in floors(plain.model, args.long).items()}
    print(json.dumps(line))
    peers["ds_serve"].engine.close()


if __name__ == "__main__":
    main()
