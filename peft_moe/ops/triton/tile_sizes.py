"""How large the tiles of a product are: by the mean number of rows of an expert, and by the GPU's shared memory.

`benchmarks/pieces.py --sweep` measures them.
"""

from __future__ import annotations

from functools import cache

import torch
from triton.runtime import driver

from .launch import once_a_shape
from .tiles import rank_width

FEW_ROWS = 48  # of an expert on average: up to here LoRA A rides along
RIDING_RANK = 64  # a low-rank product of more columns gets a pass of its own
HALVED_ROWS = 128  # tiles of so many or more are halved where an expert has no more rows
LONGEST_STEP = 128  # along K
GROUP = 4  # row tiles that are taken together
_LARGE_ROWS = 512  # of an expert on average: up to here LoRA A by itself takes small tiles
_LEAST_SHARED_MEMORY, _LARGE_SHARED_MEMORY = 64 * 1024, 200 * 1024


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of it that a program may hold: 64 KB on AMD's MI300, 99 on RTX cards, 163 on A100, 227 on H100 and B200."""
    if device.type != "cuda":  # in the interpreter
        return _LEAST_SHARED_MEMORY
    return int(driver.active.utils.get_device_properties(device.index)["max_shared_mem"])


@once_a_shape
def tile_sizes(
    rows: int, experts: int, columns: int, riding: int, low_rank: bool, scaled: bool, room: int
) -> dict[str, int]:
    """Of a product of `(rows, K)` with `(experts, columns, K)`.

    Args: riding: columns of LoRA A's product that rides along. low_rank: whether this is one by itself. scaled:
        whether the weights are codes. room: see `shared_memory`.
    """
    tiles = _by_rows(rows / experts, columns, low_rank, scaled, room)
    step, stages, across = tiles["STEP"], tiles["num_stages"], tiles["ROWS"] + tiles["COLUMNS"] + riding
    while 2 * (stages - 1) * step * across > room:  # what is loaded ahead, in 16 bits
        step, stages = (step // 2, stages) if step > 64 else (step, stages - 1)
    return tiles | {"STEP": step, "num_stages": stages}


def _by_rows(mean: float, columns: int, low_rank: bool, scaled: bool, room: int) -> dict[str, int]:
    if columns <= 64:
        width = rank_width(columns)
        if mean <= _LARGE_ROWS:
            return {"ROWS": 32, "COLUMNS": width, "STEP": 64, "num_warps": 2, "num_stages": 3}
        return {"ROWS": 128, "COLUMNS": width, "STEP": 64, "num_warps": 4, "num_stages": 4}
    if low_rank:
        if mean <= _LARGE_ROWS:
            return {"ROWS": 64, "COLUMNS": 128, "STEP": 64, "num_warps": 4, "num_stages": 3}
        return {"ROWS": 128, "COLUMNS": 128, "STEP": 64, "num_warps": 8, "num_stages": 3}
    if mean <= 16:
        return {"ROWS": 16, "COLUMNS": 128, "STEP": LONGEST_STEP, "num_warps": 4, "num_stages": 3}
    if scaled:  # codes become 16-bit in registers, of which large tiles leave none
        if mean <= 24:
            return {"ROWS": 32, "COLUMNS": 128, "STEP": 64, "num_warps": 4, "num_stages": 4}
        return {"ROWS": 64, "COLUMNS": 64, "STEP": 64, "num_warps": 4, "num_stages": 4}
    if mean <= FEW_ROWS:
        return {"ROWS": 64, "COLUMNS": 128, "STEP": 64, "num_warps": 4, "num_stages": 4}
    if room >= _LARGE_SHARED_MEMORY:
        return {"ROWS": 128, "COLUMNS": 256, "STEP": 64, "num_warps": 8, "num_stages": 4}
    return {"ROWS": 128, "COLUMNS": 128, "STEP": 64, "num_warps": 8, "num_stages": 2}
