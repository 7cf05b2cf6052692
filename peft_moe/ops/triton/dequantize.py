"""FP8 codes times their scales into 16 bits in one pass: every byte is read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, once_a_shape


@triton.jit
def _dequantize_kernel(
    codes, scales, row_index, out,
    rows, cols, out_expert, out_row, out_col, scale_expert, scale_row, block_cols,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row_mask, column_mask = row < rows, column < cols
    mask = row_mask[:, None] & column_mask[None, :]
    values = tl.load(codes + (expert * rows + row[:, None]) * cols + column[None, :], mask=mask, other=0.0)
    block = tl.load(row_index + row, mask=row_mask, other=0)
    at = scales + expert * scale_expert + block[:, None] * scale_row + (column // block_cols)[None, :]
    factor = tl.load(at, mask=mask, other=0.0)
    place = out + expert * out_expert + row[:, None].to(tl.int64) * out_row + column[None, :] * out_col
    tl.store(place, (values.to(tl.float32) * factor).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize_rows_kernel(
    codes, scales, row_index, out,
    rows, cols, out_expert, out_row, out_col, scale_expert, scale_row,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Whole blocks of columns: one scale a row and step, instead of one an element."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    steps = tl.arange(0, BLOCK)
    scale_at = scales + expert * scale_expert + tl.load(row_index + row, mask=row_mask, other=0) * scale_row
    code_at = codes + (expert * rows + row[:, None]) * cols + steps[None, :]
    out_at = out + expert * out_expert + row[:, None].to(tl.int64) * out_row + steps[None, :] * out_col
    for _ in range(0, cols, BLOCK):
        values = tl.load(code_at, mask=row_mask[:, None], other=0.0).to(tl.float32)
        factor = tl.load(scale_at, mask=row_mask, other=0.0)
        tl.store(out_at, (values * factor[:, None]).to(out.dtype.element_ty), mask=row_mask[:, None])
        code_at += BLOCK
        out_at += BLOCK * out_col
        scale_at += 1


def runs_on(device: torch.device) -> bool:
    """Whether the GPU converts FP8 in hardware."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def dequantize_blocks(codes: Tensor, scales: Tensor, row_index: Tensor, block_cols: int, out: Tensor) -> Tensor:
    """`out[e, n, k] = codes[e, n, k] * scales[e, row_index[n], k // block_cols]`, rounded once.

    Args:
        codes: contiguous `(E, N, K)` FP8. scales: `(E or 1, r, c)` fp32 with unit last stride. row_index: `(N,)` int32.
        block_cols: columns of one scale. out: `(E, N, K)` 16 or 32 bits, any strides.
    """
    scale_expert = scales.stride(0) if scales.shape[0] > 1 else 0
    _launch(codes.shape, block_cols, out.stride(), scale_expert, scales.stride(1))(codes, scales, row_index, out)
    return out


@once_a_shape
def _launch(
    shape: tuple[int, int, int], block_cols: int, out_strides: tuple[int, int, int], scale_expert: int, scale_row: int
) -> Launch:
    experts, rows, cols = shape
    numbers = (rows, cols, *out_strides, scale_expert, scale_row)
    if block_cols in (32, 64, 128, 256) and cols % block_cols == 0:
        tile_rows = 4096 // block_cols
        grid = (triton.cdiv(rows, tile_rows), experts)
        return Launch(_dequantize_rows_kernel, grid, numbers, ROWS=tile_rows, BLOCK=block_cols, num_warps=8)
    tile_rows, tile_cols = 16, min(512, triton.next_power_of_2(cols))
    tiles = (triton.cdiv(cols, tile_cols), triton.cdiv(rows, tile_rows), experts)
    return Launch(_dequantize_kernel, tiles, (*numbers, block_cols), ROWS=tile_rows, COLUMNS=tile_cols, num_warps=8)
