"""Pipeline stages: how a model is cut into them, and one of them as a callable on packed rows of tokens.

A stage is transformers' own module in which the layers of other stages are OtherLayer, without parameters,
so that indices stay the model's; its forward is left by an exception where the next stage begins. stage_class
gives a subclass that cuts itself while it is built, on the meta device: from_pretrained then reads this
stage's tensors only, and still converts checkpoints as the model wants them. Knows no process group and no
step. The loader builds stages, the worker calls them.
"""

from __future__ import annotations

import contextlib
import inspect
from itertools import accumulate, pairwise

import torch
from deepspeed.runtime.utils import partition_balanced
from torch import nn
from transformers import PreTrainedModel

from ds_serve.attention.interface import UnsupportedModelError
from ds_serve.model.errors import ModelLoadError
from ds_serve.parallel.place import Place


class Elsewhere(nn.Module):
    """Stands for a module of another stage, which must not run on this one."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args, **kwargs):
        raise UnsupportedModelError(
            f"the model cannot be cut into stages: {self.name}, which is on one stage only, runs on others "
            "too; use pipeline_parallel=1"
        )


class OtherEmbedding(Elsewhere):
    """Stands for an embedding of the first stage. Not a number, so that no other use of it goes unseen."""

    def __init__(self, name: str, embedding: nn.Embedding) -> None:
        super().__init__(name)
        # Without rows: some models look up the weight's device.
        self.register_buffer(
            "weight", embedding.weight.new_empty(0, embedding.embedding_dim), persistent=False
        )

    def forward(self, *args, **kwargs) -> torch.Tensor:
        ids = next(each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor))
        return self.weight.new_full((), torch.nan).expand(*ids.shape, self.weight.shape[1])


class OtherNorm(Elsewhere):
    """Stands for a norm of the first stage's embeddings (BLOOM): hands on what stands for these."""

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings


class OtherLayer(Elsewhere):
    """Stands for a decoder layer of another stage: hands hidden states on, or leaves the model with them.

    Some models take a layer's output as it is, some its first part. This one always gives a tuple and takes
    either; what a layer of this stage gets is put there by Stage.
    """

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__(name)
        for attribute, value in vars(layer).items():  # such as attention_type, which the model's loop reads
            if isinstance(value, str | int | float | None) and not attribute.startswith("_"):
                setattr(self, attribute, value)
        self.leaves = False

    def forward(self, hidden_states, *args, **kwargs) -> tuple:
        hidden = hidden_states[0] if isinstance(hidden_states, tuple) else hidden_states
        if self.leaves:
            raise _Leave(hidden)
        return hidden, None, None


class _Leave(Exception):
    """Carries a stage's hidden states out of the model's forward."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


# -- where the cuts are ------------------------------------------------------------------------


class Parts:
    """Names of a causal LM's modules: its stack of decoder layers, and what is before and after it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.stack = stack_name(model)
        names = {id(module): name for name, module in model.named_modules()}
        beside = list(model.get_submodule(self.stack.rpartition(".")[0]).children())
        following = beside[beside.index(model.get_submodule(self.stack)) + 1 :]
        embeddings = [model.get_input_embeddings(), *(m for m in beside if isinstance(m, nn.Embedding))]
        embeddings += [m for m in beside if isinstance(m, nn.LayerNorm) and "embed" in names[id(m)]]
        rest = [m for m in (*following, model.get_output_embeddings()) if m is not None and _size(m)]
        self.before = sorted({names[id(module)] for module in embeddings})
        self.after = sorted({names[id(module)] for module in rest} - {*self.before})

    def weights(self, model: PreTrainedModel) -> list[int]:
        """Parameters of each layer; what is before or after the stack counts to its first or last layer."""
        count = [_size(layer) for layer in model.get_submodule(self.stack)]
        count[0] += sum(_size(model.get_submodule(name)) for name in self.before)
        count[-1] += sum(_size(model.get_submodule(name)) for name in self.after)
        return count


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def stack_name(model: PreTrainedModel) -> str:
    """Name of the ModuleList of the model's decoder layers. UnsupportedModelError where there is none.

    It lies in the decoder: a tower of images may have as many layers.
    """
    count, decoder = model.config.get_text_config(decoder=True).num_hidden_layers, model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and id(module) in inside:
            return name
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of {count} decoder layers to cut into stages; "
        "use pipeline_parallel=1"
    )


def cut_points(weights: list[int], stages: int, wanted: list[int] | None) -> list[range]:
    """Each stage's decoder layers: as many as wanted says, else balanced by weights (one for each layer).

    ModelLoadError where stages and layers do not fit.
    """
    layers = len(weights)
    if wanted is not None:
        if sum(wanted) != layers:
            given = ",".join(map(str, wanted))
            raise ModelLoadError(f"stage_layers {given} are {sum(wanted)} layers, but the model has {layers}")
        ends = [0, *accumulate(wanted)]
    else:
        if stages > layers:
            raise ModelLoadError(f"pipeline_parallel is {stages}, but the model has only {layers} layers")
        ends = [int(end) for end in partition_balanced(weights, stages)]
    return [range(start, end) for start, end in pairwise(ends)]


# -- cutting -----------------------------------------------------------------------------------


def stage_class(model_class: type[PreTrainedModel], place: Place, layers: range) -> type[PreTrainedModel]:
    """A subclass of model_class, by the same name, that holds only what place's stage needs."""

    class Cut(model_class):
        def __init__(self, config, *args, **kwargs) -> None:
            super().__init__(config, *args, **kwargs)
            _cut(self, place, layers)

    for attribute in ("__name__", "__qualname__", "__module__"):
        setattr(Cut, attribute, getattr(model_class, attribute))
    return Cut


def _cut(model: PreTrainedModel, place: Place, layers: range) -> None:
    parts = Parts(model)
    stack = model.get_submodule(parts.stack)
    for index, layer in enumerate(stack):
        if index not in layers:
            stack[index] = OtherLayer(f"{parts.stack}.{index}", layer)
    if not place.is_first_stage:
        tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        for name in parts.before:
            if not (place.is_last_stage and f"{name}.weight" in tied):  # the head's weight is read through it
                module = model.get_submodule(name)
                is_norm = isinstance(module, nn.LayerNorm)
                model.set_submodule(name, OtherNorm(name) if is_norm else OtherEmbedding(name, module))
    if not place.is_last_stage:
        stack[layers.stop].leaves = True
        for name in parts.after:
            model.set_submodule(name, Elsewhere(name))
    held = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    model.all_tied_weights_keys = {
        target: source for target, source in model.all_tied_weights_keys.items() if {target, source} <= held
    }


def drop_tied_embedding(model: PreTrainedModel, place: Place) -> None:
    """Once a later stage is loaded: its tied embedding was there for the head's weight only."""
    if place.is_first_stage:
        return
    names = [name for name, module in model.named_modules() if module is model.get_input_embeddings()]
    embedding = model.get_submodule(names[0])
    if not isinstance(embedding, Elsewhere):
        model.set_submodule(names[0], OtherEmbedding(names[0], embedding))
        model.all_tied_weights_keys = {}


# -- running -----------------------------------------------------------------------------------


class Stage:
    """One pipeline stage of a model: callable on packed rows of tokens.

    module is the cut model, whose decoder layers first_layer .. first_layer + num_layers - 1 are here.
    """

    def __init__(self, module: PreTrainedModel, place: Place, layers: range) -> None:
        self.module, self.place = module, place
        self.first_layer, self.num_layers = layers.start, len(layers)
        self.hidden_size = module.config.get_text_config(decoder=True).hidden_size
        self.dtype = module.dtype
        self._stack = None if place.is_first_stage else stack_name(module)
        # Whisper's decoder, say, takes any keyword, does nothing with this one and gives all tokens' logits.
        self._keeps_logits = "logits_to_keep" in inspect.signature(module.forward).parameters

    @property
    def layers(self) -> range:
        """Model-wide indices of this stage's decoder layers."""
        return range(self.first_layer, self.first_layer + self.num_layers)

    def __call__(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        sampled: torch.Tensor,
        hidden: torch.Tensor | None,
    ) -> torch.Tensor:
        """input_ids int64[1, T], positions int64[T], sampled int64[S], hidden [1, T, H] of the stage before.

        Logits [S, V] of the tokens named by sampled on the last stage, hidden states [1, T, H] on the others.
        The first stage takes no hidden. Call it inside use_batch(batch).
        """
        positions = _like_new(positions)
        kept = {"logits_to_keep": sampled} if self._keeps_logits else {}
        with self._given(hidden):
            try:
                output = self.module(
                    input_ids=input_ids, position_ids=positions[None], use_cache=False, **kept
                )
            except _Leave as leave:
                return leave.hidden
        return output.logits[0] if kept else output.logits[0, sampled]

    def _given(self, hidden: torch.Tensor | None):
        """Inside it, this stage's first layer gets hidden, whatever the model's loop gives it."""
        if self._stack is None:
            return contextlib.nullcontext()
        if hidden is None:
            raise ValueError(f"hidden: stage {self.place.stage} needs the hidden states of the stage before")
        hidden = _like_new(hidden[0])[None]

        def give(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (hidden, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": hidden}

        # Not for good: a layer with a hook is not one that injection replaces.
        first = self.module.get_submodule(self._stack)[self.first_layer]
        return first.register_forward_pre_hook(give, with_kwargs=True)


def _like_new(tensor: torch.Tensor) -> torch.Tensor:
    """tensor as inference mode makes tensors. Compiled layers tell apart those that were made before, such as
    a CUDA graph's, or are parts of others, and would have to be compiled for them again."""
    if torch.is_inference_mode_enabled() and (not tensor.is_inference() or tensor.storage_offset()):
        return tensor.clone()
    return tensor
