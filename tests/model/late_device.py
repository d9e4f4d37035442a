"""A CPU that behaves like a device whose steps end later than they are launched.

What a step has drawn is on the host only when the step is over, some time after launch() has returned; until
then whoever reads it finds nonsense. Steps end in their order.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from ds_serve.worker import sampled, worker

NONSENSE = -(10**6)


class LateDevice:
    """step_s: how long a step takes, one after another. most_ahead: steps launched and not over, at most."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._num_ahead = self.most_ahead = 0
        threading.Thread(target=self._run, daemon=True).start()

    def started(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.full_like(tensor, NONSENSE)
        self._copies.append((host, tensor.clone()))
        return host

    def timer(self, device: torch.device) -> Timer:
        return Timer(self)

    def enqueue(self, over: threading.Event) -> None:
        copies, self._copies = self._copies, []
        self._num_ahead += 1
        self.most_ahead = max(self.most_ahead, self._num_ahead)
        self._work.put((copies, over))

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            copies, over = self._work.get()
            time.sleep(self._step_s)
            for host, tensor in copies:
                host.copy_(tensor)
            self._num_ahead -= 1
            over.set()


class Timer:
    """launched._Timer of a LateDevice."""

    def __init__(self, device: LateDevice) -> None:
        self._device, self._over = device, threading.Event()

    def begin(self) -> None:
        self._began = time.perf_counter()

    def waiting(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def end(self) -> None:
        self._device.enqueue(self._over)

    def is_over(self) -> bool:
        return self._over.is_set()

    def wait(self) -> None:
        assert self._over.wait(10)

    def seconds(self) -> float:
        return time.perf_counter() - self._began


@contextlib.contextmanager
def late_device(step_s: float = 0.01) -> Iterator[LateDevice]:
    """Inside it engines that are started run ahead of a LateDevice."""
    device = LateDevice(step_s)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.Worker, "runs_ahead", True)
        patch.setattr(worker, "timer", device.timer)
        patch.setattr(sampled, "_started", device.started)
        yield device
