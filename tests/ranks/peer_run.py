"""Started on every rank: the all-reduce over peer memory, with a stand-in for torch's symmetric memory.

    peer_run.py sums FOLDER          each rank prints what `sums` finds, as a line of JSON
    peer_run.py engine FOLDER CASES RESULTS      matrix_run.py's engines, whose shards are summed so

The stand-in is a file that a stage's shards have mapped. As in torch, a shard that calls the op waits for the
others, adds up what lies in the buffers in the order of the shards, and waits again until all have read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from pathlib import Path

import torch
import torch.distributed
from saying import say

from ds_serve.parallel import peer
from ds_serve.parallel.grid import Grid, meet


class SharedFile:
    """What peer.py takes from torch, over a file, which the ranks `fails` cannot map and `wrong` missum."""

    def __init__(self, folder: Path, fails: tuple[int, ...] = (), wrong: tuple[int, ...] = ()) -> None:
        self.folder, self.fails, self.wrong = folder, fails, wrong
        self.num_calls = 0

    def mapped(self, num_bytes: int, group, device: torch.device) -> torch.Tensor:
        rank, size = torch.distributed.get_rank(), group.size()
        if rank in self.fails:
            raise OSError("no memory can be mapped here")
        path = self.folder / f"stage{rank // size}"
        shape = {"shared": True, "size": size * num_bytes, "dtype": torch.uint8}
        self.buffers = list(torch.from_file(str(path), **shape).view(size, num_bytes))
        return self.buffers[group.rank()]

    def one_shot(self, mine: torch.Tensor, group, out: torch.Tensor) -> torch.Tensor:
        own = self.buffers[group.rank()]
        assert mine.dtype in (torch.bfloat16, torch.float32)
        assert mine.is_contiguous() and out.is_contiguous() and mine.shape == out.shape
        assert own.data_ptr() <= mine.data_ptr() and mine.nbytes <= own.nbytes
        assert mine.nbytes % 4 == 0 and out.data_ptr() % 16 == 0
        self.num_calls += 1
        torch.distributed.barrier(group)
        total, *others = (each[: mine.nbytes].view(mine.dtype) for each in self.buffers)
        for each in others:
            total = total + each
        out.copy_(total)
        torch.distributed.barrier(group)
        if torch.distributed.get_rank() in self.wrong:
            out[0] += 1
        return out


@contextlib.contextmanager
def stand_in(memory: SharedFile):
    """Inside it peer.py finds memory where torch's would be."""
    replaced = {"_mapped": memory.mapped, "_one_shot": memory.one_shot, "_obstacle": lambda place: None}
    original = {name: getattr(peer, name) for name in replaced}
    vars(peer).update(replaced)
    try:
        yield memory
    finally:
        vars(peer).update(original)


def expected(values: torch.Tensor, grid: Grid) -> torch.Tensor:
    """values of all shards, added in their order, in their dtype."""
    parts = [torch.empty_like(values) for _ in range(grid.place.tp)]
    torch.distributed.all_gather(parts, values, group=grid.tensor_group)
    total = parts[0]
    for each in parts[1:]:
        total = total + each
    return total


def differences(grid: Grid, memory: SharedFile) -> dict[str, int]:
    """Of tensors of many kinds: how many sums are wrong, and how many tensors went through the memory."""
    torch.manual_seed(grid.place.rank)
    limit = peer.MAX_BYTES // grid.place.tp
    small = [(1, 1, 64), (3, 7, 24), (1,), (5, 2), (limit // 4,)]
    found = {"wrong": 0, "taken": 0, "left": 0}

    def check(tensor: torch.Tensor, taken: bool) -> None:
        wanted, before = expected(tensor, grid), memory.num_calls
        returned = grid.all_reduce(tensor)
        found["wrong"] += not (torch.equal(returned, wanted) and returned is tensor)
        found["wrong"] += taken != (memory.num_calls > before)
        found["taken" if taken else "left"] += 1

    for _ in range(4):  # the same memory again and again
        for shape in small:
            for dtype in (torch.float32, torch.bfloat16):
                tensor = torch.randn(shape).to(dtype)
                check(tensor, taken=tensor.nbytes % 4 == 0)
    check(torch.randn(65)[1:], taken=True)  # begins between two 16-byte words
    check(torch.randn(limit // 4 + 1), taken=False)
    check(torch.randn(64).half(), taken=False)
    check(torch.arange(64), taken=False)
    check(torch.randn(0), taken=False)
    return found


def sums(folder: Path) -> list[dict]:
    """A record for each case: no stand-in, all shards can map, the last one cannot, the last one missums."""
    grid = Grid.make(2, 2, "group")
    last = grid.place.world_size - 1
    found = [{"case": "cpu", "error": refusal(grid)}]
    for name, faults in {"all": {}, "fails": {"fails": (last,)}, "wrong": {"wrong": (last,)}}.items():
        if grid.place.rank == 0:
            (folder / name).mkdir()
        torch.distributed.barrier()
        with stand_in(SharedFile(folder / name, **faults)) as memory, said() as lines:
            made = peer.connect(grid.place, grid.tensor_group, "auto")
            record = {"case": name, "connected": made is not None}
            if record["connected"]:
                record |= differences(grid, memory)
                peer.disconnect()
            before = memory.num_calls
            grid.all_reduce(torch.ones(8))
            record |= {"after": memory.num_calls - before, "said": lines, "error": refusal(grid)}
        found.append(record)
    return [record | {"rank": grid.place.rank} for record in found]


def refusal(grid: Grid) -> str | None:
    """What connect says where peer memory must be used."""
    try:
        peer.connect(grid.place, grid.tensor_group, "peer")
    except RuntimeError as error:
        return str(error)
    peer.disconnect()
    return None


@contextlib.contextmanager
def said():
    """The list of what peer.py logs inside it."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname}: {record.getMessage()}")
    peer.logger.addHandler(handler)
    try:
        yield lines
    finally:
        peer.logger.removeHandler(handler)


def main() -> int:
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "engine":
        import matrix_run

        sys.argv = ["matrix_run.py", *sys.argv[3:]]
        with stand_in(SharedFile(folder)) as memory:
            code = matrix_run.main()
        say(json.dumps({"calls": memory.num_calls}))
        return code
    meet()
    for record in sums(folder):
        say(json.dumps(record))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
