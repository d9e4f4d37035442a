"""The way of drawn tokens in a pipeline: from the last stage straight to the first, past the engine.

A group of its own, since on CUDA all that two ranks send in one group goes through one stream, and a token
that is awaited would hold up the hidden states of the next step. Knows no slot and no step. Made by grid.py;
used by the worker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
import torch.distributed

from ds_serve.parallel.place import Place


class WayBack:
    """From shard 0 of the last stage to shard 0 of the first. All ranks make it together."""

    def __init__(self, place: Place) -> None:
        self._last, self._rank = (place.pp - 1) * place.tp, place.rank
        self._group = torch.distributed.new_group([0, self._last])
        self._sends: deque = deque()

    def send(self, token_ids: torch.Tensor) -> None:
        """Starts sending int64[S]; the caller leaves it unchanged."""
        while self._sends and self._sends[0][0].is_completed():
            self._sends.popleft()
        self._sends.append((torch.distributed.isend(token_ids, 0, group=self._group), token_ids))

    def expect(self, count: int, device: torch.device | str) -> Callable[[], torch.Tensor]:
        """Makes room for the tokens of the next send(), of which there are count.

        What it returns waits for them (on CUDA the stream does) and gives int64[count]; on the first stage's
        other shards it gives room for them.
        """
        room = torch.empty(count, dtype=torch.int64, device=device)
        if self._rank != 0:
            return lambda: room
        work = torch.distributed.irecv(room, self._last, group=self._group)

        def take() -> torch.Tensor:
            work.wait()
            return room

        return take

    def use(self, device: str) -> None:
        """Once before the first step: NCCL connects at the first use, and waits on the host for the other."""
        if self._rank == self._last:
            self.send(torch.zeros(1, dtype=torch.int64, device=device))
        elif self._rank == 0:
            self.expect(1, device)()

    def close(self) -> None:
        """Waits until all has left."""
        for work, _ in self._sends:
            work.wait()
        self._sends.clear()
