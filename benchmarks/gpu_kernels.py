"""Answers the questions that tuning on CUDA asks, in one run of a few minutes: a line each, beside its floor.

    python benchmarks/gpu_kernels.py [--only gemm,attention] [--minutes 8] [--dry-run]

A question that fails says why and the others go on; one that would begin after --minutes is left out and
named. Shapes are those of Llama-3.1-8B. Floors: bytes over the measured speed of a copy, or arithmetic over
that of a large product, whichever is longer.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator

import torch
from gpu_clock import Clock, Line
from gpu_flashinfer import attention, compile_all, write
from gpu_gemm import products, products_autotuned, products_lt, products_reduced, products_skinny
from gpu_model import Ceilings, measure
from torch import nn

HIDDEN, INNER, HEADS, DIM, VOCAB = 4096, 14336, 40, 128, 128256  # heads: queries' and keys'
Question = Callable[[Clock, bool], Iterator[Line]]


# -- what stands between the products ----------------------------------------------------------------


def _norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    residual = residual + x
    wide = residual.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    return weight * wide.to(x.dtype), residual


def _gate(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return nn.functional.silu(gate) * up


def _rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def elementwise(clock: Clock, dry: bool) -> Iterator[Line]:
    """Norm with residual, gated activation and rotary embedding, as inductor fuses each."""
    scale = 16 if dry else 1
    hidden, inner, heads = HIDDEN // scale, INNER // scale, HEADS // (4 if dry else 1)
    like = {"dtype": torch.bfloat16, "device": clock.device}
    weight = torch.randn(hidden, **like)
    norm, gate, rope = (torch.compile(each, dynamic=False) for each in (_norm, _gate, _rope))
    for rows in (2,) if dry else (1, 64, 256, 2048):

        def several(*shape: int) -> list[torch.Tensor]:
            return [
                torch.randn(*shape, **like) for _ in range(clock.copies(2 * torch.Size(shape).numel(), 16))
            ]

        x, wide, q = several(rows, hidden), several(rows, 2 * inner), several(rows, heads, DIM)
        cos, sin = torch.randn(rows, DIM, **like), torch.randn(rows, DIM, **like)
        calls = {
            "norm + residual": (lambda i, x=x: norm(x[i % len(x)], x[(i + 1) % len(x)], weight), 8 * hidden),
            "gated activation": (lambda i, wide=wide: gate(wide[i % len(wide)]), 6 * inner),
            "rotary embedding": (
                lambda i, q=q, cos=cos, sin=sin: rope(q[i % len(q)], cos, sin), 4 * heads * DIM,
            ),
        }  # fmt: skip
        for name, (call, row_bytes) in calls.items():
            yield Line(f"{name}, {rows} rows", clock.us(call, 16), clock.floor_us(rows * row_bytes))


def sampling(clock: Clock, dry: bool) -> Iterator[Line]:
    """Drawing a token from logits [rows, vocabulary]."""
    vocab = VOCAB // 64 if dry else VOCAB
    tuned = torch.compile(lambda logits: logits.argmax(-1), dynamic=False)
    for rows in (2,) if dry else (1, 64, 256):
        half = [torch.randn(rows, vocab, dtype=torch.bfloat16, device=clock.device) for _ in range(4)]
        wide = [each.float() for each in half]
        noise = torch.rand_like(wide[0])
        calls = {
            "argmax bf16": lambda i, half=half: half[i % 4].argmax(-1),
            "argmax bf16, inductor": lambda i, half=half: tuned(half[i % 4]),
            "argmax fp32": lambda i, wide=wide: wide[i % 4].argmax(-1),
            "to fp32": lambda i, half=half: half[i % 4].float(),
            "finite": lambda i, wide=wide: wide[i % 4].isfinite().all(-1),
            "log softmax fp32": lambda i, wide=wide: wide[i % 4].log_softmax(-1),
            "top 50": lambda i, wide=wide: wide[i % 4].topk(50),
            "sort": lambda i, wide=wide: wide[i % 4].sort(-1, descending=True),
            "gumbel": lambda i, wide=wide, noise=noise: (wide[i % 4] - (-noise.log()).log()).argmax(-1),
        }
        for name, call in calls.items():
            width = 2 if "bf16" in name or name == "to fp32" else 4
            yield Line(f"{name}, {rows} rows", clock.us(call, 4), clock.floor_us(width * rows * vocab))


# -- what the host pays ------------------------------------------------------------------------------


def launches(clock: Clock, dry: bool) -> Iterator[Line]:
    """A graph of many small kernels: what its replay costs the host, and each kernel the device."""
    small = torch.zeros(16, device=clock.device)
    yield Line("eager launch, host", clock.host_us(lambda: [small.add_(1) for _ in range(100)]) / 100)
    if not clock.on_gpu:
        return
    for kernels in (1, 100, 400):
        graph = clock.graph(lambda _: small.add_(1), kernels)
        yield Line(f"graph of {kernels}: replay, host", clock.host_us(graph.replay))
        yield Line(f"graph of {kernels}: a kernel, device", clock.event_us(graph.replay) / kernels)
    began, ended = torch.cuda.Event(), torch.cuda.Event()
    yield Line("event record", clock.host_us(began.record))
    yield Line("event wait by a stream", clock.host_us(lambda: torch.cuda.current_stream().wait_event(began)))
    yield Line("event query", clock.host_us(ended.query))


def copies(clock: Clock, dry: bool) -> Iterator[Line]:
    """Small copies: what a step's inputs and tokens cost."""
    for size in (4096, 65536) if dry else (4096, 65536, 2**20):
        pinned = torch.zeros(size, dtype=torch.uint8, pin_memory=clock.on_gpu)
        plain = torch.zeros(size, dtype=torch.uint8)
        there = torch.zeros(size, dtype=torch.uint8, device=clock.device)

        def arrive(there=there, pinned=pinned) -> None:
            pinned.copy_(there, non_blocking=True)
            clock.wait()

        def send(there=there, pinned=pinned) -> None:
            there.copy_(pinned, non_blocking=True)

        yield Line(f"{size} bytes, pinned to device, host", clock.host_us(send))
        yield Line(
            f"{size} bytes, pageable to device, host", clock.host_us(lambda t=there, p=plain: t.copy_(p))
        )
        yield Line(f"{size} bytes, device to pinned and wait", clock.host_us(arrive))
    rows = torch.zeros(256, dtype=torch.int64, device=clock.device)
    yield Line("256 tokens .tolist()", clock.host_us(rows.tolist))
    yield Line("256 tokens: pin_memory() of a new tensor", clock.host_us(_new_pinned(clock)))


def _new_pinned(clock: Clock) -> Callable[[], object]:
    return lambda: torch.zeros(256, dtype=torch.int64, pin_memory=clock.on_gpu)


QUESTIONS: dict[str, Question] = {
    "launch": launches, "copy": copies, "gemm": products, "attention": attention, "write": write,
    "sample": sampling, "element": elementwise, "lt": products_lt, "reduced": products_reduced,
    "skinny": products_skinny, "autotuned": products_autotuned,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default=",".join(QUESTIONS), help=f"of {','.join(QUESTIONS)}")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU")
    args = parser.parse_args(arguments)
    names = args.only.split(",")
    if unknown := set(names) - set(QUESTIONS):
        raise SystemExit(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(QUESTIONS)}")
    torch._dynamo.config.recompile_limit = 64  # one function, many shapes
    device = torch.device("cpu" if args.dry_run else "cuda")
    ceilings: Ceilings = measure(device, args.dry_run)
    print(ceilings.line(), flush=True)
    began = time.monotonic()
    compiling = multiprocessing.get_context("spawn").Process(target=compile_all, args=(device,))
    if "attention" in names and not args.dry_run:
        compiling.start()  # FlashInfer compiles for a minute: beside the questions before
    for name in names:
        if name == "attention" and compiling.pid is not None:
            compiling.join()
            print(f"-- FlashInfer has compiled after {time.monotonic() - began:.0f} s")
        if time.monotonic() - began > args.minutes * 60:
            print(f"-- {name}: left out, {args.minutes:g} minutes are over")
            continue
        ask(name, Clock(device, ceilings), args.dry_run)
    return 0


def ask(name: str, clock: Clock, dry: bool) -> None:
    began = time.monotonic()
    try:
        with torch.inference_mode():
            for line in QUESTIONS[name](clock, dry):
                print(line.text(), flush=True)
    except Exception as error:
        print(f"-- {name}: FAILED {type(error).__name__}: {str(error)[:300]}")
    print(f"-- {name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
