"""Started on every rank by the launcher: matrix_run.py with decode steps that are recorded and replayed.

    graph_run.py CASES RESULTS

Each rank prints how many steps it has replayed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

import matrix_run
from recorded_graphs import recorded_graphs
from saying import say

if __name__ == "__main__":
    with recorded_graphs() as replays:
        code = matrix_run.main()
    say(f"replays {replays.total()}")
    sys.exit(code)
