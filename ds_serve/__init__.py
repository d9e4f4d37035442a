"""Serving of Hugging Face causal language models on DeepSpeed.

`ds_serve.pipeline` (a module that can be called, see there) is loaded at first use: importing the
package itself imports no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from ds_serve.messages import SamplingParams

__version__ = "0.1.0"
__all__ = ["SamplingParams", "__version__", "pipeline"]


def __getattr__(name: str) -> Any:
    if name == "pipeline":
        return importlib.import_module("ds_serve.pipeline")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
