"""This rank's groups in the (stage, tensor) grid, and what ranks send one another while they compute.

DeepSpeed makes the groups of shards and does the collectives; what is our own is the all-reduce per tensor
group, through shared memory on CPU (shm.py) and peer memory on CUDA (peer.py), and a group for each pair of
neighbours along the pipeline. Knows no model, no plan and no request. Made by rank.py; used by model/ and
worker/.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
from collections import deque
from datetime import timedelta
from functools import cached_property
from typing import Literal

import deepspeed
import torch
import torch.distributed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology

from ds_serve.parallel import peer, shm
from ds_serve.parallel.place import Place
from ds_serve.parallel.wayback import WayBack

TIMEOUT = timedelta(minutes=10)  # for a collective; ranks that die or hang are seen by control.py long before

AllReduce = Literal["auto", "shared_memory", "peer", "group"]


def meet():
    """Meets all other ranks that the launcher started; returns the store that they share.

    Raises what torch.distributed raises where the environment names no ranks or they do not come, ValueError
    where it asks for NVLink multicast.
    """
    if get_accelerator().device_name() == "cuda":
        peer.forbid_multicast(os.environ)
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    # DeepSpeed's own set-up of the shared-memory op takes the whole world for one tensor group.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(timeout=TIMEOUT, verbose=False)
    return torch.distributed.distributed_c10d._get_default_store()


class Grid:
    """place, and the collectives of its groups. One rank alone: every method is the identity."""

    def __init__(self, place: Place, groups=None, all_reduce: AllReduce = "auto") -> None:
        self.place = place
        self._groups = groups
        self._sends: deque = deque()
        self._links: dict[int, object] = {}  # rank of this shard in a neighbouring stage -> the pair's group
        self.uses_shm, self._peers = False, None
        self.way_back: WayBack | None = None
        if groups is not None:
            self._connect(all_reduce)

    @classmethod
    def make(cls, tp: int, pp: int, all_reduce: AllReduce = "auto") -> Grid:
        """The grid of all ranks that have met, a collective. ValueError where they are not tp x pp."""
        world = torch.distributed.get_world_size()
        if world != tp * pp:
            raise ValueError(
                f"tensor_parallel {tp} x pipeline_parallel {pp} need {tp * pp} ranks, found {world}"
            )
        with contextlib.redirect_stdout(io.StringIO()):
            topology = PipeModelDataParallelTopology(num_pp=pp, num_mp=tp, num_dp=1)
            groups = PipelineParallelGrid(topology=topology)
        place = Place(torch.distributed.get_rank(), tp, pp)
        if (groups.get_stage_id(), groups.get_slice_parallel_rank()) != (place.stage, place.shard):
            raise RuntimeError(f"DeepSpeed's grid puts rank {place.rank} elsewhere than {place}")
        return cls(place, groups, all_reduce)

    def _connect(self, all_reduce: AllReduce) -> None:
        """Groups and connections that steps need; a collective of all ranks."""
        place = self.place
        on_cuda = get_accelerator().device_name() == "cuda"
        if place.tp > 1 and (all_reduce == "peer" or (on_cuda and all_reduce == "auto")):
            self._peers = peer.connect(place, self.tensor_group, all_reduce)
        elif place.tp > 1:
            self.uses_shm = shm.connect(place, self.tensor_group, all_reduce)
        # On one group NCCL would serialise what comes in and what goes out.
        for rank in range(place.world_size - place.tp):
            pair = (rank, rank + place.tp)
            group = torch.distributed.new_group(pair, timeout=TIMEOUT)
            if place.rank in pair:
                self._links[sum(pair) - place.rank] = group
        if place.pp > 1:
            self.way_back = WayBack(place)
        self._use_all()

    def _use_all(self) -> None:
        """Uses each group once: NCCL connects at the first use, and waits on the host for the others then."""
        place, device = self.place, get_accelerator().current_device_name()
        token = torch.zeros(1, device=device)
        if place.tp > 1:
            source = place.rank - place.shard
            parts = [torch.empty_like(token) for _ in range(place.tp)] if place.shard == 0 else None
            torch.distributed.all_reduce(token, group=self.tensor_group)
            torch.distributed.broadcast(token, src=source, group=self.tensor_group)
            torch.distributed.gather(token, parts, dst=source, group=self.tensor_group)
        if not place.is_first_stage:
            self.receive(token)
        if not place.is_last_stage:
            self.send_on(token)
        if self.way_back is not None:
            self.way_back.use(device)
        get_accelerator().synchronize()

    # -- what deepspeed.init_inference asks of its mpu ---------------------------------------------

    @property
    def tensor_group(self):
        """The torch.distributed group of this stage's tensor shards; None for one rank alone."""
        return None if self._groups is None else self._groups.get_slice_parallel_group()

    def get_model_parallel_group(self):
        return self.tensor_group

    def get_model_parallel_rank(self) -> int:
        return self.place.shard

    def get_model_parallel_world_size(self) -> int:
        return self.place.tp

    def get_data_parallel_group(self):
        return None

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_world_size(self) -> int:
        return 1

    # -- within a stage ----------------------------------------------------------------------------

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums tensor over the stage's shards, in place, and returns it. It must be contiguous."""
        if self.place.tp > 1:
            if not tensor.is_contiguous():
                raise ValueError("all_reduce: the tensor must be contiguous")
            if tensor.dtype in shm.DTYPES:
                deepspeed.comm.inference_all_reduce(tensor, group=self.tensor_group)
            else:
                torch.distributed.all_reduce(tensor, group=self.tensor_group)
        return tensor

    def share_tokens(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Fills token_ids int64[R] on every shard of the stage with shard 0's, and returns it."""
        if self.place.tp == 1:
            return token_ids
        if self.uses_shm or self._peers is not None:  # sums are what these are fast at
            # float32 holds integers below 2**24, more than any vocabulary, and adds zeros exactly.
            mine = token_ids.float()
            return token_ids.copy_(self.all_reduce(mine if self.place.shard == 0 else mine.zero_()))
        source = self.place.rank - self.place.shard
        torch.distributed.broadcast(token_ids, src=source, group=self.tensor_group)
        return token_ids

    # -- along the pipeline ------------------------------------------------------------------------

    def send_on(self, hidden: torch.Tensor) -> None:
        """Starts sending hidden to the same shard of the next stage.

        On CPU the caller leaves it unchanged; on CUDA a copy is sent, as a captured graph writes its output
        to the same place again.
        """
        while self._sends and (self._sends[0][0].is_completed() or len(self._sends) > self.place.pp):
            self._sends.popleft()[0].wait()
        if hidden.device.type != "cpu":
            hidden = hidden.clone()
        hidden = hidden.contiguous()
        to = self.place.rank + self.place.tp
        self._sends.append((torch.distributed.isend(hidden, to, group=self._links[to]), hidden))

    def receive(self, hidden: torch.Tensor) -> torch.Tensor:
        """Fills hidden with what the previous stage sent, in the order of sending.

        On CPU this waits for it; on CUDA the current stream does, and the host goes on.
        """
        of = self.place.rank - self.place.tp
        torch.distributed.recv(hidden, of, group=self._links[of])
        return hidden

    # -- over all ranks ----------------------------------------------------------------------------

    def minimum(self, values: list[int]) -> list[int]:
        """Of each value, the least over all ranks."""
        return [min(each) for each in zip(*self.gather(values), strict=True)]

    def maximum(self, values: list[float]) -> list[float]:
        """Of each value, the greatest over all ranks."""
        return [max(each) for each in zip(*self.gather(values), strict=True)]

    def total(self, values: list[int]) -> list[int]:
        """Of each value, the sum over all ranks."""
        return [sum(each) for each in zip(*self.gather(values), strict=True)]

    @cached_property
    def ranks_here(self) -> int:
        """How many of the ranks run on this machine; the first time a collective."""
        return self.gather(socket.gethostname()).count(socket.gethostname())

    def gather(self, mine) -> list:
        """What each rank gave, by rank: plain values. A collective."""
        found: list = [mine] * self.place.world_size
        if self.place.world_size > 1:
            torch.distributed.all_gather_object(found, mine)
        return found

    def close(self) -> None:
        """Leaves the groups; all ranks do so together, after their last step."""
        if self.way_back is not None:
            self.way_back.close()
        for work, _ in self._sends:
            work.wait()
        self._sends.clear()
        if self.place.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.barrier()
            if self._peers is not None:
                peer.disconnect()
                self._peers = None
            torch.distributed.destroy_process_group()
