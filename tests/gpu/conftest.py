"""Where these tests run: on CUDA devices. Without one they are skipped, unless DS_SERVE_TEST_CUDA says

pretended  on tests/model/pretended_cuda.py's device: what of a test's own code needs no kernel runs there
cpu        test_models_cuda.py alone, on the CPU
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "model")]

_pretending = None


def pytest_configure(config: pytest.Config) -> None:
    global _pretending
    if os.environ.get("DS_SERVE_TEST_CUDA") == "pretended":
        from pretended_cuda import pretend

        _pretending = pretend()
        _pretending.__enter__()


def pytest_unconfigure(config: pytest.Config) -> None:
    if _pretending is not None:
        _pretending.__exit__(None, None, None)
