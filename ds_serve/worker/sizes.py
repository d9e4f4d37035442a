"""How large the KV memory is and how it is cut: groups of layers, blocks of both tiers.

All ranks call these together where they take a grid: groups are the same on every rank, and the rank with the
least memory sets the number of blocks. Called by the worker, and by planning.py, which has no ranks.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import psutil

from ds_serve.attention.layout import KVLayout
from ds_serve.config import Settings
from ds_serve.model.errors import ModelLoadError
from ds_serve.model.loader import LoadedModel
from ds_serve.parallel.grid import Grid
from ds_serve.windows import Grouping, Windows, group_layers
from ds_serve.worker.memory import Room

logger = logging.getLogger(__name__)


def cut_groups(model: LoadedModel, settings: Settings, grid: Grid) -> tuple[KVLayout, Windows]:
    """model.layout with the groups of its layers, and the reach of all groups. A collective."""
    layout, stage = model.layout, grid.place.stage
    found = [[-1.0] * _num_layers(model) for _ in range(3)]
    for layer, kv in enumerate(layout.layers, layout.first_layer):
        size = kv.num_kv_heads * (kv.k_dim + (0 if kv.v_in_k else kv.v_dim))
        for each, value in zip(found, (kv.reach, size, stage), strict=True):
            each[layer] = value
    reaches, sizes, stages = ([int(value) for value in grid.maximum(each)] for each in found)
    if settings.host_cache and any(reaches):
        logger.info("a host cache keeps whole prefixes: blocks that left a sliding window are kept too")
    grouping = grouping_of(reaches, sizes, stages, settings, model.max_model_len)
    here = range(layout.first_layer, layout.first_layer + len(layout.layers))
    layout = replace(layout, groups=tuple(grouping.groups[layer] for layer in here))
    return layout, windows_of(grouping, settings)


def grouping_of(
    reaches: list[int], sizes: list[int], stages: list[int], settings: Settings, max_model_len: int
) -> Grouping:
    """The groups of all layers of the model, as windows.group_layers has them and the settings allow."""
    if settings.host_cache or settings.window_blocks == "off":
        reaches = [0] * len(reaches)
    return group_layers(reaches, sizes, stages, settings.max_model_len or max_model_len)


def windows_of(grouping: Grouping, settings: Settings) -> Windows:
    return Windows(grouping.reaches, settings.block_size, settings.tokens_in_flight)


def _num_layers(model: LoadedModel) -> int:
    return model.config.get_text_config(decoder=True).num_hidden_layers


def num_blocks(layout: KVLayout, windows: Windows, settings: Settings, room: Room) -> int:
    """How many blocks this rank holds: as many as the settings say, or as its room does."""
    if settings.num_blocks is not None:
        return settings.num_blocks
    memory = settings.kv_cache_memory
    if memory is None:
        # More than twice what a full batch of the longest requests fills would only slow the start.
        most = 2 * settings.max_num_seqs * windows.most_blocks(room.longest)
        memory = min(room.bytes, most * layout.bytes_per_block)
    blocks = memory // layout.bytes_per_block
    if blocks < 1:
        raise ModelLoadError(
            f"kv_cache_memory of {memory} bytes holds no block of {layout.bytes_per_block} bytes"
        )
    return blocks


def num_host_blocks(layout: KVLayout, settings: Settings, ranks_here: int) -> int:
    """How many blocks this rank's share of host_cache holds."""
    if not settings.host_cache:
        return 0
    if not settings.prefix_caching:
        raise ModelLoadError("host_cache keeps prefixes, and prefix_caching is off: give one or the other")
    share = settings.host_cache // settings.world_size
    available = psutil.virtual_memory().available
    if share * ranks_here > available:
        raise ModelLoadError(
            f"host_cache of {settings.host_cache} bytes is {share} for each of the {ranks_here} ranks here, "
            f"and this machine has {available} bytes available: give less"
        )
    return share // max(1, layout.bytes_per_block)
