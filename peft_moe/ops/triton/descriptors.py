"""Tiles of matrices by descriptor, on GPUs with a tensor memory accelerator (Hopper, Blackwell).

The copy engine works out addresses and edges, and the threads are left to multiply.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .launch import TRITON


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


_GLUON = ((3, 6), (3, 9))  # versions of Triton whose Gluon is known to compile `warp_specialized`


@cache
def has_warp_specialization(device: torch.device) -> bool:
    """Whether `warp_specialized` can be imported and runs there: `wgmma` is Hopper's alone."""
    if not has_descriptors(device) or not _GLUON[0] <= TRITON <= _GLUON[1]:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def is_aligned(matrix: Tensor, row: int) -> bool:
    """Whether rows of so many elements start at 16-byte addresses."""
    return matrix.data_ptr() % 16 == 0 and row * matrix.element_size() % 16 == 0


def of_rows(x: Tensor, height: int, step: int) -> Any:
    """Descriptor of `(S, K)` with unit stride in K, in tiles `(height, step)`; `None` where there can be none."""
    if not is_aligned(x, x.stride(0)):
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [height, step])


def stack_as_matrix(stack: Tensor) -> tuple[tuple[int, int], int] | None:
    """Shape and row stride of `(E, N, K)` as one matrix with unit stride in a row; `None` where a tile of it cannot be
    copied.

    With unit stride in K it is `(E * N, K)`; with unit stride in N, `(E * K, N)`.
    """
    experts, n_size, k_size = stack.shape
    k_first = stack.stride(2) != 1
    height, width, row = (k_size, n_size, stack.stride(2)) if k_first else (n_size, k_size, stack.stride(1))
    if stack.stride(1 if k_first else 2) != 1 or stack.stride(0) != height * row or not is_aligned(stack, row):
        return None
    return (experts * height, width), row


def of_stack(weight: Tensor, columns: int, step: int) -> Any:
    """Descriptor of `(E, N, K)` as `stack_as_matrix` has it, in tiles `(columns, step)` or `(step, columns)`."""
    matrix = stack_as_matrix(weight)
    if matrix is None:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    shape, row = matrix
    return TensorDescriptor(
        weight, list(shape), [row, 1], [columns, step] if weight.stride(2) == 1 else [step, columns]
    )
