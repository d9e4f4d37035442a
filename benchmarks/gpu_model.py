"""The model that benchmarks/gpu.py measures, made where it is measured, and what the device allows for it.

Llama-3.1-8B's shape with random bfloat16 weights; a tiny one stands in for it in dry runs. Floors are what no
engine can beat: bytes over the measured speed of a copy, arithmetic over that of a large matrix product.
Used by gpu.py and its parts; knows no engine.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": None,
}  # fmt: skip
TINY = SHAPE | {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 512,
}  # fmt: skip
CHECK_LAYERS = 2
SHARD_BYTES = 2 * 2**30
WRITERS = 4
CALLS = 4  # timed together: a launch and a wait cost some 20 us


@dataclass(frozen=True)
class Scale:
    """What is measured: requests at once, tokens of prompts and answers, rounds."""

    batches: tuple[int, ...] = (1, 64, 256)  # of the decode steps
    prompt: int = 512
    out: int = 128
    long: tuple[int, int] = (2048, 8192)  # prompts whose first token is timed
    rates: tuple[int, ...] = (64, 256)  # prompts at once, whose output rate is taken
    chunk: int = 8192  # max_num_batched_tokens
    rounds: int = 3
    check_prompts: tuple[int, ...] = (1, 15, 16, 17, 33, 100, 255, 511, 512, 513, 700, 1000)
    check_out: int = 24
    check_chunk: int = 512


FULL = Scale()
DRY = Scale(
    batches=(1, 3, 6), prompt=32, out=8, long=(48, 128), rates=(3, 6), chunk=128, rounds=2,
    check_prompts=(1, 15, 16, 17, 40, 70), check_out=6, check_chunk=32,
)  # fmt: skip


@dataclass(frozen=True)
class Ceilings:
    """Measured on this device: bytes read + written a second, bytes a second from pinned memory, FLOP/s."""

    copy: float
    host: float
    flops: float

    def line(self) -> str:
        return (
            f"device copy {self.copy / 1e12:.3f} TB/s (read + written), from the host "
            f"{self.host / 1e9:.1f} GB/s, bf16 product {self.flops / 1e12:.1f} TFLOP/s"
        )


def config_of(dry: bool, layers: int | None = None) -> PreTrainedConfig:
    shape = dict(TINY if dry else SHAPE)
    if layers is not None:
        shape["num_hidden_layers"] = layers
    return AutoConfig.for_model("llama", **shape)


def room(needed: int) -> Path:
    """Where a model of so many bytes goes: memory (/dev/shm) if it has twice the room, else the disk."""
    for folder in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        if folder.is_dir() and shutil.disk_usage(folder).free > 2 * needed:
            return folder
    raise SystemExit(
        f"a model of {needed / 1e9:.1f} GB finds no room twice that size in /dev/shm or "
        f"{tempfile.gettempdir()}: name a folder with --folder"
    )


def directory(config: PreTrainedConfig, device: torch.device, parent: Path | None = None) -> str:
    """A model directory of this shape, written at the first call: bfloat16, scaled so that logits depend on
    everything and their first few differ."""
    shapes = parameters(config)
    size = 2 * sum(math.prod(shape) for shape in shapes.values())
    parent = parent or room(size)
    folder = parent / f"ds-serve-llama-{config.hidden_size}x{config.num_hidden_layers}-bf16"
    if (folder / "config.json").is_file():
        return str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device).manual_seed(0)
    index: dict[str, str] = {}
    with ThreadPoolExecutor(WRITERS) as pool:
        writes = []
        for number, names in enumerate(_shards(shapes)):
            file = f"model-{number:05d}.safetensors"
            tensors = {name: _random(name, shapes[name], generator, device) for name in names}
            writes.append(pool.submit(save_file, tensors, folder / file, metadata={"format": "pt"}))
            index |= dict.fromkeys(names, file)
        for write in writes:
            write.result()
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)  # last: who finds it finds all
    return str(folder)


def parameters(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(each.shape) for name, each in model.named_parameters()}


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        names.append(name)
        size += 2 * math.prod(shape)
        if size >= SHARD_BYTES:
            yield names
            names, size = [], 0
    if names:
        yield names


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator, device: torch.device):
    noise = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
    if len(shape) < 2:
        return (1 + 0.1 * noise).cpu()
    return (noise * (0.5 if "embed" in name else 1.5 / math.sqrt(shape[-1]))).cpu()


# -- floors ----------------------------------------------------------------------------------------


class Floors:
    """The least milliseconds (or the most tokens a second) of each row, on shards x stages devices."""

    def __init__(self, config: PreTrainedConfig, ceilings: Ceilings, scale: Scale, tp: int, pp: int) -> None:
        self._copy, self._host = ceilings.copy * tp, ceilings.host * tp * pp
        self._flops, self._pp, self._scale = ceilings.flops * tp, pp, scale
        shapes = parameters(config)
        read = {name: math.prod(shape) for name, shape in shapes.items() if "embed_tokens" not in name}
        self._weights = 2 * sum(read.values())
        self._layers = sum(count for name, count in read.items() if "lm_head" not in name)
        self._kv = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        self._width = config.num_hidden_layers * config.num_attention_heads * config.head_dim

    def step(self, rows: int) -> float:
        """A decode step: the weights less the embedding, and the KV of half-way through the answers."""
        context = self._scale.prompt + self._scale.out / 2
        return (self._weights + rows * context * self._kv) / self._copy * 1e3

    def cold(self, length: int) -> float:
        """The arithmetic of a prompt: products, and the causal half of QK and PV."""
        work = 2 * self._layers * length + 2 * self._width * length**2
        return max(work / self._flops, self._weights / self._copy) * 1e3

    def device_hit(self, length: int) -> float:
        return (self._weights + length * self._kv) / self._copy * 1e3

    def host_hit(self, length: int) -> float:
        return self.device_hit(length) + length * self._kv / self._host * 1e3

    def rate(self, rows: int) -> float:
        """Output tokens a second: all prompts' arithmetic, then the decode steps; every stage at work."""
        prompts = self.cold(self._scale.prompt) * rows
        seconds = (prompts + self._scale.out * self.step(rows)) / 1e3
        return rows * self._scale.out / seconds * self._pp


def measure(device: torch.device, dry: bool) -> Ceilings:
    """Ceilings of this device, each the median of ten."""
    size, side = (2**20, 256) if dry else (4 * 2**30, 8192)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    there = torch.empty(size // 4, dtype=torch.uint8, pin_memory=device.type == "cuda").random_()
    left = torch.randn(side, side, dtype=torch.bfloat16, device=device)
    right = torch.randn(side, side, dtype=torch.bfloat16, device=device)
    return Ceilings(
        copy=2 * size / _seconds(lambda: copy.copy_(source), device),
        host=there.numel() / _seconds(lambda: copy[: there.numel()].copy_(there, non_blocking=True), device),
        flops=2 * side**3 / _seconds(lambda: left @ right, device),
    )


def _seconds(work: Callable[[], object], device: torch.device, rounds: int = 10) -> float:
    found = []
    for _ in range(rounds + 3):
        _wait(device)
        began = time.perf_counter()
        for _ in range(CALLS):
            work()
        _wait(device)
        found.append((time.perf_counter() - began) / CALLS)
    return statistics.median(found[3:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prepare(dry: bool, parent: Path | None, parts: set[str]) -> dict:
    """Makes the models that the parts need and measures the device; plain values, for another process."""
    device = torch.device("cpu" if dry else "cuda")
    torch.manual_seed(0)
    made = {
        "device": "cpu" if dry else torch.cuda.get_device_name(),
        "ceilings": asdict(measure(device, dry)),
    }
    if "check" in parts:
        made["small"] = directory(config_of(dry, CHECK_LAYERS), device, parent)
    if parts - {"check"}:
        made["large"] = directory(config_of(dry), device, parent)
    return made
