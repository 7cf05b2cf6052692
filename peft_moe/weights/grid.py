"""Where each scale of an 8-bit tensor applies: blocks, rows, whole tensors, and two halves with blocks of their own.

Scales always multiply: `weight = codes * scale`. They are seen as `(experts, r, c)`, one for each block of `(rows,
cols)`; the last block of an axis is short where the block size does not divide it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
)
E8M0 = getattr(torch, "float8_e8m0fnu", None)
_POWERS = tuple(2**n for n in range(4, 11))  # block sizes that are in use where nobody states one


def decode_scale(scale: Tensor) -> Tensor:
    """Scales as fp32 (fp64 stays): floating tensors, e8m0, or the bytes of e8m0 (`2 ** (byte - 127)`)."""
    if scale.dtype == torch.uint8:
        return torch.exp2(scale.float() - 127)
    return scale if scale.dtype == torch.float64 else scale.float()


def are_powers(scale: Tensor) -> bool:
    """Whether all of these scales are powers of two, which a floating dtype can hold, too (`scale_fmt` ue8m0)."""
    mantissa, _ = torch.frexp(decode_scale(scale))
    return bool((mantissa == 0.5).all())


def encode_scale(scale: Tensor, dtype: torch.dtype, powers: bool = False) -> Tensor:
    """Scales in the dtype in which they are stored; powers of two are rounded up, so that no code overflows.

    Args: powers: make powers of two of them in any dtype; e8m0 holds nothing else.
    """
    if powers or dtype in (torch.uint8, E8M0):
        exponent = torch.ceil(torch.log2(scale.float())).clamp(-127, 127)
        # log2 of a power of two may come out a hair above the integer
        exponent = torch.where(torch.exp2(exponent - 1) >= scale, exponent - 1, exponent)
        if dtype == torch.uint8:
            return (exponent + 127).to(torch.uint8)
        return torch.exp2(exponent).to(dtype)
    return scale.to(dtype)


def block_length(size: int, count: int, stated: int | None, axis: str) -> int:
    """How many of `size` rows (or columns) one of `count` scales covers.

    `stated` is the block size that the model names. Without one it is inferred: one scale covers all, as many scales
    as rows cover one each, else the quotient. Raises `ValueError` where that does not fit, or where two sizes would.
    """
    if stated is not None:
        if math.ceil(size / stated) == count:
            return stated
        raise ValueError(
            f"{count} scales over {size} {axis} in blocks of {stated}, expected {math.ceil(size / stated)}"
        )
    if count == 1:
        return size
    if count == size:
        return 1
    fitting = [power for power in _POWERS if math.ceil(size / power) == count]
    if size % count == 0 and (not fitting or size // count in fitting):
        return size // count
    if len(fitting) == 1 and size % count:
        return fitting[0]
    raise ValueError(f"{count} scales over {size} {axis}, and the model states no block size that would say how")


@dataclass(frozen=True)
class Grid:
    """The blocks of a `(rows, cols)` matrix.

    Attributes:
        sections: rows of each part that has blocks of its own; gate and up rows that were quantized apart are two.
        block_rows, block_cols: of one scale.
    """

    sections: tuple[int, ...]
    block_rows: int
    cols: int
    block_cols: int

    @property
    def shape(self) -> tuple[int, int]:
        """`(r, c)`: how many scales a matrix has."""
        return sum(math.ceil(rows / self.block_rows) for rows in self.sections), math.ceil(self.cols / self.block_cols)

    def row_index(self, device: torch.device) -> Tensor:
        """`(rows,)` int64: the row of scales that applies to each row."""
        found, start = [], 0
        for rows in self.sections:
            found.append(torch.arange(rows, device=device) // self.block_rows + start)
            start += math.ceil(rows / self.block_rows)
        return found[0] if len(found) == 1 else torch.cat(found)

    def _column_blocks(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Views of `(E, rows, cols)`: full blocks `(E, rows, n, block)` and the short last one `(E, rows, rest)`."""
        full = self.cols // self.block_cols
        head = values[..., : full * self.block_cols].unflatten(-1, (full, self.block_cols))
        return head, values[..., full * self.block_cols :]

    def scale_(self, values: Tensor, scales: Tensor, divide: bool = False) -> Tensor:
        """Multiply (or divide) `(E, rows, cols)` in place by `(E or 1, r, c)` scales of the same dtype."""
        if scales.shape[1] > 1:
            scales = scales.index_select(1, self.row_index(values.device))
        head, tail = self._column_blocks(values)
        full = head.shape[-2]
        for part, factor in ((head, scales[..., :full, None]), (tail, scales[..., full:])):
            if part.numel():
                part.div_(factor) if divide else part.mul_(factor)
        return values

    def largest(self, values: Tensor) -> Tensor:
        """`(E, r, c)`: the largest magnitude in each block of `(E, rows, cols)`."""
        head, tail = self._column_blocks(values)
        by_row = head.abs().amax(dim=-1)
        if tail.shape[-1]:
            by_row = torch.cat([by_row, tail.abs().amax(dim=-1, keepdim=True)], dim=-1)
        rows, _ = self.shape
        if rows == 1:
            return by_row.amax(dim=1, keepdim=True)
        out = by_row.new_zeros(by_row.shape[0], rows, by_row.shape[2])
        index = self.row_index(values.device)[None, :, None].expand_as(by_row)
        return out.scatter_reduce_(1, index, by_row, "amax")

    def expand(self, flags: Tensor) -> Tensor:
        """`(E, r, c)` booleans of the blocks -> `(E, rows, cols)` booleans of their elements."""
        spread = flags.index_select(1, self.row_index(flags.device))
        return spread.repeat_interleave(self.block_cols, dim=2)[..., : self.cols]


def find_grids(rows: int, cols: int, counts: tuple[int, int], stated: Sequence[int] | None, halves: bool) -> list[Grid]:
    """Every way in which `(r, c)` scales can lie over a matrix: one, or two that only the codes can tell apart.

    Args: stated: the block size that the model names. halves: the rows are gate and up, one after the other, which a
    checkpoint of single experts quantizes apart.

    Raises `ValueError` if the scales do not fit.
    """
    stated_rows, stated_cols = (None, None) if stated is None else stated
    block_cols = block_length(cols, counts[1], stated_cols, "columns")
    found: list[Grid] = []
    problem: ValueError | None = None
    try:
        found.append(Grid((rows,), block_length(rows, counts[0], stated_rows, "rows"), cols, block_cols))
    except ValueError as error:
        problem = error
    if halves and rows % 2 == 0 and counts[0] % 2 == 0:
        half = rows // 2
        try:
            block = block_length(half, counts[0] // 2, stated_rows, "rows of gate and of up")
            apart = Grid((half, half), block, cols, block_cols)
            cpu = torch.device("cpu")
            if not found or not torch.equal(apart.row_index(cpu), found[0].row_index(cpu)):
                found.append(apart)
        except ValueError as error:
            problem = problem or error
    if not found:
        assert problem is not None
        raise problem
    return found


def quantize(
    values: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    shared: bool = False,
    powers: bool = False,
) -> tuple[Tensor, Tensor]:
    """Codes `(E, rows, cols)` of an 8-bit dtype and their scales `(E, r, c)`, new ones for every block.

    Args: values: fp32 or fp64, consumed. shared: one scale for all experts, `(1, 1, 1)`. powers: scales
    that are powers of two.

    Raises `ValueError` if a value is not finite: no code would hold it.
    """
    largest = grid.largest(values)
    if shared:
        largest = largest.amax(dim=0, keepdim=True)
    if not torch.isfinite(largest).all():
        raise ValueError("the merged weights hold values that are not finite; the adapter seems broken")
    top = torch.finfo(dtype).max
    # A block of zeros has no magnitude to scale by: any scale does, one is the plainest.
    scales = encode_scale(torch.where(largest > 0, largest / top, 1.0), scale_dtype, powers)
    decoded = decode_scale(scales).to(values.dtype)
    # A scale that underflowed to zero would turn its block into NaN: such values are zero in this storage.
    divisor = torch.where(decoded > 0, decoded, torch.inf)
    return grid.scale_(values, divisor, divide=True).clamp_(-top, top).to(dtype), scales
