"""Rank 0 in the test's own process, and processes of control_ranks.py as the other ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import control_ranks
import msgspec
import pytest
from control_ranks import FileStore

from ds_serve.messages import Row, StepPlan
from ds_serve.parallel.control import Controller, RankFailure
from ds_serve.parallel.place import Place
from ds_serve.parallel.wire import KEY, Address, Build

HOUSE = str(Path(control_ranks.__file__).parents[2])  # for PYTHONPATH
SOON_S = 20  # where something must happen; only a failing test waits so long


class Ranks:
    """Other ranks as processes, and the controller that leads them."""

    def __init__(self, folder: Path, tp: int, pp: int, timeout_s: float) -> None:
        self.folder, self._shape, self._timeout_s = folder, (tp, pp), timeout_s
        self.store = FileStore(folder)
        self.processes: dict[int, subprocess.Popen] = {}
        self.controller: Controller | None = None

    def start(self, *ranks: int) -> None:
        for rank in ranks:
            command = [
                sys.executable,
                control_ranks.__file__,
                self.folder,
                rank,
                *self._shape,
                self._timeout_s,
            ]
            self.processes[rank] = subprocess.Popen(
                [str(each) for each in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )

    def lead(self) -> Controller:
        self.controller = Controller(Place(0, *self._shape), self.store, self._timeout_s)
        return self.controller

    @property
    def address(self) -> Address:
        return msgspec.json.decode(self.store.get(KEY), type=Address)

    def build(self, **orders: list) -> None:
        self.controller.send(Build(settings_json=json.dumps({key[4:]: each for key, each in orders.items()})))
        self.controller.progress.phase = "idle"

    def step(self, *steps: int) -> None:
        for step in steps:
            self.controller.send(StepPlan(step=step, rows=[Row(slot=0, start=step, count=1)]))

    def failure(self) -> str:
        """Results may come first; then the one failure, which check() has too."""
        while not isinstance(found := self.controller.results.get(timeout=SOON_S), RankFailure):
            pass
        with pytest.raises(RankFailure) as raised:
            self.controller.check()
        assert raised.value is found
        return str(found)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.processes[rank].pid, number)

    def journal(self, rank: int) -> list[str]:
        return (self.folder / f"journal{rank}").read_text().split()

    def exit_codes(self, *ranks: int) -> list[int]:
        return [self.processes[rank].wait(SOON_S) for rank in ranks]

    def stderr(self, rank: int) -> str:
        return self.processes[rank].stderr.read()


@contextmanager
def ranks_in(folder: Path, tp: int = 2, pp: int = 2, timeout_s: float = 6.0) -> Iterator[Ranks]:
    ranks = Ranks(folder, tp, pp, timeout_s)
    try:
        yield ranks
    finally:
        if ranks.controller is not None:
            ranks.controller.close()
        for process in ranks.processes.values():
            process.kill()
            process.wait()
            for pipe in filter(None, (process.stdout, process.stderr)):
                pipe.close()
