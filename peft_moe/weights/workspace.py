"""Where quantized stacks rebuild their 16-bit weights, one after the other.

A stack is read by the product that follows its building and by nothing later, so all layers can share the memory: the
work of one device is in order. Nothing of a stack's size outlives the call.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor


class _Buffers(threading.local):
    """Of one thread: two threads may build at the same time."""

    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, Tensor] = {}


_buffers = _Buffers()


def borrow(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor of this shape, valid until the next `borrow` on the same device, dtype and thread.

    The allocator of a GPU gives the next layer what the last has given back, and lends it to others in between, such
    as the logits. On a CPU, whose memory would be mapped anew each time, one buffer stays.
    """
    if device.type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    size = math.prod(shape)
    buffer = _buffers.by_dtype.get(dtype)
    if buffer is None or buffer.numel() < size:
        _buffers.by_dtype.pop(dtype, None)  # free the smaller one first
        del buffer
        with torch.inference_mode(False):  # or nothing outside of inference mode could write to it later
            buffer = _buffers.by_dtype[dtype] = torch.empty(size, dtype=dtype, device=device)
    return buffer[:size].view(*shape)


def release() -> None:
    """Free this thread's buffers of the CPU; the next `borrow` makes new ones."""
    _buffers.by_dtype.clear()
