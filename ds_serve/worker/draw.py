"""The arithmetic of drawing a token: filters as thresholds, integer weights, a hash for the draw.

Knows tensors only, neither slots nor requests; sampler.py calls it.

A token's weight is an integer, 2**40 for the likeliest one, and a draw walks the surviving tokens in
id order up to a point that a hash of (seed, position) gives. Integer sums do not depend on the order
of adding, and filters are thresholds on the logit itself, so neither the batch around a row nor the
way a device sorts equal logits can change what is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

WEIGHT_ONE = 2.0**40  # the likeliest token's weight: a sum over 2**22 tokens still fits an int64
NUCLEUS_CANDIDATES = 256  # top-p looks at this many tokens before it sorts a row's whole vocabulary


@dataclass(frozen=True)
class Filter:
    """top-k and top-p of F rows.

    top_k int64 [F, 1] is the vocabulary's size where off, top_p float64 [F, 1] infinity where off.
    nucleus_only bool [F, 1] marks rows with top-p alone, whose number of tokens has no bound (None:
    no such row). num_candidates is how many of the likeliest tokens to look at first.
    """

    top_k: torch.Tensor
    top_p: torch.Tensor
    num_candidates: int
    nucleus_only: torch.Tensor | None


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """float64 in [0, 1), one a pair: the upper 53 bits of a counter-based hash.

    seeds uint64 [R], positions int64 [R]. The mixing function is splitmix64's (Steele, Lea and
    Flood, "Fast splittable pseudorandom number generators", 2014), over the seed, then the position.
    """
    mixed = _mix(seeds + np.uint64(0x9E3779B97F4A7C15))
    mixed = _mix(mixed + positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def argmax(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 [R], bool [R]): each row's first largest entry, and whether that entry is finite."""
    if scores.device.type == "cpu":  # numpy's is vectorised over a row, torch's is not (10 times slower)
        tokens = torch.from_numpy(scores.numpy().argmax(-1))
    else:
        tokens = scores.argmax(-1)
    return tokens, scores.gather(1, tokens[:, None]).squeeze(1).isfinite()


def weigh(distance: torch.Tensor) -> torch.Tensor:
    """int64 weights of logits given as their distance (<= 0) to the row's largest."""
    return distance.exp().mul_(WEIGHT_ONE).long()


def least_kept(distance: torch.Tensor, weights: torch.Tensor, limits: Filter) -> torch.Tensor:
    """[F, 1]: the least distance that top-k, then top-p, keep. Equal logits are kept or dropped together.

    distance and weights are [F, V]. top-p keeps a token while those above it hold less than top_p of
    what top-k left over.
    """
    on_cpu = distance.device.type == "cpu"
    if limits.nucleus_only is not None and not on_cpu:  # asking whether the candidates suffice would wait
        best = distance.sort(-1, descending=True).values
    else:
        best = distance.topk(min(limits.num_candidates, distance.shape[1])).values
    kth = best.gather(1, (limits.top_k - 1).clamp(max=best.shape[1] - 1))
    if limits.nucleus_only is not None:
        kth = kth.masked_fill(limits.nucleus_only, -torch.inf)
    total = (weights * (distance >= kth)).sum(-1, keepdim=True)
    least, index = _nucleus(best, kth, limits.top_p * total)
    if limits.nucleus_only is not None and on_cpu and best.shape[1] < distance.shape[1]:
        unbounded = (limits.nucleus_only & (index == best.shape[1] - 1)).squeeze(1)
        if unbounded.any():
            whole = torch.from_numpy(np.ascontiguousarray(np.sort(distance[unbounded].numpy(), -1)[:, ::-1]))
            mass = (limits.top_p * total)[unbounded]
            least[unbounded] = _nucleus(whole, kth[unbounded], mass)[0]
    return least


def _nucleus(best: torch.Tensor, kth: torch.Tensor, mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([F, 1] least distance kept, its index in best). best [F, C] descends; mass is a sum of weights."""
    weights = weigh(best)
    kept = (best >= kth) & (weights.cumsum(-1) - weights < mass)
    index = kept.sum(-1, keepdim=True).sub_(1).clamp_(min=0)
    return best.gather(1, index), index


def pick(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """int64 [R]: the token at the point uniform [R] of each row of weights [R, V], in id order.

    A token without weight is never picked, because it does not raise the sum. A row without any
    weight (not a distribution) gives some id inside the vocabulary.
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    point = (uniform[:, None] * total).long().minimum(total - 1)
    return torch.searchsorted(cumulative, point, right=True).squeeze(1).clamp_(max=weights.shape[1] - 1)
