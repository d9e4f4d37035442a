"""One pipeline stage of a model: a callable on packed rows of tokens."""

from __future__ import annotations

import torch
from torch import nn

from ds_serve.parallel.place import Place


class Stage:
    """One pipeline stage of a model: callable on packed rows of tokens."""

    def __init__(self, module: nn.Module, place: Place, first_layer: int, num_layers: int) -> None:
        self.module, self.place = module, place
        self.first_layer, self.num_layers = first_layer, num_layers
        self.hidden_size = module.config.get_text_config(decoder=True).hidden_size
        self.dtype = module.dtype

    def __call__(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        sampled: torch.Tensor,
        hidden: torch.Tensor | None,
    ) -> torch.Tensor:
        """Logits [S, V] on the last stage."""
        output = self.module(
            input_ids=input_ids, position_ids=positions[None], use_cache=False, logits_to_keep=sampled
        )
        return output.logits[0]
