"""What is begun before a model's weights are read, to run beside that: the builds of attention's kernels.

It reads of the configuration what attention kernels are compiled for. A guess that is wrong costs a build
that nobody uses, or one at first use. Knows no weights. Called by the loader.
"""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedConfig

from ds_serve.config import Settings

logger = logging.getLogger(__name__)


def begin_builds(settings: Settings, config: PreTrainedConfig, device: torch.device) -> None:
    """Starts the builds of FlashInfer's kernels, where attention is going to use them; returns at once."""
    if device.type != "cuda" or settings.attention not in ("auto", "flashinfer"):
        return
    from ds_serve.attention.flashinfer import start_builds  # imports triton, which takes its time

    text = config.get_text_config(decoder=True)
    dtype = text.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    if dtype is None:
        return
    try:
        for dim, group, windowed, capped in kernel_shapes(text):
            start_builds(device, dtype, dim, group, windowed, capped)
    except Exception as error:  # what cannot be built will be said where it is used
        logger.info("attention's kernels could not be built ahead: %s", error)


def kernel_shapes(config: PreTrainedConfig) -> list[tuple[int, int, bool, bool]]:
    """(columns of a head, query heads a KV head, whether windowed, whether soft-capped) of the layers."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads or getattr(config, "kv_lora_rank", None):
        return []
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    group = max(1, heads // (getattr(config, "num_key_value_heads", None) or heads))
    capped = bool(getattr(config, "attn_logit_softcapping", None))
    types = getattr(config, "layer_types", None)
    if types is None:
        window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        types = ["sliding_attention" if window else "full_attention"]
    windowed = {kind == "sliding_attention" for kind in types if kind != "chunked_attention"}
    return [(dim, group, each, capped) for each in sorted(windowed)]
