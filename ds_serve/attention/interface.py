"""How Hugging Face models come to call our attention: 'ds_paged' in transformers' AttentionInterface.

install() points a model at a backend and refuses models that would not call it; probe_layers() learns
each layer's KV shape by a dry forward. The model is called with one packed row of all the step's tokens
(input_ids [1, T], position_ids [1, T], use_cache=False) inside context.use_batch(batch); rows are told
apart by the batch alone. This module knows no block and no kernel. Used by model/ and worker/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ds_serve.attention.backends import Backend
from ds_serve.attention.context import current_batch, get_batch
from ds_serve.attention.latent import LatentProjection
from ds_serve.attention.layout import LayerKV
from ds_serve.attention.opaque import number_of

NAME = "ds_paged"
# The same without a mask function, where masks tell nothing that the attention call does not tell too:
# building one waits for the device at each step, to ask whether the positions are of several sequences.
NAME_WITHOUT_MASK = NAME + "_no_mask"
NAME_ADAPTED = NAME + "_adapted"  # of models that model/adapters.py has changed: another mask
LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})

# Keywords that models pass along and that change nothing of what attention computes here: the batch
# says where sequences begin, and positions are in q and k already.
_HARMLESS = frozenset(
    {
        "position_ids",
        "cache_position",
        "position_embeddings",
        "use_cache",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "logits_to_keep",
        "num_items_in_batch",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "deterministic",
    }
)


class UnsupportedModelError(ValueError):
    """The model's attention cannot be served through ds_paged; the message says why."""


@dataclass(frozen=True)
class MaskSpec:
    """Stands in for a mask: the window's or chunk's size, for models that give it to the mask only."""

    local_size: int


@dataclass
class _Recorder:
    """What a dry forward leaves: (layer_idx, shape) of each call, in order, and whether masks mattered."""

    calls: list[tuple[int, LayerKV]] = field(default_factory=list)
    needs_mask: bool = False


_recorder: ContextVar[_Recorder | None] = ContextVar("ds_serve_attention_recorder", default=None)


def paged_mask(
    *args: Any,
    local_size: int | None = None,
    use_vmap: bool = False,
    allow_is_bidirectional_skip: bool | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> MaskSpec | None:
    """transformers' mask function for 'ds_paged': no mask (causal), or a MaskSpec with the local size."""
    if allow_is_bidirectional_skip is not None:
        raise UnsupportedModelError("the model asks for bidirectional attention; ds_paged is causal")
    if use_vmap:
        raise UnsupportedModelError("the model overlays a mask of its own, which ds_paged does not compute")
    if attention_mask is not None and not attention_mask.all():  # BioGPT and others make one of ones
        raise UnsupportedModelError("attention_mask: hides tokens, but the batch says which tokens there are")
    return None if local_size is None else MaskSpec(int(local_size))


def adapted_mask(*args: Any, **kwargs: Any) -> torch.Tensor:
    """As paged_mask, for adapted models: their attention reads no mask, but some handle one as a tensor."""
    if paged_mask(*args, **kwargs) is not None:
        raise UnsupportedModelError("an adapted model asks for a local mask, which its attention ignores")
    return torch.empty(0)


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: MaskSpec | torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [1,H,T,Dk], key [1,Hk,T,Dk], value [1,Hk,T,Dv].

    key_bias is the backend's, and comes from model/adapters.py only. Returns ([1,T,H,Dv], None).
    UnsupportedModelError for any keyword that would change the result and is not computed here.
    """
    _refuse_unknown(module, attention_mask, is_causal, kwargs)
    if query.shape[0] != 1:
        raise ValueError(f"input_ids: must be one packed row, got a batch of {query.shape[0]}")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    latent = LatentProjection.of(module)
    if latent is not None:
        query, key = latent.absorb(query, key)
    window, chunk = _locality(module, attention_mask, sliding_window)
    packed = (
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        None if latent is not None else value[0].transpose(0, 1),
    )
    if torch.compiler.is_compiling():
        width = value.shape[3] if latent is None else latent.rank
        number = _installed(module, "ds_paged_number")
        out = torch.ops.ds_serve_paged.attend(
            *packed, number, scale, window, chunk, softcap, s_aux, key_bias, width
        )
        return (out if latent is None else latent.expand(out))[None], None
    recorder = _recorder.get()
    if recorder is not None:
        shape = LayerKV(key.shape[1], key.shape[3], value.shape[3]) if latent is None else latent.shape
        shape = replace(shape, reach=min((size for size in (window, chunk) if size), default=0))
        recorder.calls.append((module.layer_idx, shape))
        recorder.needs_mask |= (window, chunk) != (sliding_window, None)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    if key.shape[1] == 0:
        batch = current_batch.get()
        if batch is not None:
            batch.num_calls += 1
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    backend: Backend = _installed(module, "ds_paged_backend")
    batch = get_batch()
    batch.num_calls += 1
    out = backend.forward(
        module.layer_idx - batch.layout.first_layer,
        *packed,
        batch,
        scale=scale,
        window=window,
        chunk=chunk,
        softcap=softcap,
        sinks=s_aux,
        key_bias=key_bias,
    )
    return (out if latent is None else latent.expand(out))[None], None


def _installed(module: nn.Module, name: str) -> Any:
    """What install() left on an attention module under name."""
    found = getattr(module, name, None)
    if found is None:
        raise RuntimeError(f"{type(module).__name__} has no attention backend: call install(model, backend)")
    return found


def _refuse_unknown(module: nn.Module, mask: Any, is_causal: bool | None, kwargs: dict[str, Any]) -> None:
    who = type(module).__name__
    if mask is not None and not isinstance(mask, MaskSpec):
        raise UnsupportedModelError(
            f"{who} passes attention_mask ({type(mask).__name__}): ds_paged computes causal masks only"
        )
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(f"{who} passes is_causal=False: ds_paged is causal")
    for name, value in kwargs.items():
        if value is None or value is False or name in _HARMLESS or (name == "dropout" and value == 0):
            continue
        raise UnsupportedModelError(f"{who} passes {name}={_brief(value)}, which ds_paged does not compute")


def _brief(value: Any) -> str:
    return f"tensor{tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:60]


def _locality(
    module: nn.Module, mask: MaskSpec | None, sliding_window: int | None
) -> tuple[int | None, int | None]:
    """(window, chunk) of a layer: from the keyword, or from the mask where a model gives it to that only."""
    if mask is None:
        return sliding_window, None
    if getattr(module, "ds_paged_chunked", False):
        return sliding_window, mask.local_size
    if sliding_window is not None and sliding_window != mask.local_size:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes sliding_window={sliding_window} but a mask of {mask.local_size}"
        )
    return mask.local_size, None


def _is_chunked(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    if types:
        return types[module.layer_idx] == "chunked_attention"
    return (
        getattr(config, "attention_chunk_size", None) is not None
        and getattr(config, "sliding_window", None) is None
    )


def mark_adapted(model: PreTrainedModel) -> None:
    """Tells install() that model's attention calls paged_attention itself."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.ds_paged_adapted = True


def install(model: PreTrainedModel, backend: Backend) -> None:
    """Makes every attention layer of model call backend. UnsupportedModelError where that cannot work.

    Call it again to change the backend. Layers added later need another call.
    """
    _check_supported(model)
    name = NAME_ADAPTED if _is_adapted(model) else NAME
    if _is_adapted(model):
        model.config._attn_implementation = name
    else:
        model.set_attn_implementation(name)
    number = number_of(backend)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation != name:
            raise UnsupportedModelError(
                f"{type(module).__name__} kept attention {module.config._attn_implementation!r} "
                f"when asked for {name!r}"
            )
        if hasattr(module, "layer_idx"):
            module.ds_paged_backend, module.ds_paged_number = backend, number
            module.ds_paged_chunked = _is_chunked(module)


def _is_adapted(module: nn.Module) -> bool:
    return getattr(module, "ds_paged_adapted", False)


def _check_supported(model: PreTrainedModel) -> None:
    who = type(model).__name__
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or _is_adapted(module):
            continue
        if not module._can_set_attn_implementation():
            raise UnsupportedModelError(
                f"{who}: {type(module).__name__} does not call transformers' AttentionInterface, so its "
                "attention cannot be replaced"
            )
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(f"{who} keeps recurrent state, and only attention's KV is paged")
    config = model.config.get_text_config(decoder=True)
    other = sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES)
    if other:
        raise UnsupportedModelError(
            f"{who} has layers of type {', '.join(other)}, which ds_paged cannot serve"
        )


def probe_layers(
    model: PreTrainedModel,
    forward: Callable[[], Any] | None = None,
    layers: Iterable[int] | None = None,
) -> list[LayerKV]:
    """KV shapes on this rank of the given layers (all by default), in order, from a forward of two tokens.

    Nothing is attended to and no KV is written; the weights' contents do not matter. forward runs
    the model on any input; a pipeline stage gives its own, and the layer_idx it holds as layers. Where no
    layer learns anything from a mask, the model builds none from now on.
    UnsupportedModelError unless each of these layers calls ds_paged exactly once, in order.
    """
    config = model.config.get_text_config(decoder=True)
    expected = list(range(config.num_hidden_layers) if layers is None else layers)
    recorder = _Recorder()
    token = _recorder.set(recorder)
    try:
        with torch.no_grad():
            forward() if forward is not None else _dry_forward(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{type(model).__name__}: {error}") from error
    except (AttributeError, TypeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its code fails where attention is {NAME}, which makes no mask: {error}"
        ) from error
    finally:
        _recorder.reset(token)
    found = [index for index, _ in recorder.calls]
    if found != expected:
        raise UnsupportedModelError(
            f"{type(model).__name__}: each decoder layer must call attention once and in order; expected "
            f"layers {expected}, the dry forward called {found}"
        )
    if not recorder.needs_mask and not _is_adapted(model):
        model.set_attn_implementation(NAME_WITHOUT_MASK)
    return [shape for _, shape in recorder.calls]


def _dry_forward(model: PreTrainedModel) -> None:
    device = model.get_input_embeddings().weight.device
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    positions = torch.arange(2, device=device)[None]
    model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1)


ALL_ATTENTION_FUNCTIONS.register(NAME, paged_attention)
ALL_ATTENTION_FUNCTIONS.register(NAME_WITHOUT_MASK, paged_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, paged_mask)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME_ADAPTED, adapted_mask)
