"""Where a rank stands: which stage of the pipeline, which tensor shard of that stage.

Plain integers; no torch. Tensor shards of one stage have neighbouring ranks, as in DeepSpeed's
PipeModelDataParallelTopology. Used by everything that must know which rank it is.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Rank `rank` of tp x pp ranks. The default is the only rank there is."""

    rank: int = 0
    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        if self.tp < 1 or self.pp < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(f"no such place: rank {self.rank} of tp {self.tp} x pp {self.pp}")

    @property
    def world_size(self) -> int:
        return self.tp * self.pp

    @property
    def stage(self) -> int:
        return self.rank // self.tp

    @property
    def shard(self) -> int:
        """Which tensor shard of its stage."""
        return self.rank % self.tp

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.pp - 1

    @property
    def samples(self) -> bool:
        """Whether this rank draws the tokens, and sends the results: one rank does."""
        return self.is_last_stage and self.shard == 0

    def __str__(self) -> str:
        return f"rank {self.rank} (stage {self.stage}, tensor {self.shard})"
