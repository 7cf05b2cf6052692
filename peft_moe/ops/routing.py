"""From router output to rows sorted by expert, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Rows of a Mixture-of-Experts call, sorted by expert.

    Attributes:
        order: `(S,)` int64, flat position `t * k + j` of each sorted row.
        source: `(S,)` int64, token of each sorted row, `order // k`.
        inverse: `(S,)` int64, sorted position of each flat row: `order[inverse[i]] == i`.
        experts: `(S,)` int64, expert of each sorted row, clamped into `[0, E)`.
        offsets: `(E,)` int32, end of each expert's rows; rows at or past `offsets[-1]` belong to no expert.
        top_k: k.
        valid: `(S, 1)` bool, False for rows of no expert; `None` where every row has one.
    """

    order: Tensor
    source: Tensor
    inverse: Tensor
    experts: Tensor
    offsets: Tensor
    top_k: int
    valid: Tensor | None


def route(index: Tensor, num_experts: int, sentinels: bool) -> Routing:
    """Sort the routed rows by expert.

    Args:
        index: `(T, k)` integer; an entry `>= num_experts` is a sentinel: that row contributes zero.
        num_experts: E.
        sentinels: whether sentinels can occur. Without them their masks, one pass each over the rows, are saved.

    No host synchronisation.
    """
    top_k = index.shape[-1]
    flat = index.reshape(-1)
    experts, order = torch.sort(flat, stable=True)
    inverse = torch.empty_like(order)
    inverse.scatter_(0, order, torch.arange(order.numel(), device=order.device))
    boundaries = torch.arange(num_experts, device=experts.device, dtype=experts.dtype)
    offsets = torch.searchsorted(experts, boundaries, right=True, out_int32=True)
    valid = None
    if sentinels:
        valid = (experts < num_experts).unsqueeze(-1)
        experts = experts.clamp(max=num_experts - 1)
    return Routing(order, order // top_k, inverse, experts, offsets, top_k, valid)


def compact(routing: Routing, num_experts: int) -> tuple[Routing, Tensor]:
    """The same rows, with the experts that have some renumbered from 0 on, so that a stack of these alone will do.

    Returns: the routing, whose `experts` and `offsets` count slots, n = min(S, E) of them; and `(n,)` int64, the
    expert of each slot. Slots that are left over have no rows and name expert 0. No host synchronisation: how many
    experts have rows is never asked, only how many can.
    """
    experts = routing.experts
    slots = min(experts.numel(), num_experts)
    begins = torch.diff(experts, prepend=experts[:1]) != 0
    slot = torch.cumsum(begins, dim=0)
    expert_of = torch.zeros(slots, dtype=torch.int64, device=experts.device).scatter_(0, slot, experts.long())
    boundaries = torch.arange(slots, device=experts.device)
    offsets = torch.searchsorted(slot, boundaries, right=True, out_int32=True)
    offsets = torch.minimum(offsets, routing.offsets[-1])  # rows of no expert stay past the end
    return routing._replace(experts=slot, offsets=offsets), expert_of


def has_sentinels(index: Tensor, num_experts: int) -> bool:
    """Whether an entry of `index` points past the experts. Looks at the data: for CPU tensors only."""
    return index.numel() > 0 and bool((index >= num_experts).any())


def mask_rows(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Zero the rows of no expert. `where`, since those rows may hold NaN: 0 * NaN is not 0."""
    return rows if valid is None else torch.where(valid, rows, rows.new_zeros(()))


class Gather(torch.autograd.Function):
    """`(T, H)` tokens -> `(S, H)` rows sorted by expert.

    The backward un-sorts and sums over k: one read and one write of the rows, where the backward of plain indexing
    scatters into zeros with atomics.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, inverse: Tensor, top_k: int, valid: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, valid)
        ctx.top_k = top_k
        ctx.tokens = x.shape[0]
        return x[source]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inverse, valid = ctx.saved_tensors
        return unsort_and_sum(mask_rows(grads[0], valid), inverse, ctx.tokens, ctx.top_k), None, None, None, None


class Unsort(torch.autograd.Function):
    """`(S, N)` rows sorted by expert -> the same rows in flat (token, k) order; the backward sorts again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows[inverse]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return grads[0][order], None, None


def unsort_and_sum(rows: Tensor, inverse: Tensor, tokens: int, top_k: int) -> Tensor:
    """`(S, H)` sorted rows -> `(T, H)`: back to flat order, summed over k (accumulated in fp32 by the reduction)."""
    return rows[inverse].view(tokens, top_k, rows.shape[-1]).sum(dim=1)


def combine(rows: Tensor, weights: Tensor, routing: Routing, dtype: torch.dtype) -> Tensor:
    """Weighted sum of the experts' outputs, `out[t] = sum_k w[t, k] * rows[t, k]`.

    Args:
        rows: `(S, H)` sorted by expert. weights: `(T, k)`, of any floating dtype; the product is taken in the
            promoted dtype, as transformers does. dtype: of the result `(T, H)`.
    """
    tokens, top_k = weights.shape
    flat = Unsort.apply(mask_rows(rows, routing.valid), routing.order, routing.inverse)
    return (flat.view(tokens, top_k, rows.shape[-1]) * weights.unsqueeze(-1)).sum(dim=1).to(dtype)
