"""All ranks of one launch, seen from a rank: rank 0 leads, the others follow it until its process is done.

    rank 0                                  the others
    lead(settings)     meet, make the grid     follow()
    Lead.start(settings)  ── Build ──►         load, then run plans
    LeadRank.close()      ── Close ──►         wait for the next Build
    Lead.leave()          ── Leave ──►         end with code 0

Knows settings and workers; no engine, no request and no launcher. Called by rank.py.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

import msgspec
import torch

from ds_serve.config import Settings
from ds_serve.messages import CopyResult, StepPlan
from ds_serve.model.loader import load
from ds_serve.parallel.control import Controller, Follower, Progress
from ds_serve.parallel.grid import Grid, meet
from ds_serve.parallel.wire import Build, Close, Leave
from ds_serve.worker.certify import certify
from ds_serve.worker.constraint import Constraints
from ds_serve.worker.finisher import Finisher
from ds_serve.worker.local import LeadRank
from ds_serve.worker.memory import told_at_start
from ds_serve.worker.worker import Worker

logger = logging.getLogger(__name__)

JOIN_S = 120.0  # until every rank has imported and connected
_SHAPE_KEY = "ds_serve/shape"


class _Shape(msgspec.Struct, frozen=True):
    """What ranks need before they can hear plans; rank 0 leaves it in the store."""

    tp: int
    pp: int
    all_reduce: str
    rank_timeout: float


def build_worker(
    settings: Settings,
    grid: Grid,
    progress: Progress,
    deliver: Callable[[CopyResult], None],
    fail: Callable[[BaseException], None],
) -> Worker:
    """This rank's worker, on as many threads as are its share of the machine, with a certificate if asked.

    Its copier's results and failure go to deliver and fail, on a thread of the copier's.
    """
    here = grid.ranks_here
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    elif here > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
    progress.phase = "loading"
    constraints = None
    if grid.place.samples:  # it reads the tokenizer while the model is loaded
        constraints = Constraints(settings.model, trust_remote_code=settings.trust_remote_code)
    with told_at_start(grid.place):
        worker = Worker(load(settings, grid), settings, grid, progress, deliver, fail, constraints)
    if settings.check:
        kv_bytes = worker.num_blocks * worker.layout.bytes_per_block
        worker.certificate = certify(worker.model, settings, grid, kv_bytes)
    if constraints is not None:
        constraints.wait()
    progress.phase = "idle"
    return worker


class Lead:
    """Rank 0's hold on the others, for one engine after another."""

    def __init__(self, settings: Settings) -> None:
        self.shape = _shape(settings)
        store = meet()
        store.set(_SHAPE_KEY, msgspec.json.encode(self.shape))
        self.grid = Grid.make(self.shape.tp, self.shape.pp, self.shape.all_reduce)
        self.controller = Controller(self.grid.place, store, self.shape.rank_timeout)
        self.controller.join(JOIN_S)
        self._rank: LeadRank | None = None
        self._left = False
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self.terminated)

    def start(self, settings: Settings) -> LeadRank:
        """Loads the model on all ranks. Raises RankFailure, or RuntimeError while another engine is open."""
        if self._left:
            raise RuntimeError("the other ranks have ended")
        if _shape(settings) != self.shape:
            raise RuntimeError(
                f"these ranks are set up as {self.shape}, and cannot become {_shape(settings)}"
            )
        if self._rank is not None and not self._rank.closed:
            raise RuntimeError("the ranks serve another engine: close it first")
        self.controller.send(Build(settings_json=settings.model_dump_json()))
        self._rank = LeadRank(lambda *report: build_worker(settings, self.grid, *report), self.controller)
        return self._rank

    def terminated(self, *_: object) -> NoReturn:
        """Handles SIGTERM: often from a launcher that saw another rank die, which is then the RankFailure."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would hide the reason
        self.controller.check(wait_s=1.0)
        raise SystemExit(128 + signal.SIGTERM)

    def leave(self) -> None:
        """Lets the other ranks end; after a failure, ends those of this machine. May be called again."""
        if self._left:
            return
        self._left = True
        if self.controller.failed:
            self.controller.kill()
        else:
            self.controller.send(Leave())
            self.grid.close()
        self.controller.close()


def _shape(settings: Settings) -> _Shape:
    return _Shape(
        settings.tensor_parallel, settings.pipeline_parallel, settings.all_reduce, settings.rank_timeout
    )


def follow() -> int:
    """Serves rank 0 on this rank until it leaves. Returns the exit code; a failure ends the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: rank 0 decides
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    store = meet()
    shape = msgspec.json.decode(store.get(_SHAPE_KEY), type=_Shape)
    grid = Grid.make(shape.tp, shape.pp, shape.all_reduce)
    follower = Follower(grid.place, store, shape.rank_timeout)
    try:
        while not isinstance(message := follower.receive(), Leave):
            if isinstance(message, Build):
                _run_plans(Settings.model_validate_json(message.settings_json), grid, follower)
        grid.close()
    except BaseException as error:
        _fail(follower, error)
    follower.close()
    return 0


def _fail(follower: Follower, error: BaseException) -> NoReturn:
    """Ends this process, whichever thread failed, once rank 0 knows why."""
    follower.fail(error)
    print(f"ds-serve: {follower.place}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if logger.isEnabledFor(logging.DEBUG):
        traceback.print_exception(error)
    os._exit(1)  # other threads may be inside a collective that never ends


def _run_plans(settings: Settings, grid: Grid, follower: Follower) -> None:
    """One engine's life on this rank."""
    progress, deliver = follower.progress, follower.deliver
    fail = functools.partial(_fail, follower)
    worker = build_worker(settings, grid, progress, deliver, fail)
    finisher = Finisher(worker.runs_ahead, deliver, fail)
    while isinstance(plan := follower.receive(), StepPlan):
        finisher.take(worker.launch(plan))
    finisher.close()
    worker.close()
    if not isinstance(plan, Close):
        raise RuntimeError(f"{type(plan).__name__} came in the middle of an engine's plans")
