"""Serving of Hugging Face causal language models on DeepSpeed. Importing the package imports no torch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ds_serve.messages import SamplingParams

if TYPE_CHECKING:
    from ds_serve.generation.pipeline import TextGenerationPipeline

__version__ = "0.1.0"
__all__ = ["SamplingParams", "__version__", "pipeline"]

# At its import DeepSpeed warns where the CPU is the only accelerator; ds_serve names its device itself.
logging.getLogger("DeepSpeed").addFilter(lambda record: "unable to detect" not in record.getMessage())
# transformers imports torchao where it is installed, which warns of what it lacks for CUDA and of old calls.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").addFilter(
    lambda record: "register_constant" not in record.getMessage()
)


def pipeline(task: str = "text-generation", model: Any = None, **arguments: Any) -> TextGenerationPipeline:
    """A pipeline like transformers.pipeline, run by ds_serve's engine: see generation/pipeline.py."""
    from ds_serve.generation.pipeline import pipeline as build

    return build(task, model, **arguments)
