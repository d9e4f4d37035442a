"""Puts a rank together: settings -> model -> worker -> engine, in this process or as the engine process.

The one place that knows both engine and worker. Called by the pipeline (build_local_engine) and, as
`python -m ds_serve.rank FOLDER`, by the server's supervisor, whose private folder holds settings.json.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from pathlib import Path

import torch

from ds_serve.cache.manager import CacheManager
from ds_serve.config import Settings
from ds_serve.engine.ipc import IpcPort
from ds_serve.engine.limits import Limits
from ds_serve.engine.local import LocalEngine
from ds_serve.engine.loop import EngineLoop
from ds_serve.engine.scheduler import Scheduler
from ds_serve.messages import EngineFailure, EngineInfo
from ds_serve.model.loader import load
from ds_serve.worker.local import LocalRank
from ds_serve.worker.worker import Worker

logger = logging.getLogger(__name__)


def build_local_engine(settings: Settings) -> LocalEngine:
    """The engine with its one rank on two threads of this process. Raises what loading raises."""
    return LocalEngine(*_build(settings))


def _build(settings: Settings) -> tuple[Scheduler, LocalRank, EngineInfo]:
    rank = LocalRank(lambda: _build_worker(settings))
    info = rank.worker.info(settings)
    limits = Limits(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=info.max_model_len,
        max_queue=settings.max_queue,
        max_steps_in_flight=settings.steps_in_flight or 2,
        vocab_size=info.vocab_size,
    )
    # What a cached block's content depends on, beside its tokens and the request's salt.
    identity = f"{Path(settings.model).resolve()} {info.dtype}"
    cache = CacheManager(
        info.num_blocks, info.block_size, identity=identity, prefix_caching=settings.prefix_caching
    )
    return Scheduler(limits, cache), rank, info


def _build_worker(settings: Settings) -> Worker:
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    return Worker(load(settings), settings)


def main(folder: str) -> int:
    """The engine process: serves the front that owns folder until it goes away. Returns the exit code."""
    parent = int(os.environ["DS_SERVE_PARENT_PID"])
    _die_with_parent(parent)
    settings = Settings.model_validate_json((Path(folder) / "settings.json").read_bytes())
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    port = IpcPort(folder, parent)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the front decides
    try:
        scheduler, rank, info = _build(settings)
        port.deliver([info])
        EngineLoop(scheduler, rank, port, port.deliver).run()
    except Exception as error:
        logger.error("engine: %s", error, exc_info=settings.log_level == "debug")
        port.deliver([EngineFailure(reason=f"{type(error).__name__}: {error}")])
        return 1
    finally:
        port.close()
    return 0


def _die_with_parent(parent: int) -> None:
    """SIGKILL for this process when its parent ends, however it ends (Linux)."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the front that started this engine is gone")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
