"""Tiles of matrices by descriptor, on GPUs with a tensor memory accelerator (Hopper, Blackwell).

The copy engine works out addresses and edges, and the threads are left to multiply.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def has_descriptors(device: torch.device) -> bool:
    """Whether kernels on this device can load by descriptor."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    try:
        from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: F401
    except ImportError:  # of a Triton before 3.4
        return False
    return True


def _is_aligned(matrix: Tensor, row: int) -> bool:
    """Whether rows of so many elements start at 16-byte addresses."""
    return matrix.data_ptr() % 16 == 0 and row * matrix.element_size() % 16 == 0


def of_rows(x: Tensor, height: int, step: int) -> Any:
    """Descriptor of `(S, K)` with unit stride in K, in tiles `(height, step)`; `None` where there can be none."""
    if not _is_aligned(x, x.stride(0)):
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [height, step])


def of_stack(weight: Tensor, columns: int, step: int) -> Any:
    """Descriptor of `(E, N, K)` as one matrix; `None` where there can be none.

    With unit stride in K it is `(E * N, K)`, in tiles `(columns, step)`; with unit stride in N `(E * K, N)`, in tiles
    `(step, columns)`.
    """
    experts, n_size, k_size = weight.shape
    k_first = weight.stride(2) != 1
    height, width, row = (k_size, n_size, weight.stride(2)) if k_first else (n_size, k_size, weight.stride(1))
    if weight.stride(1 if k_first else 2) != 1 or weight.stride(0) != height * row or not _is_aligned(weight, row):
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(
        weight, [experts * height, width], [row, 1], [step, columns] if k_first else [columns, step]
    )
