"""KV's memory: what a largest step leaves of a device, and what is said where that is nothing.

The device is a stand-in that says how much there is; the steps are real ones of tiny models.
"""

from __future__ import annotations

import queue

import pytest
import torch
from tiny_models import build, mixed_prompts, oracles, run_all, save

from ds_serve.config import Settings
from ds_serve.messages import Request, SamplingParams
from ds_serve.model.errors import ModelLoadError
from ds_serve.model.loader import load
from ds_serve.parallel.grid import Grid
from ds_serve.parallel.place import Place
from ds_serve.rank import build_local_engine
from ds_serve.worker import memory
from ds_serve.worker.memory import RESERVE, Room, kv_room, largest_step
from ds_serve.worker.sizes import cut_groups, num_blocks
from ds_serve.worker.worker import Worker

GIB = 2**30


class Device:
    """In Meter's place: total bytes, of which others hold some; a step grows by step(longest)."""

    def __init__(self, total: int, held: int, step) -> None:
        self._total, self._held, self._step = total, held, step
        self.seen: list[int] = []

    def total(self) -> int:
        return self._total

    def free(self) -> int:
        return self._total - self._held

    def grown(self, run) -> int:
        longest = run.args[-1]
        self.seen.append(longest)
        return self._step(longest)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made: dict[str, str] = {}

    def folder(architecture: str) -> str:
        if architecture not in made:
            made[architecture] = save(build(architecture), tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return folder


def room_of(folder: str, device: Device, **wanted) -> Room:
    settings = Settings(model=folder, **wanted)
    grid, model = Grid(Place()), load(settings)
    layout, windows = cut_groups(model, settings, grid)
    return kv_room(model, layout, windows, settings, grid, device)


def test_kv_gets_what_a_largest_step_leaves_of_the_share(folders):
    device = Device(100 * GIB, 20 * GIB, lambda longest: 5 * GIB)
    assert room_of(folders("llama"), device) == Room(90 * GIB - 25 * GIB - RESERVE, 512)
    room = room_of(folders("llama"), device, device_memory_utilization=0.5)
    assert room == Room(25 * GIB - RESERVE, 512)


def test_shorter_sequences_are_served_where_the_longest_ones_steps_take_everything(folders, monkeypatch):
    monkeypatch.setattr(memory, "SHORTEST", 64)
    device = Device(10 * GIB, GIB, lambda longest: longest * GIB // 32)
    room = room_of(folders("llama"), device)
    assert room == Room(int(0.9 * 10 * GIB) - GIB - 4 * GIB - RESERVE, 128)
    assert sorted(set(device.seen), reverse=True) == [512, 256, 128]
    with pytest.raises(ModelLoadError, match=r"16\.00 GiB.*nothing|nothing.*16\.00 GiB"):
        room_of(folders("llama"), device, max_model_len=512)


def test_nothing_left_and_too_much_wanted_name_the_numbers_and_what_to_do(folders):
    full = Device(8 * GIB, 7 * GIB, lambda longest: GIB)
    with pytest.raises(ModelLoadError, match=r"8\.00 GiB.*hold 7\.00 GiB.*tensor_parallel.*max_num_seqs"):
        room_of(folders("llama"), full)
    roomy = Device(8 * GIB, GIB, lambda longest: GIB)
    with pytest.raises(ModelLoadError, match=r"KV is to have 6442450944 bytes.*Give KV less"):
        room_of(folders("llama"), roomy, kv_cache_memory="6GiB")
    assert room_of(folders("llama"), roomy, kv_cache_memory="4GiB").longest == 512
    roomy.seen.clear()
    assert room_of(folders("llama"), roomy, num_blocks=1).longest == 512 and set(roomy.seen) == {512}


def test_a_step_that_does_not_fit_is_measured_as_a_whole_device(folders, monkeypatch):
    monkeypatch.setattr(memory, "SHORTEST", 64)

    def step(longest: int) -> int:
        if longest > 300:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return GIB

    assert room_of(folders("llama"), Device(10 * GIB, GIB, step)).longest == 256
    with pytest.raises(torch.OutOfMemoryError):  # build_worker words it
        room_of(folders("llama"), Device(10 * GIB, GIB, step), max_model_len=512)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
def test_a_largest_step_has_all_tokens_rows_and_logits(architecture, folders, monkeypatch):
    settings = Settings(model=folders(architecture), max_num_batched_tokens=600, max_num_seqs=3)
    model, grid, place = load(settings), Grid(Place()), Place()
    layout, _ = cut_groups(model, settings, grid)
    seen = []
    stage = model.stage

    def watched(ids, positions, sampled, hidden):
        seen.append((ids.shape[1], positions.max().item(), len(sampled)))
        return stage(ids, positions, sampled, hidden)

    model.stage = watched
    largest_step(model, layout, settings, place, 512)
    assert seen == [(600, 511, 3 + memory.MAX_SCORED)]


def test_the_share_is_refused_where_it_does_nothing(folders):
    with pytest.raises(ModelLoadError, match="device_memory_utilization.*kv_cache_memory"):
        build_local_engine(Settings(model=folders("llama"), device_memory_utilization=0.5))
    with pytest.raises(ValueError, match="does nothing beside num_blocks"):
        Settings(model="m", device_memory_utilization=0.5, num_blocks=8)


def test_blocks_are_bounded_by_what_requests_can_fill(folders):
    settings = Settings(model=folders("llama"), max_num_seqs=2)
    model, grid = load(settings), Grid(Place())
    layout, windows = cut_groups(model, settings, grid)
    assert num_blocks(layout, windows, settings, Room(100 * GIB, 512)) == 2 * 2 * (512 // 16)
    assert num_blocks(layout, windows, settings, Room(5 * layout.bytes_per_block, 512)) == 5


def test_out_of_memory_while_loading_says_what_to_change(folders, monkeypatch):
    def allocate(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore lines")

    monkeypatch.setattr("ds_serve.attention.layout.torch.empty", allocate)
    with pytest.raises(ModelLoadError, match=r"Tried to allocate 20\.00 GiB\.\).*kv_cache_memory.*plan"):
        build_local_engine(Settings(model=folders("llama")))


def test_out_of_memory_in_a_step_ends_requests_with_a_proposal(folders, monkeypatch):
    engine = build_local_engine(Settings(model=folders("llama"), num_blocks=64))
    prompts = mixed_prompts(4)
    wanted = oracles(build("llama"), prompts, [6] * 4)
    assert run_all(engine, prompts, 6) == wanted
    usual = Worker._compute

    def compute(self, inputs, hidden):
        if inputs.attention.num_tokens > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return usual(self, inputs, hidden)

    monkeypatch.setattr(Worker, "_compute", compute)
    outputs = queue.SimpleQueue()
    params = SamplingParams(max_tokens=4, temperature=0.0)
    engine.submit(Request(id="a", prompt_token_ids=[5, 6, 7], params=params), outputs.put)
    output = outputs.get(timeout=60)
    assert output.finish_reason == "error"
    assert "3 tokens in 1 requests ran out of memory" in output.error
    assert "max_num_batched_tokens" in output.error and "kv_cache_memory" in output.error
    engine.close()
