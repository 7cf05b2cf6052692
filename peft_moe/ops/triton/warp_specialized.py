"""The product of `project` on Hopper, with warps that only copy and warps that only multiply.

A kernel whose warps do both fills its pipeline anew for each tile, finds its rows, loads the low-rank operands and
stores while the tensor cores wait: 5 microseconds a tile, where the products of K = 768 take 8. Here one warp runs
ahead through all tiles of a program and has the copy engine fill buffers; two warpgroups, each with half a tile's rows,
empty them. Rows that have to be gathered are not copied by tiles, so those products stay with `project`.

Written in Gluon, Triton's language of explicit layouts and barriers, which is experimental: `has_warp_specialization`
says where this module can be imported.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .descriptors import is_aligned, stack_as_matrix
from .launch import Launch, once_a_shape
from .tiles import rank_width

_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed in Triton 3.7
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _find(offsets, experts, expert, begin, end, before, row_tile, ROWS: gl.constexpr):
    """(expert, its first row, its end, row tiles before it) of a row tile; the search starts from an earlier one's."""
    while (expert < experts) & (row_tile >= before + gl.cdiv(end - begin, ROWS)):
        before += gl.cdiv(end - begin, ROWS)
        expert += 1
        begin = end
        end = gl.load(offsets + gl.minimum(expert, experts - 1))
    return expert, begin, end, before


@gluon.jit
def _tile(
    offsets, experts, number, across, expert, begin, end, before,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """(expert, first row, end of the expert's rows, first column) of a tile; expert == experts: past the last one."""
    row_tile, first_column = number // across * GROUP + number % GROUP, number % across // GROUP * COLUMNS
    expert, begin, end, before = _find(offsets, experts, expert, begin, end, before, row_tile, ROWS)
    return expert, begin + (row_tile - before) * ROWS, end, first_column


@gluon.jit
def _copy(
    tiles, buffers, barriers, offsets, experts, n_size, k_size,
    K_FIRST: gl.constexpr, HAS_B: gl.constexpr, R_FIRST: gl.constexpr, RANK: gl.constexpr,
    COLUMNS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """The one warp that copies."""
    x_tiles, w_tiles, low_tiles, b_tiles = tiles
    x_buffers, w_buffers, low_buffers, b_buffer = buffers
    empty, ready, low_empty, low_ready = barriers
    HALF: gl.constexpr = x_tiles.block_type.shape[0]
    steps = gl.cdiv(k_size, STEP)
    across = GROUP * gl.cdiv(n_size, COLUMNS)
    number = gl.program_id(0)
    copied, tiles_done = gl.to_tensor(0), gl.to_tensor(0)
    zero = gl.to_tensor(0)
    expert, begin, end, before = _find(
        offsets, experts, zero, zero, gl.load(offsets), zero, number // across * GROUP, 2 * HALF
    )
    while expert < experts:
        mine, start, last, first_column = _tile(
            offsets, experts, number, across, expert, begin, end, before, 2 * HALF, COLUMNS, GROUP
        )
        if mine < experts:
            for step in range(steps):
                stage = copied % STAGES
                k = step * STEP
                bar = ready.index(stage)
                mbarrier.wait(empty.index(stage), (copied // STAGES & 1) ^ 1)
                if last - start > HALF:
                    mbarrier.expect(bar, w_tiles.block_type.nbytes + 2 * x_tiles.block_type.nbytes)
                    _load(x_tiles, [start + HALF, k], bar, x_buffers.index(2 * stage + 1))
                else:
                    mbarrier.expect(bar, w_tiles.block_type.nbytes + x_tiles.block_type.nbytes)
                _load(x_tiles, [start, k], bar, x_buffers.index(2 * stage))
                # Past an expert's edge lie the weights of the next: those columns are not stored. Past K of all lie
                # zeros.
                if K_FIRST:
                    _load(w_tiles, [mine * k_size + k, first_column], bar, w_buffers.index(stage))
                else:
                    _load(w_tiles, [mine * n_size + first_column, k], bar, w_buffers.index(stage))
                copied += 1
                if HAS_B:
                    # Not before the tile's first step was used: until then the tile before may use these buffers, and
                    # to wait for it would hold up the steps.
                    if step == gl.minimum(STAGES, steps - 1):
                        bar = low_ready.index(0)
                        mbarrier.wait(low_empty.index(0), (tiles_done & 1) ^ 1)
                        mbarrier.expect(bar, b_tiles.block_type.nbytes + 2 * low_tiles.block_type.nbytes)
                        _load(low_tiles, [start, 0], bar, low_buffers.index(0))
                        _load(low_tiles, [start + HALF, 0], bar, low_buffers.index(1))
                        if R_FIRST:
                            _load(b_tiles, [mine * RANK, first_column], bar, b_buffer.index(0))
                        else:
                            _load(b_tiles, [mine * n_size + first_column, 0], bar, b_buffer.index(0))
                        tiles_done += 1
        number += gl.num_programs(0)
        expert, begin, end, before = _find(
            offsets, experts, expert, begin, end, before, number // across * GROUP, 2 * HALF
        )


@gluon.jit
def _store_rows(total, buffer, out_tiles, out, start, last, first_column, n_size):
    HALF: gl.constexpr = out_tiles.block_type.shape[0]
    COLUMNS: gl.constexpr = out_tiles.block_type.shape[1]
    tma.store_wait(0)  # the copy before this one has read the buffer
    buffer.store(total.to(out_tiles.dtype))
    if last - start >= HALF:
        fence_async_shared()
        _store(out_tiles, [start, first_column], buffer)
    else:  # the next rows are another expert's
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
        rows = start + gl.arange(0, HALF, gl.SliceLayout(1, layout))
        columns = first_column + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
        inside = (rows < last)[:, None] & (columns < n_size)[None, :]
        gl.store(out + rows.to(gl.int64)[:, None] * n_size + columns[None, :], buffer.load(layout), mask=inside)


@gluon.jit
def _products(
    half, buffers, barriers, out_buffers, out_tiles, out, bias, offsets, experts, n_size, k_size,
    K_FIRST: gl.constexpr, HAS_B: gl.constexpr, R_FIRST: gl.constexpr, HAS_BIAS: gl.constexpr,
    COLUMNS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """A warpgroup that multiplies the upper (half = 0) or the lower rows of each tile."""
    x_buffers, w_buffers, low_buffers, b_buffer = buffers
    empty, ready, low_empty, low_ready = barriers
    HALF: gl.constexpr = out_tiles.block_type.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    steps = gl.cdiv(k_size, STEP)
    across = GROUP * gl.cdiv(n_size, COLUMNS)
    number = gl.program_id(0)
    used, tiles_done = gl.to_tensor(0), gl.to_tensor(0)
    zero = gl.to_tensor(0)
    expert, begin, end, before = _find(
        offsets, experts, zero, zero, gl.load(offsets), zero, number // across * GROUP, 2 * HALF
    )
    while expert < experts:
        mine, start, last, first_column = _tile(
            offsets, experts, number, across, expert, begin, end, before, 2 * HALF, COLUMNS, GROUP
        )
        if mine < experts:
            start += half * HALF
            if start < last:
                total = gl.zeros((HALF, COLUMNS), gl.float32, layout)
                for step in range(steps):
                    stage = used % STAGES
                    mbarrier.wait(ready.index(stage), used // STAGES & 1)
                    w_buffer = w_buffers.index(stage)
                    if not K_FIRST:
                        w_buffer = w_buffer.permute((1, 0))
                    x_buffer = x_buffers.index(2 * stage + half)
                    total = warpgroup_mma(x_buffer, w_buffer, total, use_acc=step > 0, is_async=True)
                    total = warpgroup_mma_wait(1, deps=(total,))  # the step before is done
                    mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES), count=1, pred=step > 0)
                    used += 1
                if HAS_B:
                    mbarrier.wait(low_ready.index(0), tiles_done & 1)
                    b_tile = b_buffer.index(0)
                    if not R_FIRST:
                        b_tile = b_tile.permute((1, 0))
                    total = warpgroup_mma(low_buffers.index(half), b_tile, total, is_async=True)
                total = warpgroup_mma_wait(0, deps=(total,))
                mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES), count=1)
                if HAS_B:
                    mbarrier.arrive(low_empty.index(0), count=1)
                if HAS_BIAS:
                    columns = first_column + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
                    added = gl.load(bias + mine * n_size + columns, mask=columns < n_size, other=0.0)
                    total += added.to(gl.float32)[None, :]
                buffer = out_buffers.index(half)
                if out_tiles.block_type.shape[1] == COLUMNS:
                    _store_rows(total, buffer, out_tiles, out, start, last, first_column, n_size)
                else:
                    left, right = total.reshape([HALF, 2, COLUMNS // 2]).permute(0, 2, 1).split()
                    _store_rows(left, buffer, out_tiles, out, start, last, first_column, n_size)
                    _store_rows(right, buffer, out_tiles, out, start, last, first_column + COLUMNS // 2, n_size)
            else:  # the expert's last rows are all in the upper half
                for _step in range(steps):
                    stage = used % STAGES
                    mbarrier.wait(ready.index(stage), used // STAGES & 1)
                    mbarrier.arrive(empty.index(stage), count=1)
                    used += 1
                if HAS_B:
                    mbarrier.wait(low_ready.index(0), tiles_done & 1)
                    mbarrier.arrive(low_empty.index(0), count=1)
            tiles_done += 1
        number += gl.num_programs(0)
        expert, begin, end, before = _find(
            offsets, experts, expert, begin, end, before, number // across * GROUP, 2 * HALF
        )
    tma.store_wait(0)


@gluon.jit
def _specialized_project_kernel(
    offsets, x_tiles, w_tiles, low_tiles, b_tiles, out_tiles, out, bias,
    experts, n_size, k_size,
    K_FIRST: gl.constexpr, HAS_B: gl.constexpr, R_FIRST: gl.constexpr, HAS_BIAS: gl.constexpr, RANK: gl.constexpr,
    COLUMNS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    x_buffers = gl.allocate_shared_memory(x_tiles.dtype, [2 * STAGES] + x_tiles.block_type.shape, x_tiles.layout)
    w_buffers = gl.allocate_shared_memory(w_tiles.dtype, [STAGES] + w_tiles.block_type.shape, w_tiles.layout)
    out_buffers = gl.allocate_shared_memory(out_tiles.dtype, [2] + out_tiles.block_type.shape, out_tiles.layout)
    low_buffers, b_buffer = x_buffers, w_buffers  # not used so, but they have to be something
    if HAS_B:
        low_buffers = gl.allocate_shared_memory(low_tiles.dtype, [2] + low_tiles.block_type.shape, low_tiles.layout)
        b_buffer = gl.allocate_shared_memory(b_tiles.dtype, [1] + b_tiles.block_type.shape, b_tiles.layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    low_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    low_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(empty.index(stage), count=2)  # by both warpgroups
        mbarrier.init(ready.index(stage), count=1)
    mbarrier.init(low_empty.index(0), count=2)
    mbarrier.init(low_ready.index(0), count=1)
    tiles = (x_tiles, w_tiles, low_tiles, b_tiles)
    buffers = (x_buffers, w_buffers, low_buffers, b_buffer)
    barriers = (empty, ready, low_empty, low_ready)
    gl.warp_specialize(
        [
            (_products, (
                0, buffers, barriers, out_buffers, out_tiles, out, bias, offsets, experts, n_size, k_size,
                K_FIRST, HAS_B, R_FIRST, HAS_BIAS, COLUMNS, STEP, STAGES, GROUP,
            )),
            (_products, (
                1, buffers, barriers, out_buffers, out_tiles, out, bias, offsets, experts, n_size, k_size,
                K_FIRST, HAS_B, R_FIRST, HAS_BIAS, COLUMNS, STEP, STAGES, GROUP,
            )),
            (_copy, (
                tiles, buffers, barriers, offsets, experts, n_size, k_size,
                K_FIRST, HAS_B, R_FIRST, RANK, COLUMNS, STEP, STAGES, GROUP,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


_HALF, _COLUMNS, _STEP = 64, 256, 64  # rows of a warpgroup, columns of a tile, a step along K
_LARGEST_RANK = 64  # whose operands still fit beside the buffers
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def multiply(
    x: Tensor, weight: Tensor, b: Tensor | None, low: Tensor | None, bias: Tensor | None, offsets: Tensor, out: Tensor
) -> bool:
    """`out[m] = W[e] x[m] + B[e] low[m] + bias[e]`, if strides and sizes allow; else False, and nothing is done.

    Args: x `(S, K)`, weight `(E, N, K)`, low contiguous `(S, R)`, b `(E, N, R)`, bias contiguous `(E, N)`, offsets
        `(E,)` int32 as of `project.project`; b and low may be `None`, and bias. out: receives `(S, N)`, contiguous;
        rows past `offsets[-1]` are not written.
    """
    experts, n_size, k_size = weight.shape
    rank = 16 if b is None else b.shape[2]
    ranks = rank_width(rank)
    k_first, r_first = weight.stride(2) != 1, b is not None and b.stride(2) != 1
    # Transposed weights: past K such a tile holds those of the next expert, which zeros of x do not hide if they are
    # infinite. So it is with B and its rank.
    if x.dtype not in _DTYPES or rank > _LARGEST_RANK or (k_first and k_size % _STEP) or (r_first and rank != ranks):
        return False
    if not (is_aligned(x, x.stride(0)) and is_aligned(out, n_size) and (low is None or is_aligned(low, rank))):
        return False
    wide = _COLUMNS if ranks == 16 else _COLUMNS // 2  # of what is stored at once: there is no room for more
    w_tiles, low_tiles, b_tiles = _of_stack(weight, _STEP), None, None
    if b is not None and low is not None:
        low_tiles, b_tiles = _tiles(low, low.shape, rank, (_HALF, ranks)), _of_stack(b, ranks)
    if w_tiles is None or (b is not None and b_tiles is None):
        return False
    launch = _of_shapes(x.device, experts, n_size, k_size, k_first, rank, b is not None, r_first, bias is not None)
    launch(
        offsets, _tiles(x, x.shape, x.stride(0), (_HALF, _STEP)), w_tiles, low_tiles, b_tiles,
        _tiles(out, out.shape, n_size, (_HALF, wide)), out, bias,
    )  # fmt: skip
    return True


def _tiles(matrix: Tensor, shape: tuple[int, ...], row: int, block: tuple[int, int]) -> Any:
    return TensorDescriptor(matrix, list(shape), [row, 1], list(block), _layout(block, matrix.dtype))


@cache
def _layout(block: tuple[int, int], dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[dtype])


def _of_stack(stack: Tensor, depth: int) -> Any:
    """Descriptor of `(E, N, K)` as one matrix, in tiles `depth` deep along K; `None` where there can be none."""
    matrix = stack_as_matrix(stack)
    if matrix is None:
        return None
    shape, row = matrix
    return _tiles(stack, shape, row, (_COLUMNS, depth) if stack.stride(2) == 1 else (depth, _COLUMNS))


@cache
def processors(device: torch.device) -> int:
    """Each runs one program, which fills its shared memory."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@once_a_shape
def _of_shapes(
    device: torch.device, experts: int, n_size: int, k_size: int, k_first: bool, rank: int, has_b: bool, r_first: bool,
    has_bias: bool,
) -> Launch:  # fmt: skip
    return Launch(
        _specialized_project_kernel, (processors(device),), (experts, n_size, k_size),
        K_FIRST=k_first, HAS_B=has_b, R_FIRST=r_first, HAS_BIAS=has_bias, RANK=rank,
        COLUMNS=_COLUMNS, STEP=_STEP, STAGES=3, GROUP=4, num_warps=4, maxnreg=168,
    )  # fmt: skip
