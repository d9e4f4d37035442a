"""Grammars and prompts' log-probabilities on a CUDA device: the tests of the CPU, run there.

Run it where there is a GPU: python -m pytest tests/gpu
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

# Their engines run on DeepSpeed's accelerator, which is CUDA here.
from test_constrained_engine import *  # noqa: F403
from test_prompt_logprobs import *  # noqa: F403


def test_the_accelerator_is_cuda():
    from deepspeed.accelerator import get_accelerator

    assert get_accelerator().device_name() == "cuda"
