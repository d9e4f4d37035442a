"""Processes for control_harness.py: followers whose worker does as it is told, and a rank 0 to be killed.

    python control_ranks.py FOLDER RANK TP PP TIMEOUT_S

The Build's settings are JSON: {rank: [step, what to do there]}.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from ds_serve.messages import CopyResult, StepPlan, StepResult
from ds_serve.parallel.control import Controller, Follower
from ds_serve.parallel.place import Place
from ds_serve.parallel.wire import Build, Leave

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711"


class FileStore:
    """set() and get() of torch.distributed's store, over files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, key: str) -> Path:
        return self._folder / key.replace("/", "_")

    def set(self, key: str, value: str | bytes) -> None:
        draft = self._path(key).with_suffix(".draft")
        draft.write_bytes(value.encode() if isinstance(value, str) else value)
        draft.rename(self._path(key))

    def get(self, key: str) -> bytes:
        while not self._path(key).exists():
            time.sleep(0.005)
        return self._path(key).read_bytes()


def act(what: str, follower: Follower, step: int) -> None:
    """One way to fail. Hanging ones leave the heartbeats alive."""
    progress = follower.progress
    progress.step = step
    match what.split():
        case ["raise"]:
            raise ValueError("no such expert")
        case ["lose", peer]:  # as a collective does when its peer is killed
            while (
                Path(f"/proc/{peer}").exists()
                and "Z" not in Path(f"/proc/{peer}/stat").read_text().split()[2]
            ):
                time.sleep(0.001)
            raise RuntimeError(GLOO)
        case ["hang", phase, num_calls]:
            progress.phase, progress.batch = phase, SimpleNamespace(num_calls=int(num_calls))
            threading.Event().wait()
        case _:
            raise AssertionError(what)


def copies(follower: Follower, plan: StepPlan) -> None:
    """Loads that fail where they are to go to this rank's own block, and stores that do not."""
    rank = follower.place.rank
    if plan.loads:
        failed = [index for index, (_, block) in enumerate(plan.loads) if block == rank]
        follower.deliver(CopyResult(rank=rank, step=plan.step, kind="load", failed=failed, seconds=0.5))
    if plan.stores:
        follower.deliver(CopyResult(rank=rank, step=plan.step, kind="store"))


def follow(follower: Follower, journal: Path) -> int:
    orders: list = [-1, ""]
    steps: list[int] = []
    try:
        while not isinstance(message := follower.receive(), Leave):
            with journal.open("a") as file:
                print(message.step if isinstance(message, StepPlan) else type(message).__name__, file=file)
            if isinstance(message, Build):
                orders = json.loads(message.settings_json).get(str(follower.place.rank), orders)
                follower.progress.phase = "idle"
            elif isinstance(message, StepPlan):
                steps.append(message.step)
                if message.step == orders[0]:
                    act(orders[1], follower, message.step)
                follower.progress.step = message.step
                follower.progress.busy_s += 0.25
                copies(follower, message)
                if message.rows and follower.place.samples:
                    follower.deliver(StepResult(step=message.step, token_ids=steps))
    except Exception as error:
        follower.fail(error)
        os._exit(1)
    if "CONTROL_RANKS_LINGER" in os.environ:  # beyond the end of rank 0
        time.sleep(0.6)
    follower.close()
    return 0


def lead(controller: Controller) -> int:
    """Rank 0 as a process: says when all are there, and waits to be killed; after SIGINT it leaves."""
    controller.join(20)
    try:
        print("joined", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        controller.send(Leave())
        controller.close()
    return 0


def main(folder: str, rank: str, tp: str, pp: str, timeout_s: str) -> int:
    place, store = Place(int(rank), int(tp), int(pp)), FileStore(Path(folder))
    if place.rank == 0:
        return lead(Controller(place, store, float(timeout_s)))
    return follow(Follower(place, store, float(timeout_s)), Path(folder) / f"journal{rank}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
