"""One-shot all-reduce over peer memory for one tensor group on CUDA: torch's symmetric memory.

Each shard puts its tensor into a buffer that the others have mapped, and sums all of them by itself, in one
kernel that waits for the others before and after. For small messages that beats NCCL, whose cost is latency;
larger ones stay NCCL's. Both can be captured in a CUDA graph. DeepSpeed's inference_all_reduce, which its
sharded linears call, is led here. NVLink multicast stays off, here and in NCCL.

Knows no model and no step. Called by grid.py. torch's ops run in tests/gpu/test_peer_cuda.py only.
"""

from __future__ import annotations

import ctypes
import logging
import socket
import time
from collections.abc import MutableMapping

import torch
import torch.distributed
from deepspeed.accelerator import get_accelerator
from deepspeed.comm import comm
from deepspeed.comm.reduce_op import ReduceOp

from ds_serve.parallel.place import Place

logger = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float32)  # what the op has kernels for (torch 2.11 to 2.13)
# Of all shards' tensors together: beyond it NCCL moves less. To be tuned by tests/gpu/test_peer_cuda.py.
MAX_BYTES = 2 << 20
TRIAL_S = 30.0  # for the trial at start
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


def forbid_multicast(environ: MutableMapping[str, str]) -> None:
    """Keeps NVLink multicast off in NCCL and torch; before the first communicator is made.

    ValueError where environ asks for it.
    """
    for name, value in NO_MULTICAST.items():
        found = environ.setdefault(name, value)
        if found != value:
            raise ValueError(
                f"{name} is {found}, but NVLink multicast must stay off: unset it, or set it to {value}"
            )


class PeerMemory:
    """A buffer of this shard that the group's others have mapped, and the all-reduce through it.

    One buffer is enough for any number of all-reduces in a row on one stream. The kernel ends only when every
    shard has read what it needs, so the copy that comes next overwrites nothing that a peer still reads. On
    two streams at once the kernels could wait for one another for ever: all-reduces belong to one stream.
    """

    def __init__(self, group, device: torch.device) -> None:
        self.group = group
        self.max_bytes = MAX_BYTES // group.size()
        self._buffer = _mapped(self.max_bytes, group, device)

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether all_reduce is for tensor: by its dtype, shape and strides, alike on all shards."""
        size = tensor.numel() * tensor.element_size()
        return (
            tensor.dtype in DTYPES
            and 0 < size <= self.max_bytes
            and size % 4 == 0  # the op's smallest access
            and tensor.is_contiguous()
        )

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums tensor over the group, in place, and returns it. It must be one that takes() takes.

        The shards' values are added in the order of the shards, in tensor's dtype, on every shard: all get
        the same bits.
        """
        flat = tensor.view(-1)
        mine = self._buffer[: flat.numel() * flat.element_size()].view(flat.dtype)
        # The op can copy by itself, but then it signals before all of its threads have written (no barrier
        # in front of its sync_remote_blocks): a peer may read what was there before.
        mine.copy_(flat)
        if flat.data_ptr() % 16 == 0:
            _one_shot(mine, self.group, flat)
        else:  # it stores 16 bytes at once
            flat.copy_(_one_shot(mine, self.group, torch.empty_like(mine)))
        return tensor


def _mapped(num_bytes: int, group, device: torch.device) -> torch.Tensor:
    """uint8[num_bytes] that the other shards of group have mapped once all have called this."""
    from torch.distributed import _symmetric_memory as symm_mem

    buffer = symm_mem.empty(num_bytes, dtype=torch.uint8, device=device)
    handle = symm_mem.rendezvous(buffer, group)
    if handle.multicast_ptr:
        raise RuntimeError("torch has set up NVLink multicast, which must stay off")
    if handle.offset:  # the op counts from where the allocation begins
        raise RuntimeError(f"torch's allocation begins {handle.offset} bytes before the buffer")
    # Never freed: torch waits for the device then, and a kernel that waits for a dead rank does not end.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(buffer))
    return buffer


def _one_shot(mine: torch.Tensor, group, out: torch.Tensor) -> torch.Tensor:
    """out = the sum of the group's buffers, of which mine is this shard's."""
    return torch.ops.symm_mem.one_shot_all_reduce_out(mine, "sum", group.group_name, out)


# -- setting it up -----------------------------------------------------------------------------


def connect(place: Place, group, wanted: str) -> PeerMemory | None:
    """Leads inference_all_reduce of this group through peer memory, where that works, until disconnect().

    All ranks call it together. None where it cannot be had and wanted is "auto"; a warning then says why.
    RuntimeError where wanted is "peer".
    """
    memory = None
    # Stages may fare differently, but each agreement is one of all ranks.
    obstacle = _agreed(place, _obstacle(place))
    if obstacle is None:
        try:
            memory = PeerMemory(group, torch.device(get_accelerator().current_device_name()))
        except Exception as error:  # whatever torch, the driver or a sandbox objects to
            obstacle = f"{type(error).__name__}: {error}".partition("\n")[0]
    obstacle = _agreed(place, obstacle)
    obstacle = _agreed(place, obstacle or _fault(memory, place))
    if obstacle is None:
        _lead_here(memory)
        return memory
    if wanted == "peer":
        raise RuntimeError(f"all_reduce: peer cannot be used: {obstacle}")
    if place.shard == 0:
        logger.warning("stage %d sums its shards over NCCL, not over peer memory: %s", place.stage, obstacle)
    return None


def disconnect() -> None:
    """inference_all_reduce is DeepSpeed's own again; all ranks are past their last one."""
    vars(comm.cdb).pop("inference_all_reduce", None)


def _lead_here(memory: PeerMemory) -> None:
    plain = comm.cdb.inference_all_reduce

    def inference_all_reduce(tensor, op, group=None):
        if group is memory.group and op == ReduceOp.SUM and memory.takes(tensor):
            return memory.all_reduce(tensor)
        return plain(tensor, op, group)

    comm.cdb.inference_all_reduce = inference_all_reduce


def _of_stage(place: Place, mine) -> list:
    """What each shard of this stage gave; a collective of all ranks."""
    everyone: list = [None] * place.world_size
    torch.distributed.all_gather_object(everyone, mine)
    first = place.rank - place.shard
    return everyone[first : first + place.tp]


def _agreed(place: Place, mine: str | None) -> str | None:
    """The first obstacle that a shard of this stage has met; a collective of all ranks."""
    return next(filter(None, _of_stage(place, mine)), None)


def _obstacle(place: Place) -> str | None:
    """Why this shard cannot reach the others' memory, or None; a collective of all ranks."""
    cannot, uuid = _lacking(), ""
    if cannot is None:
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    shards = _of_stage(place, (socket.gethostname(), uuid))
    if cannot is not None:
        return cannot
    if len({host for host, _ in shards}) > 1:
        return "the stage's tensor ranks are on several machines"
    uuids = [each for _, each in shards]
    if len(set(uuids)) < len(uuids):
        return "two of the stage's tensor ranks share a GPU"
    return _unreachable({*uuids} - {uuid})


def _lacking() -> str | None:
    if get_accelerator().device_name() != "cuda":
        return "the device is not CUDA"
    if not hasattr(torch.ops.symm_mem, "one_shot_all_reduce_out"):
        return f"torch {torch.__version__} has no one-shot all-reduce"
    from torch.distributed import _symmetric_memory as symm_mem

    backend = symm_mem.get_backend(torch.device("cuda"))
    return None if backend == "CUDA" else f"torch's symmetric memory is {backend} (TORCH_SYMMMEM), not CUDA"


def _unreachable(uuids: set[str]) -> str | None:
    """Of the GPUs with these uuids that this process sees, one whose memory it cannot reach."""
    own = torch.cuda.current_device()
    for index in range(torch.cuda.device_count()):
        known = str(torch.cuda.get_device_properties(index).uuid) in uuids
        if known and not torch.cuda.can_device_access_peer(own, index):
            return f"GPU {own} has no peer access to GPU {index}"
    return None


def _fault(memory: PeerMemory, place: Place) -> str | None:
    """What a trial of some sizes finds wrong with the sums. TimeoutError where they do not come at all."""
    device = torch.device(get_accelerator().current_device_name())
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for dtype in DTYPES:
        for count in (8, 1000, memory.max_bytes // dtype.itemsize):
            values = torch.arange(count, device=device) % 13  # so small that sums are exact in bfloat16
            total = memory.all_reduce((values + place.shard).to(dtype))
            wrong += (total != place.tp * values + place.tp * (place.tp - 1) // 2).sum()
    _wait(device)
    return f"{wrong.item()} sums of a trial are wrong" if wrong.item() else None


def _wait(device: torch.device) -> None:
    """Until device has done what it was given. TimeoutError after TRIAL_S seconds: then it never will."""
    if device.type != "cuda":
        return
    event, deadline = torch.cuda.Event(), time.monotonic() + TRIAL_S
    event.record()
    while not event.query():
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"an all-reduce over peer memory has not ended after {TRIAL_S:g} s; set all_reduce to group"
            )
        time.sleep(0.001)
