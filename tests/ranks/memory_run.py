"""Started on every rank by the launcher: loads a model and writes what memory that took.

    memory_run.py MODEL TP PP FOLDER

Writes FOLDER/RANK.json: anonymous bytes (RssAnon: memory-mapped files do not count) after the imports, at
the peak and at the end, and the bytes of the rank's own parameters.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import torch

from ds_serve.config import Settings
from ds_serve.model.loader import load
from ds_serve.parallel.grid import Grid, meet

EVERY_S = 0.005


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no RssAnon")


class Peak:
    """The largest anonymous_bytes() inside the with block, sampled by a thread. Linux keeps no record."""

    def __enter__(self) -> Peak:
        self.bytes, self._done = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(EVERY_S):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *exception) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_bytes())


def main(model: str, tp: str, pp: str, folder: str) -> None:
    before = anonymous_bytes()
    with Peak() as peak:
        meet()
        grid = Grid.make(int(tp), int(pp))
        loaded = load(Settings(model=model, tensor_parallel=int(tp), pipeline_parallel=int(pp)), grid)
        after = anonymous_bytes()
    found = {
        "before": before,
        "peak": peak.bytes,
        "after": after,
        "shard": sum(parameter.nbytes for parameter in loaded.stage.module.parameters()),
        "injected": loaded.injection.injected,
        "reasons": loaded.injection.reasons,
    }
    (Path(folder) / f"{grid.place.rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    grid.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
