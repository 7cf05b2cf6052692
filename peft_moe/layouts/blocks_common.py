"""What every block forward shares: its type and two rules about dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: `forward(block, run_experts, *args, **kwargs)`: what `block.forward(*args, **kwargs)` returns.
BlockForward = Callable[..., Any]

#: A block of a known class: `find_block_forward` has checked its attributes, of which types know nothing.
Block = Any


def linear_output_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear on `x` answers: the autocast dtype inside `torch.autocast`, else that of `x`."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `Tensor.sum` adds up values of `dtype`: fp32 for the 16-bit ones."""
    return torch.promote_types(dtype, torch.float32)
