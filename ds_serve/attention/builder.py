"""Compiles ds_serve/csrc by DeepSpeed's op builder at first use and loads it once a process.

All .cpp files there become one library, which registers its ops as torch.ops.ds_serve.*. Where it
cannot be built there is one warning that says why, and callers use plain PyTorch instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from deepspeed.ops.op_builder.cpu.builder import CPUOpBuilder

CSRC = Path(__file__).resolve().parent.parent / "csrc"


class DsServeOpBuilder(CPUOpBuilder):
    """The op library's sources and flags, in the form DeepSpeed's builder wants."""

    BUILD_VAR = "DS_BUILD_DS_SERVE"
    NAME = "ds_serve"

    def __init__(self) -> None:
        super().__init__(name=f"{self.NAME}_{_fingerprint()}")

    def absolute_name(self) -> str:
        return f"ds_serve.ops.{self.name}"

    def sources(self) -> list[str]:
        return [str(path) for path in sorted(CSRC.glob("*.cpp"))]

    def include_paths(self) -> list[str]:
        return [str(CSRC)]

    def cxx_args(self) -> list[str]:
        return ["-O3", "-std=c++20", "-fopenmp", self.cpu_arch()]


@cache
def _fingerprint() -> str:
    """Changes with the sources, torch, the processor and the Python: each gets a library of its own."""
    digest = hashlib.sha256()
    for path in sorted([*CSRC.glob("*.cpp"), *CSRC.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(f"{torch.__version__} {sys.version} {_cpu_flags()}".encode())
    return digest.hexdigest()[:12]


def _cpu_flags() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return ""


@contextlib.contextmanager
def _build_alone(name: str) -> Iterator[None]:
    """Holds a lock of the operating system's around the build, which a killed process cannot leave
    behind; so torch's own lock file, if there is one, is stale and is removed."""
    from torch.utils.cpp_extension import _get_build_directory

    directory = Path(_get_build_directory(name, verbose=False))
    with open(directory / "ds_serve.flock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        (directory / "lock").unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def _tools_on_path() -> Iterator[None]:
    """ninja lies beside the interpreter, which need not be on PATH."""
    before = os.environ.get("PATH")
    os.environ["PATH"] = os.pathsep.join(filter(None, [os.path.dirname(sys.executable), before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = before


@cache
def load_ops() -> ModuleType | None:
    """The op library, built if needed (about half a minute the first time), or None after one warning."""
    try:
        builder = DsServeOpBuilder()
        chatter = io.StringIO()
        with _tools_on_path(), _build_alone(builder.name), contextlib.redirect_stdout(chatter):
            return builder.load(verbose=False)
    except Exception as error:  # whatever the compiler, ninja or the loader raise: say it, go on without
        warnings.warn(
            f"ds_serve's C++ ops could not be built, plain PyTorch is used instead (slower): {_summary(error)}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _summary(error: Exception) -> str:
    """The error's first line, with the compiler's first complaint if there is one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    complaint = next((line for line in lines if "error:" in line), "")
    cause = f" ({error.__cause__})" if error.__cause__ and not complaint else ""
    return f"{type(error).__name__}: {first}{cause}" + (f": {complaint}" if complaint != first else "")
