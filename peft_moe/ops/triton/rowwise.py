"""The passes over rows between the products: gated SiLU and its backward, and the weighted sum over the experts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch


@triton.jit
def _silu_gated_kernel(pre, hidden, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < inner
    gate = tl.load(pre + row * 2 * inner + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pre + row * 2 * inner + inner + column, mask=mask, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(hidden + row * inner + column, value.to(hidden.dtype.element_ty), mask=mask)


def silu_gated(pre: Tensor) -> Tensor:
    """`(S, 2I)` rows [gate; up] -> `(S, I)`: silu(gate) * up, in fp32 and rounded once."""
    rows, inner = pre.shape[0], pre.shape[1] // 2
    hidden = torch.empty(rows, inner, dtype=pre.dtype, device=pre.device)
    if rows:
        block = min(1024, 1 << (inner - 1).bit_length())
        launch(_silu_gated_kernel, (rows, -(-inner // block)), (pre, hidden, inner), BLOCK=block)
    return hidden


@triton.jit
def _silu_gated_backward_kernel(
    pre, d_hidden, weights, order, offsets, d_pre, hidden, dots, inner, experts, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(order + row)
    scale = tl.load(weights + position).to(tl.float32)
    dot = 0.0
    for first in range(0, inner, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = column < inner
        gate = tl.load(pre + row * 2 * inner + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(pre + row * 2 * inner + inner + column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(d_hidden + row * inner + column, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        swish = gate * sigmoid
        value = swish * up
        dot += tl.sum(value * grad, 0)
        grad *= scale
        d_gate = grad * up * (sigmoid + swish * (1 - sigmoid))
        tl.store(d_pre + row * 2 * inner + column, d_gate.to(d_pre.dtype.element_ty), mask=mask)
        tl.store(d_pre + row * 2 * inner + inner + column, (grad * swish).to(d_pre.dtype.element_ty), mask=mask)
        tl.store(hidden + row * inner + column, value.to(hidden.dtype.element_ty), mask=mask)
    # Rows of no expert may hold anything, NaN too.
    tl.store(dots + position, tl.where(row < tl.load(offsets + experts - 1), dot, 0.0))


def silu_gated_backward(
    pre: Tensor, d_hidden: Tensor, weights: Tensor, order: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of gated SiLU and of the routing weight, in one pass.

    Args: pre `(S, 2I)`, d_hidden `(S, I)` before weighting, both sorted; weights contiguous `(T, k)`; order, offsets:
        see `Routing`.
    Returns: d_pre `(S, 2I)` of `weight * d_hidden`; rowdot(hidden, d_hidden) `(S,)` fp32 in the order of weights, zero
        for rows of no expert; hidden `(S, I)`.
    """
    rows, inner = d_hidden.shape
    d_pre, hidden = torch.empty_like(pre), torch.empty_like(d_hidden)
    dots = torch.empty(rows, dtype=torch.float32, device=pre.device)
    if rows:
        block = min(1024, 1 << (inner - 1).bit_length())
        arguments = (pre, d_hidden, weights, order, offsets, d_pre, hidden, dots, inner, offsets.shape[0])
        launch(_silu_gated_backward_kernel, (rows,), arguments, BLOCK=block)
    return d_pre, dots, hidden


@triton.jit
def _combine_kernel(
    rows, inverse, weights, offsets, out, width, experts,
    TOP_K: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    end = tl.load(offsets + experts - 1)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in tl.static_range(TOP_K):
        position = tl.load(inverse + token * TOP_K + choice)
        value = tl.load(rows + position * width + column, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(position < end, value, 0.0)  # rows of no expert may hold anything, NaN too
        if HAS_WEIGHTS:
            value *= tl.load(weights + token * TOP_K + choice).to(tl.float32)
        total += value
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=mask)


def combine(
    rows: Tensor, inverse: Tensor, weights: Tensor | None, offsets: Tensor, top_k: int, dtype: torch.dtype
) -> Tensor:
    """`out[t] = sum_k w[t, k] rows[inverse[t * k]]`, summed in fp32; rows past `offsets[-1]` count as zero.

    Args: rows `(S, H)` sorted by expert; inverse `(S,)` int64; weights contiguous `(T, k)` or `None` for ones.
    Returns: `(T, H)` in `dtype`.
    """
    tokens, width = inverse.shape[0] // top_k, rows.shape[1]
    out = torch.empty(tokens, width, dtype=dtype, device=rows.device)
    if tokens:
        block = min(2048, 1 << (width - 1).bit_length())
        launch(
            _combine_kernel, (tokens, -(-width // block)),
            (rows, inverse, weights, offsets, out, width, offsets.shape[0]),
            TOP_K=top_k, HAS_WEIGHTS=weights is not None, BLOCK=block,
            num_warps=8 if block >= 2048 else 4,
        )  # fmt: skip
    return out
