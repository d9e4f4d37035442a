"""Checkpoints that a Hugging Face method quantised: which are served, and how; others are refused by name.

Some methods' weights become dense while they are read, one by one: what is loaded is a plain model. The
others stay as their package keeps them, with the package's own products; such a model cannot be cut into
tensor shards. Knows config.json's quantization_config; reads no tensor, knows no request. Called by the
loader and the parity probe.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from ds_serve.attention.interface import UnsupportedModelError
from ds_serve.config import Settings
from ds_serve.model.errors import ModelLoadError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """How checkpoints of one quant_method are served.

    package: what pip installs, None: transformers suffices. dense: weights become dense while they are read.
    skips: the setting that names modules which were not quantised, where transformers would guess them.
    """

    package: str | None = None
    dense: bool = False
    skips: str | None = None


METHODS = {
    "torchao": Method("torchao", skips="modules_to_not_convert"),
    "bitsandbytes": Method("bitsandbytes", skips="llm_int8_skip_modules"),
    "compressed-tensors": Method("compressed-tensors"),
    "fp8": Method(dense=True),
    "mxfp4": Method(dense=True),
}


def prepare(settings: Settings, config: PreTrainedConfig) -> None:
    """Makes config load a quantised checkpoint as it is served here. Does nothing for another checkpoint.

    Raises ModelLoadError where it cannot be served, before any weight is read.
    """
    how = _how(config)
    if how is None:
        return
    name = how["quant_method"]
    method = METHODS.get(name)
    if method is None:
        raise ModelLoadError(
            f"{settings.model}: quantised by {name!r}, which is not served here; served are "
            f"{', '.join(METHODS)}, and checkpoints that are not quantised"
        )
    _check_package(settings, name, method)
    _check_dtype(settings, name, config)
    _check_scales(settings, name, how)
    dense = method.dense or (name == "compressed-tensors" and not _activations(how))
    if not dense and settings.tensor_parallel > 1:
        raise ModelLoadError(
            f"{settings.model}: quantised by {name}, whose weights cannot be cut into tensor shards, but "
            f"tensor_parallel is {settings.tensor_parallel}; use tensor_parallel=1"
        )
    if name == "bitsandbytes" and _threshold(how):
        logger.warning(
            "%s: bitsandbytes keeps columns in which a token of the step is above llm_int8_threshold (%g) in "
            "half precision, so an answer can depend on what else is in the batch",
            settings.name, _threshold(how),
        )  # fmt: skip
    config.quantization_config = how | ({"dequantize": True} if dense else {})


def kept(config: PreTrainedConfig) -> str | None:
    """The method whose form the weights keep once they are read; None where they are dense."""
    how = _how(config)
    return how["quant_method"] if how is not None and not how.get("dequantize") else None


def rounds_activations(config: PreTrainedConfig) -> bool:
    """Whether inputs of linears are quantised too: a last bit can then move a product by a whole step."""
    how = _how(config)
    return how is not None and bool(_activations(how) or how.get("load_in_8bit"))


def _how(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The quantization_config as a dict of plain values, None where there is none."""
    places = (config, config.get_text_config(decoder=True))
    how = next(filter(None, (getattr(place, "quantization_config", None) for place in places)), None)
    if how is None:
        return None
    how = dict(how if isinstance(how, dict) else how.to_dict())
    name = how.get("quant_method")
    if how.get("load_in_8bit") or how.get("load_in_4bit"):  # old checkpoints say no more
        name = "bitsandbytes"
    return how | {"quant_method": str(getattr(name, "value", name))}


def _threshold(how: dict[str, Any]) -> float:
    return how.get("llm_int8_threshold", 6.0) if how.get("load_in_8bit") else 0.0


def _check_package(settings: Settings, name: str, method: Method) -> None:
    if method.package and importlib.util.find_spec(method.package.replace("-", "_")) is None:
        raise ModelLoadError(
            f"{settings.model}: quantised by {name}, whose package is not installed: pip install "
            f"{method.package} (or ds_serve[quant])"
        )


def _check_dtype(settings: Settings, name: str, config: PreTrainedConfig) -> None:
    """Scales and what was not quantised keep the checkpoint's dtype, whatever transformers is asked for."""
    made_for = str(config.get_text_config(decoder=True).dtype).removeprefix("torch.")
    if settings.dtype not in ("auto", made_for):
        raise ModelLoadError(
            f"{settings.model}: quantised by {name} for {made_for}, but dtype is {settings.dtype}; "
            "use dtype=auto"
        )


def _activations(how: dict[str, Any]) -> list[dict]:
    """How activations are quantised: one dict for each group of linears that quantises them."""
    if how["quant_method"] == "compressed-tensors":
        groups = (how.get("config_groups") or {}).values()
        keys = ("input_activations", "output_activations")
        return [group[key] for group in groups for key in keys if group.get(key)]
    if how["quant_method"] == "torchao":
        kinds = _dicts(how.get("quant_type"))
        return [kind for kind in kinds if "DynamicActivation" in kind.get("_type", "")]
    return []


def _check_scales(settings: Settings, name: str, how: dict[str, Any]) -> None:
    """An activation's scale must be its token's own or fixed."""
    for scheme in _activations(how):
        of_step = scheme.get("dynamic") is True and scheme.get("strategy") == "tensor"
        if of_step or any(each.get("_type") == "PerTensor" for each in _dicts(scheme)):
            raise ModelLoadError(
                f"{settings.model}: quantised by {name} with one scale for the activations of a step, so an "
                "answer would depend on the requests beside it; quantise with a scale for each token"
            )
    if how.get("kv_cache_scheme"):
        raise ModelLoadError(
            f"{settings.model}: quantised by {name} with a kv_cache_scheme, but keys and values in the cache "
            "are not quantised here; take it out of config.json to serve the weights alone"
        )


def _dicts(value: Any) -> Iterator[dict]:
    """Every dict within value, itself included."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _dicts(each)


def name_skipped(config: PreTrainedConfig, whole: PreTrainedModel) -> None:
    """Puts what was not quantised into config: from one stage, transformers would guess other modules."""
    how = _how(config)
    skips = METHODS[how["quant_method"]].skips if how else None
    if skips and how.get(skips) is None:
        config.quantization_config = how | {skips: sorted(get_keys_to_not_convert(whole))}


def settle(module: PreTrainedModel) -> None:
    """Once the weights are read: takes off what compressed-tensors has left on a model's modules.

    It would make weights dense in the first forward, brings each module's weights to a device, which is
    DeepSpeed's work here, and, with transformers 5.17, rounds dense weights anew in each forward.
    """
    if hasattr(module, "ct_decompress_hook"):
        with alone(module.config):
            module.hf_quantizer.compressor.decompress_model(module)
    if any(hasattr(each, "_original_forward_func") for each in module.modules()):
        from compressed_tensors.offload import remove_dispatch

        remove_dispatch(module)
    for each in module.modules():
        if kept(module.config) is None and each.__dict__.pop("quantization_scheme", None) is not None:
            for name in each._parameters.keys() - {"weight", "bias"}:
                delattr(each, name)
            del each.forward
        elif getattr(each.__dict__.get("forward"), "__func__", None) is type(each).forward:
            del each.forward  # the class's own, left as an attribute


@contextlib.contextmanager
def alone(config: PreTrainedConfig) -> Iterator[None]:
    """Inside it each rank works for itself: compressed-tensors deals modules out to all ranks of the world.

    Ranks of other stages have other modules, and wait for ever.
    """
    how = _how(config)
    if how is None or how["quant_method"] != "compressed-tensors":
        yield
        return
    from compressed_tensors.offload import as_single_threaded

    with as_single_threaded():
        yield


@contextlib.contextmanager
def explained(settings: Settings, config: PreTrainedConfig) -> Iterator[None]:
    """Whatever a quantised model's package raises inside becomes a ModelLoadError that names the method."""
    how = _how(config)
    try:
        yield
    except (ModelLoadError, UnsupportedModelError):
        raise
    except Exception as error:
        if how is None:
            raise
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelLoadError(
            f"{settings.model}: quantised by {how['quant_method']}, which cannot run it here: {said}"
        ) from error
