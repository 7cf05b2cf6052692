"""Which rows a program works for."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_tile(offsets, tile, experts: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a row tile; expert == experts: past the last one."""
    index = tl.arange(0, EXPERTS)
    ends = tl.load(offsets + index, mask=index < experts, other=0)
    starts = tl.load(offsets + index - 1, mask=(index > 0) & (index < experts), other=0)
    tiles = tl.where(index < experts, (ends - starts + ROWS - 1) // ROWS, 0)
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32) * (index < experts).to(tl.int32), 0)
    mine = index == expert
    before = tl.sum(tl.where(index < expert, tiles, 0), 0)
    start = tl.sum(tl.where(mine, starts, 0), 0) + (tile - before) * ROWS
    end = tl.sum(tl.where(mine, ends, 0), 0)
    return expert, start, end


def row_tiles(rows: int, experts: int, height: int) -> int:
    """At most how many tiles of so many rows it takes when none holds rows of two experts; no look at the routing."""
    return rows // height + min(experts, rows)


def rank_width(rank: int) -> int:
    """The power of two in whose columns a low-rank product is computed: at least what `tl.dot` takes."""
    return max(16, 1 << (rank - 1).bit_length())
