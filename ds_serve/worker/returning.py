"""Tokens that the last stage draws, on the first stage: which are still to come, and into whose slots.

Knows steps and slots; no plan and no model. Used by the worker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from ds_serve.parallel.grid import Grid
from ds_serve.worker.inputs import TokenPool


class Returning:
    """Fills the pool in the order of the steps, when a step needs it: on all shards at the same step.

    most: steps in flight at most; what was drawn longer ago is there without waiting.
    """

    def __init__(self, grid: Grid, pool: TokenPool, most: int) -> None:
        self._grid, self._pool, self._most = grid, pool, most
        self._coming: deque[tuple[Callable[[], torch.Tensor], torch.Tensor, list[int]]] = deque()

    def expect(self, slots: torch.Tensor, names: list[int]) -> None:
        """A step draws tokens for slots int64[S] on the device, names on the host."""
        if names:
            take = self._grid.way_back.expect(len(names), slots.device)
            self._coming.append((take, slots.clone(), names))

    def take(self, drawn_in: np.ndarray) -> None:
        """Waits for what has been drawn for the slots that drawn_in int64[T] names (-1: none)."""
        needed = set(drawn_in[drawn_in >= 0].tolist())
        steps = enumerate(self._coming, 1)
        until = max((n for n, (*_, names) in steps if not needed.isdisjoint(names)), default=0)
        for _ in range(max(until, len(self._coming) - self._most)):
            self._take_one()

    def close(self) -> None:
        """Waits for all: the next engine must not get this one's."""
        while self._coming:
            self._take_one()

    def _take_one(self) -> None:
        take, slots, _ = self._coming.popleft()
        self._pool.put(slots, self._grid.share_tokens(take()))
