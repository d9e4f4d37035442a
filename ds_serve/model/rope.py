"""Makes rotary embeddings independent of what else is in the batch.

transformers' `longrope` and `dynamic` scalings choose frequencies by the largest position of a forward. Rows
of different requests share a forward here, so the choice is made once, at load. Called by the loader.
"""

from __future__ import annotations

import logging

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ds_serve.attention.interface import UnsupportedModelError

logger = logging.getLogger(__name__)


def settle_rope(model: nn.Module, max_model_len: int) -> None:
    """longrope: freeze the long or the short factors by max_model_len. dynamic: UnsupportedModelError."""
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        types = set(rope_type.values()) if isinstance(rope_type, dict) else {rope_type}
        if any("dynamic" in (each or "") for each in types):
            raise UnsupportedModelError(
                "rope_type 'dynamic' changes every request's positions with the longest one in the batch"
            )
        if "longrope" in types:
            if isinstance(rope_type, dict):
                raise UnsupportedModelError("longrope by layer type is not supported")
            _freeze_longrope(module, max_model_len)


def _freeze_longrope(module: nn.Module, max_model_len: int) -> None:
    short_len = module.config.rope_parameters["original_max_position_embeddings"]
    frequencies, scaling = ROPE_INIT_FUNCTIONS["longrope"](
        module.config, module.inv_freq.device, seq_len=max_model_len
    )
    module.inv_freq.copy_(frequencies)
    module.attention_scaling = scaling
    module.rope_type = "frozen"  # transformers updates 'longrope' and 'dynamic' only
    which = "long" if max_model_len > short_len else "short"
    logger.warning(
        "longrope: the %s factors are used for every request (max_model_len %d, original length %d); "
        "transformers would switch at the original length",
        which, max_model_len, short_len,
    )  # fmt: skip
