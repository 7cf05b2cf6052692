"""One projection of all experts with its adapter: gather, base product, LoRA A and LoRA B.

    low[m] = scale A[e] x[source[m]]          out[m] = W[e] x[source[m]] + B[e] low[m] + bias[e]

A program computes a tile of rows of one expert and a tile of columns. An expert's last rows take half a tile where
that is enough: with 256 rows an expert, a fifth of what tiles of 128 compute would be in vain. LoRA B is one more step
of the base product's accumulation. With few rows an expert, where launches count, LoRA A rides along in the loop over
K; with many, its narrow tile would slow the matrix units more than a pass of its own over the input costs. Where the
GPU has a copy engine, tiles of the weights and of rows that need no gather come by descriptor. Which expert a program
works for follows from the offsets on the device: nothing waits for the host.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..scaled import ScaledStack
from .dequantize import runs_on
from .descriptors import has_descriptors, has_warp_specialization, of_rows, of_stack
from .launch import Launch, once_a_shape
from .tile_sizes import FEW_ROWS, GROUP, HALVED_ROWS, LONGEST_STEP, RIDING_RANK, shared_memory, tile_sizes
from .tiles import find_tile, rank_width, row_tiles


@triton.jit
def project_tile(
    expert, start, end, column_tile,
    x, x_tiles, source, w, w_tiles, w_scales, a, b, bias, out, low,
    scale, n_size, k_size, scale_rows, scale_columns,
    x_row, w_expert, w_n, w_k, s_expert, s_n, s_k, a_expert, a_r, a_k, b_expert, b_n, b_r,
    RANK: tl.constexpr, RANKS: tl.constexpr, HAS_SOURCE: tl.constexpr, X_TILES: tl.constexpr, W_TILES: tl.constexpr,
    K_FIRST: tl.constexpr, SCALED: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr, HAS_BIAS: tl.constexpr,
    SCALE_OUT: tl.constexpr, EVEN_K: tl.constexpr, WHOLE_N: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    rows = start + tl.arange(0, ROWS)
    row_mask = rows < end
    if HAS_SOURCE:
        position = tl.load(source + rows, mask=row_mask, other=0).to(tl.int64)
    else:
        position = rows.to(tl.int64)
    first_column = column_tile * COLUMNS
    if WHOLE_N:
        # The last tile moves back and computes some columns again: a mask in the address of a transposed weight
        # would hide from the compiler that columns are contiguous, which costs a factor of 12.
        first_column = tl.multiple_of(tl.minimum(first_column, n_size - COLUMNS), 16)
    columns = first_column + tl.arange(0, COLUMNS)
    column_mask = columns < n_size
    steps = tl.arange(0, STEP)
    # RANK of them, and what is missing to a power of two; of high ranks, where LoRA A never rides along, 64 at a time
    RANK_STEP: tl.constexpr = RANKS if RANKS < 64 else 64
    ranks = tl.arange(0, RANK_STEP)
    expert64 = expert.to(tl.int64)
    x_at = x + position[:, None] * x_row + steps[None, :]
    # Factors of ranks that are no power of two: their last columns are masked, not moved.
    NARROW: tl.constexpr = (COLUMNS <= 64 or SCALE_OUT) and not (WHOLE_N or SCALED or HAS_B)
    inside_columns = columns if WHOLE_N or NARROW else tl.where(column_mask, columns, 0)
    w_at = w + expert64 * w_expert + inside_columns[None, :] * w_n + steps[:, None] * w_k
    if SCALED:
        scales_at = w_scales + expert64 * s_expert + (inside_columns // scale_rows) * s_n
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if HAS_A:
        a_at = a + expert64 * a_expert + ranks[None, :] * a_r + steps[:, None] * a_k
        low_total = tl.zeros((ROWS, RANK_STEP), dtype=tl.float32)
    for k in range(0, k_size, STEP):
        if X_TILES:
            x_tile = x_tiles.load([start, k])
        else:
            # Rows past the end are not loaded at all: all from one place, they would be slower than real ones.
            inside = row_mask[:, None] if EVEN_K else row_mask[:, None] & (k + steps < k_size)[None, :]
            x_tile = tl.load(x_at, mask=inside, other=0.0)
            x_at += STEP
        if W_TILES:
            # Past an expert's edge lie the weights of the next: those columns are not stored. Past K of all lie zeros.
            if K_FIRST:
                w_tile = w_tiles.load([expert * k_size + k, first_column])
            else:
                w_tile = w_tiles.load([expert * n_size + first_column, k]).T
        else:
            if NARROW:
                w_tile = tl.load(w_at, mask=(k + steps < k_size)[:, None] & column_mask[None, :], other=0.0)
            else:
                w_tile = tl.load(w_at) if EVEN_K else tl.load(w_at, mask=(k + steps < k_size)[:, None], other=0.0)
            w_at += STEP * w_k
        if SCALED:  # of one step along K they are those of its first column
            part = tl.dot(x_tile, w_tile.to(x_tile.dtype))
            total += part * tl.load(scales_at + (k // scale_columns) * s_k)[None, :]
        else:
            total = tl.dot(x_tile, w_tile, total)
        if HAS_A:
            if EVEN_K and RANK == RANKS:
                a_tile = tl.load(a_at)
            else:
                a_tile = tl.load(a_at, mask=(k + steps < k_size)[:, None] & (ranks < RANK)[None, :], other=0.0)
            low_total = tl.dot(x_tile, a_tile, low_total)
            a_at += STEP * a_k
    if HAS_B:
        for first_rank in tl.static_range(0, RANK, RANK_STEP):
            rank = first_rank + ranks
            low_at = low + rows.to(tl.int64)[:, None] * RANK + rank[None, :]
            low_mask = row_mask[:, None]
            b_at = b + expert64 * b_expert + rank[:, None] * b_r + inside_columns[None, :] * b_n
            if first_rank + RANK_STEP <= RANK:
                b_tile = tl.load(b_at)
            else:
                low_mask &= (rank < RANK)[None, :]
                b_tile = tl.load(b_at, mask=(rank < RANK)[:, None], other=0.0)
            if HAS_A:
                low_tile = (low_total * scale).to(x.dtype.element_ty)
            else:
                low_tile = tl.load(low_at, mask=low_mask, other=0.0)
            total = tl.dot(low_tile, b_tile, total)
            if HAS_A:
                if column_tile == 0:
                    tl.store(low_at, low_tile, mask=low_mask)
    if HAS_BIAS:
        total += tl.load(bias + expert64 * n_size + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if SCALE_OUT:
        total *= scale
    out_at = out + rows.to(tl.int64)[:, None] * n_size + columns[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def _project_kernel(
    x, x_tiles, x_halves, source, w, w_tiles, w_scales, a, b, bias, offsets, out, low,
    scale, n_size, k_size, scale_rows, scale_columns,
    x_row, w_expert, w_n, w_k, s_expert, s_n, s_k, a_expert, a_r, a_k, b_expert, b_n, b_r,
    experts: tl.constexpr, EXPERTS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    HAS_SOURCE: tl.constexpr, X_TILES: tl.constexpr, W_TILES: tl.constexpr, K_FIRST: tl.constexpr,
    SCALED: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr, HAS_BIAS: tl.constexpr, SCALE_OUT: tl.constexpr,
    EVEN_K: tl.constexpr, WHOLE_N: tl.constexpr, GROUP: tl.constexpr, HALVES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    # A few row tiles by all column tiles, row tiles first: programs that run together share rows and weights.
    across = GROUP * tl.cdiv(n_size, COLUMNS)
    place = tl.program_id(0) % across
    row_tile, column_tile = tl.program_id(0) // across * GROUP + place % GROUP, place // GROUP
    expert, start, end = find_tile(offsets, row_tile, experts, EXPERTS, ROWS)
    if expert < experts:
        if HALVES and end - start <= ROWS // 2:  # an expert's last rows
            project_tile(
                expert, start, end, column_tile,
                x, x_halves, source, w, w_tiles, w_scales, a, b, bias, out, low,
                scale, n_size, k_size, scale_rows, scale_columns,
                x_row, w_expert, w_n, w_k, s_expert, s_n, s_k, a_expert, a_r, a_k, b_expert, b_n, b_r,
                RANK, RANKS, HAS_SOURCE, X_TILES, W_TILES, K_FIRST, SCALED, HAS_A, HAS_B, HAS_BIAS, SCALE_OUT, EVEN_K,
                WHOLE_N, ROWS // 2, COLUMNS, STEP,
            )  # fmt: skip
        else:
            project_tile(
                expert, start, end, column_tile,
                x, x_tiles, source, w, w_tiles, w_scales, a, b, bias, out, low,
                scale, n_size, k_size, scale_rows, scale_columns,
                x_row, w_expert, w_n, w_k, s_expert, s_n, s_k, a_expert, a_r, a_k, b_expert, b_n, b_r,
                RANK, RANKS, HAS_SOURCE, X_TILES, W_TILES, K_FIRST, SCALED, HAS_A, HAS_B, HAS_BIAS, SCALE_OUT, EVEN_K,
                WHOLE_N, ROWS, COLUMNS, STEP,
            )  # fmt: skip


def multiplies(weight: ScaledStack) -> bool:
    """Whether the kernel takes these codes: the GPU converts FP8, and no step along K has more than one scale."""
    codes = weight.codes
    if codes.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2) or not runs_on(codes.device):
        return False
    return weight.columns >= codes.shape[2] or weight.columns % LONGEST_STEP == 0


def project(
    x: Tensor,
    source: Tensor | None,
    weight: Tensor | ScaledStack,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    bias: Tensor | None,
    offsets: Tensor,
    tiles: dict[str, int] | None = None,
    low: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rows through their expert's projection.

    Args:
        x: `(T, K)` with unit stride in K. source: `(S,)` row of x for each sorted row; `None`: x is `(S, K)` itself.
        weight: `(E, N, K)`, any strides, or codes that `multiplies`.
        a: `(E, R, K)`, b: `(E, N, R)`, any strides; or both `None`.
        scale: of the low-rank product. bias: contiguous `(E, N)` or `None`.
        offsets: `(E,)` int32 ends of the experts' rows.
        tiles: sizes to use instead of the default ones.
        low: contiguous `(S, R)` where it is known; A is not looked at then.

    Returns: out `(S, N)` and low `(S, R)` in the dtype of x; rows past `offsets[-1]` are not written.
    """
    rows = x.shape[0] if source is None else source.shape[0]
    if low is not None:
        a = None
    elif a is not None and (rows > FEW_ROWS * weight.shape[0] or a.shape[1] > RIDING_RANK):
        low, a = low_rank(x, a, scale, offsets, source), None
    return _launch(x, source, weight, a, b, scale, low, bias, offsets, tiles, scale_out=False)


def low_rank(
    x: Tensor, a: Tensor, scale: float, offsets: Tensor, source: Tensor | None = None,
    tiles: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """`scale A x` `(S, R)` alone; arguments as those of `project`."""
    return _launch(x, source, a, None, None, scale, None, None, offsets, tiles, scale_out=True)[0]


def _launch(
    x: Tensor,
    source: Tensor | None,
    weight: Tensor | ScaledStack,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    low: Tensor | None,
    bias: Tensor | None,
    offsets: Tensor,
    tiles: dict[str, int] | None,
    scale_out: bool,
) -> tuple[Tensor, Tensor | None]:
    rows = x.shape[0] if source is None else source.shape[0]
    scales = scaling = None
    if isinstance(weight, ScaledStack):
        codes, scales = weight.codes, weight.scales
        scaling = (weight.rows, weight.columns, *scales.stride())
    else:
        codes = weight
    out = x.new_empty(rows, weight.shape[1])
    if a is not None:
        low = x.new_empty(rows, a.shape[1])
    if rows == 0:
        return out, low
    riding = 0 if a is None else rank_width(a.shape[1])
    chosen = tiles or tile_sizes(
        rows, *weight.shape[:2], riding, scale_out, scales is not None, shared_memory(x.device)
    )  # fmt: skip
    by_tiles = scales is None and chosen["ROWS"] >= HALVED_ROWS and chosen["COLUMNS"] > 64 and x.element_size() == 2
    plain = source is None and a is None and not scale_out and not tiles
    if by_tiles and plain and has_warp_specialization(x.device):
        from .warp_specialized import multiply

        if multiply(x, codes, b, low, bias, offsets, out):
            return out, low
    x_tiles = x_halves = w_tiles = None
    if by_tiles and has_descriptors(x.device):
        x_tiles, x_halves, w_tiles = _descriptors(x, source, codes, chosen)
    launch = _of_shapes(
        rows, x.stride(0), source is not None, codes.shape, codes.stride(), scaling,
        None if a is None else a.stride(), None if b is None else (b.shape[2], *b.stride()), bias is not None,
        float(scale), scale_out, x_tiles is not None, w_tiles is not None,
        tuple(chosen.items()),
    )  # fmt: skip
    launch(x, x_tiles, x_halves, source, codes, w_tiles, scales, a, b, bias, offsets, out, low)
    return out, low


def _descriptors(x: Tensor, source: Tensor | None, weight: Tensor, tiles: dict[str, int]) -> tuple[Any, Any, Any]:
    """Of tiles of rows, of half as many rows, and of weights; `None` for what comes by pointers."""
    height, columns, step = tiles["ROWS"], tiles["COLUMNS"], tiles["STEP"]
    x_tiles = x_halves = w_tiles = None
    if source is None:
        x_tiles, x_halves = of_rows(x, height, step), of_rows(x, height // 2, step)
    _, n_size, k_size = weight.shape
    k_first = weight.stride(2) != 1
    # Transposed weights: past K such a tile holds those of the next expert, which zeros of x do not hide if they are
    # infinite; and with a gather, whole tiles come as fast by pointers.
    if not k_first or (k_size % step == 0 and (source is None or n_size % columns)):
        w_tiles = of_stack(weight, columns, step)
    return x_tiles, x_halves, w_tiles


@once_a_shape
def _of_shapes(
    rows: int, x_row: int, has_source: bool, shape: tuple[int, int, int], w_strides: tuple[int, int, int],
    scaling: tuple[int, ...] | None, a_strides: tuple[int, int, int] | None, b: tuple[int, int, int, int] | None,
    has_bias: bool, scale: float, scale_out: bool, by_x_tiles: bool, by_w_tiles: bool,
    tiles: tuple[tuple[str, int], ...],
) -> Launch:  # fmt: skip
    experts, n_size, k_size = shape
    chosen = dict(tiles)
    columns, rank = chosen["COLUMNS"], b[0] if b else 16
    covered, scale_strides = ((1, 1), (0, 0, 0)) if scaling is None else (scaling[:2], scaling[2:])
    height = -(-row_tiles(rows, experts, chosen["ROWS"]) // GROUP) * GROUP
    return Launch(
        _project_kernel, (height * -(-n_size // columns),),
        (scale, n_size, k_size, *covered, x_row, *w_strides, *scale_strides,
         *(a_strides or (0, 0, 0)), *(b[1:] if b else (0, 0, 0))),
        experts=experts, EXPERTS=1 << (experts - 1).bit_length(), RANK=rank, RANKS=rank_width(rank),
        HAS_SOURCE=has_source, X_TILES=by_x_tiles, W_TILES=by_w_tiles, K_FIRST=w_strides[2] != 1,
        SCALED=scaling is not None, HAS_A=a_strides is not None, HAS_B=b is not None,
        HAS_BIAS=has_bias, SCALE_OUT=scale_out, EVEN_K=k_size % chosen["STEP"] == 0,
        WHOLE_N=n_size % 16 == 0 and n_size >= columns, GROUP=GROUP, HALVES=chosen["ROWS"] >= HALVED_ROWS,
        **chosen,
    )  # fmt: skip
