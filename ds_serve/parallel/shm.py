"""DeepSpeed's shared-memory all-reduce for one tensor group, where it can work.

The op itself knows neither groups nor several machines: it takes rank, size and a name from the environment,
so each stage gives it values of its own. Its segments are unlinked as soon as every shard has mapped them,
so that nothing stays in /dev/shm whatever becomes of the ranks. Called by grid.py.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import socket
from pathlib import Path

import torch
import torch.distributed

from ds_serve.parallel.place import Place

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the op leaves others unreduced, without a word
SEGMENT_BYTES = 70 << 20  # of each rank, in /dev/shm
FOLDER = Path("/dev/shm")


def connect(place: Place, group, wanted: str) -> bool:
    """Whether inference_all_reduce now goes through shared memory. All ranks call it together.

    RuntimeError where "shared_memory" is wanted and cannot be had; "auto" falls back to the group, and
    says why in the log.
    """
    if wanted == "group":
        return False
    everyone: list = [None] * place.world_size
    torch.distributed.all_gather_object(everyone, (socket.gethostname(), _obstacle(everyone)))
    hosts = [host for host, _ in everyone]
    first = place.rank - place.shard
    mine = range(first, first + place.tp)
    obstacle = next((everyone[rank][1] for rank in mine if everyone[rank][1]), None)
    if len({hosts[rank] for rank in mine}) > 1:
        obstacle = "the stage's tensor ranks are on several machines"
    on_this_host = hosts.count(hosts[place.rank])
    if obstacle is None and wanted == "auto" and on_this_host > len(os.sched_getaffinity(0)):
        obstacle = (
            f"{on_this_host} ranks share {len(os.sched_getaffinity(0))} cores, and it spins while it waits"
        )
    if obstacle is None:
        _initialize(place, group)
        return True
    if wanted == "shared_memory":
        raise RuntimeError(f"all_reduce: shared_memory cannot be used: {obstacle}")
    if place.rank == 0:
        logger.info("all-reduce through the process group: %s", obstacle)
    return False


def _obstacle(everyone: list) -> str | None:
    """Why this rank cannot use the op, or None."""
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return "the device is not the CPU"
    if not FOLDER.is_dir():
        return f"there is no {FOLDER}"
    free, needed = shutil.disk_usage(FOLDER).free, SEGMENT_BYTES * len(everyone)
    if free < needed:
        return f"{FOLDER} has {free >> 20} MiB free, {needed >> 20} are needed"
    try:
        op = _load()
    except Exception as error:  # no compiler, or what the build raises
        return f"DeepSpeed's op cannot be built: {error}"
    return None if op.vector_kernel_level() >= 1 else "the CPU has no AVX2"


def _load():
    from deepspeed.accelerator import get_accelerator

    with contextlib.redirect_stdout(io.StringIO()):
        return get_accelerator().create_op_builder("ShareMemCommBuilder").load()


def _initialize(place: Place, group) -> None:
    """Gives the op this stage's size, rank and name, then takes the names away again."""
    from deepspeed.comm import comm

    op = _load()
    saved = {name: os.environ.get(name) for name in ("LOCAL_SIZE", "MASTER_PORT")}
    stage_name = f"{saved['MASTER_PORT']}_stage{place.stage}"
    os.environ["LOCAL_SIZE"], os.environ["MASTER_PORT"] = str(place.tp), stage_name
    try:
        op.initialize(place.tp, place.shard)
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
    comm.cdb.shm_comm_op, comm.cdb.shm_vector_kernel_level = op, op.vector_kernel_level()
    torch.distributed.barrier(group)
    address = os.environ.get("MASTER_ADDR", "")
    own = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{stage_name}_{place.shard}"
    (FOLDER / own).unlink(missing_ok=True)
