"""Up to how many rows an expert a product on FP8 codes is faster than dequantizing first: measured once a device."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from ..scaled import ScaledStack
from .dequantize import dequantize_blocks
from .project import project

_EXPERTS, _OUT, _IN, _BLOCK = 24, 1536, 2048, 128  # larger than the caches, small beside a model
_MEANS = (4, 16, 32, 48, 64, 96, 128, 192, 256)  # rows of an expert
_REPEATS, _CALLS = 7, 4

_found: dict[torch.device, int] = {}


def measured(device: torch.device) -> int | None:
    """What `rows_on_codes` found; `None` before its first call."""
    return _found.get(device)


def rows_on_codes(device: torch.device) -> int:
    """The largest number of rows an expert, on average, at which forward and backward products run on codes."""
    if device not in _found:
        if torch.cuda.is_current_stream_capturing():
            return 0
        with torch.no_grad(), torch.cuda.device(device):
            _found[device] = _measure(device)
    return _found[device]


def _measure(device: torch.device) -> int:
    elements = _EXPERTS * _OUT * _IN
    numbers = torch.arange(elements, dtype=torch.int32, device=device)
    # Without drawing random numbers, which would change what the user draws; codes that are no NaN.
    codes = (numbers * 37 % 113).to(torch.uint8).view(torch.float8_e4m3fn).view(_EXPERTS, _OUT, _IN)
    del numbers
    scales = torch.full((_EXPERTS, _OUT // _BLOCK, _IN // _BLOCK), 2.0**-8, device=device)
    stack = ScaledStack(codes, scales, _BLOCK, _BLOCK)
    dense = torch.empty(codes.shape, dtype=torch.bfloat16, device=device)
    index = torch.arange(_OUT, dtype=torch.int32, device=device) // _BLOCK
    best = 0
    for mean in _MEANS:
        offsets = torch.arange(mean, mean * _EXPERTS + 1, mean, dtype=torch.int32, device=device)
        x, d_out = (_rows(mean * _EXPERTS, width, device) for width in (_IN, _OUT))

        def on_codes(x: Tensor = x, d_out: Tensor = d_out, offsets: Tensor = offsets) -> None:
            project(x, None, stack, None, None, 1.0, None, offsets)
            project(d_out, None, stack.mT, None, None, 1.0, None, offsets)

        def dequantized(x: Tensor = x, d_out: Tensor = d_out, offsets: Tensor = offsets) -> None:
            for rows, transposed in ((x, False), (d_out, True)):
                dequantize_blocks(codes, scales, index, _BLOCK, dense)
                project(rows, None, dense.mT if transposed else dense, None, None, 1.0, None, offsets)

        if _milliseconds(on_codes) >= _milliseconds(dequantized):
            break
        best = mean
    return best


def _rows(count: int, width: int, device: torch.device) -> Tensor:
    return torch.arange(count * width, device=device).float().sin_().bfloat16().view(count, width)


def _milliseconds(step: Callable[[], None]) -> float:
    step()
    times = []
    for _ in range(_REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(_CALLS):
            step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
