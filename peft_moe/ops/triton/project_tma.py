"""One projection of all experts where each has many rows, on GPUs with a tensor memory accelerator (Hopper, Blackwell).

    out[m] = W[e] x[source[m]] + B[e] low[m] + bias[e]

As in `project.py`, but tiles of the weights, and of rows that need no gather, come by descriptor: the copy engine works
out addresses and edges, and the threads are left to multiply. A fixed number of programs takes tile after tile.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, once_a_shape
from .tiles import find_tile, row_tiles

_TILES = {"ROWS": 128, "COLUMNS": 256, "STEP": 64, "num_warps": 8, "num_stages": 3}


@triton.jit
def _project_tile(
    expert, start, end, first_column,
    x, x_tiles, source, w_tiles, b, bias, low, out,
    n_size, k_size, x_row, b_expert, b_n, b_r,
    RANK: tl.constexpr, HAS_SOURCE: tl.constexpr, HAS_B: tl.constexpr, HAS_BIAS: tl.constexpr, K_FIRST: tl.constexpr,
    EVEN_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    steps = tl.arange(0, STEP)
    rows = start + tl.arange(0, ROWS)
    row_mask = rows < end
    if HAS_SOURCE:
        position = tl.load(source + rows, mask=row_mask, other=0).to(tl.int64)
        x_at = x + position[:, None] * x_row + steps[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for k in range(0, k_size, STEP):
        if HAS_SOURCE:
            x_tile = tl.load(x_at) if EVEN_K else tl.load(x_at, mask=(k + steps < k_size)[None, :], other=0.0)
            x_at += STEP
        else:
            x_tile = x_tiles.load([start, k])
        # Tiles past an expert's edge hold the next one's weights: those columns are not stored, and steps past
        # K meet zeros of x.
        if K_FIRST:
            w_tile = w_tiles.load([expert * k_size + k, first_column])
        else:
            w_tile = w_tiles.load([expert * n_size + first_column, k]).T
        total = tl.dot(x_tile, w_tile, total)
    columns = first_column + tl.arange(0, COLUMNS)
    column_mask = columns < n_size
    if HAS_B:
        ranks = tl.arange(0, RANK)
        low_at = low + rows.to(tl.int64)[:, None] * RANK + ranks[None, :]
        low_tile = tl.load(low_at, mask=row_mask[:, None], other=0.0)
        b_at = b + expert.to(tl.int64) * b_expert + ranks[:, None] * b_r + columns[None, :] * b_n
        total = tl.dot(low_tile, tl.load(b_at, mask=column_mask[None, :], other=0.0), total)
    if HAS_BIAS:
        bias_at = bias + expert.to(tl.int64) * n_size + columns
        total += tl.load(bias_at, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    out_at = out + rows.to(tl.int64)[:, None] * n_size + columns[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def _project_tma_kernel(
    x, x_tiles, x_halves, source, w_tiles, b, bias, low, offsets, out,
    n_size, k_size, tiles, x_row, b_expert, b_n, b_r,
    experts: tl.constexpr, EXPERTS: tl.constexpr, RANK: tl.constexpr,
    HAS_SOURCE: tl.constexpr, HAS_B: tl.constexpr, HAS_BIAS: tl.constexpr, K_FIRST: tl.constexpr, EVEN_K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(n_size, COLUMNS)
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        expert, start, end = find_tile(offsets, number // n_tiles, experts, EXPERTS, ROWS)
        first_column = (number % n_tiles) * COLUMNS
        if expert < experts:
            if end - start <= ROWS // 2:  # an expert's last rows
                _project_tile(
                    expert, start, end, first_column, x, x_halves, source, w_tiles, b, bias, low, out,
                    n_size, k_size, x_row, b_expert, b_n, b_r,
                    RANK, HAS_SOURCE, HAS_B, HAS_BIAS, K_FIRST, EVEN_K, ROWS // 2, COLUMNS, STEP,
                )  # fmt: skip
            else:
                _project_tile(
                    expert, start, end, first_column, x, x_tiles, source, w_tiles, b, bias, low, out,
                    n_size, k_size, x_row, b_expert, b_n, b_r,
                    RANK, HAS_SOURCE, HAS_B, HAS_BIAS, K_FIRST, EVEN_K, ROWS, COLUMNS, STEP,
                )  # fmt: skip


@cache
def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _has_descriptors(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    try:
        from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: F401
    except ImportError:  # of a Triton before 3.4
        return False
    return True


def _flat(weight: Tensor) -> tuple[bool, list[int], int] | None:
    """(K before N, shape, row stride) of `(E, N, K)` as one matrix of all experts; `None` if it is none."""
    experts, n_size, k_size = weight.shape
    for k_first, shape, row in ((False, (n_size, k_size), 1), (True, (k_size, n_size), 2)):
        stride = weight.stride(row)
        unit, whole = weight.stride(3 - row) == 1, weight.stride(0) == shape[0] * stride
        if unit and whole and stride * weight.element_size() % 16 == 0:
            return k_first, [experts * shape[0], shape[1]], stride
    return None


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel runs for these: 16-bit tensors whose rows start at 16-byte addresses."""
    aligned = x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return aligned and x.element_size() == 2 and _has_descriptors(x.device) and _flat(weight) is not None


def project_tma(
    x: Tensor,
    source: Tensor | None,
    weight: Tensor,
    b: Tensor | None,
    low: Tensor | None,
    bias: Tensor | None,
    offsets: Tensor,
) -> Tensor:
    """Arguments as those of `project`, with `low` `(S, R)` computed already; `takes` says whether they can be taken."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    found = _flat(weight)
    assert found is not None
    k_first, shape, stride = found
    rows = x.shape[0] if source is None else source.shape[0]
    out = torch.empty(rows, weight.shape[1], dtype=x.dtype, device=x.device)
    columns, step, height = _TILES["COLUMNS"], _TILES["STEP"], _TILES["ROWS"]
    w_tiles = TensorDescriptor(weight, shape, [stride, 1], [step, columns] if k_first else [columns, step])
    x_tiles: Any = None
    x_halves: Any = None
    if source is None:
        x_tiles = TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [height, step])
        x_halves = TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [height // 2, step])
    launch = _of_shapes(
        rows, x.stride(0), source is not None, weight.shape, k_first,
        None if b is None else (b.shape[2], *b.stride()), bias is not None, x.device,
    )  # fmt: skip
    launch(x, x_tiles, x_halves, source, w_tiles, b, bias, low, offsets, out)
    return out


@once_a_shape
def _of_shapes(
    rows: int, x_row: int, has_source: bool, shape: tuple[int, int, int], k_first: bool,
    b: tuple[int, int, int, int] | None, has_bias: bool, device: torch.device,
) -> Launch:  # fmt: skip
    experts, n_size, k_size = shape
    tiles = row_tiles(rows, experts, _TILES["ROWS"]) * -(-n_size // _TILES["COLUMNS"])
    return Launch(
        _project_tma_kernel, (min(tiles, _programs(device)),),
        (n_size, k_size, tiles, x_row, *(b[1:] if b else (0, 0, 0))),
        experts=experts, EXPERTS=1 << (experts - 1).bit_length(), RANK=b[0] if b else 16,
        HAS_SOURCE=has_source, HAS_B=b is not None, HAS_BIAS=has_bias, K_FIRST=k_first,
        EVEN_K=k_size % _TILES["STEP"] == 0, **_TILES,
    )  # fmt: skip
