"""Puts engine and ranks together: settings -> workers -> engine, in this process or as the engine process.

The one place that knows both engine and worker. Called by the pipeline (build_local_engine, follow) and, as
`python -m ds_serve.rank FOLDER FRONT_PID`, by the server's supervisor, whose private folder holds
settings.json: directly for one rank, through the deepspeed launcher for several.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import logging
import os
import shutil
import signal
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import psutil

from ds_serve.cache.manager import CacheManager
from ds_serve.collect import uncollected
from ds_serve.config import Settings
from ds_serve.engine.ipc import IpcPort
from ds_serve.engine.limits import Limits
from ds_serve.engine.local import LocalEngine
from ds_serve.engine.loop import EngineLoop
from ds_serve.engine.scheduler import Scheduler
from ds_serve.launch import check_world, ranks
from ds_serve.messages import EngineFailure, EngineInfo
from ds_serve.parallel.place import Place

with uncollected():  # torch, DeepSpeed and transformers
    from ds_serve.model.certificate import Certificate
    from ds_serve.model.errors import ModelLoadError
    from ds_serve.parallel.grid import Grid
    from ds_serve.worker.cluster import Lead, build_worker, follow
    from ds_serve.worker.local import LocalRank

__all__ = ["build_checked_engine", "build_local_engine", "follow", "main"]

logger = logging.getLogger(__name__)

_lead: Lead | None = None
_engines: weakref.WeakSet[LocalEngine] = weakref.WeakSet()


def build_local_engine(settings: Settings) -> LocalEngine:
    """The engine with its rank on two threads of this process, which must be rank 0 if there are several.

    Raises what loading raises, RankFailure where a rank fails, ValueError for a wrong number of ranks.
    """
    return _open(settings)[0]


def build_checked_engine(settings: Settings) -> tuple[LocalEngine, Certificate]:
    """As build_local_engine with the setting check; a mismatch is told by the certificate, not raised."""
    engine, rank = _open(settings.model_copy(update={"check": True}), refuse=False)
    return engine, rank.worker.certificate


def _open(settings: Settings, refuse: bool = True) -> tuple[LocalEngine, LocalRank]:
    check_world(settings, ranks())
    scheduler, rank, info = _build(settings, refuse)
    engine = LocalEngine(scheduler, rank, info)
    _engines.add(engine)
    return engine, rank


def _build(settings: Settings, refuse: bool = True) -> tuple[Scheduler, LocalRank, EngineInfo]:
    """refuse: a model that settings.check finds to be another than the original is a ModelLoadError."""
    rank = _start_ranks(settings)
    certificate = rank.worker.certificate
    if certificate is not None:
        logger.info("check:\n%s", certificate.table())
        if refuse and not certificate.matches:
            rank.close()
            raise ModelLoadError(
                f"{settings.name} is not what transformers computes: {certificate.first_failure}"
            )
    info = rank.worker.info(settings)
    limits = Limits(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=info.max_model_len,
        max_queue=settings.max_queue,
        max_steps_in_flight=settings.max_steps_in_flight,
        num_stages=settings.pipeline_parallel,
        num_ranks=settings.world_size,
        vocab_size=info.vocab_size,
        copy_s_per_block=info.copy_s_per_block,
        prefill_s_per_token=info.prefill_s_per_token,
        bytes_per_block=info.bytes_per_block,
        audit_share=settings.audit_share,
        adapters=info.adapters,
    )
    return Scheduler(limits, _cache(settings, info)), rank, info


def _cache(settings: Settings, info: EngineInfo) -> CacheManager:
    # Blocks that two steps can take: those that are to be saved before they are evicted.
    zone = 2 * -(-(settings.max_num_batched_tokens + settings.max_num_seqs) // info.block_size)
    return CacheManager(
        info.num_blocks,
        info.block_size,
        # What a cached block's content depends on, beside its tokens and the request's salt.
        identity=f"{Path(settings.model).resolve()} {info.dtype}",
        prefix_caching=settings.prefix_caching,
        num_host_blocks=info.num_host_blocks,
        store_zone=min(zone, info.num_blocks // 4),
        max_pinned_blocks=int(settings.max_pinned_share * info.num_blocks),
        windows=info.windows,
        tokens_ahead=settings.tokens_in_flight,
    )


def _start_ranks(settings: Settings) -> LocalRank:
    global _lead
    if settings.world_size == 1:
        return LocalRank(lambda *report: build_worker(settings, Grid(Place()), *report))
    if _lead is None:
        _lead = Lead(settings)
        atexit.register(_leave)
    return _lead.start(settings)


def _leave() -> None:
    """At the end of rank 0's process: engines still open are closed, then the other ranks may end."""
    for engine in list(_engines):
        engine.close()
    if _lead is not None:
        _lead.leave()


def main(folder: str = "", front_pid: str = "0") -> int:
    """A rank's process under a front: rank 0 serves the front that owns folder until it goes away.

    Other ranks need neither, and get neither where their machine has no front.

    Returns the exit code; with several ranks it ends the process itself.
    """
    gc.freeze()  # at the end too there is less to look through
    rank_env = ranks()
    _die_with_parent()
    if rank_env is not None and rank_env.rank > 0:
        return follow()
    front_lives = _watch(int(front_pid))
    settings = Settings.model_validate_json((Path(folder) / "settings.json").read_bytes())
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    port = IpcPort(folder, front_lives)
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the front decides
    code = 1
    try:
        check_world(settings, rank_env)
        scheduler, rank, info = _build(settings)
        port.deliver([info])
        gc.freeze()
        EngineLoop(scheduler, rank, port, port.deliver).run()
        code = 0
    except SystemExit:
        code = 0
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it may be on its way, and the reason is to get out
        logger.error("engine: %s", error, exc_info=settings.log_level == "debug")
        port.deliver([EngineFailure(reason=f"{type(error).__name__}: {error}")])
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        port.close()
        if not front_lives():  # nobody else is left to remove it
            shutil.rmtree(folder, ignore_errors=True)
    if _lead is not None:
        _lead.leave()
        logging.shutdown()
        os._exit(code)  # a thread may be inside a collective that never ends
    return code


def _terminated(*_: object) -> NoReturn:
    """SIGTERM: from the front, or from a launcher, whose reason the lead may know."""
    if _lead is not None:
        _lead.terminated()
    raise SystemExit(0)


def _watch(front_pid: int) -> Callable[[], bool]:
    """Whether the front lives, by its pid and start. SystemExit where it is gone already."""
    try:
        front = psutil.Process(front_pid)
    except psutil.NoSuchProcess:
        sys.exit("the front that started this engine is gone")

    def lives() -> bool:
        return front.is_running() and front.status() != psutil.STATUS_ZOMBIE

    return lives


def _die_with_parent() -> None:
    """SIGKILL for this process when its parent ends, however it ends (Linux)."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
