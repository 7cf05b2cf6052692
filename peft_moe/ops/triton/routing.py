"""Routed rows sorted by expert, in one kernel or two where a general sort and what follows it takes fifteen.

Few rows: each compares itself with all others. More: a counting sort; each program counts a run of blocks of rows,
then each places its own, after the rows of smaller experts and after those of the programs before it. Rows of one
expert keep their order. Nothing waits for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..routing import Routing
from .launch import Launch, once_a_shape

_FEW = 8192  # rows that are compared one with another
_BLOCK = 64  # rows of a block of the counting sort
_PROGRAMS = 128  # at most: each reads the counts of all


@triton.jit
def _expert_of(index, at, inside, experts):
    """Experts of some rows; `experts` for rows of none."""
    return tl.minimum(tl.load(index + at, mask=inside, other=experts), experts).to(tl.int32)


@triton.jit
def _store(order, source, inverse, sorted_experts, position, at, inside, expert, experts, top_k):
    tl.store(order + position, at.to(tl.int64), mask=inside)
    tl.store(source + position, (at // top_k).to(tl.int64), mask=inside)
    tl.store(sorted_experts + position, tl.minimum(expert, experts - 1).to(tl.int64), mask=inside)
    tl.store(inverse + at, position.to(tl.int64), mask=inside)


@triton.jit
def _compare_kernel(
    index, order, source, inverse, sorted_experts, offsets, total, experts, top_k,
    LANES: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    expert = _expert_of(index, at, inside, experts)
    lanes = program * LANES + tl.arange(0, LANES)  # experts whose rows this program counts
    before = tl.zeros((BLOCK, CHUNK), dtype=tl.int32)
    up_to = tl.zeros((LANES, CHUNK), dtype=tl.int32)
    for first in range(0, total, CHUNK):
        other_at = first + tl.arange(0, CHUNK)
        other_inside = other_at < total
        other = _expert_of(index, other_at, other_inside, experts)
        other = tl.where(other_inside, other, experts + 1)[None, :]
        earlier = other_at[None, :] < at[:, None]
        before += ((other < expert[:, None]) | ((other == expert[:, None]) & earlier)).to(tl.int32)
        up_to += (other <= lanes[:, None]).to(tl.int32)
    _store(order, source, inverse, sorted_experts, tl.sum(before, 1), at, inside, expert, experts, top_k)
    tl.store(offsets + lanes, tl.sum(up_to, 1), mask=lanes < experts)


@triton.jit
def _count_kernel(index, counts, total, experts, run, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    lanes = tl.arange(0, EXPERTS)
    found = tl.zeros((EXPERTS,), dtype=tl.int32)
    for block in range(program * run, (program + 1) * run):
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < total
        expert = tl.where(inside, _expert_of(index, at, inside, experts), EXPERTS)
        found += tl.sum((expert[:, None] == lanes[None, :]).to(tl.int32), 0)
    tl.store(counts + program * EXPERTS + lanes, found)


@triton.jit
def _place_kernel(
    index, counts, order, source, inverse, sorted_experts, offsets, total, programs, experts, top_k, run,
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
    rows = tl.arange(0, BLOCK)
    for block in range(program * run, (program + 1) * run):
        at = block * BLOCK + rows
        inside = at < total
        expert = tl.where(inside, _expert_of(index, at, inside, experts), EXPERTS)
        mine = expert[:, None] == lanes[None, :]
        earlier = (expert[None, :] == expert[:, None]) & (rows[None, :] < rows[:, None])  # of the same expert
        position = tl.sum(tl.where(mine, next_place[None, :], 0), 1) + tl.sum(earlier.to(tl.int32), 1)
        next_place += tl.sum(mine.to(tl.int32), 0)
        _store(order, source, inverse, sorted_experts, position, at, inside, expert, experts, top_k)


def route(index: Tensor, num_experts: int, sentinels: bool) -> Routing:
    """See `ops.routing.route`: the same result, bit for bit."""
    top_k, flat = index.shape[-1], index.reshape(-1).contiguous()  # one column of several stays a view
    total, device = flat.numel(), index.device
    order, source, inverse, experts = torch.empty(4, total, dtype=torch.int64, device=device).unbind()
    offsets = torch.empty(num_experts, dtype=torch.int32, device=device)
    if total <= _FEW:
        _compare(total, num_experts, top_k)(flat, order, source, inverse, experts, offsets)
    else:
        count, place = _counting_sort(total, num_experts, sentinels, top_k)
        counts = torch.empty(count.grid[0], count.constants["EXPERTS"], dtype=torch.int32, device=device)
        count(flat, counts)
        place(flat, counts, order, source, inverse, experts, offsets)
    valid = None
    if sentinels:
        valid = (torch.arange(total, device=device) < offsets[-1]).unsqueeze(-1)
    return Routing(order, source, inverse, experts, offsets, top_k, valid)


@once_a_shape
def _compare(total: int, num_experts: int, top_k: int) -> Launch:
    programs = max(-(-total // 16), -(-num_experts // 8))
    lanes = max(2, 1 << (-(-num_experts // programs) - 1).bit_length())
    chunk = min(1024, max(16, 1 << (total - 1).bit_length()))
    numbers = (total, num_experts, top_k)
    return Launch(_compare_kernel, (programs,), numbers, LANES=lanes, BLOCK=16, CHUNK=chunk, num_warps=8)


@once_a_shape
def _counting_sort(total: int, num_experts: int, sentinels: bool, top_k: int) -> tuple[Launch, Launch]:
    width = 1 << (num_experts + int(sentinels) - 1).bit_length()
    blocks = -(-total // _BLOCK)
    run = -(-blocks // _PROGRAMS)  # blocks of a program
    programs = -(-blocks // run)
    numbers = (total, num_experts, run)
    count = Launch(_count_kernel, (programs,), numbers, EXPERTS=width, BLOCK=_BLOCK, num_warps=8)
    place = Launch(
        _place_kernel, (programs,), (total, programs, num_experts, top_k, run),
        EXPERTS=width, BLOCK=_BLOCK, CHUNK=max(1, 4096 // width), num_warps=8,
    )  # fmt: skip
    return count, place
