"""4-bit codes times their scales into 16 or 32 bits in one pass: NF4, FP4 and MXFP4.

Each half byte is looked up in a table of 16 numbers, which stays in the cache next to the cores; scales that are
themselves in 8 bits (nested ones, or exponents) are decoded on the way. So every byte is read and written once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, once_a_shape

_BYTES = 2048  # of codes, for each program


class Nested(NamedTuple):
    """Scales in 8 bits: `scale = table[byte] * scales[its block] + offset`.

    Attributes:
        table: `(256,)` fp32. scales: fp32, one for each `size` of them. size: how many one covers.
        offsets: fp32, one for each `blocks` of them, in order.
    """

    table: Tensor
    scales: Tensor
    size: int
    offsets: Tensor
    blocks: int


@triton.jit
def _four_bit_kernel(
    codes, scales, table, out, runs, nested_table, nested_scales, offsets,
    blocks, first, nested_size, offset_blocks,
    HALF: tl.constexpr, ROWS: tl.constexpr, HAS_RUNS: tl.constexpr, NESTED: tl.constexpr, EXPONENTS: tl.constexpr,
    LOW_FIRST: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(1).to(tl.int64)
    inside = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # block in its run
    mask = inside < blocks
    start = first + inside
    if HAS_RUNS:
        start += tl.load(runs + run).to(tl.int64) * blocks
    scale = tl.load(scales + start, mask=mask, other=0)
    if NESTED:
        # Two steps, as it is stored: a product that is rounded, and a sum.
        scale = tl.load(nested_table + scale.to(tl.int32)) * tl.load(nested_scales + start // nested_size, mask=mask)
        scale = scale + tl.load(offsets + start // offset_blocks, mask=mask)
    if EXPONENTS:
        bits = scale.to(tl.int32)
        scale = tl.where(bits == 0, 1 << 22, bits << 23).to(tl.float32, bitcast=True)  # 2 ** (byte - 127)
    halves = tl.arange(0, HALF)[None, :]
    byte = tl.load(codes + start[:, None] * HALF + halves, mask=mask[:, None], other=0).to(tl.int32)
    high = (tl.load(table + (byte >> 4)) * scale[:, None]).to(out.dtype.element_ty)
    low = (tl.load(table + (byte & 15)) * scale[:, None]).to(out.dtype.element_ty)
    values = tl.interleave(low, high) if LOW_FIRST else tl.interleave(high, low)
    place = out + (run * blocks + inside)[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(place, values, mask=mask[:, None])


def takes_blocks(size: int) -> bool:
    """Whether the kernel runs for blocks of so many elements."""
    return 16 <= size <= 2 * _BYTES and size & (size - 1) == 0


def dequantize_4bit(
    codes: Tensor,
    scales: Tensor,
    table: Tensor,
    size: int,
    out: Tensor,
    first: int = 0,
    runs: Tensor | None = None,
    nested: Nested | None = None,
    low_first: bool = False,
) -> Tensor:
    """`out[i] = table[code i] * scale of its block`, rounded once.

    Args:
        codes: contiguous uint8, two a byte. scales: contiguous, one for each `size` elements: fp32, or uint8, which are
            the codes of `nested` scales, or else exponents. table: `(16,)` fp32. size: as `takes_blocks` takes it.
        out: contiguous, of whole blocks. first: number of the block with which it begins.
        runs: `(r,)` integers on the device: out has r parts, which lie one after the other in codes, and takes these.
        low_first: the low half of a byte is the earlier element.
    """
    count = 1 if runs is None else runs.numel()
    if out.numel() == 0:
        return out
    blocks = out.numel() // size // count
    nested_table, nested_scales, nested_size, offsets, offset_blocks = nested or (None, None, 1, None, 1)
    exponents = nested is None and scales.dtype == torch.uint8
    launch = _launch(blocks, count, size, first, nested_size, offset_blocks, runs is not None, nested is not None,
                     exponents, low_first)  # fmt: skip
    launch(codes, scales, table, out, runs, nested_table, nested_scales, offsets)
    return out


@once_a_shape
def _launch(
    blocks: int, runs: int, size: int, first: int, nested_size: int, offset_blocks: int, has_runs: bool, nested: bool,
    exponents: bool, low_first: bool,
) -> Launch:  # fmt: skip
    rows = _BYTES * 2 // size
    return Launch(
        _four_bit_kernel, (triton.cdiv(blocks, rows), runs), (blocks, first, nested_size, offset_blocks),
        HALF=size // 2, ROWS=rows, HAS_RUNS=has_runs, NESTED=nested, EXPONENTS=exponents, LOW_FIRST=low_first,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
