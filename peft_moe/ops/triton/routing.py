"""Routed rows sorted by expert: a counting sort in two kernels, where a general sort and what follows takes fifteen.

Each program counts a run of blocks of rows; then each places its own, after the rows of smaller experts and after those
of the programs before it. Rows of one expert keep their order. Nothing waits for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..routing import Routing
from .launch import launch

_TILE = 32768  # elements of the (rows, experts) tile of a block
_PROGRAMS = 128  # at most: each reads the counts of all


@triton.jit
def _experts_of(index, at, inside, experts, EXPERTS: tl.constexpr):
    """Experts of some rows as `(BLOCK,)`, and as a one-hot `(BLOCK, EXPERTS)` tile; rows outside have none."""
    expert = tl.minimum(tl.load(index + at, mask=inside, other=0), experts).to(tl.int32)
    return expert, ((expert[:, None] == tl.arange(0, EXPERTS)[None, :]) & inside[:, None]).to(tl.int32)


@triton.jit
def _count_kernel(index, counts, total, experts, run, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    found = tl.zeros((EXPERTS,), dtype=tl.int32)
    for block in range(program * run, (program + 1) * run):
        at = block * BLOCK + tl.arange(0, BLOCK)
        _, hot = _experts_of(index, at, at < total, experts, EXPERTS)
        found += tl.sum(hot, 0)
    tl.store(counts + program * EXPERTS + tl.arange(0, EXPERTS), found)


@triton.jit
def _place_kernel(
    index, counts, order, source, inverse, sorted_experts, offsets,
    total, programs, experts, top_k, run,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    lanes = tl.arange(0, EXPERTS)
    everywhere = tl.zeros((EXPERTS,), dtype=tl.int32)
    before = tl.zeros((EXPERTS,), dtype=tl.int32)
    for first in range(0, programs, CHUNK):
        one = first + tl.arange(0, CHUNK)
        found = tl.load(counts + one[:, None] * EXPERTS + lanes[None, :], mask=(one < programs)[:, None], other=0)
        everywhere += tl.sum(found, 0)
        before += tl.sum(tl.where((one < program)[:, None], found, 0), 0)
    ends = tl.cumsum(everywhere, 0)
    if program == 0:
        tl.store(offsets + lanes, ends, mask=lanes < experts)
    next_place = ends - everywhere + before
    for block in range(program * run, (program + 1) * run):
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < total
        expert, hot = _experts_of(index, at, inside, experts, EXPERTS)
        position = tl.sum(hot * (tl.cumsum(hot, 0) - 1 + next_place[None, :]), 1)
        next_place += tl.sum(hot, 0)
        tl.store(order + position, at.to(tl.int64), mask=inside)
        tl.store(source + position, (at // top_k).to(tl.int64), mask=inside)
        tl.store(sorted_experts + position, tl.minimum(expert, experts - 1).to(tl.int64), mask=inside)
        tl.store(inverse + at, position.to(tl.int64), mask=inside)


def route(index: Tensor, num_experts: int, sentinels: bool) -> Routing:
    """See `ops.routing.route`: the same result, bit for bit."""
    top_k, flat = index.shape[-1], index.reshape(-1)
    total, device = flat.numel(), index.device
    width = 1 << (num_experts + int(sentinels) - 1).bit_length()
    block = max(16, min(256, _TILE // width))
    blocks = max(1, -(-total // block))
    run = -(-blocks // _PROGRAMS)  # blocks of a program
    programs = -(-blocks // run)
    counts = torch.empty(programs, width, dtype=torch.int32, device=device)
    order, source, inverse, experts = torch.empty(4, total, dtype=torch.int64, device=device).unbind()
    offsets = torch.empty(num_experts, dtype=torch.int32, device=device)
    launch(_count_kernel, (programs,), (flat, counts, total, num_experts, run), EXPERTS=width, BLOCK=block, num_warps=8)
    launch(
        _place_kernel, (programs,),
        (flat, counts, order, source, inverse, experts, offsets, total, programs, num_experts, top_k, run),
        EXPERTS=width, BLOCK=block, CHUNK=max(1, 4096 // width), num_warps=8,
    )  # fmt: skip
    valid = None
    if sentinels:
        valid = (torch.arange(total, device=device) < offsets[-1]).unsqueeze(-1)
    return Routing(order, source, inverse, experts, offsets, top_k, valid)
