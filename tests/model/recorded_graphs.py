"""A CPU that records graphs as CUDA does, for tests: ops with the memory that they read and write, no Python.

A replay runs the recorded ops on the memory of the recording: what the recording function computes in Python
is frozen, and what it asked of the host is an error. Kernels of the stand-in for FlashInfer are recorded as
they are. Before each step static inputs and output are filled with nonsense, so that what is not written, or
read late, shows.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

import fake_flashinfer
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ds_serve.attention.cpu import CpuBackend
from ds_serve.attention.reference import ReferenceBackend
from ds_serve.parallel.grid import Grid
from ds_serve.worker import graphs

NONSENSE = 2**40
WAITS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim"}


class _Tape(TorchDispatchMode):
    """Keeps the ops that are called inside it."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple] = []

    def kernel(self, function: Callable[..., None]) -> Callable[..., None]:
        """function, which is kept as a whole."""

        def call(*args):
            with _disable_current_modes():
                function(*args)
            self._calls.append((function, args, {}, None))

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.partition(".")[0] in WAITS:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        found = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, found))
        return found

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, found in self._calls:
            for there, now in zip(tree_leaves(found), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(now, torch.Tensor):
                    if now.data_ptr() != there.data_ptr():
                        there.copy_(now)
                elif hasattr(now, "wait"):  # of a collective
                    now.wait()


class CpuRecorder:
    """graphs.Recorder. What it runs is not deferred: a recording computes too."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        def waits(tensor):
            raise RuntimeError("tolist: operation not permitted when stream is capturing")

        tape = _Tape()
        with pytest.MonkeyPatch.context() as patch, tape:
            patch.setattr(torch.Tensor, "tolist", waits)  # on CPU it is no op
            for owner, name in ((fake_flashinfer, "_attend"), (fake_flashinfer._Wrapper, "_own_plan")):
                patch.setattr(owner, name, tape.kernel(getattr(owner, name)))
            run()
        return tape.replay

    def bytes_taken(self) -> int:
        return 0


@contextlib.contextmanager
def recorded_graphs(backends: tuple[type, ...] = (CpuBackend,)) -> Iterator[Counter]:
    """Inside it engines on CPU record graphs with these attention backends: how many replays of each size."""
    replays: Counter[int] = Counter()
    upload, replay = graphs.GraphRunner.upload, graphs.GraphRunner.replay

    def poisoned_upload(self, step, rows=None):
        self._integers.fill_(NONSENSE)
        return upload(self, step, rows)

    def poisoned_replay(self, inputs):
        if self._output is not None:
            self._output.fill_(torch.nan)
        replays[inputs.attention.num_tokens] += 1
        return replay(self, inputs)

    send_on = Grid.send_on
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Grid, "send_on", lambda self, hidden: send_on(self, hidden.clone()))  # as on CUDA
        patch.setattr("ds_serve.worker.worker.recorder_of", lambda device: CpuRecorder())
        patch.setattr(graphs.GraphRunner, "upload", poisoned_upload)
        patch.setattr(graphs.GraphRunner, "replay", poisoned_replay)
        for backend in (CpuBackend, ReferenceBackend):
            patch.setattr(backend, "captures", backend in backends)
        yield replays
