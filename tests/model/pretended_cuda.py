"""A CUDA device that is only pretended, where there is none: what was put there says so, and keeps apart.

Inside pretend() torch and DeepSpeed have a device cuda:0. A tensor there is an OnDevice around a tensor in
memory, which computes for it. As on a real device, an operation on tensors of both sides is an error, and
numpy sees no tensor of the device. Each wait of the host for the device is counted, by the lines of ds_serve
that led there. Streams and events do nothing: order, speed and whatever a CUDA kernel does are not shown.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda:0")

# Operations that wait for a device whatever their arguments are.
_WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_consecutive", "_unique2",
    "unique_dim", "bincount", "repeat_interleave",
}  # fmt: skip
_TAKES_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_COPIES = {"copy_", "_to_copy"}

_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
"""


class Waits:
    """How often the host waited for the device while is_on, by what for and where."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self.is_on = False

    def note(self, what: str) -> None:
        if not self.is_on:
            return
        stack = traceback.StackSummary.extract(traceback.walk_stack(None), lookup_lines=False)
        ours = [frame for frame in stack if "/ds_serve/" in frame.filename][:4]
        theirs = [frame for frame in stack if "/transformers/" in frame.filename][:1]
        where = [
            f"{frame.filename.rpartition('/ds_serve/')[2].rpartition('/site-packages/')[2]}:{frame.lineno} "
            f"{frame.name}"
            for frame in [*ours, *theirs]
        ]
        self.places[f"{threading.current_thread().name}: {what} in {' < '.join(where)}"] += 1

    @contextlib.contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        self.places, self.is_on = Counter(), True
        try:
            yield self.places
        finally:
            self.is_on = False


WAITS = Waits()
_pinned: set[int] = set()  # where storages of pinned memory begin


class OnDevice(torch.Tensor):
    """A tensor that says it is on cuda:0."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CUDA,
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    # What is no operation to torch.

    def tolist(self):
        WAITS.note("tolist")
        return self.inner.tolist()

    def numpy(self, *, force: bool = False):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def is_contiguous(self, **kwargs) -> bool:
        return self.inner.is_contiguous(**kwargs)

    def __repr__(self) -> str:
        return f"OnDevice({self.inner!r})"


def _run(func, args: tuple, kwargs: dict):
    name = func._schema.name.removeprefix("aten::")
    if name in ("pin_memory", "_pin_memory"):
        if isinstance(args[0], OnDevice):
            raise RuntimeError("cannot pin a tensor on cuda:0: only memory can be pinned")
        return _pin(args[0].clone())
    if name == "is_pinned":
        return _is_pinned(args[0])
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    any_there = any(isinstance(each, OnDevice) for each in tensors)
    asked = kwargs.get("device")
    goes_there = any_there if asked is None else torch.device(asked).type == "cuda"
    if any_there:
        _check_sides(func, name, args, tensors)
    _note_waits(name, args, kwargs, goes_there, any_there)
    out = _compute(func, name, args, kwargs, goes_there)
    if kwargs.get("pin_memory"):
        _pin(out)
    return out


def _compute(func, name: str, args: tuple, kwargs: dict, goes_there: bool):
    """In memory; what comes out is on the side that it goes to, and the tensor that went in where it is."""
    came: dict[int, OnDevice] = {}

    def inner(each):
        if isinstance(each, OnDevice):
            came[id(each.inner)] = each
            return each.inner
        return each

    def outer(each):
        if not isinstance(each, torch.Tensor) or isinstance(each, OnDevice):
            return each
        if id(each) in came:
            return came[id(each)]
        return OnDevice(each) if goes_there else each

    own_args, own_kwargs = tree_map(inner, args), tree_map(inner, kwargs)
    if own_kwargs.get("device") is not None:
        own_kwargs["device"] = torch.device("cpu")
    if own_kwargs.get("pin_memory"):
        own_kwargs["pin_memory"] = False
    if name == "histc":  # of integers on CUDA alone
        own_args = (own_args[0].float(), *own_args[1:])
    return tree_map(outer, func(*own_args, **own_kwargs))


def _check_sides(func, name: str, args: tuple, tensors: list[torch.Tensor]) -> None:
    if name in _COPIES:
        return
    if name in _TAKES_INDICES and isinstance(args[0], OnDevice):  # indices may be in memory
        tensors = [args[0], *(each for each in args[2:3] if isinstance(each, torch.Tensor))]
    apart = next((each for each in tensors if not isinstance(each, OnDevice) and each.dim()), None)
    if apart is not None:
        raise RuntimeError(
            f"{func}: expected all tensors on the same device, but found cuda:0 and a {apart.dtype}"
            f"{list(apart.shape)} on {apart.device}"
        )


def _note_waits(name: str, args: tuple, kwargs: dict, goes_there: bool, any_there: bool) -> None:
    if any_there and name in _WAITING:
        WAITS.note(name)
    if name in _TAKES_INDICES and any_there:
        indices = [each for each in args[1] if each is not None]
        if any(each.dtype in (torch.bool, torch.uint8) for each in indices):
            WAITS.note(f"{name} by a mask")
        elif any(each.dim() and not isinstance(each, OnDevice) for each in indices):
            WAITS.note(f"{name} by indices in memory")
    if name == "_to_copy" and goes_there != any_there:
        _note_copy(kwargs.get("non_blocking", False), None if any_there else args[0], goes_there)
    if name == "copy_" and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
        at_once = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        memory = args[1] if isinstance(args[0], OnDevice) else args[0]
        _note_copy(at_once, memory, isinstance(args[0], OnDevice))


def _note_copy(at_once: bool, memory: torch.Tensor | None, goes_there: bool) -> None:
    way = "to the device" if goes_there else "to the host"
    if not at_once:
        WAITS.note(f"copy {way}")
    elif memory is not None and not _is_pinned(memory):
        WAITS.note(f"copy {way} of memory that is not pinned")


def _pin(tensor: torch.Tensor) -> torch.Tensor:
    _pinned.add(tensor.untyped_storage().data_ptr())
    return tensor


def _is_pinned(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, OnDevice) and tensor.untyped_storage().data_ptr() in _pinned


class _Mode(TorchDispatchMode):
    """Sees what is made on the device or goes there from memory."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name not in ("aten::pin_memory", "aten::is_pinned"):
            with self:
                if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
                    found = func.decompose(*args, **kwargs)
                    if found is not NotImplemented:
                        return found
        return _run(func, args, kwargs)


# -- torch.cuda --------------------------------------------------------------------------------


class _Stream:
    def __init__(self, device=None, priority: int = 0, **_) -> None:
        self.device = device

    def wait_event(self, event) -> None: ...

    def wait_stream(self, stream) -> None: ...

    def synchronize(self) -> None:
        WAITS.note("stream.synchronize")

    def record_event(self, event=None):
        return event or _Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> None: ...

    def __exit__(self, *_) -> None: ...


class _Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, **_) -> None: ...

    def record(self, stream=None) -> None: ...

    def wait(self, stream=None) -> None: ...

    def synchronize(self) -> None:
        WAITS.note("event.synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, other) -> float:
        return 0.001


class _Cudart:
    def cudaHostRegister(self, address: int, *_) -> int:
        _pinned.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        _pinned.discard(address)
        return 0


class _Properties:
    name, major, minor, total_memory, multi_processor_count = "pretended", 9, 0, 8 << 30, 132


_TORCH_CUDA = {
    "_lazy_init": lambda: None, "init": lambda: None, "is_initialized": lambda: True,
    "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
    "set_device": lambda device: None, "synchronize": lambda device=None: WAITS.note("synchronize"),
    "Stream": _Stream, "Event": _Event, "stream": lambda stream: contextlib.nullcontext(),
    "current_stream": lambda device=None: _Stream(), "default_stream": lambda device=None: _Stream(),
    "cudart": _Cudart, "check_error": lambda code: None, "empty_cache": lambda: None,
    "mem_get_info": lambda device=None: (8 << 30, 8 << 30), "memory_stats": lambda device=None: {},
    "max_memory_allocated": lambda device=None: 0, "memory_allocated": lambda device=None: 0,
    "max_memory_reserved": lambda device=None: 0, "memory_reserved": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None, "get_device_name": lambda device=None: "pretended",
    "get_device_properties": lambda device=None: _Properties(),
    "get_device_capability": lambda device=None: (9, 0), "is_bf16_supported": lambda *_, **__: True,
}  # fmt: skip


@contextlib.contextmanager
def pretend() -> Iterator[Waits]:
    """Inside it there is a CUDA device, on this thread and on those that are started.

    RuntimeError where there is a real one.
    """
    if torch.cuda.is_available():
        raise RuntimeError("there is a CUDA device: none is pretended beside it")
    from deepspeed.accelerator import get_accelerator, real_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    get_accelerator()  # what is there otherwise
    _register_guard()
    mode, run = _Mode(), threading.Thread.run

    def run_there(self) -> None:
        torch._C._set_only_lift_cpu_tensors(True)  # of this thread: torch.tensor(.., device=) is seen by mode
        with mode:
            run(self)

    with contextlib.ExitStack() as stack:
        for name, value in _TORCH_CUDA.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(threading.Thread, "run", run_there))
        stack.enter_context(mock.patch.object(real_accelerator, "ds_accelerator", CUDA_Accelerator()))
        # In inference mode a view of what was made before it would need a version counter that it lacks.
        stack.enter_context(mock.patch.object(torch._C, "_InferenceMode", lambda mode: torch.no_grad()))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(mode)
        yield WAITS


def _register_guard() -> None:
    """torch asks each device's guard to make it the current one: for CUDA one that does nothing."""
    if torch.version.cuda is not None:
        torch._C._ensureCUDADeviceGuardSet()
        return
    library = Path(tempfile.gettempdir()) / f"pretended_cuda_{torch.__version__}_{os.getuid()}.so"
    if not library.exists():
        root, made = Path(torch.__file__).parent, library.with_suffix(f".{os.getpid()}")
        flags = ["-O1", "-shared", "-fPIC", "-std=c++20", f"-I{root / 'include'}", f"-L{root / 'lib'}"]
        command = ["c++", *flags, "-x", "c++", "-", "-lc10", "-o", str(made)]
        subprocess.run(command, input=_GUARD.encode(), check=True)
        made.replace(library)
    ctypes.CDLL(str(library))
