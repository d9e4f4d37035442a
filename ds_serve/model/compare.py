"""Errors of a served part against its original, and how large they may be.

An error is a share, token by token: of what a decoder layer adds to its input, or of the hidden state. The
reference is the original in float32; in half precision the original in the served dtype is the yardstick,
since it rounds as much. Knows tensors [T, ...] and no model. Called by worker/certify.py.
"""

from __future__ import annotations

import torch

from ds_serve.model.certificate import Row

# Share of what a layer adds that float32 may be off by. Of 107 tiny architectures the worst token is off by
# 1.3e-6; wider sums round more, and a wrong weight gives over 1e-2.
LOCAL_FP32 = 5e-5
# The same of the hidden state after any number of layers: 5e-6 after four of them.
TOTAL_FP32 = 1e-3
# In half precision: so many times the yardstick's error of the token, or of the median token. Of the same
# models in bfloat16, fused or not, the worst token without experts is at 4.0, the next at 3.0. At least
# FLOOR_EPS times the dtype's precision, for parts that round nothing.
YARDSTICKS = 6.0
FLOOR_EPS = 2.0
# A layer that adds next to nothing is measured by this share of the hidden state.
LEAST_ADDED = 0.01
# Tokens that may take other experts than the original's, where two of them score the same: this share, and
# as many as the yardstick has. Seen with four experts: up to 1 %.
FLIPPED_SHARE = 0.01


def added(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """[T]: the norm of what a layer adds to each token, at least LEAST_ADDED of the outcome."""
    return norms(after.float() - before.float()) + LEAST_ADDED * norms(after)


def norms(hidden: torch.Tensor) -> torch.Tensor:
    """[T]: the norm of each token's values."""
    return hidden.float().flatten(1).norm(dim=1)


def errors(found: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[T]: the norm of each token's difference over scale [T]."""
    return norms(found.float() - wanted.float()) / scale.clamp_min(1e-30)


def judge_local(
    row: Row, found: torch.Tensor, yardstick: torch.Tensor | None, eps: float, has_experts: bool
) -> None:
    """Sets row's local fields from errors [T] of the served part and, in half precision, the yardstick's."""
    bounds = _bounds(found, yardstick, eps, LOCAL_FP32)
    worst = _worst(found, bounds)
    row.local, row.local_bound = found[worst].item(), bounds[worst].item()
    row.over = int((~(found <= bounds)).sum())
    row.over_allowed = 0
    if has_experts:
        flipped = 0 if yardstick is None else int((yardstick > YARDSTICKS * yardstick.median()).sum())
        row.over_allowed = int(FLIPPED_SHARE * len(found)) + flipped


def judge_total(
    row: Row, found: torch.Tensor, yardstick: torch.Tensor | None, eps: float, has_experts: bool
) -> None:
    """The same of row's total fields. With experts by the median token: one that took another expert in some
    layer stays off, and so do later ones that look at it."""
    if has_experts:
        found, yardstick = found.median()[None], None if yardstick is None else yardstick.median()[None]
    bounds = _bounds(found, yardstick, eps, TOTAL_FP32)
    worst = _worst(found, bounds)
    row.total, row.total_bound = found[worst].item(), bounds[worst].item()


def _bounds(found: torch.Tensor, yardstick: torch.Tensor | None, eps: float, fp32: float) -> torch.Tensor:
    """[T]: how large each token's error may be."""
    if yardstick is None:
        return torch.full_like(found, fp32)
    return (YARDSTICKS * yardstick.clamp_min(yardstick.median())).clamp_min(FLOOR_EPS * eps)


def _worst(found: torch.Tensor, bounds: torch.Tensor) -> int:
    """The token with the largest excess; one that is not a number exceeds all."""
    return int((found / bounds).nan_to_num(nan=torch.inf).argmax())
