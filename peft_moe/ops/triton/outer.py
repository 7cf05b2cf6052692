"""The gradients of the adapters' factors, for all experts in one kernel.

    out[e, n, r] = sum over the expert's rows m of  big[source[m], n] * scale[order[m]] * small[m, r]

Every large matrix is read once; experts without rows get zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch


@triton.jit
def _outer_kernel(
    big, source, small, scale, order, offsets, out,
    n_size, big_row, out_expert, out_n, out_r,
    RANK: tl.constexpr, HAS_SOURCE: tl.constexpr, HAS_SCALE: tl.constexpr,
    COLUMNS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = columns < n_size
    ranks = tl.arange(0, RANK)
    total = tl.zeros((COLUMNS, RANK), dtype=tl.float32)
    for first in range(start, end, STEP):
        rows = first + tl.arange(0, STEP)
        row_mask = rows < end
        if HAS_SOURCE:
            position = tl.load(source + rows, mask=row_mask, other=0).to(tl.int64)
        else:
            position = rows.to(tl.int64)
        mask = row_mask[:, None] & column_mask[None, :]
        big_tile = tl.load(big + position[:, None] * big_row + columns[None, :], mask=mask, other=0.0)
        small_at = small + rows.to(tl.int64)[:, None] * RANK + ranks[None, :]
        small_tile = tl.load(small_at, mask=row_mask[:, None], other=0.0)
        if HAS_SCALE:
            place = tl.load(order + rows, mask=row_mask, other=0)
            factor = tl.load(scale + place, mask=row_mask, other=0.0).to(tl.float32)
            small_tile = (small_tile.to(tl.float32) * factor[:, None]).to(big.dtype.element_ty)
        total = tl.dot(tl.trans(big_tile), small_tile, total, input_precision=PRECISION)
    out_at = out + expert.to(tl.int64) * out_expert + columns[:, None] * out_n + ranks[None, :] * out_r
    tl.store(out_at, total.to(out.dtype.element_ty), mask=column_mask[:, None])


def outer(
    big: Tensor,
    source: Tensor | None,
    small: Tensor,
    scale: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    transposed: bool,
) -> Tensor:
    """Per expert the product of a wide and a narrow matrix over the expert's rows.

    Args:
        big: `(T, N)` with `source` `(S,)`, or `(S, N)`; unit stride in N. small: contiguous `(S, R)`, R a power of two
        >= 16. scale: contiguous, S factors in flat order, or `None`. order: `(S,)`. offsets: `(E,)` int32.

    Returns: contiguous `(E, N, R)`, or `(E, R, N)` if `transposed`, in the dtype of `big`.
    """
    experts, n_size, rank = offsets.shape[0], big.shape[1], small.shape[1]
    shape = (experts, rank, n_size) if transposed else (experts, n_size, rank)
    out = torch.empty(shape, dtype=big.dtype, device=big.device)
    n_stride, r_stride = (1, n_size) if transposed else (rank, 1)
    columns = 64
    launch(
        _outer_kernel, (-(-n_size // columns), experts),
        (big, source, small, scale, order, offsets, out, n_size, big.stride(0), n_size * rank, n_stride, r_stride),
        RANK=rank, HAS_SOURCE=source is not None, HAS_SCALE=scale is not None,
        COLUMNS=columns, STEP=64, PRECISION="ieee" if big.dtype == torch.float32 else "tf32",
        num_warps=4, num_stages=4,
    )  # fmt: skip
    return out
