"""Reads LoRA adapters as peft saves them: which linears each one changes, and how.

An adapter is a directory with adapter_config.json and adapter_model.safetensors. It is held against the
whole model, every tensor of it; what it asks for beyond plain LoRA is refused by name. Knows no rank and no
batch. Called by the loader; lora.py reads the tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ds_serve.model.errors import ModelLoadError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALL_LINEAR = "all-linear"
_PREFIX = "base_model.model."
_DTYPES = {"F64", "F32", "F16", "BF16"}

# Fields of peft's LoraConfig that are read here, and those that say nothing of what is computed: what
# initialised the tensors or was needed in training. Any other one must be off.
_READ = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    "bias", "init_lora_weights",
}  # fmt: skip
_NO_MATTER = {
    "peft_version", "revision", "inference_mode", "fan_in_fan_out", "lora_dropout", "megatron_core",
    "qalora_group_size", "eva_config", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
# Ways to begin that leave the model's own weights as they are.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")

Refused = Callable[[str], ModelLoadError]


@dataclass(frozen=True)
class Update:
    """What an adapter adds to a linear: y + scale * (x A^T) B^T, with A [rank, in] and B [out, rank]."""

    rank: int
    scale: float
    a: str  # the tensors' names
    b: str


@dataclass(frozen=True)
class Adapter:
    """One adapter; updates by the linear's name in the model."""

    name: str
    file: Path
    updates: Mapping[str, Update]


def read_adapters(folders: Mapping[str, str], build: Callable[[], PreTrainedModel]) -> list[Adapter]:
    """The adapters of these directories by name, in order; build gives the whole model, without weights.

    Raises ModelLoadError naming the adapter and what is wrong with it.
    """
    if not folders:
        return []
    model = build()
    return [_read(name, Path(folder), model) for name, folder in folders.items()]


def _read(name: str, folder: Path, model: PreTrainedModel) -> Adapter:
    def refused(why: str) -> ModelLoadError:
        return ModelLoadError(f"adapter {name!r} ({folder}): {why}")

    config = _read_config(folder, refused)
    _check_config(config, model, refused)
    linears = _targets(config, model, refused)
    updates = {linear: _update(config, linear, refused) for linear in linears}
    _check_tensors(folder / WEIGHTS, updates, linears, refused)
    return Adapter(name, folder / WEIGHTS, updates)


# -- the configuration -------------------------------------------------------------------------


def _read_config(folder: Path, refused: Refused) -> dict[str, Any]:
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise refused(f"no directory with {file} (adapters are not downloaded, other formats not read)")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise refused(f"{CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise refused(f"{CONFIG} is no JSON object")
    return config


def _check_config(config: dict[str, Any], model: PreTrainedModel, refused: Refused) -> None:
    if config.get("peft_type") != "LORA":
        raise refused(f"peft_type is {config.get('peft_type')!r}; only 'LORA' is served")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise refused(f"task_type is {config['task_type']!r}; only 'CAUSAL_LM' is served")
    if config.get("bias", "none") != "none":
        raise refused(f"bias is {config['bias']!r}: it changes the model's own biases; only 'none' is served")
    beginning = config.get("init_lora_weights", True)
    if beginning not in _PLAIN_BEGINNINGS:
        raise refused(
            f"init_lora_weights is {beginning!r}, which changes the model's own weights: convert the adapter "
            "with peft's path_initial_model_for_weight_conversion"
        )
    for field in sorted(config.keys() - _READ - _NO_MATTER):
        if config[field]:
            raise refused(f"{field} is {_brief(config[field])}; adapters are served without it")
    _check_base(config, model, refused)


def _check_base(config: dict[str, Any], model: PreTrainedModel, refused: Refused) -> None:
    """That the adapter was made for this kind of model, as far as it says."""
    made_for = (config.get("auto_mapping") or {}).get("base_model_class")
    base = Path(config.get("base_model_name_or_path") or "") / "config.json"
    if config.get("base_model_name_or_path") and base.is_file():
        [made_for] = json.loads(base.read_text(encoding="utf-8")).get("architectures") or [made_for]
    if made_for is not None and made_for not in {each.__name__ for each in type(model).__mro__}:
        raise refused(f"it was made for {made_for}, and the model is {type(model).__name__}")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# -- which linears -----------------------------------------------------------------------------


def _targets(config: dict[str, Any], model: PreTrainedModel, refused: Refused) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each linear that the adapter changes, by its name in the model."""
    wanted = config.get("target_modules")
    found: dict[str, tuple[int, int]] = {}
    lacking = set(wanted) if isinstance(wanted, list) else set()
    try:
        for name, module in model.named_modules():
            matching = _matching(wanted, name, module, model)
            lacking -= matching
            if not matching or _matching(config.get("exclude_modules"), name, module, model):
                continue
            if isinstance(wanted, str) or _in_layers(config, name):
                found[name] = _size_of_target(name, module, model, refused)
    except re.error as error:
        raise refused(f"a pattern of {CONFIG} is no regular expression: {error}") from error
    if lacking or not found:
        names = ", ".join(sorted(lacking)) or _brief(wanted)
        raise refused(f"target_modules: {type(model).__name__} has no linear {names}")
    return found


def _matching(wanted: Any, name: str, module: nn.Module, model: PreTrainedModel) -> set[str]:
    """Which of wanted, a list of names or one pattern, a module's full name matches: peft's rules."""
    if not wanted or not name:
        return set()
    if not isinstance(wanted, str):
        return {each for each in wanted if name == each or name.endswith(f".{each}")}
    if wanted.lower() == ALL_LINEAR:
        is_meant = _size(module) is not None and module is not model.get_output_embeddings()
    else:
        is_meant = re.fullmatch(wanted, name) is not None
    return {wanted} if is_meant else set()


def _in_layers(config: dict[str, Any], name: str) -> bool:
    """Whether layers_to_transform has the layer that a module's name tells: its first number."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if match:
            return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _size_of_target(
    name: str, module: nn.Module, model: PreTrainedModel, refused: Refused
) -> tuple[int, int]:
    if module is model.get_output_embeddings() or isinstance(module, nn.Embedding):
        raise refused(f"target_modules name {name}, an embedding or the head; only other linears are changed")
    size = _size(module)
    if size is None:
        raise refused(f"target_modules name {name}, which is no linear but {type(module).__name__}")
    return size


def _size(module: nn.Module) -> tuple[int, int] | None:
    """(outputs, inputs) of a linear, None for any other module."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return None


# -- what is added to each ---------------------------------------------------------------------


def _update(config: dict[str, Any], linear: str, refused: Refused) -> Update:
    rank = _of_pattern(config, "rank_pattern", linear, config.get("r", 8))
    alpha = _of_pattern(config, "alpha_pattern", linear, config.get("lora_alpha", 8))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise refused(f"{linear}: rank {rank!r} with alpha {alpha!r} is no LoRA")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    a, b = (f"{_PREFIX}{linear}.lora_{part}.weight" for part in "AB")
    return Update(rank, scale, a, b)


def _of_pattern(config: dict[str, Any], field: str, linear: str, default: Any) -> Any:
    """The value of the first pattern that a linear's name ends with."""
    for pattern, value in (config.get(field) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", linear):
            return value
    return default


def _check_tensors(
    file: Path, updates: dict[str, Update], linears: dict[str, tuple[int, int]], refused: Refused
) -> None:
    """Exactly the tensors that the configuration tells of, each of the model's sizes."""
    wanted = {}
    for linear, update in updates.items():
        outputs, inputs = linears[linear]
        wanted |= {update.a: [update.rank, inputs], update.b: [outputs, update.rank]}
    try:
        with safe_open(file, framework="pt") as tensors:
            found = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 (no mapping)
            shapes = {key: each.get_shape() for key, each in found.items()}
            dtypes = {each.get_dtype() for each in found.values()}
    except (SafetensorError, OSError) as error:
        raise refused(f"{file.name} cannot be read: {error}") from error
    if lacking := sorted(wanted.keys() - shapes):
        raise refused(f"{file.name} lacks {len(lacking)} tensors: {lacking[:3]}")
    if left := sorted(shapes.keys() - wanted):
        raise refused(f"{file.name} has {len(left)} tensors that {CONFIG} does not tell of: {left[:3]}")
    for key, shape in wanted.items():
        if shapes[key] != shape:
            raise refused(f"{key} is {shapes[key]}, and {shape} would fit the model")
    if dtypes - _DTYPES:
        raise refused(f"{file.name} has tensors of {', '.join(sorted(dtypes - _DTYPES))}")
