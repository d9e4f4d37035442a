"""How near the products of Llama-3.1-8B's layer come to reading their weights once, and by which code.

cuBLAS, cuBLASLt, inductor (a reduction at one row, Triton's templates with autotuning), and a kernel of a few
lines for few rows, which splits the sum over programs. Weights merged (qkv, gate_up) and apart. Used by
gpu_kernels.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from gpu_clock import Clock, Line
from torch import nn

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

SHAPES = {  # outputs, inputs
    "q": (4096, 4096), "kv": (2048, 4096), "qkv": (6144, 4096), "o": (4096, 4096), "gate": (14336, 4096),
    "gate_up": (28672, 4096), "down": (4096, 14336), "head": (128256, 4096),
}  # fmt: skip
ROWS = (1, 2, 8, 16, 64, 128, 256, 2048)
PER_LAYER = ("qkv", "o", "gate_up", "down")
LAYERS = 32
# outputs a program, inputs a turn, programs a sum, warps, stages
SKINNY = (
    (16, 256, 1, 4, 4), (16, 512, 1, 4, 3), (32, 256, 1, 4, 4), (64, 128, 1, 4, 4), (64, 128, 4, 4, 4),
    (16, 256, 4, 4, 4), (32, 128, 2, 4, 5), (128, 128, 4, 8, 3),
)  # fmt: skip
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Weights:
    """Inputs of one shape and enough weights of it that none is in the cache when its turn comes."""

    def __init__(self, clock: Clock, shape: tuple[int, int], scale: int) -> None:
        self.outputs, self.inputs = shape[0] // scale, shape[1] // scale
        count = clock.copies(2 * self.outputs * self.inputs)
        like = {"dtype": torch.bfloat16, "device": clock.device}
        self.each = [torch.randn(self.outputs, self.inputs, **like) * 0.02 for _ in range(count)]
        self._like, self._clock = like, clock

    def time(self, product: Product, rows: int) -> tuple[float, float]:
        """(microseconds, their floor). ValueError where the product is not nn.Linear's."""
        x = torch.randn(rows, self.inputs, **self._like)
        right, found = nn.functional.linear(x, self.each[0]).float(), product(x, self.each[0]).float()
        error = ((found - right).norm() / right.norm()).item()
        if not error < 1e-2:
            raise ValueError(f"the product is off by {error:.2g}")
        calls = max(8, len(self.each)) if self._clock.on_gpu else 2
        taken = self._clock.us(lambda index: product(x, self.each[index % len(self.each)]), calls)
        elements = self.outputs * self.inputs + rows * (self.inputs + self.outputs)
        return taken, self._clock.floor_us(2 * elements, 2 * rows * self.inputs * self.outputs)


def products(clock: Clock, dry: bool) -> Iterator[Line]:
    """Every shape and number of rows by cuBLAS; a layer's and the model's sum of them."""
    scale, all_rows = (32, (1, 8)) if dry else (1, ROWS)
    taken: dict[tuple[str, int], tuple[float, float]] = {}
    for name, shape in SHAPES.items():
        weights = Weights(clock, shape, scale)
        for rows in all_rows:
            taken[name, rows] = weights.time(nn.functional.linear, rows)
            yield Line(f"cuBLAS {name} M={rows}", *taken[name, rows])
    for rows in all_rows:
        for what, names in (("merged", PER_LAYER), ("apart", ("q", "kv", "o", "gate", "gate", "down"))):
            parts = [(LAYERS * us, LAYERS * floor) for us, floor in (taken[name, rows] for name in names)]
            us, floor = (sum(each) for each in zip(*parts, taken["head", rows], strict=True))
            yield Line(f"cuBLAS model {what} M={rows}", us, floor)


def products_lt(clock: Clock, dry: bool) -> Iterator[Line]:
    """The same by cuBLASLt, whose heuristics are others; for decode's rows."""
    before = torch.backends.cuda.preferred_blas_library()
    scale, all_rows = (32, (1,)) if dry else (1, (1, 16, 64, 256))
    try:
        torch.backends.cuda.preferred_blas_library("cublaslt")
        for name in (*PER_LAYER, "head"):
            weights = Weights(clock, SHAPES[name], scale)
            for rows in all_rows:
                yield Line(f"cuBLASLt {name} M={rows}", *weights.time(nn.functional.linear, rows))
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def products_reduced(clock: Clock, dry: bool) -> Iterator[Line]:
    """One row as inductor's reduction: coordinate descent tuning turns the product into one."""
    for name in (*PER_LAYER, "head"):
        compiled = torch.compile(
            lambda x, w: nn.functional.linear(x, w),
            dynamic=False,
            options={"coordinate_descent_tuning": True},
        )
        yield Line(
            f"inductor tuned {name} M=1", *Weights(clock, SHAPES[name], 32 if dry else 1).time(compiled, 1)
        )


def products_autotuned(clock: Clock, dry: bool) -> Iterator[Line]:
    """Triton's templates, cuBLAS left out, so that their own time is seen."""
    options = {
        "max_autotune_gemm": True,
        "max_autotune_gemm_backends": "TRITON" if clock.on_gpu else "ATEN,CPP",
    }
    if clock.on_gpu:
        options["triton.enable_persistent_tma_matmul"] = True
    for rows in (1,) if dry else (64, 256, 16):
        for name in PER_LAYER[:1] if dry else PER_LAYER:
            compiled = torch.compile(lambda x, w: nn.functional.linear(x, w), dynamic=False, options=options)
            weights = Weights(clock, SHAPES[name], 32 if dry else 1)
            yield Line(f"inductor autotuned {name} M={rows}", *weights.time(compiled, rows))


def products_skinny(clock: Clock, dry: bool) -> Iterator[Line]:
    """Few rows by the kernel below, the best of its tilings."""
    if triton is None:
        raise ModuleNotFoundError("triton")
    scale, all_rows = (32, (1, 3)) if dry else (1, (1, 8, 16, 64))
    for name in (*PER_LAYER, "head"):
        weights = Weights(clock, SHAPES[name], scale)
        for rows in all_rows:
            found, failure = [], None
            for tiling in SKINNY[:2] if dry else SKINNY:
                try:
                    found.append((*weights.time(functools.partial(skinny, tiling=tiling), rows), tiling))
                except Exception as error:  # too much shared memory, or what the compiler cannot do
                    failure = error
            if not found:
                raise failure
            us, floor, tiling = min(found)
            yield Line(f"skinny {name} M={rows}", us, floor, f"tiling {tiling}")


def skinny(x: torch.Tensor, w: torch.Tensor, tiling: tuple[int, int, int, int, int]) -> torch.Tensor:
    """x [M,K] w [N,K] -> x w^T [M,N], for M up to 64; K is a multiple of the tiling's turn."""
    outputs_each, turn, programs, warps, stages = tiling
    (rows, inputs), outputs = x.shape, w.shape[0]
    turn = min(turn, triton.next_power_of_2(inputs // programs))
    padded = max(16, triton.next_power_of_2(rows))
    out = torch.empty(
        programs, rows, outputs, dtype=x.dtype if programs == 1 else torch.float32, device=x.device
    )
    _skinny[(triton.cdiv(outputs, outputs_each), programs)](
        x, w, out, rows, outputs, INPUTS=inputs, ROWS=padded, OUTPUTS=outputs_each, TURN=turn,
        PROGRAMS=programs, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out[0] if programs == 1 else out.sum(0).to(x.dtype)


if triton is not None:

    @triton.jit
    def _skinny(
        x, w, out, rows, outputs, INPUTS: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
        TURN: tl.constexpr, PROGRAMS: tl.constexpr,
    ):  # fmt: skip
        row = tl.arange(0, ROWS)
        output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        here = row[None, :] < rows
        there = output[:, None] < outputs
        total = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
        for start in range(0, INPUTS, TURN * PROGRAMS):
            k = start + tl.program_id(1) * TURN + tl.arange(0, TURN)
            inside = k < INPUTS
            w_at = w + output[:, None].to(tl.int64) * INPUTS + k[None, :]
            w_tile = tl.load(w_at, mask=there & inside[None, :], other=0.0, eviction_policy="evict_first")
            x_tile = tl.load(x + row[None, :] * INPUTS + k[:, None], mask=here & inside[:, None], other=0.0)
            total = tl.dot(w_tile, x_tile, total)
        place = out + (tl.program_id(1) * rows + row[None, :]) * outputs + output[:, None]
        tl.store(place, total.to(out.dtype.element_ty), mask=here & there)
