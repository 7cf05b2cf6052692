"""The passes over rows between the products: gated swish and its backward, and the weighted sum over the experts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import GatedSwish
from .launch import launch


@triton.jit
def _gate_and_up(pre, row, column, mask, inner, INTERLEAVED: tl.constexpr):
    """Both in fp32, and where they lie."""
    at = pre + row * 2 * inner + (2 * column if INTERLEAVED else column)
    apart = 1 if INTERLEAVED else inner
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + apart, mask=mask, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _gated_kernel(
    pre, hidden, inner,
    ALPHA: tl.constexpr, SHIFT: tl.constexpr, LIMIT: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < inner
    gate, up = _gate_and_up(pre, row, column, mask, inner, INTERLEAVED)
    if LIMIT > 0:
        gate, up = tl.minimum(gate, LIMIT), tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    value = gate * tl.sigmoid(ALPHA * gate) * (up + SHIFT)
    tl.store(hidden + row * inner + column, value.to(hidden.dtype.element_ty), mask=mask)


def _constants(form: GatedSwish, inner: int) -> dict[str, float | int | bool]:
    block = min(1024, 1 << (inner - 1).bit_length())
    return {
        "ALPHA": form.alpha, "SHIFT": form.shift, "LIMIT": form.limit or 0.0, "INTERLEAVED": form.interleaved,
        "BLOCK": block,
    }  # fmt: skip


def gated(form: GatedSwish, pre: Tensor) -> Tensor:
    """`(S, 2I)` -> `(S, I)`, in fp32 and rounded once."""
    rows, inner = pre.shape[0], pre.shape[1] // 2
    hidden = torch.empty(rows, inner, dtype=pre.dtype, device=pre.device)
    if rows:
        constants = _constants(form, inner)
        launch(_gated_kernel, (rows, -(-inner // int(constants["BLOCK"]))), (pre, hidden, inner), **constants)
    return hidden


@triton.jit
def _gated_backward_kernel(
    pre, d_hidden, weights, order, offsets, d_pre, dots, inner, experts,
    ALPHA: tl.constexpr, SHIFT: tl.constexpr, LIMIT: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(order + row)
    scale = tl.load(weights + position).to(tl.float32)
    dot = 0.0
    for first in range(0, inner, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = column < inner
        gate, up = _gate_and_up(pre, row, column, mask, inner, INTERLEAVED)
        grad = tl.load(d_hidden + row * inner + column, mask=mask, other=0.0).to(tl.float32)
        gate_moves, up_moves = 1.0, 1.0
        if LIMIT > 0:
            gate_moves = (gate <= LIMIT).to(tl.float32)
            up_moves = (tl.abs(up) <= LIMIT).to(tl.float32)
            gate, up = tl.minimum(gate, LIMIT), tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        up += SHIFT
        sigmoid = tl.sigmoid(ALPHA * gate)
        swish = gate * sigmoid
        value = swish * up
        dot += tl.sum(value * grad, 0)
        grad *= scale
        d_gate = grad * up * (sigmoid + ALPHA * swish * (1 - sigmoid)) * gate_moves
        d_up = grad * swish * up_moves
        # pre may lie where d_pre does, and hidden takes the place of d_hidden: all threads have read before one writes.
        tl.debug_barrier()
        d_at = d_pre + row * 2 * inner + (2 * column if INTERLEAVED else column)
        tl.store(d_at, d_gate.to(d_pre.dtype.element_ty), mask=mask)
        tl.store(d_at + (1 if INTERLEAVED else inner), d_up.to(d_pre.dtype.element_ty), mask=mask)
        tl.store(d_hidden + row * inner + column, value.to(d_hidden.dtype.element_ty), mask=mask)
    # Rows of no expert may hold anything, NaN too.
    tl.store(dots + position, tl.where(row < tl.load(offsets + experts - 1), dot, 0.0))


def gated_backward(
    form: GatedSwish, pre: Tensor, d_hidden: Tensor, weights: Tensor, order: Tensor, offsets: Tensor, d_pre: Tensor
) -> Tensor:
    """Backward of a gated swish and of the routing weight, in one pass; hidden `(S, I)` takes the place of d_hidden.

    Args: pre `(S, 2I)`, d_hidden `(S, I)` before weighting, both sorted; weights contiguous `(T, k)`; order, offsets:
        see `Routing`. d_pre: receives that of `weight * d_hidden`; may be pre itself.
    Returns: rowdot(hidden, d_hidden) `(S,)` fp32 in the order of weights, zero for rows of no expert.
    """
    rows, inner = d_hidden.shape
    dots = torch.empty(rows, dtype=torch.float32, device=pre.device)
    if rows:
        arguments = (pre, d_hidden, weights, order, offsets, d_pre, dots, inner, offsets.shape[0])
        launch(_gated_backward_kernel, (rows,), arguments, **_constants(form, inner))
    return dots


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
