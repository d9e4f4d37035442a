"""Started on every rank by the launcher: an engine over all ranks whose decode steps are CUDA graphs.

    graphs_cuda_run.py FOLDER TP PP

Rank 0 prints the worst gap of its tokens (gaps.py), each rank how many steps it has replayed.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
sys.path.insert(0, str(Path(__file__).parents[1] / "ranks"))

from gaps import worst_gap
from saying import say
from tiny_models import mixed_prompts

from ds_serve.config import Settings
from ds_serve.launch import ranks
from ds_serve.rank import build_local_engine, follow
from ds_serve.worker.graphs import GraphRunner

PROMPTS = mixed_prompts(24)
LENGTHS = [8 + (7 * index) % 17 for index in range(len(PROMPTS))]
replays: Counter[int] = Counter()


def count_replays() -> None:
    """replays then has the number of replays of each size."""
    replay = GraphRunner.replay

    def counted(self, inputs):
        replays[inputs.attention.num_tokens] += 1
        return replay(self, inputs)

    GraphRunner.replay = counted


def main() -> int:
    folder, tp, pp = sys.argv[1:]
    count_replays()
    rank_env = ranks()
    if rank_env is not None and rank_env.rank > 0:
        code = follow()
    else:
        settings = Settings(
            model=folder, tensor_parallel=int(tp), pipeline_parallel=int(pp), num_blocks=60, max_num_seqs=20
        )
        engine = build_local_engine(settings)
        say(f"gap {worst_gap(engine, PROMPTS, LENGTHS)}")
        engine.close()
        code = 0
    say(f"replays {replays.total()}")
    return code


if __name__ == "__main__":
    sys.exit(main())
