"""A tiny model saved as quantised checkpoints of each method that is served, without calibration data."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import build, save
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

SIZES = {"intermediate_size": 128}  # bitsandbytes' 4 bits on CPU: blocks of 64 that end with a row
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])

# kind: (the package, whether inputs of linears are rounded too, whether weights are dense once they are read)
KINDS = {
    "torchao-int8": ("torchao", False, False),
    "torchao-fp8": ("torchao", False, False),
    "torchao-int8-dynamic": ("torchao", True, False),
    "bitsandbytes-nf4": ("bitsandbytes", False, False),
    "bitsandbytes-int8": ("bitsandbytes", True, False),
    "compressed-tensors-w4a16": ("compressed_tensors", False, True),
    "compressed-tensors-w8a8": ("compressed_tensors", True, False),
    "compressed-tensors-fp8": ("compressed_tensors", True, False),
    "fp8": ("transformers", False, True),
    "mxfp4": ("transformers", False, True),
}


def original(kind: str, dtype: torch.dtype = torch.float32, **sizes) -> PreTrainedModel:
    """The model that quantise(kind) starts from."""
    return build("gpt_oss", dtype) if kind == "mxfp4" else build("llama", dtype, **SIZES | sizes)


def quantise(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **sizes) -> str:
    """Saves a checkpoint of one of KINDS in folder, and gives its name."""
    model = original(kind, dtype, **sizes)
    model.config.dtype = dtype
    if kind.startswith("compressed-tensors"):
        _compressed_tensors(model, kind.removeprefix("compressed-tensors-"), folder)
    elif kind in ("fp8", "mxfp4"):
        (_fp8 if kind == "fp8" else _mxfp4)(model, folder)
    else:
        how = _torchao(kind) if kind.startswith("torchao") else _bitsandbytes(kind)
        dense = save(model, folder / "dense")
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=how).save_pretrained(folder)
    return str(folder)


def _torchao(kind: str) -> TorchAoConfig:
    from torchao import quantization as q

    how = {
        "torchao-int8": q.Int8WeightOnlyConfig,
        "torchao-fp8": q.Float8WeightOnlyConfig,
        "torchao-int8-dynamic": q.Int8DynamicActivationInt8WeightConfig,
    }[kind]
    return TorchAoConfig(how())


def _bitsandbytes(kind: str) -> BitsAndBytesConfig:
    if kind == "bitsandbytes-int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )


def _compressed_tensors(model: PreTrainedModel, kind: str, folder: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    eight = {"num_bits": 8, "type": "float" if kind == "fp8" else "int", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": eight | {"strategy": "channel"},
        "input_activations": eight | {"strategy": "token", "dynamic": True},
    }
    if kind == "w4a16":
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
        scheme = {"targets": ["Linear"], "weights": weights}
    how = QuantizationConfig(config_groups={"linears": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, how)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        groups = module.weight.data.unflatten(1, (module.weight_scale.shape[1], -1))
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), module.quantization_scheme.weights)
        module.weight_scale.data = scale.to(module.weight.dtype)
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


def _fp8(model: PreTrainedModel, folder: Path) -> None:
    """Blocks of 32 x 32 of each projection, with a scale."""
    tensors = {}
    for name, weight in model.state_dict().items():
        tensors[name] = weight.clone()
        if name.endswith("_proj.weight"):
            blocks = weight.float().unflatten(1, (-1, 32)).unflatten(0, (-1, 32))
            scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
            tensors[name] = (blocks / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = scale
    _save(model, tensors, {"quant_method": "fp8", "weight_block_size": [32, 32]}, folder)


def _mxfp4(model: PreTrainedModel, folder: Path) -> None:
    """Rows of 32 numbers of each expert, two in a byte, with a power of two."""
    tensors = {}
    for name, weight in model.state_dict().items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = weight.clone()
            continue
        rows = weight.transpose(1, 2).float().unflatten(2, (-1, 32))
        power = rows.abs().amax(-1).log2().floor() - 2
        codes = (rows / power.exp2()[..., None])[..., None].sub(FP4).abs().argmin(-1).to(torch.uint8)
        tensors[name + "_blocks"] = codes[..., 0::2] | codes[..., 1::2] << 4
        tensors[name + "_scales"] = (power + 127).to(torch.uint8)
    _save(model, tensors, {"quant_method": "mxfp4"}, folder)


def _save(model: PreTrainedModel, tensors: dict, how: dict, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    edit_config(folder, quantization_config=how)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def largest_gap(model: PreTrainedModel, prompts: list[list[int]], outputs: list[list[int]]) -> float:
    """How far below model's best logit an output's token is at worst, as a share of the largest logit.

    0: model would choose the same tokens. Where activations are rounded to 8 bits, a sum in another order can
    move one by a step, so that transformers' own attention functions choose different tokens now and then.
    """
    gaps = []
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        gaps.append((logits.amax(-1) - chosen).max() / logits.abs().max())
    return float(max(gaps))


def edit_config(folder: Path | str, **fields) -> None:
    """Replaces fields of the directory's config.json."""
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
