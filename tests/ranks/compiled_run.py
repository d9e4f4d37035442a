"""matrix_run.py with layers that torch.compile has traced, and runs as traced.

Each rank says how many it compiled, and at the end how many graphs it met while it served.

    compiled_run.py CASES RESULTS
"""

from __future__ import annotations

import sys

from matrix_run import main
from saying import say

from ds_serve.model import compiled, loader


def compile_and_tell(stage, layout, grid, report, mode):
    compiled.compile_layers(stage, layout, grid, report, mode)
    say(f"rank {grid.place.rank} compiled {report.compiled} {report.reasons}")


class Backend(compiled._Backend):
    made: list[Backend] = []

    def __init__(self) -> None:
        super().__init__()
        self.made.append(self)


if __name__ == "__main__":
    compiled._Backend = Backend
    compiled.compiler = lambda traced, inputs: traced.forward
    loader.compile_layers = compile_and_tell
    code = main()
    say(f"late graphs {sum(each.num_late for each in Backend.made)}")
    sys.exit(code)
