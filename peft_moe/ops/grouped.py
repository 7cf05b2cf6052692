"""Grouped matrix products, and which backend runs them.

`grouped_mm`: one product per expert over rows sorted by expert. Two backends: torch's own kernel ("grouped_mm"), and a
loop of plain products ("loop") that runs on any device and dtype. Under `torch.compile` both hide behind a custom
operator: the native kernel's meta function knows bf16 alone, and a loop's shapes depend on data.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("peft_moe")

MAX_GROUPS = 1024  # of the native kernel
_ALIGNMENT = 16  # bytes: of every row stride, on the CPU too

_native: Any = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


@cache
def log_once(message: str) -> None:
    """Say in one line why something does not run the fast way; each distinct line once a process."""
    logger.warning(message)


@cache
def native_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's grouped product is there and right on this device and dtype; says once if it is not."""
    problem = native_problem(device, dtype)
    if problem is not None:
        log_once(f"no grouped_mm on {device.type} with {dtype} ({problem}); experts run in a loop there")
    return problem is None


def native_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torch's grouped product cannot be used on this device and dtype; `None` if it can: tried once, both forms.

    On CUDA only its fast path counts: elsewhere torch loops over the groups itself, with a host synchronisation.
    """
    if _native is None:
        return f"torch {torch.__version__} has none"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return "its kernels know bfloat16, float16 and float32"
    if device.type == "cuda" and dtype != torch.bfloat16:
        return "on CUDA it is fast in bfloat16 alone"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return "its fast kernel needs compute capability 9.0"
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rows = torch.randn(48, 32).to(device, dtype)
        grads = torch.randn(48, 64).to(device, dtype)
        weights = torch.randn(3, 64, 32).to(device, dtype)
        offsets = torch.tensor([16, 16, 48], dtype=torch.int32, device=device)
        try:
            pairs = [
                (_native(rows, weights.mT, offs=offsets), _loop_rows(rows, weights.mT, offsets)),
                (_native(grads, weights, offs=offsets), _loop_rows(grads, weights, offsets)),
                (_native(grads.t(), rows, offs=offsets)[::2], _loop_outer(grads, rows, offsets)[::2]),
            ]
        except (RuntimeError, NotImplementedError) as error:
            return f"it does not run: {error}"
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        for found, expected in pairs:
            if (found.float() - expected.float()).norm() > tolerance * expected.float().norm():
                return "it gives wrong results"
    return None


def _aligned(*tensors: Tensor) -> bool:
    """Whether each matrix has one unit stride and a 16-byte multiple as the other."""
    for tensor in tensors:
        rows, columns = tensor.stride()[-2:]
        leading = rows if columns == 1 else columns
        if min(rows, columns) != 1 or (leading * tensor.element_size()) % _ALIGNMENT:
            return False
    return True


def _runs_native(a: Tensor, b: Tensor, offsets: Tensor, backend: str) -> bool:
    if backend == "loop" or not native_works(a.device, a.dtype):
        return False
    if offsets.numel() > MAX_GROUPS:
        log_once(f"{offsets.numel()} experts are more than grouped_mm's {MAX_GROUPS} groups: they run in a loop")
        return False
    columns = b.shape[-1] * b.element_size()  # the result's row stride
    if not _aligned(a, b) or columns % _ALIGNMENT or (b.dim() == 3 and b.stride(0) * b.element_size() % _ALIGNMENT):
        log_once(
            f"grouped_mm needs strides of whole {_ALIGNMENT} bytes, found shapes {tuple(a.shape)} and "
            f"{tuple(b.shape)} in {a.dtype}: these experts run in a loop"
        )
        return False
    return True


def _bounds(offsets: Tensor) -> list[tuple[int, int, int]]:
    """(expert, start, end) of the experts that have rows; one host synchronisation."""
    found, start = [], 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            found.append((expert, start, end))
        start = end
    return found


def _loop_rows(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    out = rows.new_zeros(rows.shape[0], weights.shape[-1])
    for expert, start, end in _bounds(offsets):
        torch.mm(rows[start:end], weights[expert], out=out[start:end])
    return out


def _loop_outer(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    out = a.new_zeros(offsets.numel(), a.shape[-1], b.shape[-1])
    for expert, start, end in _bounds(offsets):
        torch.mm(a[start:end].t(), b[start:end], out=out[expert])
    return out


def _rows_eager(rows: Tensor, weights: Tensor, offsets: Tensor, backend: str) -> Tensor:
    rows = rows.contiguous()
    if _runs_native(rows, weights, offsets, backend):
        return _native(rows, weights, offs=offsets)
    return _loop_rows(rows, weights, offsets)


def _outer_eager(a: Tensor, b: Tensor, offsets: Tensor, backend: str) -> Tensor:
    a, b = a.contiguous(), b.contiguous()
    if not _runs_native(a, b, offsets, backend):
        return _loop_outer(a, b, offsets)
    out = _native(a.t(), b, offs=offsets)
    # Some GPUs leave the result of an empty group unwritten (pytorch#172439).
    counts = torch.diff(offsets, prepend=offsets.new_zeros(1))
    return out.masked_fill_((counts == 0)[:, None, None], 0)


@torch.library.custom_op("peft_moe::grouped_rows", mutates_args=())
def _rows_op(rows: Tensor, weights: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return _rows_eager(rows, weights, offsets, backend)


@_rows_op.register_fake
def _(rows: Tensor, weights: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[-1])


@torch.library.custom_op("peft_moe::grouped_outer", mutates_args=())
def _outer_op(a: Tensor, b: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return _outer_eager(a, b, offsets, backend)


@_outer_op.register_fake
def _(a: Tensor, b: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return a.new_empty(offsets.numel(), a.shape[-1], b.shape[-1])


def grouped_mm(rows: Tensor, weights: Tensor, offsets: Tensor, backend: str = "auto") -> Tensor:
    """Multiply each expert's rows by that expert's matrix; not differentiable (the callers write the backward).

    Args:
        rows: `(S, K)` sorted by expert. weights: `(E, K, N)`, any view, same dtype. offsets: `(E,)` int32 ends.
        backend: "auto" and "grouped_mm" take torch's kernel where it is right for device, dtype and strides;
            "loop" never does.

    Returns: `(S, N)`. Rows at or past `offsets[-1]` hold anything.
    """
    if torch.compiler.is_compiling():
        return _rows_op(rows, weights, offsets, backend)
    return _rows_eager(rows, weights, offsets, backend)


def grouped_outer(a: Tensor, b: Tensor, offsets: Tensor, backend: str = "auto") -> Tensor:
    """Per expert `a_eᵀ b_e`, the shape of a weight gradient; experts without rows get exactly zero.

    Args: a: `(S, N)`, b: `(S, K)`, both sorted by expert, same dtype. offsets: `(E,)` int32. Returns: `(E, N, K)`.
    """
    if torch.compiler.is_compiling():
        return _outer_op(a, b, offsets, backend)
    return _outer_eager(a, b, offsets, backend)
