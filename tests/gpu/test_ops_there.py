"""The C++ ops on the machine with the GPU: a refusal is a Python exception there too, not the process's end.

It was seen to end the process there and nowhere else (Python 3.12, torch 2.11). So each refusal runs in a
process of its own, and where one dies the test tells the compiler, the libraries and the stack.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("for the machine with a CUDA device", allow_module_level=True)

BEGIN = """
import faulthandler; faulthandler.enable()
import torch
from ds_serve.attention.builder import load_ops
assert load_ops() is not None
ops = torch.ops.ds_serve
"""
PACKED = """
if not ops.has_avx512_bf16(): raise ValueError("no AVX512-BF16 here")
x, w = torch.randn(3, 32).bfloat16(), ops.pack_weight(torch.randn(64, 32).bfloat16())
"""
PAGED = """
q, k, slab = torch.zeros(1, 2, 16), torch.zeros(1, 1, 16), torch.zeros(2, 512)
def attend(tables):
    slots, starts = torch.zeros(1, dtype=torch.long), torch.tensor([0, 1], dtype=torch.int32)
    batch = slots, starts, starts[1:], tables
    ops.paged_attention(q, k, k, slab, 0, 256, 16, *batch, 1.0, 0, 0, 0.0, None, None)
"""
REFUSED = {
    "torch's own": "torch.zeros(2, 3).unflatten(1, (2, 2))",
    "packed for others": PACKED + "ops.linear_packed(x, w, 65, None)",
    "not bfloat16": PACKED + "ops.linear_packed(x.float(), w, 64, None)",
    "a bias too short": PACKED + "ops.linear_packed(x, w, 64, torch.zeros(63).bfloat16())",
    "a block that is none": PAGED + "attend(torch.tensor([[9]], dtype=torch.int32))",
}
EVIDENCE = """
c++ --version | head -1; ldd --version | head -1
root=$(python3 -c "from torch.utils import cpp_extension; print(cpp_extension.get_default_build_root())")
so=$(ls -t $root/*/ds_serve_*/*.so | head -1)
ldd $so | grep -E "stdc|gcc_s|gomp"
ldd $(python3 -c "import torch; print(torch._C.__file__)") | grep -E "stdc|gcc_s"
env | grep -E "^LD_|^CXX|^CC="
"""


@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_is_an_exception(what):
    done = subprocess.run([sys.executable, "-c", BEGIN + REFUSED[what]], capture_output=True, text=True)
    if done.returncode < 0:
        found = subprocess.run(["bash", "-c", EVIDENCE], capture_output=True, text=True)
        pytest.fail(f"ended by signal {-done.returncode}:\n{done.stderr[-3000:]}\n{found.stdout}")
    assert done.returncode == 1 and "Error: " in done.stderr, done.stderr[-1000:]
