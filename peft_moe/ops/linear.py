"""One projection of all experts, differentiable: the pieces of the generic path.

The generic path composes these where the whole-MLP function of `experts.py` does not apply: dropout, DoRA, adapters
that differ by row, a norm after the experts, projections that are called one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .grouped import grouped_mm, grouped_outer

# A frozen stack `(E, N, K)`: the tensor, or what builds it where keeping it would cost memory.
FrozenStack = Tensor | Callable[[], Tensor]


def first_order_only(backward: Any) -> Any:
    """Raise where a second derivative is asked for: what was saved has no history, and it would be silently wrong."""
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        if not torch.compiler.is_compiling():
            raise RuntimeError(
                "grouped experts have no second derivatives (`create_graph=True`). Compute without, or set "
                "PEFT_MOE_GROUPED=0 with frozen experts."
            )
        return once(ctx, *grads)

    return checked


def may_overwrite_saved() -> bool:
    """Whether a backward may write into a tensor that its forward made and saved: no other pass will read it.

    Not with `retain_graph=True`, nor where the compiler traces.
    """
    return not torch.compiler.is_compiling() and not torch._C._autograd._get_current_graph_task_keep_graph()


def stack_tensor(stack: FrozenStack) -> Tensor:
    """The `(E, N, K)` tensor of a frozen stack."""
    return stack if isinstance(stack, Tensor) else stack()


class FrozenGroupedLinear(torch.autograd.Function):
    """`y = x Wᵀ` per expert with W frozen: saves nothing of the size of x or W, computes no weight gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: FrozenStack, offsets: Tensor, backend: str) -> Tensor:
        weight = stack_tensor(stack)
        is_tensor = isinstance(stack, Tensor)
        ctx.save_for_backward(offsets, weight if is_tensor else None)
        ctx.build = None if is_tensor else stack
        ctx.backend = backend
        return grouped_mm(x, weight.mT, offsets, backend)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        offsets, weight = ctx.saved_tensors
        weight = ctx.build() if weight is None else weight
        return grouped_mm(grads[0], weight, offsets, ctx.backend), None, None, None


class GroupedLora(torch.autograd.Function):
    """`y = (x Aᵀ) Bᵀ` per expert: x `(S, K)`, A `(E, R, K)`, B `(E, N, R)` with the scaling folded in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, offsets: Tensor, backend: str) -> Tensor:
        low = grouped_mm(x, a.mT, offsets, backend)
        ctx.save_for_backward(x, a, b, low, offsets)
        ctx.backend = backend
        return grouped_mm(low, b.mT, offsets, backend)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, low, offsets = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_low = grouped_mm(grad, b, offsets, ctx.backend)
        dx = grouped_mm(d_low, a, offsets, ctx.backend) if ctx.needs_input_grad[0] else None
        da = grouped_outer(d_low, x, offsets, ctx.backend) if ctx.needs_input_grad[1] else None
        db = grouped_outer(grad, low, offsets, ctx.backend) if ctx.needs_input_grad[2] else None
        return dx, da, db, None, None


def frozen_linear(x: Tensor, stack: FrozenStack, offsets: Tensor, backend: str) -> Tensor:
    """`(S, K)` rows through their expert's frozen `(N, K)` matrix. Returns `(S, N)`."""
    return FrozenGroupedLinear.apply(x, stack, offsets, backend)


def lora_linear(x: Tensor, a: Tensor, b: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """The adapter's part of a projection: `(S, K)` -> `(S, N)`. See `GroupedLora`."""
    return GroupedLora.apply(x, a, b, offsets, backend)
