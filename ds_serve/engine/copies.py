"""Copies between the tiers that are under way: one plan's loads or stores, done when every rank has said so.

Knows ranks as numbers, blocks as pairs and owners as whatever it was given; knows no cache and no sequence.
Called by the scheduler.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from ds_serve.messages import CopyResult

Kind = Literal["load", "store"]
Pairs = list[tuple[int, int]]


@dataclass(slots=True)
class Batch:
    """All loads, or all stores, of one plan.

    parts     who they are for, and their pairs, in the plan's order
    failed    indexes into the plan's list: a pair failed if it failed on any rank
    seconds   on the slowest rank so far
    """

    parts: list[tuple[Any, Pairs]]
    failed: set[int] = field(default_factory=set)
    seconds: float = 0.0
    ranks: set[int] = field(default_factory=set)

    @property
    def num_pairs(self) -> int:
        return sum(len(pairs) for _, pairs in self.parts)

    def landed(self) -> Iterator[tuple[Any, Pairs, set[int]]]:
        """Each owner with its pairs and the indexes of those that failed, counted from its first."""
        start = 0
        for owner, pairs in self.parts:
            end = start + len(pairs)
            yield owner, pairs, {index - start for index in self.failed if start <= index < end}
            start = end


class CopyBook:
    """Batches under way, by plan and kind. num_ranks: how many ranks answer for each of them."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._batches: dict[tuple[int, Kind], Batch] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def num(self, kind: Kind) -> int:
        """Plans whose copies of this kind are under way."""
        return sum(each == kind for _, each in self._batches)

    def owners(self, kind: Kind) -> list[Any]:
        """Owners of copies of this kind that are under way."""
        return [owner for key, batch in self._batches.items() if key[1] == kind for owner, _ in batch.parts]

    def start(self, step: int, kind: Kind, parts: list[tuple[Any, Pairs]]) -> None:
        """Count these; the plan of step carries their pairs in this order. Nothing where there is none."""
        batch = Batch(parts)
        if batch.num_pairs:
            self._batches[step, kind] = batch

    def land(self, result: CopyResult) -> Batch | None:
        """Take in one rank's word; the batch where it was the last rank's, else None.

        Raises ValueError where nothing like it is under way, the rank is unknown or has answered before, or
        failed names pairs that are not in the plan.
        """
        key = (result.step, result.kind)
        batch = self._batches.get(key)
        if batch is None:
            raise ValueError(
                f"rank {result.rank} reports {result.kind}s of step {result.step}: none under way"
            )
        if result.rank in batch.ranks or not 0 <= result.rank < self._num_ranks:
            raise ValueError(
                f"{result.kind}s of step {result.step}: a report of rank {result.rank}, "
                f"after {sorted(batch.ranks)} of {self._num_ranks} ranks"
            )
        if any(not 0 <= index < batch.num_pairs for index in result.failed):
            raise ValueError(
                f"{result.kind}s of step {result.step}: rank {result.rank} says that {result.failed} failed, "
                f"of {batch.num_pairs}"
            )
        batch.ranks.add(result.rank)
        batch.failed.update(result.failed)
        batch.seconds = max(batch.seconds, result.seconds)
        if len(batch.ranks) < self._num_ranks:
            return None
        return self._batches.pop(key)
