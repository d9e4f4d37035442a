"""Time of a model step on CPU: transformers' eager layers against the fused ones, and the machine's floor.

    python benchmarks/decoder_layer.py [--threads 2] [--layers 30] [--rounds 7] [--skip-original]

Builds a random bf16 model of SmolLM2-135M's shape twice (original and injected, same attention backend)
and times forwards in turn: decodes of 1 and of 16 rows at --context tokens with each row's logits, prefills
of 1 x 1024 and 16 x 128 tokens with the logits of each row's last. The floor of a step is the longer of two:
its multiplications at the machine's peak, its weights at the machine's read bandwidth, both measured in this
run. Prints one JSON line: ms {min, median} of both models and the floor. Measures no engine and no server.

Where other processes run, use --threads 1, which is timed by CPU time; or set GOMP_SPINCOUNT=1000 for 2: a
thread that spins at a barrier holds the core that its preempted partner needs.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ds_serve.attention.backends import select_backend
from ds_serve.attention.context import AttentionBatch, use_batch
from ds_serve.attention.interface import install
from ds_serve.attention.layout import KVLayout, LayerKV
from ds_serve.model.injection import inject

BLOCK = 16


def build(layers: int) -> LlamaForCausalLM:
    """A model of SmolLM2-135M's shape with random weights."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().bfloat16()


def batch_of(config: LlamaConfig, rows: int, new: int, context: int) -> AttentionBatch:
    """rows sequences with `new` tokens each, the last of `context`."""
    kv = LayerKV(config.num_key_value_heads, config.head_dim, config.head_dim)
    layout = KVLayout((kv,) * config.num_hidden_layers, block_size=BLOCK)
    blocks = -(-context // BLOCK)
    tables = torch.arange(rows * blocks, dtype=torch.int32).reshape(rows, blocks)
    positions = torch.arange(context - new, context).repeat(rows)
    row_of = torch.arange(rows).repeat_interleave(new)
    return AttentionBatch(
        slab=layout.allocate(rows * blocks, "cpu"),
        layout=layout,
        slot_mapping=tables[row_of, positions // BLOCK].long() * BLOCK + positions % BLOCK,
        query_start=torch.arange(rows + 1, dtype=torch.int32) * new,
        context_len=torch.full((rows,), context, dtype=torch.int32),
        block_tables=tables,
        positions=positions,
        num_tokens=rows * new,
    )


def step_of(model: LlamaForCausalLM, batch: AttentionBatch) -> Callable[[], None]:
    ids = torch.randint(0, 49152, (1, batch.num_tokens), generator=torch.Generator().manual_seed(0))
    last = batch.query_start[1:].long() - 1

    def step() -> None:
        with torch.inference_mode(), use_batch(batch):
            model(input_ids=ids, position_ids=batch.positions[None], use_cache=False, logits_to_keep=last)

    return step


def times(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """ms of each step, taken in turn so that a noisy moment meets all of them."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 1):
        for name, step in steps.items():
            begin = clock()
            step()
            if index:
                taken[name].append((clock() - begin) * 1e3)
    return taken


def summary(ms: list[float]) -> dict[str, float]:
    return {"min": round(min(ms), 2), "median": round(statistics.median(ms), 2)}


def machine_limits() -> tuple[float, float]:
    """(multiply-adds a second, bytes read a second): the best seen of each, of bytes by two ways to read."""
    ops = torch.ops.ds_serve
    x, w = torch.randn(384, 512).bfloat16(), ops.pack_weight(torch.randn(512, 512).bfloat16())
    one = torch.ones(1, 1024, dtype=torch.bfloat16)
    big = torch.ones(64 << 20, dtype=torch.float32)  # 256 MiB, many times the cache, in small pages
    huge = ops.pack_weight(torch.ones(64 << 10, 1024, dtype=torch.bfloat16))  # 128 MiB in huge pages
    taken = times(
        {
            "macs": lambda: ops.linear_packed(x, w, 512, None),
            "big": lambda: big.sum(),
            "huge": lambda: ops.linear_packed(one, huge, 64 << 10, None),
        },
        25,
    )
    read = max(t.nbytes / min(taken[name]) for name, t in (("big", big), ("huge", huge)))
    return 384 * 512 * 512 / min(taken["macs"]) * 1e3, read * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--context", type=int, default=160)
    parser.add_argument("--skip-original", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("error", RuntimeWarning)

    original, backend = build(args.layers), select_backend("cpu", torch.bfloat16, BLOCK)
    injected = copy.deepcopy(original)
    for model in (original, injected):
        install(model, backend)
    begin = time.perf_counter()
    report = inject(injected, backend)
    inject_ms = (time.perf_counter() - begin) * 1e3
    models = {"injected": injected} if args.skip_original else {"original": original, "injected": injected}

    macs, bandwidth = machine_limits()
    head = original.lm_head.weight.numel()
    body = sum(p.numel() for n, p in original.named_parameters() if "layers" in n and p.dim() == 2)
    result: dict[str, object] = {
        "backend": backend.name,
        "threads": args.threads,
        "layers": args.layers,
        "injected": report.injected,
        "kept": report.reasons,
        "max_error": round(report.max_error, 5),
        "inject_ms": round(inject_ms),
        "peak_gmacs": round(macs / 1e9, 1),
        "read_gb_s": round(bandwidth / 1e9, 1),
    }
    for name, rows, new, context, factor in (
        ("decode_1", 1, 1, args.context, 10),
        ("decode_16", 16, 1, args.context, 8),
        ("prefill_1x1024", 1, 1024, 1024, 1),
        ("prefill_16x128", 16, 128, 128, 1),
    ):
        batch = batch_of(original.config, rows, new, context)
        taken = times({m: step_of(model, batch) for m, model in models.items()}, args.rounds * factor)
        arithmetic = (rows * new * body + rows * head) / macs * 1e3
        reading = (body + head) * 2 / bandwidth * 1e3
        result[name] = {m: summary(ms) for m, ms in taken.items()}
        result[name]["floor"] = {"arithmetic": round(arithmetic, 2), "weights": round(reading, 2)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
