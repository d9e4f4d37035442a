"""The arithmetic of drawing a token: filters as thresholds, integer weights, a hash for the draw.

Knows tensors only, neither slots nor requests; sampler.py calls it.

A token's weight is an integer, 2**40 for the likeliest one, and a draw walks the surviving tokens in
id order up to a point that a hash of (seed, position) gives. Integer sums do not depend on the order
of adding, and filters are thresholds on the logit itself, so neither the batch around a row nor the
way a device sorts equal logits can change what is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ds_serve.worker.put import put

WEIGHT_ONE = 2.0**40  # the likeliest token's weight
MAX_SUMMANDS = 2**22  # so many weights add up within an int64
ROWS_AT_ONCE = 4
NUCLEUS_CANDIDATES = 256  # top-p looks at this many tokens before it sorts a row's whole vocabulary


@dataclass(frozen=True)
class Filter:
    """top-k, top-p and min-p of F rows; columns are [F, 1].

    top_k int64 is the vocabulary's size where off, top_p float64 infinity, min_distance (the
    logarithm of min-p) minus infinity. unbounded bool marks rows without top-k (None: no such row),
    nucleus int64 [N] indexes those of them with top-p. num_candidates is how many of the likeliest
    tokens top-k and top-p look at first (0: both are off everywhere).
    """

    top_k: torch.Tensor
    top_p: torch.Tensor
    min_distance: torch.Tensor
    unbounded: torch.Tensor | None
    nucleus: torch.Tensor | None
    num_candidates: int


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
    if _on_cpu(scores):  # numpy's is vectorised over a row, torch's is not (10 times slower)
        tokens = torch.from_numpy(scores.numpy().argmax(-1))
    else:
        tokens = scores.argmax(-1)
    return tokens, scores.gather(1, tokens[:, None]).squeeze(1).isfinite()


def penalised(
    scores: torch.Tensor, penalty: tuple[torch.Tensor, ...], seen: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """scores [R, V] with some rows penalised for the tokens that they have seen.

    penalty: int64 [P], those rows; int64 [P], their rows in the tables; their repetition, presence and
    frequency penalties, [P, 1]. The tables: seen bool [S, V] in prompt or output, counts [S, V] of output.
    """
    rows, table_rows, *fines = penalty
    if not _on_cpu(scores):
        values = scores.index_select(0, rows)
        fined = _fined(values, counts[table_rows], *fines)
        return scores.index_copy(0, rows, torch.where(seen[table_rows], fined, values))
    which, tokens = true_entries(seen[table_rows])  # a few among the whole vocabulary
    index = (rows[which], tokens)
    fines = (fine[which, 0] for fine in fines)
    return scores.index_put(index, _fined(scores[index], counts[table_rows[which], tokens], *fines))


def _fined(
    values: torch.Tensor,
    counts: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> torch.Tensor:
    values = torch.where(values < 0, values * repetition, values / repetition)
    return values - frequency * counts - presence * (counts > 0)


def weigh(distance: torch.Tensor) -> torch.Tensor:
    """int64 weights of logits given as their distance (<= 0) to the row's largest."""
    return distance.exp().mul_(WEIGHT_ONE).long()


def least_kept(distance: torch.Tensor, limits: Filter) -> torch.Tensor:
    """[F, 1]: the least distance [F, V] that the filters keep. Equal logits are kept or dropped together.

    top-p keeps a token while those above it hold less than top_p of what top-k left over.
    """
    if not limits.num_candidates:
        return limits.min_distance
    best = _largest(distance, limits)
    kth = best.gather(1, (limits.top_k - 1).clamp(max=best.shape[1] - 1))
    if limits.unbounded is not None:
        kth = kth.masked_fill(limits.unbounded, -torch.inf)
    weights = weigh(best) * (best >= kth)
    total = weights.sum(-1, keepdim=True)
    if not _on_cpu(distance):  # there, best stops at the kth, and may leave out some that equal it
        total += ((distance == kth).sum(-1, keepdim=True) - (best == kth).sum(-1, keepdim=True)) * weigh(kth)
    elif limits.nucleus is not None:
        whole = _by_parts(lambda part: weigh(part).sum(-1, keepdim=True), distance)
        total[limits.nucleus] = whole[limits.nucleus]
    mass = limits.top_p * total
    least = _nucleus(best, weights, mass)
    if _on_cpu(distance) and limits.nucleus is not None:
        short = (weights.sum(-1, keepdim=True) < mass)[limits.nucleus].squeeze(1)
        if short.any():  # the nucleus is larger than the candidates
            rows = limits.nucleus[short]
            whole = torch.from_numpy(np.sort(distance[rows].numpy(), -1)[:, ::-1].copy())
            least[rows] = _nucleus(whole, weigh(whole), mass[rows])
    return torch.where(limits.top_p.isinf(), kth, least).maximum(limits.min_distance)


def _nucleus(best: torch.Tensor, weights: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """[F, 1]: the last of best [F, C], which descends, that less than mass comes before."""
    kept = (weights > 0) & (weights.cumsum(-1) - weights < mass)
    return best.gather(1, kept.sum(-1, keepdim=True).sub_(1).clamp_(min=0))


def _largest(distance: torch.Tensor, limits: Filter) -> torch.Tensor:
    """[F, C >= num_candidates]: each row's largest distances, descending, padded with minus infinity.

    On a device rows are sorted whole where top-p has no top-k to bound it: to ask whether the
    candidates suffice would wait for the device. On CPU all that equal the last candidate are in.
    """
    count, size = limits.num_candidates, distance.shape[1]
    if not _on_cpu(distance):
        if limits.nucleus is not None:
            return distance.sort(-1, descending=True).values
        return distance.topk(count).values
    # The maxima of `count` groups reach the count-th largest of them, so no candidate is below that one.
    # It takes three cheap passes to find them so, where a selection costs as much as twenty.
    depth = size // (4 * count)
    if depth < 2:
        return torch.from_numpy(np.sort(distance.numpy(), -1)[:, ::-1].copy())
    groups = size // depth
    maxima = distance[:, : groups * depth].view(-1, depth, groups).amax(1)
    rows, columns = _entries_from(distance, maxima.topk(count).values[:, -1:])
    place = torch.arange(len(rows)) - torch.searchsorted(rows, torch.arange(len(distance)))[rows]
    width = int(place.max()) + 1 if len(place) else 1  # no entry: every row is NaN
    best = distance.new_full((len(distance), max(width, count)), -torch.inf)
    best[rows, place] = distance[rows, columns]
    return best.sort(-1, descending=True).values


def _entries_from(distance: torch.Tensor, least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """true_entries of distance [R, V] >= least [R, 1], on CPU, where numpy compares faster than torch."""
    return true_entries(torch.from_numpy(distance.numpy() >= least.numpy()))


def true_entries(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) int64 of the true entries of mask [R, V], row by row. Waits for a device."""
    if not _on_cpu(mask):
        return mask.nonzero(as_tuple=True)
    flat = torch.from_numpy(np.flatnonzero(mask.numpy()))  # 6 times as fast as torch's own
    rows = flat.div(mask.shape[1], rounding_mode="floor")
    return rows, flat - rows * mask.shape[1]


def unset_bits(words: np.ndarray, size: int, device: torch.device) -> torch.Tensor:
    """bool [G, size] on the device: where bit t % 32 of word t // 32 of words, uint32 [G, W], is no 1."""
    missing = max(0, -(-size // 32) - words.shape[1])
    words = np.invert(np.pad(words, ((0, 0), (0, missing))))
    if device.type == "cpu":
        bits = np.unpackbits(words.astype("<u4", copy=False).view(np.uint8), 1, size, "little")
        return torch.from_numpy(bits.view(np.bool_))
    bits = put([words.view(np.int32)], device)[0][:, :, None]
    return (
        bits.bitwise_right_shift(torch.arange(32, device=device)).bitwise_and(1).bool().flatten(1)[:, :size]
    )


def pick(distance: torch.Tensor, uniform: torch.Tensor, least: torch.Tensor | None = None) -> torch.Tensor:
    """int64 [R]: the token at the point uniform [R] of the weights [of those above least [R, 1]].

    distance is [R, V]. A token without weight is never picked, because it does not raise the sum. A
    row without any weight (not a distribution) gives some id inside the vocabulary.
    """
    return _by_parts(_pick, *(column for column in (distance, uniform, least) if column is not None))


def _pick(distance: torch.Tensor, uniform: torch.Tensor, least: torch.Tensor | None = None) -> torch.Tensor:
    weights = weigh(distance)
    if least is not None:
        weights.mul_(distance >= least)
    cumulative = weights.cumsum(-1)
    point = _point(uniform, cumulative[:, -1])[:, None]
    return torch.searchsorted(cumulative, point, right=True).squeeze(1).clamp_(max=distance.shape[1] - 1)


def pick_above(distance: torch.Tensor, uniform: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """As pick. On CPU it weighs the tokens that reach least alone: good where they are few."""
    if _on_cpu(distance):
        rows, columns = _entries_from(distance, least)
        if 0 < len(rows) <= MAX_SUMMANDS:
            cumulative = weigh(distance[rows, columns]).cumsum(0)
            ends = torch.searchsorted(rows, torch.arange(len(distance)), right=True)
            until = torch.cat([cumulative.new_zeros(1), cumulative])[ends]  # up to and with each row
            before = torch.cat([until.new_zeros(1), until[:-1]])
            found = torch.searchsorted(cumulative, before + _point(uniform, until - before), right=True)
            return columns[found.clamp_(max=len(rows) - 1)]
    return pick(distance, uniform, least)


def _point(uniform: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return (uniform * total).long().minimum(total - 1)


def _by_parts(function: Callable[..., torch.Tensor], *columns: torch.Tensor) -> torch.Tensor:
    """function of a few rows of the columns at a time where a CPU's cache then holds them; else of all."""
    if not _on_cpu(columns[0]):
        return function(*columns)
    parts = zip(*(column.split(ROWS_AT_ONCE) for column in columns), strict=True)
    return torch.cat([function(*part) for part in parts])


def _on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"
