"""Offline speed of the engine beside transformers' own generate_batch, in one run; prints one JSON line.

    python benchmarks/offline.py smollm2-135m --prompts 16 --in 128 --out 64

single_ms is the time between two tokens of a lone request; tokens_per_s counts output tokens of N requests at
once over the whole time, prefill included; ttft_* are of one prompt of --long tokens, first cold, then as a
prefix hit. Each peer is a process of its own; they take turns, round by round, since these machines are
noisy; figures are medians over --repeat rounds after one that warms up, best_* the best of them.
floor_single_ms is the time to read the weights once at the measured speed of memory, floor_ttft_ms the
arithmetic of the long prompt at the measured speed of a large bf16 product.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import queue
import random
import statistics
import time

import torch
from shapes import directory
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from ds_serve.config import Settings
from ds_serve.messages import Request, SamplingParams
from ds_serve.rank import build_local_engine


class Ours:
    """The engine in this process, as the pipeline uses it."""

    def __init__(self, folder: str, args: argparse.Namespace) -> None:
        settings = Settings(model=folder, num_threads=args.threads, steps_in_flight=args.steps_in_flight)
        self.engine = build_local_engine(settings)
        self._count = 0

    def run(self, prompts: list[list[int]], out: int) -> tuple[float, list[float]]:
        """(seconds, the first prompt's token times) of all prompts at once, out tokens each."""
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

    def __init__(self, folder: str, args: argparse.Namespace) -> None:
        torch.set_num_threads(args.threads)
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

    _, times = peer.run([prompt(args.length)], args.out)
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    figures = {"single_ms": statistics.median(gaps) * 1e3}
    elapsed, _ = peer.run([prompt(args.length) for _ in range(args.prompts)], args.out)
    figures["tokens_per_s"] = args.prompts * args.out / elapsed
    long = prompt(args.long)
    figures["ttft_cold_ms"] = peer.run([long], 1)[0] * 1e3
    figures["ttft_hit_ms"] = peer.run([long], 1)[0] * 1e3
    return figures


class Floors:
    """What memory and arithmetic allow, measured in turn with the peers."""

    def __init__(self, folder: str, args: argparse.Namespace) -> None:
        torch.set_num_threads(args.threads)
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        total = sum(parameter.numel() for parameter in model.parameters())  # a tied head counts once, as read
        embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        self._weights = total - embedding
        layers = self._weights - config.vocab_size * config.hidden_size
        # The causal half of QK and of PV.
        attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * args.long**2
        self._macs = layers * args.long + attention
        self._memory = torch.empty(256 << 20, dtype=torch.uint8).random_().view(torch.int64)
        self._square = torch.randn(2048, 2048, dtype=torch.bfloat16)

    def round(self) -> dict[str, float]:
        read = min(_timed(self._memory.sum) for _ in range(5)) / (self._memory.numel() * 8)
        multiply = min(_timed(lambda: self._square @ self._square) for _ in range(5)) / 2048**3
        return {
            "floor_single_ms": 2 * self._weights * read * 1e3,
            "floor_ttft_ms": self._macs * multiply * 1e3,
            "memory_gb_s": 1 / read / 1e9,
            "product_gmac_s": 1 / multiply / 1e9,
        }


def _timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def serve_rounds(kind: str, folder: str, args: argparse.Namespace, pipe) -> None:
    """A peer's process: a seed comes in, a round's figures go out, None ends it."""
    logging.disable(logging.WARNING)
    os.environ.setdefault("TQDM_DISABLE", "1")
    peer = {"ds_serve": Ours, "generate_batch": Transformers, "floors": Floors}[kind](folder, args)
    while (seed := pipe.recv()) is not None:
        pipe.send(peer.round() if kind == "floors" else measure(peer, args, seed))
    os._exit(0)  # a persistent manager's thread would hold the process


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
    folder = directory(args.model)
    args.vocab = AutoConfig.from_pretrained(folder).vocab_size
    kinds = ["ds_serve", "floors"] + ["generate_batch"] * (not args.only_ours)
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for kind in kinds:
        pipes[kind], theirs = context.Pipe()
        context.Process(target=serve_rounds, args=(kind, folder, args, theirs), daemon=True).start()
    rounds: dict[str, list[dict]] = {kind: [] for kind in kinds}
    for seed in range(args.repeat + 1):
        for kind, pipe in pipes.items():
            pipe.send(seed)
            rounds[kind].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(None)
    line: dict = {"model": args.model, "prompts": args.prompts, "in": args.length, "out": args.out}
    line |= {kind: summary(each[1:]) for kind, each in rounds.items()}
    print(json.dumps(line))


def summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    line = {}
    for key in rounds[0]:
        values = [each[key] for each in rounds]
        line[key] = round(statistics.median(values), 2)
        line[f"best_{key}"] = round(max(values) if key.endswith("_s") else min(values), 2)
    return line


if __name__ == "__main__":
    main()
