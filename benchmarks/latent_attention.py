"""Times one layer's latent attention with latents in the cache, and with keys and values, a JSON line a case.

`python benchmarks/latent_attention.py [--heads 16] [--seconds 1] [--way cpu]`. Sizes are DeepSeek's: latents
of 512 + 64 numbers, heads of 128 + 64 and 128; 16 heads are V2-Lite's, or a shard's of V3 cut into eight.
What differs is timed: attention, and the projection of the step's latents, or of its queries and sums. Times
are the minimum and the median of interleaved calls, in milliseconds of this thread's CPU time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from attention import CASES, make_batch, measure
from torch import nn

from ds_serve.attention.backends import select_backend
from ds_serve.attention.latent import LatentProjection
from ds_serve.attention.layout import LayerKV

RANK, NOPE, ROPE, V = 512, 128, 64, 128


def ways(
    heads: int, counts: list[int], lengths: list[int], dtype: torch.dtype, prefer: str
) -> dict[str, Callable[[], None]]:
    tokens, scale = sum(counts), (NOPE + ROPE) ** -0.5
    linear = nn.Linear(RANK, heads * (NOPE + V), bias=False).to(dtype)
    latent, rope = torch.randn(1, 1, tokens, RANK, dtype=dtype), torch.randn(1, 1, tokens, ROPE, dtype=dtype)
    query = torch.randn(1, heads, tokens, NOPE + ROPE, dtype=dtype)
    backend = select_backend("cpu", dtype, 16, prefer)
    projection = LatentProjection(linear, RANK, NOPE, ROPE, V)
    of_latents = make_batch(projection.shape, counts, lengths, dtype)
    of_heads = make_batch(LayerKV(heads, NOPE + ROPE, V), counts, lengths, dtype)

    def latents() -> None:
        projection(latent)
        q, k = projection.absorb(query, torch.cat([latent[..., :NOPE], rope], -1))
        q, k = q[0].transpose(0, 1), k[0].transpose(0, 1)
        projection.expand(backend.forward(0, q, k, None, of_latents, scale=scale))

    def keys_and_values() -> None:
        both = linear(latent[0]).view(tokens, heads, NOPE + V)
        key = torch.cat([both[..., :NOPE], rope[0, 0][:, None].expand(tokens, heads, ROPE)], -1)
        backend.forward(0, query[0].transpose(0, 1), key, both[..., NOPE:], of_heads, scale=scale)

    return {"latents": latents, "keys_and_values": keys_and_values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case and each way")
    parser.add_argument("--way", default="cpu", help="attention backend")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32):
            for name, (counts, lengths) in CASES.items():
                calls = ways(arguments.heads, counts, lengths, dtype, arguments.way)
                record = {"case": name, "dtype": str(dtype).removeprefix("torch."), "heads": arguments.heads}
                print(json.dumps(record | measure(calls, arguments.seconds)), flush=True)


if __name__ == "__main__":
    main()
