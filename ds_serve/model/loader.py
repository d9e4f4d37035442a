"""Loads a Hugging Face causal LM directory for serving, through deepspeed.init_inference.

The module is transformers' own: it is built on the meta device and cut to this rank's stage, each of the
stage's tensors is read once from safetensors (memory-mapped), its attention becomes ds_paged, and known
layers are swapped for fused ones, others compiled. Knows no request, no batch and no KV pool. Called by the
worker.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from deepspeed.accelerator import get_accelerator
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ds_serve.attention.backends import Backend, select_backend
from ds_serve.attention.interface import UnsupportedModelError, install, probe_layers
from ds_serve.attention.latent import drop_latents, use_latents
from ds_serve.attention.layout import KVLayout
from ds_serve.config import Settings
from ds_serve.model.adapter_files import read_adapters
from ds_serve.model.adapters import adapt, plain_attention
from ds_serve.model.ahead import begin_builds
from ds_serve.model.compiled import compile_layers
from ds_serve.model.errors import ModelLoadError
from ds_serve.model.injection import inject
from ds_serve.model.lora import attach
from ds_serve.model.parity import plain_output, try_adapters, verify_paged
from ds_serve.model.quantised import alone, explained, name_skipped, prepare, settle
from ds_serve.model.report import InjectionReport
from ds_serve.model.rope import settle_rope
from ds_serve.model.sharding import shard
from ds_serve.model.stage import Parts, Stage, cut_points, drop_tied_embedding, stage_class
from ds_serve.parallel.grid import Grid
from ds_serve.parallel.place import Place

logger = logging.getLogger(__name__)


@dataclass
class LoadedModel:
    """What a worker needs of a model. stage maps packed token rows to logits or hidden states."""

    stage: Stage
    config: PreTrainedConfig
    layout: KVLayout
    backend: Backend
    injection: InjectionReport
    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    vocab_size: int


def load(settings: Settings, grid: Grid | None = None) -> LoadedModel:
    """This rank's part of the model: of grid.place's stage, its tensor shard. None: one rank alone.

    All tensor shards of a stage call it together. Raises ModelLoadError for a bad directory or setting,
    UnsupportedModelError for a model that paged attention or a pipeline cannot serve.
    """
    grid = grid or Grid(Place())
    wanted = (settings.tensor_parallel, settings.pipeline_parallel)
    if (grid.place.tp, grid.place.pp) != wanted:
        raise ValueError(f"settings ask for tp x pp of {wanted}, the grid is {grid.place.tp, grid.place.pp}")
    config = read_config(settings)
    device = _device(settings)
    begin_builds(settings, config, device)
    adapters = read_adapters(settings.adapters, lambda: skeleton(settings, config))
    module, layers = read_stage(settings, config, grid.place, read_weights)
    stage = Stage(shard(module, grid), grid.place, layers)
    if adapters:
        attach(stage.module, adapters, grid, device)
    backend = select_backend(device, stage.dtype, settings.block_size, settings.attention)
    with explained(settings, config):
        plain = plain_output(stage, device)
    adapt(stage.module, grid.place, lambda: longest(config, settings))
    install(stage.module, backend)
    layout = _proven_layout(stage, plain, settings, backend, grid)
    if adapters:
        try_adapters(stage, len(adapters), layout, device)
    max_model_len = longest(config, settings)
    settle_rope(stage.module, max_model_len)
    reduce = grid.all_reduce if grid.place.tp > 1 else None
    report = inject(stage.module, backend, settings.injection, reduce)
    compile_layers(stage, layout, grid, report, settings.compile)
    logger.info(
        "%s: %s, %s on %s, attention %s, %d modules fused, %d compiled, %d as they are",
        settings.name if grid.place.world_size == 1 else f"{settings.name}, {grid.place}",
        type(stage.module).__name__, str(stage.dtype).removeprefix("torch."), device, backend.name,
        report.injected, report.compiled, report.kept,
    )  # fmt: skip
    return LoadedModel(
        stage=stage,
        config=config,
        layout=layout,
        backend=backend,
        injection=report,
        device=device,
        dtype=stage.dtype,
        max_model_len=max_model_len,
        vocab_size=config.get_text_config(decoder=True).vocab_size,
    )


def read_config(settings: Settings) -> PreTrainedConfig:
    """The directory's configuration. ModelLoadError or UnsupportedModelError where it is none to serve."""
    folder = Path(settings.model)
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"{settings.model}: no directory with a config.json (models are not downloaded)")
    if not any(folder.glob("*.safetensors")):
        raise ModelLoadError(f"{settings.model}: no *.safetensors; other weight formats are not read")
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=settings.trust_remote_code, local_files_only=True
        )
    except (ValueError, OSError) as error:
        raise ModelLoadError(f"{settings.model}: {error}") from error
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{settings.model}: {config.model_type} is an encoder-decoder")
    prepare(settings, config)
    return config


def read_stage(
    settings: Settings,
    config: PreTrainedConfig,
    place: Place,
    read: Callable[[Settings, PreTrainedConfig, type], PreTrainedModel],
) -> tuple[PreTrainedModel, range]:
    """place's stage, whole on each shard, and its decoder layers. read is read_weights, or like it."""
    if place.pp == 1:
        num_layers = config.get_text_config(decoder=True).num_hidden_layers
        (layers,) = cut_points([1] * num_layers, 1, settings.stage_layers)
        return read(settings, config, AutoModelForCausalLM), layers
    whole = skeleton(settings, config)
    layers = cut_points(Parts(whole).weights(whole), place.pp, settings.stage_layers)[place.stage]
    name_skipped(whole.config, whole)
    module = read(settings, whole.config, stage_class(type(whole), place, layers))
    drop_tied_embedding(module, place)
    return module, layers


def skeleton(settings: Settings, config: PreTrainedConfig) -> PreTrainedModel:
    """The whole model without memory: its class and its parameters' sizes."""
    try:
        with _quiet_transformers(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(config), trust_remote_code=settings.trust_remote_code
            )
    except (ValueError, OSError, KeyError) as error:
        raise ModelLoadError(f"{settings.model}: {error}") from error


def read_weights(settings: Settings, config: PreTrainedConfig, model_class: type) -> PreTrainedModel:
    """transformers builds model_class on meta and fills each of its parameters by one read of its tensor.

    Tensors are views of the files, unless dtype is not the file's or they become dense: then each tensor
    shard holds the whole converted model until it is cut (measured at tp=2: 1.9 times the shard at the peak).
    """
    dtype = "auto" if settings.dtype == "auto" else getattr(torch, settings.dtype)
    with _quiet_transformers(), explained(settings, config), alone(config):
        try:
            module, loading = model_class.from_pretrained(
                settings.model,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=settings.trust_remote_code,
                attn_implementation=plain_attention(config),
                output_loading_info=True,
            )
        except (ValueError, OSError, KeyError) as error:
            raise ModelLoadError(f"{settings.model}: {error}") from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ModelLoadError(f"{settings.model}: the checkpoint lacks {len(missing)} tensors: {missing[:5]}")
    settle(module)
    return module.eval().requires_grad_(False)


def _proven_layout(
    stage: Stage, plain: torch.Tensor, settings: Settings, backend: Backend, grid: Grid
) -> KVLayout:
    """The KV layout with which paged attention gives the plain output: latents where the model has them.

    Where latents do not, on any shard, all shards of the stage cache keys and values instead.
    """
    problem, device = None, plain.device
    num_latent = use_latents(stage.module) if settings.latent_cache == "auto" else 0
    try:
        layout = _kv_layout(stage, settings.block_size, device)
        verify_paged(stage, plain, layout, backend)
    except Exception as error:
        problem = error
    signs = torch.tensor([num_latent, problem is not None], dtype=torch.float32, device=device)
    any_latent, failed = (grid.all_reduce(signs) if grid.place.tp > 1 else signs).tolist()
    if not failed:
        return layout
    if not any_latent:
        raise problem or UnsupportedModelError("another tensor shard cannot serve the model")
    logger.warning(
        "%s: keys and values are cached instead of latents, which take less memory: %s",
        type(stage.module).__name__, problem or "another tensor shard cannot use latents",
    )  # fmt: skip
    drop_latents(stage.module)
    layout = _kv_layout(stage, settings.block_size, device)
    verify_paged(stage, plain, layout, backend)
    return layout


def _kv_layout(stage: Stage, block_size: int, device: torch.device) -> KVLayout:
    """The KV shapes that this stage's layers have on this rank, by a dry forward of two tokens."""
    positions = torch.arange(2, device=device)
    hidden = None
    if not stage.place.is_first_stage:
        hidden = torch.zeros(1, 2, stage.hidden_size, dtype=stage.dtype, device=device)
    shapes = probe_layers(
        stage.module, lambda: stage(positions[None], positions, positions, hidden), stage.layers
    )
    return KVLayout(tuple(shapes), block_size, stage.dtype, stage.first_layer)


def _device(settings: Settings) -> torch.device:
    found = get_accelerator().device_name()
    if settings.device not in ("auto", found):
        raise ModelLoadError(
            f"device {settings.device} was asked for, but DeepSpeed's accelerator is {found}"
        )
    return torch.device(get_accelerator().current_device_name())


def longest(config: PreTrainedConfig, settings: Settings) -> int:
    """max_model_len: what settings want, or as many positions as the model has. ModelLoadError for more."""
    config, wanted = config.get_text_config(decoder=True), settings.max_model_len
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if limit is None and wanted is None:
        raise ModelLoadError("the model states no longest length: give max_model_len")
    if wanted is not None and limit is not None and wanted > limit:
        raise ModelLoadError(f"max_model_len is {wanted}, but the model has {limit} positions")
    return wanted or limit


@contextlib.contextmanager
def _quiet_transformers():
    """Errors only, and a progress bar only where somebody watches."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    if not sys.stderr.isatty():
        log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()
