"""The original of a served model: transformers' own modules in eager attention, a decoder layer at a time.

Each layer is a pipeline stage of its own (stage.py), so from_pretrained reads its tensors only, and what is
held is one layer, with the embeddings or the head where it is the first or the last. A model that cannot be
cut so is held whole. Knows no batch, no paging, no other rank. Called by worker/certify.py and checking.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn

from ds_serve.attention.interface import UnsupportedModelError
from ds_serve.config import Settings
from ds_serve.model import quantised
from ds_serve.model.errors import ModelLoadError
from ds_serve.model.loader import longest, read_config, read_weights, skeleton
from ds_serve.model.parity import has_experts, plain_output
from ds_serve.model.rope import settle_rope
from ds_serve.model.stage import Stage, drop_tied_embedding, stack_name, stage_class
from ds_serve.parallel.place import Place

# By decoder layer; [T, ...]: a token's hidden state, however a model shapes it.
Hidden = dict[int, torch.Tensor]


@dataclass
class Seen:
    """What went into decoder layers and came out of them, on their device, and the logits [T, V] at the end.

    logits is None where the last layer is not among them.
    """

    inputs: Hidden = field(default_factory=dict)
    outputs: Hidden = field(default_factory=dict)
    logits: torch.Tensor | None = None


def watch(
    module: nn.Module, layers: range, seen: Seen, given: Hidden | None = None, left: Hidden | None = None
) -> ExitStack:
    """Inside it, seen gets what each of the layers takes and gives; given replaces what they take, and left
    what the model gets of them.

    A layer that runs again replaces what it left before. Works for fused layers as for transformers' own.
    """
    stack, hooks = module.get_submodule(stack_name(module)), ExitStack()
    for index in layers:

        def before(_, args: tuple, kwargs: dict, index: int = index) -> tuple[tuple, dict]:
            if given and index in given:
                hidden = given[index].movedim(0, -2)
            else:
                hidden = args[0] if args else kwargs["hidden_states"]
            # A layer may add to its input in place.
            seen.inputs[index] = hidden.movedim(-2, 0).clone()
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        def after(_, args: tuple, output, index: int = index):
            hidden = output[0] if isinstance(output, tuple) else output
            seen.outputs[index] = hidden.movedim(-2, 0).clone()
            if left and index in left:
                hidden = left[index].movedim(0, -2)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        hooks.enter_context(stack[index].register_forward_pre_hook(before, with_kwargs=True))
        hooks.enter_context(stack[index].register_forward_hook(after))
    return hooks


class Part:
    """Some decoder layers of the original, in one dtype: all that is in memory of it."""

    def __init__(self, stage: Stage, device: torch.device) -> None:
        self.layers, self.device, self.dtype = stage.layers, device, stage.dtype
        self._stage = stage
        self.has_experts = has_experts(stage.module)

    @torch.inference_mode()
    def run(self, sequences: list[torch.Tensor], given: Hidden, left: Hidden | None = None) -> Seen:
        """Each of the sequences, int64[T], by itself; what is seen has all their tokens, one after another.

        given holds what layers are to take, left what is to go on in place of what they give, of all tokens
        too. The first layer must be in given unless it is the model's first.
        """
        parts, start = [], 0
        for ids in sequences:
            own, end = [], start + len(ids)
            for hidden in (given, left or {}):
                own.append({index: self._in_dtype(each[start:end]) for index, each in hidden.items()})
            parts.append(self._run(ids.to(self.device), *own))
            start = end
        return Seen(
            inputs={index: torch.cat([each.inputs[index] for each in parts]) for index in self.layers},
            outputs={index: torch.cat([each.outputs[index] for each in parts]) for index in self.layers},
            logits=torch.cat([each.logits for each in parts]) if self._stage.place.is_last_stage else None,
        )

    def _in_dtype(self, hidden: torch.Tensor) -> torch.Tensor:
        """Some models in half precision hand on float32; the original in float32 knows nothing else."""
        return hidden.float() if self.dtype == torch.float32 else hidden

    def _run(self, ids: torch.Tensor, given: Hidden, left: Hidden) -> Seen:
        seen, positions = Seen(), torch.arange(len(ids), device=self.device)
        first = None
        if not self._stage.place.is_first_stage:
            first = given[self.layers.start].movedim(0, -2)
        with watch(self._stage.module, self.layers, seen, given, left):
            out = self._stage(ids[None], positions, positions, first)
        if self._stage.place.is_last_stage:
            seen.logits = out
        return seen


class Original:
    """The model of settings as transformers computes it in dtype.

    streamed: a layer at a time; otherwise whole, where it cannot be cut. kinds are the layers' classes,
    has_experts is whether any of them has experts.
    """

    def __init__(self, settings: Settings, dtype: torch.dtype, device: torch.device) -> None:
        self._settings, self._dtype, self._device = settings, dtype, device
        model = skeleton(settings, read_config(settings))
        self._class, self._config = type(model), model.config
        if (method := quantised.kept(model.config)) is not None:
            raise ModelLoadError(
                f"{settings.model}: its weights stay as {method} quantised them, and there is no original in "
                "float32 to compare with; serve it without check"
            )
        self.kinds = [type(layer).__name__ for layer in model.get_submodule(stack_name(model))]
        self.has_experts = has_experts(model)
        self.streamed = len(self.kinds) > 1 and self._can_be_cut()

    def in_dtype(self, dtype: torch.dtype) -> Original:
        """The same original in another dtype."""
        other = copy.copy(self)
        other._dtype = dtype
        return other

    def parts(self, layers: range) -> Iterator[Part]:
        """The given layers, one after another, or the whole model at once."""
        if not self.streamed:
            yield self._part(range(len(self.kinds)), Place())
            return
        for index in layers:
            yield self._part(range(index, index + 1), self._place(index))

    def _place(self, index: int) -> Place:
        return Place(index, tp=1, pp=len(self.kinds))

    def _can_be_cut(self) -> bool:
        """Whether the first layer runs without the head, and the last one on hidden states alone."""
        try:
            for index in (0, len(self.kinds) - 1):
                plain_output(self._read(range(index, index + 1), self._place(index)), self._device)
        except UnsupportedModelError:
            return False
        return True

    def _part(self, layers: range, place: Place) -> Part:
        return Part(self._read(layers, place), self._device)

    def _read(self, layers: range, place: Place) -> Stage:
        model_class = stage_class(self._class, place, layers) if place.pp > 1 else self._class
        dtype = str(self._dtype).removeprefix("torch.")
        if getattr(self._config, "quantization_config", None) is not None:
            dtype = "auto"  # it is read in the checkpoint's
        settings = self._settings.model_copy(update={"dtype": dtype})
        module = read_weights(settings, self._config, model_class).to(self._device)
        if self._dtype == torch.float32:
            module.float()
        drop_tied_embedding(module, place)
        settle_rope(module, longest(self._config, self._settings))
        return Stage(module, place, layers)
