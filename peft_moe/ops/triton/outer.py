"""The gradients of the two factors of an adapter, for all experts in one kernel.

Each is a sum of outer products over the rows of an expert:

    out[e, n, r] = sum over the expert's rows m of  big[source[m], n] * scale[order[m]] * small[m, r]

Every large matrix is read once; experts without rows get zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, once_a_shape
from .tiles import rank_width


@triton.jit
def _outer_tile(
    column_tile, expert, big, source, small, scale, order, offsets, out, n_size, big_row, out_n, out_r,
    RANK: tl.constexpr, RANKS: tl.constexpr, HAS_SOURCE: tl.constexpr, HAS_SCALE: tl.constexpr,
    COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = columns < n_size
    ranks = tl.arange(0, RANKS)
    rank_mask = (ranks < RANK)[None, :]
    total = tl.zeros((COLUMNS, RANKS), dtype=tl.float32)
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
        if RANK == RANKS:
            small_tile = tl.load(small_at, mask=row_mask[:, None], other=0.0)
        else:
            small_tile = tl.load(small_at, mask=row_mask[:, None] & rank_mask, other=0.0)
        if HAS_SCALE:
            place = tl.load(order + rows, mask=row_mask, other=0)
            factor = tl.load(scale + place, mask=row_mask, other=0.0).to(tl.float32)
            small_tile = (small_tile.to(tl.float32) * factor[:, None]).to(big.dtype.element_ty)
        total = tl.dot(tl.trans(big_tile), small_tile, total)
    out_at = out + expert.to(tl.int64) * n_size * RANK + columns[:, None] * out_n + ranks[None, :] * out_r
    tl.store(out_at, total.to(out.dtype.element_ty), mask=column_mask[:, None] & rank_mask)


@triton.jit
def _outer_kernel(
    big_1, source_1, small_1, out_1, big_2, source_2, small_2, out_2, scale, order, offsets,
    n_1, big_row_1, out_n_1, out_r_1, n_2, big_row_2, out_n_2, out_r_2,
    RANK: tl.constexpr, RANKS: tl.constexpr, HAS_SOURCE_1: tl.constexpr, HAS_SOURCE_2: tl.constexpr,
    HAS_SCALE: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    tile, expert = tl.program_id(0), tl.program_id(1)
    tiles_1 = tl.cdiv(n_1, COLUMNS)
    if tile < tiles_1:
        _outer_tile(
            tile, expert, big_1, source_1, small_1, scale, order, offsets, out_1, n_1, big_row_1, out_n_1, out_r_1,
            RANK, RANKS, HAS_SOURCE_1, HAS_SCALE, COLUMNS, STEP,
        )  # fmt: skip
    else:
        _outer_tile(
            tile - tiles_1, expert,
            big_2, source_2, small_2, scale, order, offsets, out_2, n_2, big_row_2, out_n_2, out_r_2,
            RANK, RANKS, HAS_SOURCE_2, HAS_SCALE, COLUMNS, STEP,
        )  # fmt: skip


class Factor(NamedTuple):
    """What the gradient of one factor is made of.

    Attributes:
        big: `(T, N)` with `source` `(S,)`, or `(S, N)`; unit stride in N. small: contiguous `(S, R)`.
        transposed: the gradient is `(E, R, N)`, not `(E, N, R)`.
    """

    big: Tensor
    source: Tensor | None
    small: Tensor
    transposed: bool


def outer(
    first: Factor, second: Factor, scale: Tensor | None, order: Tensor, offsets: Tensor,
    tiles: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of two factors of the same rank, contiguous, in the dtype of `big`.

    Args: scale: contiguous, S numbers in flat order, or `None`. order: `(S,)`. offsets: `(E,)` int32. tiles: sizes to
        use instead of the default ones.
    """
    experts, rank = offsets.shape[0], first.small.shape[1]
    sides = _side(first), _side(second)
    found = [
        one.big.new_empty(experts, rank, n_size) if transposed else one.big.new_empty(experts, n_size, rank)
        for one, (n_size, _, _, transposed) in zip((first, second), sides, strict=True)
    ]
    launch = _of_shapes(experts, rank, *sides, scale is not None, tuple(tiles.items()) if tiles else None)
    launch(*first[:3], found[0], *second[:3], found[1], scale, order, offsets)
    return found[0], found[1]


_Side = tuple[int, int, bool, bool]


def _side(one: Factor) -> _Side:
    return one.big.shape[1], one.big.stride(0), one.source is not None, one.transposed


@once_a_shape
def _of_shapes(
    experts: int, rank: int, first: _Side, second: _Side, has_scale: bool, tiles: tuple[tuple[str, int], ...] | None
) -> Launch:
    numbers: list[int] = []
    for n_size, big_row, _, transposed in (first, second):
        numbers += [n_size, big_row, *((1, n_size) if transposed else (rank, 1))]
    chosen = dict(tiles) if tiles else _tiles(rank)
    across = sum(-(-n_size // chosen["COLUMNS"]) for n_size, *_ in (first, second))
    return Launch(
        _outer_kernel, (across, experts), tuple(numbers),
        RANK=rank, RANKS=rank_width(rank), HAS_SOURCE_1=first[2], HAS_SOURCE_2=second[2], HAS_SCALE=has_scale,
        **chosen,
    )  # fmt: skip


def _tiles(rank: int) -> dict[str, int]:
    """Swept for ranks of 16, 64, 128 and 256; the last in 48 KB of shared memory, with more it could be faster."""
    if rank <= 32:
        return {"COLUMNS": 128, "STEP": 32, "num_warps": 4, "num_stages": 2}
    if rank <= 64:
        return {"COLUMNS": 128, "STEP": 64, "num_warps": 8, "num_stages": 2}
    if rank <= 128:
        return {"COLUMNS": 128, "STEP": 64, "num_warps": 4, "num_stages": 3}
    return {"COLUMNS": 64, "STEP": 32, "num_warps": 4, "num_stages": 3}
