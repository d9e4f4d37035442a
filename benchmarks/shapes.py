"""Random-weight models of real shapes, made where a benchmark names one in place of a directory."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SHAPES = {
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
        "max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
}  # fmt: skip


def directory(model: str, dtype: torch.dtype = torch.bfloat16) -> str:
    """model itself if it is a directory, else a new one of the named shape, kept in the temporary folder."""
    if model not in SHAPES:
        if not (Path(model) / "config.json").is_file():
            raise SystemExit(f"{model}: neither a model directory nor one of {', '.join(SHAPES)}")
        return model
    folder = Path(tempfile.gettempdir()) / f"ds-serve-{model}-{str(dtype).removeprefix('torch.')}"
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        shape = dict(SHAPES[model])
        config = AutoConfig.for_model(shape.pop("model_type"), **shape)
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return str(folder)
