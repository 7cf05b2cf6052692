"""The passes over rows between the products: gated swish and its backward, and the weighted sum over the experts.

What a gated swish gives goes on into the next low-rank product, `low[m] = scale A[e] hidden[m]`, and in the backward
with B of the first projection in the place of A: a program takes a few rows of one expert and reads them again while
they are in the cache. To multiply them before they are written is slower: the compiler then works the swish out twice,
for the layout of the store and for that of the product. Of high ranks it is a kernel of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import GatedSwish
from .launch import Launch, once_a_shape
from .project import low_rank, project_tile
from .tile_sizes import RIDING_RANK
from .tiles import find_tile, rank_width, row_tiles


@triton.jit
def _load_gate_and_up(pre, row, row_mask, first, inner, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """From column `first` on; interleaved ones together, and twice. `_parted` takes them apart."""
    if INTERLEAVED:
        column = (2 * first + tl.arange(0, 2 * BLOCK))[None, :]
        both = tl.load(pre + row * 2 * inner + column, mask=row_mask & (column < 2 * inner), other=0.0)
        return both, both
    else:
        column = (first + tl.arange(0, BLOCK))[None, :]
        mask = row_mask & (column < inner)
        gate = tl.load(pre + row * 2 * inner + column, mask=mask, other=0.0)
        up = tl.load(pre + row * 2 * inner + inner + column, mask=mask, other=0.0)
        return gate, up


@triton.jit
def _parted(gate, up, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Both in fp32, `(ROWS, BLOCK)`."""
    if INTERLEAVED:
        gate, up = tl.split(tl.reshape(gate, (ROWS, BLOCK, 2)))
    return gate.to(tl.float32), up.to(tl.float32)


@triton.jit
def _store_gate_and_up(
    pre, row, row_mask, first, inner, gate, up, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    if INTERLEAVED:
        column = (2 * first + tl.arange(0, 2 * BLOCK))[None, :]
        tl.store(pre + row * 2 * inner + column, tl.interleave(gate, up), mask=row_mask & (column < 2 * inner))
    else:
        column = (first + tl.arange(0, BLOCK))[None, :]
        mask = row_mask & (column < inner)
        tl.store(pre + row * 2 * inner + column, gate, mask=mask)
        tl.store(pre + row * 2 * inner + inner + column, up, mask=mask)


@triton.jit
def _low_tile(
    expert, start, end, x, a, low, scale, k_size, a_expert, a_r, a_k,
    RANK: tl.constexpr, RANKS: tl.constexpr, EVEN_K: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """`low = scale A x` of rows that this program has just written: they are in the cache still."""
    tl.debug_barrier()  # each thread reads what others wrote
    project_tile(
        expert, start, end, 0,
        x, None, None, a, None, None, None, None, None, low, None,
        scale, RANK, k_size, 1, 1,
        k_size, a_expert, a_r, a_k, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        RANK, RANKS, False, False, False, False, False, False, False, False, True, EVEN_K,
        RANK == RANKS, ROWS, RANKS, STEP,
    )  # fmt: skip


@triton.jit
def _gated_kernel(
    pre, hidden, a, low, offsets, scale, inner, a_expert, a_r, a_k,
    experts: tl.constexpr, EXPERTS: tl.constexpr,
    ALPHA: tl.constexpr, SHIFT: tl.constexpr, LIMIT: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_A: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, EVEN_K: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    expert, start, end = find_tile(offsets, tl.program_id(0), experts, EXPERTS, ROWS)
    if expert < experts:
        row = start + tl.arange(0, ROWS)
        row_mask = (row < end)[:, None]
        row = row.to(tl.int64)[:, None]
        for first in tl.range(0, inner, BLOCK, num_stages=3):
            column = (first + tl.arange(0, BLOCK))[None, :]
            mask = row_mask & (column < inner)
            gate, up = _load_gate_and_up(pre, row, row_mask, first, inner, INTERLEAVED, BLOCK)
            gate, up = _parted(gate, up, INTERLEAVED, ROWS, BLOCK)
            if LIMIT >= 0:
                gate, up = tl.minimum(gate, LIMIT), tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
            value = gate * tl.sigmoid(ALPHA * gate) * (up + SHIFT)
            tl.store(hidden + row * inner + column, value.to(hidden.dtype.element_ty), mask=mask)
        if HAS_A:
            _low_tile(
                expert, start, end, hidden, a, low, scale, inner, a_expert, a_r, a_k,
                RANK, RANKS, EVEN_K, ROWS, STEP,
            )  # fmt: skip


_FORWARD = {"ROWS": 16, "BLOCK": 128, "STEP": 64, "num_warps": 4, "num_stages": 3}
_BACKWARD = {"ROWS": 16, "BLOCK": 128, "STEP": 128, "num_warps": 4, "num_stages": 3}


def gated(
    form: GatedSwish, pre: Tensor, a: Tensor | None, scale: float, offsets: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A gated swish in fp32, rounded once, and its product with A.

    Args: pre `(S, 2I)` sorted by expert. a: `(E, R, I)`, any strides, or `None`.
        scale: of that product. offsets: `(E,)` int32 ends of the experts' rows.
    Returns: hidden `(S, I)` and low `(S, R)`; rows past `offsets[-1]` are not written.
    """
    rows, inner = pre.shape[0], pre.shape[1] // 2
    hidden = pre.new_empty(rows, inner)
    riding, low = _riding(a, pre)
    if rows:
        factor = None if riding is None else (riding.shape[1], *riding.stride())
        launch = _forward(form, rows, inner, offsets.shape[0], factor, float(scale))
        launch(pre, hidden, riding, low, offsets)
    if a is not None and riding is None:
        low = low_rank(hidden, a, scale, offsets)
    return hidden, low


def _riding(factor: Tensor | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The factor whose product is part of the kernel, and room for that product; else nothing."""
    if factor is None or factor.shape[1] > RIDING_RANK:
        return None, None
    return factor, like.new_empty(like.shape[0], factor.shape[1])


_Factor = tuple[int, int, int, int]  # rank and strides


@once_a_shape
def _forward(form: GatedSwish, rows: int, inner: int, experts: int, a: _Factor | None, scale: float) -> Launch:
    return Launch(
        _gated_kernel, (row_tiles(rows, experts, _FORWARD["ROWS"]),),
        (scale, inner, *(a[1:] if a else (0, 0, 0))),
        **_constants(form, experts, a, inner, _FORWARD),
    )  # fmt: skip


def _constants(
    form: GatedSwish, experts: int, factor: _Factor | None, width: int, tiles: dict[str, int]
) -> dict[str, Any]:
    rank = factor[0] if factor else 16
    return {
        "experts": experts, "EXPERTS": 1 << (experts - 1).bit_length(),
        "ALPHA": form.alpha, "SHIFT": form.shift, "LIMIT": -1.0 if form.limit is None else form.limit,
        "INTERLEAVED": form.interleaved,
        "HAS_A": factor is not None, "RANK": rank, "RANKS": rank_width(rank), "EVEN_K": width % tiles["STEP"] == 0,
        **tiles,
    }  # fmt: skip


@triton.jit
def _gated_backward_kernel(
    pre, d_hidden, weights, order, offsets, d_pre, dots, b, low, scale, inner, rows, b_expert, b_r, b_n,
    experts: tl.constexpr, EXPERTS: tl.constexpr,
    ALPHA: tl.constexpr, SHIFT: tl.constexpr, LIMIT: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_A: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, EVEN_K: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    expert, start, end = find_tile(offsets, tl.program_id(0), experts, EXPERTS, ROWS)
    lanes = tl.arange(0, ROWS)
    if expert < experts:
        row_mask = start + lanes < end
        place = tl.load(order + start + lanes, mask=row_mask, other=0)
        weight = tl.load(weights + place, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        row = (start + lanes).to(tl.int64)[:, None]
        dot = tl.zeros((ROWS,), dtype=tl.float32)
        # The next block is loaded before this one is worked on. The compiler does so by itself in the forward; here
        # the barrier keeps it from that.
        column = tl.arange(0, BLOCK)[None, :]
        mask = row_mask[:, None] & (column < inner)
        next_gate, next_up = _load_gate_and_up(pre, row, row_mask[:, None], 0, inner, INTERLEAVED, BLOCK)
        next_grad = tl.load(d_hidden + row * inner + column, mask=mask, other=0.0)
        for first in range(0, inner, BLOCK):
            gate, up = _parted(next_gate, next_up, INTERLEAVED, ROWS, BLOCK)
            grad = next_grad.to(tl.float32)
            here, inside = column, mask
            column += BLOCK
            mask = row_mask[:, None] & (column < inner)
            next_gate, next_up = _load_gate_and_up(
                pre, row, row_mask[:, None], first + BLOCK, inner, INTERLEAVED, BLOCK
            )
            next_grad = tl.load(d_hidden + row * inner + column, mask=mask, other=0.0)
            gate_moves, up_moves = 1.0, 1.0
            if LIMIT >= 0:
                gate_moves = (gate <= LIMIT).to(tl.float32)
                up_moves = (tl.abs(up) <= LIMIT).to(tl.float32)
                gate, up = tl.minimum(gate, LIMIT), tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
            up += SHIFT
            sigmoid = tl.sigmoid(ALPHA * gate)
            swish = gate * sigmoid
            value = swish * up
            dot += tl.sum(value * grad, 1)
            grad *= weight
            d_gate = grad * up * (sigmoid + ALPHA * swish * (1 - sigmoid)) * gate_moves
            d_up = grad * swish * up_moves
            # pre may lie where d_pre does, and hidden takes the place of d_hidden: all threads have read this block
            # before one writes.
            tl.debug_barrier()
            d_gate, d_up = d_gate.to(d_pre.dtype.element_ty), d_up.to(d_pre.dtype.element_ty)
            _store_gate_and_up(d_pre, row, row_mask[:, None], first, inner, d_gate, d_up, INTERLEAVED, BLOCK)
            tl.store(d_hidden + row * inner + here, value.to(d_hidden.dtype.element_ty), mask=inside)
        tl.store(dots + place, dot.to(dots.dtype.element_ty), mask=row_mask)
        if HAS_A:
            _low_tile(
                expert, start, end, d_pre, b, low, scale, 2 * inner, b_expert, b_r, b_n,
                RANK, RANKS, EVEN_K, ROWS, STEP,
            )  # fmt: skip
    else:  # rows of no expert may hold anything, NaN too
        left_over = tl.load(offsets + experts - 1) + start + lanes
        their_places = tl.load(order + left_over, mask=left_over < rows, other=0)
        tl.store(dots + their_places, tl.zeros((ROWS,), dtype=dots.dtype.element_ty), mask=left_over < rows)


def gated_backward(
    form: GatedSwish,
    pre: Tensor,
    d_hidden: Tensor,
    weights: Tensor,
    order: Tensor,
    offsets: Tensor,
    d_pre: Tensor,
    b: Tensor | None,
    scale: float,
    dots_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Backward of a gated swish and of the routing weight; hidden `(S, I)` takes the place of d_hidden.

    Args: pre `(S, 2I)`, d_hidden `(S, I)` before weighting, both sorted; weights contiguous `(T, k)`; order, offsets:
        see `Routing`. d_pre: receives that of `weight * d_hidden`; may be pre itself. b: `(E, R, 2I)`, any strides,
        or `None`. scale: of the product with it.
    Returns: rowdot(hidden, d_hidden) `(S,)`, summed in fp32, in the order of weights, zero for rows of no expert; and
        `scale b d_pre` `(S, R)`.
    """
    rows, inner = d_hidden.shape
    dots = torch.empty(rows, dtype=dots_dtype, device=pre.device)
    riding, low = _riding(b, pre)
    if rows:
        factor = None if riding is None else (riding.shape[1], *riding.stride())
        launch = _backward(form, rows, inner, offsets.shape[0], factor, float(scale))
        launch(pre, d_hidden, weights, order, offsets, d_pre, dots, riding, low)
    if b is not None and riding is None:
        low = low_rank(d_pre, b, scale, offsets)
    return dots, low


@once_a_shape
def _backward(form: GatedSwish, rows: int, inner: int, experts: int, b: _Factor | None, scale: float) -> Launch:
    return Launch(
        _gated_backward_kernel, (row_tiles(rows, experts + 1, _BACKWARD["ROWS"]),),  # one more: of no expert
        (scale, inner, rows, *(b[1:] if b else (0, 0, 0))),
        **_constants(form, experts, b, 2 * inner, _BACKWARD),
    )  # fmt: skip


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


def combine(rows: Tensor, inverse: Tensor, weights: Tensor | None, offsets: Tensor, top_k: int, out: Tensor) -> None:
    """`out[t] = sum_k w[t, k] rows[inverse[t * k]]`, summed in fp32; rows past `offsets[-1]` count as zero.

    Args: rows `(S, H)` sorted by expert; inverse `(S,)` int64; weights contiguous `(T, k)` or `None` for ones; out:
        receives `(T, H)`, contiguous, of any floating dtype.
    """
    if out.numel():
        launch = _sum(*out.shape, offsets.shape[0], top_k, weights is not None)
        launch(rows, inverse, weights, offsets, out)


@once_a_shape
def _sum(tokens: int, width: int, experts: int, top_k: int, has_weights: bool) -> Launch:
    block = min(2048, 1 << (width - 1).bit_length())
    return Launch(
        _combine_kernel, (tokens, -(-width // block)), (width, experts),
        TOP_K=top_k, HAS_WEIGHTS=has_weights, BLOCK=block, num_warps=8 if block >= 2048 else 4,
    )  # fmt: skip
