"""Small arrays from the host to the device, without waiting for what the device has still to do.

torch's own blocking copies wait for all work in the stream: a whole step, where steps are launched ahead.
Knows arrays only. Used by inputs.py and the sampler.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_ALIGN_BYTES = 16


def put(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Tensors of the arrays' shapes and dtypes on the device: by one copy of all that nobody waits for.

    On a CPU they share the arrays' memory.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    ends = np.cumsum([-(-array.nbytes // _ALIGN_BYTES) * _ALIGN_BYTES for array in arrays]).tolist()
    starts = [0, *ends[:-1]]
    packed = np.empty(max(ends[-1], 1), dtype=np.uint8)  # torch views no bytes of none as another dtype
    for array, start in zip(arrays, starts, strict=True):
        packed[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = torch.empty(len(packed), dtype=torch.uint8, device=device)
    fill(there, packed)
    return [
        there[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for array, start in zip(arrays, starts, strict=True)
    ]


def fill(tensor: torch.Tensor, array: np.ndarray) -> None:
    """array into a contiguous tensor of its dtype and size, by a copy that nobody waits for."""
    values = torch.from_numpy(array).view(tensor.shape)
    if tensor.device.type != "cpu":
        # The allocator of pinned memory gives the buffer out again only once the copy has been made.
        values = values.pin_memory()
    tensor.copy_(values, non_blocking=True)
