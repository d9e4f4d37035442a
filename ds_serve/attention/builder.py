"""Compiles ds_serve/csrc by DeepSpeed's op builder at first use and loads it once a process.

All .cpp files there become one library, which registers its ops as torch.ops.ds_serve.*. It lies in
torch's extension directory under a name that changes with the sources, so that a changed source means
a new library. Where it cannot be built there is one warning that says why, and load_ops() gives None:
callers then use plain PyTorch. Knows no op.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from deepspeed.ops.op_builder.cpu.builder import CPUOpBuilder

CSRC = Path(__file__).resolve().parent.parent / "csrc"
FLAGS = ("-O3", "-fopenmp", "-march=native", "-Wno-psabi")


class DsServeOpBuilder(CPUOpBuilder):
    """The op library's sources and flags, in the form that DeepSpeed's builder wants."""

    BUILD_VAR = "DS_BUILD_DS_SERVE"

    def __init__(self) -> None:
        super().__init__(name=f"ds_serve_{_fingerprint()}")

    def absolute_name(self) -> str:
        return f"ds_serve.ops.{self.name}"

    def sources(self) -> list[str]:
        return [str(path) for path in sorted(CSRC.glob("*.cpp"))]

    def include_paths(self) -> list[str]:
        return [str(CSRC)]

    def cxx_args(self) -> list[str]:
        return list(FLAGS)


def _fingerprint() -> str:
    """Changes with the sources, the flags, torch, Python and the processor."""
    digest = hashlib.sha256()
    for path in sorted([*CSRC.glob("*.cpp"), *CSRC.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(f"{FLAGS} {torch.__version__} {sys.version} {_cpu_features()}".encode())
    return digest.hexdigest()[:12]


def _cpu_features() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return ""


@cache
def load_ops() -> ModuleType | None:
    """The op library, built if needed (10 to 60 s, once a machine), or None after one warning."""
    try:
        builder = DsServeOpBuilder()
        with _tools_on_path(), _alone(builder.name) as directory:
            built = directory / "built"  # exists once the library was whole and loaded
            if built.exists():
                return _import(builder.name, directory / f"{builder.name}.so")
            _require_tools()
            with contextlib.redirect_stdout(io.StringIO()):
                module = builder.load(verbose=False)
            built.touch()
            return module
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"ds_serve's C++ ops could not be built, so slower plain PyTorch is used: {_reason(error)}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


@contextlib.contextmanager
def _alone(name: str) -> Iterator[Path]:
    """The build directory, locked against other processes by the operating system, which drops the
    lock of a process that dies. torch's own lock file, if it is there, was left by a killed build."""
    from torch.utils.cpp_extension import _get_build_directory

    directory = Path(_get_build_directory(name, verbose=False))
    with open(directory / "ds_serve.flock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        (directory / "lock").unlink(missing_ok=True)
        yield directory


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


def _require_tools() -> None:
    from torch.utils.cpp_extension import get_cxx_compiler

    for what, tool in (("C++ compiler", get_cxx_compiler()), ("build tool", "ninja")):
        if shutil.which(tool.split()[0]) is None:
            raise RuntimeError(f"no {what} ({tool}) found")


def _import(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _reason(error: Exception) -> str:
    """The compiler's first complaint if there is one, else the error's first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    complaint = next((line for line in lines if "error:" in line), None)
    return (complaint or f"{type(error).__name__}: {lines[0] if lines else ''}")[:400]
