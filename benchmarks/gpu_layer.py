"""What one decoder layer takes on this GPU without its attention: eager, compiled, and by inductor's options.

    python benchmarks/gpu_layer.py [--only eager,merged] [--dry-run]

Llama-3.1-8B's shape, bf16, inside a CUDA graph, at 1, 64, 256 and 2,048 tokens, beside the floor of its
weights' bytes and products; and how long each way took to compile. Attention returns memory that nobody
wrote: what it takes is gpu_kernels.py's question. The options of the fastest belong into
ds_serve/model/compiled.py.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from gpu_clock import Clock, Line
from gpu_model import config_of, measure
from transformers import AutoModelForCausalLM

from ds_serve.attention.context import use_batch
from ds_serve.attention.interface import install, probe_layers
from ds_serve.attention.layout import KVLayout
from ds_serve.model import compiled
from ds_serve.model.merged import merge
from ds_serve.model.parity import chunk

SIZES, DRY_SIZES = (1, 64, 256, 2048), (1, 5)
TUNED = {"coordinate_descent_tuning": True}
AUTOTUNED = {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,TRITON"}
# way -> (merged, options for one token, options for more); None: eager
WAYS: dict[str, tuple[bool, dict[str, Any], dict[str, Any]] | None] = {
    "eager": None,
    "compiled": (False, {}, {}),
    "merged": (True, {}, {}),
    "tuned": (True, TUNED, TUNED),
    "autotuned": (True, TUNED | AUTOTUNED, AUTOTUNED),
    "pointwise": (True, TUNED, {"max_autotune_pointwise": True}),
}


class NoAttention:
    name, captures = "none", True

    def prepare(self, batch) -> None:
        pass

    def forward(self, layer, q, k, v, batch, **how) -> torch.Tensor:
        return q.new_empty(*q.shape[:2], v.shape[-1])


def compiled_forward(layer: torch.nn.Module, way: tuple, device: torch.device) -> Callable:
    is_merged, one, many = way
    if is_merged:
        merge(layer)
    compiled.OPTIONS[device.type] = {"one": one, "many": many}
    own = type(layer).forward

    def forward(layer, *args, **kwargs):
        return own(layer, *args, **kwargs)

    forward.__code__ = forward.__code__.replace(co_name="forward_of_this_way")
    whole = torch.compile(forward, backend=compiled._Backend(), dynamic=True, fullgraph=True)
    return MethodType(whole, layer)


def lines(clock: Clock, dry: bool, names: list[str]):
    device, config = clock.device, config_of(dry, 1)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    backend = NoAttention()
    install(model, backend)
    layout = KVLayout(tuple(probe_layers(model)), 16, torch.bfloat16)
    original = model.model.layers[0]
    sizes = DRY_SIZES if dry else SIZES
    slab = layout.allocate(max(sizes) // 16 + 2, device)
    weights = sum(parameter.numel() for parameter in original.parameters())
    for name in names:
        layer = copy.deepcopy(original)
        forward = layer.forward if WAYS[name] is None else compiled_forward(layer, WAYS[name], device)

        def call(size: int, forward: Callable = forward) -> Callable[[int], object]:
            x = torch.randn(1, size, config.hidden_size, dtype=torch.bfloat16, device=device)
            batch = chunk(layout, slab, 0, size)
            rotary = model.model.rotary_emb(x, batch.positions[None])

            def run(_: int) -> object:
                batch.num_calls = 0
                with use_batch(batch):
                    return forward(x, attention_mask=None, position_ids=None, position_embeddings=rotary)

            return run

        began = time.perf_counter()
        with torch._dynamo.config.patch(specialize_float=True):
            for size in compiled.LENGTHS["cpu" if dry else "cuda"]:
                call(size)(0)
        print(f"{name}: ready after {time.perf_counter() - began:.1f} s", flush=True)
        for size in sizes:
            floor = clock.floor_us(2 * weights, 2 * weights * size)
            yield Line(f"{name} T={size}", clock.us(call(size), 4), floor)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default=",".join(WAYS), help=f"of {','.join(WAYS)}")
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape on a CPU")
    args = parser.parse_args(arguments)
    names = args.only.split(",")
    if unknown := set(names) - set(WAYS):
        raise SystemExit(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    device = torch.device("cpu" if args.dry_run else "cuda")
    clock = Clock(device, measure(device, args.dry_run))
    print(clock.ceilings.line(), flush=True)
    for name in names:
        try:
            with torch.inference_mode():
                for line in lines(clock, args.dry_run, [name]):
                    print(line.text(), flush=True)
        except Exception as error:
            print(f"-- {name}: FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
