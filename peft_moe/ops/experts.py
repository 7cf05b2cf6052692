"""A whole expert MLP with LoRA as one autograd function.

With X the gathered input (S, H), W frozen, A and B the adapters (scaling folded into B), w the routing weight of a row:

    forward    G = X W_guᵀ + (X A_guᵀ) B_guᵀ + b_gu     h = act(G)
               Y = h W_dᵀ + (h A_dᵀ) B_dᵀ + b_d         out[t] = sum_k w Y
    backward   with D the gathered gradient of out (S, H), before weighting:
               dh' = D W_d + (D B_d) A_d                dw = rowdot(h, dh') + rowdot(D, b_d)       (so Y is not kept)
               dB_d = Dᵀ (w h A_dᵀ)                     dA_d = (w D B_d)ᵀ h
               dG = act'(G, w dh')                      dB_gu = dGᵀ (X A_guᵀ)       dA_gu = (dG B_gu)ᵀ X
               dX = dG W_gu + (dG B_gu) A_gu

No dense delta of a weight and no weight gradient is ever formed. Kept for backward: the ungathered x (T, H), the
routing, G (S, N) and the two low-rank products (S, R); the gathered X and h are rebuilt.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activation import Activation, activate, activate_backward
from .grouped import grouped_mm, grouped_outer
from .linear import FrozenStack, stack_tensor
from .routing import Routing, mask_rows, unsort_and_sum


class Projection(NamedTuple):
    """One projection of all experts: what is frozen and what trains.

    Attributes:
        weight: `(E, N, K)` or what builds it. bias: `(E, N)` or `None`.
        a: `(E, R, K)`, b: `(E, N, R)` with the scaling folded in, or both `None`; R a multiple of `rank_alignment`.
    """

    weight: FrozenStack
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None


def _project(
    x: Tensor,
    weight: Tensor,
    low: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    experts: Tensor,
    offsets: Tensor,
    backend: str,
) -> Tensor:
    out = grouped_mm(x, weight.mT, offsets, backend)
    if low is not None and b is not None:
        out = out + grouped_mm(low, b.mT, offsets, backend)
    return out if bias is None else out + bias[experts]


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        up_weight: FrozenStack,
        up_bias: Tensor | None,
        up_a: Tensor | None,
        up_b: Tensor | None,
        down_weight: FrozenStack,
        down_bias: Tensor | None,
        down_a: Tensor | None,
        down_b: Tensor | None,
        order: Tensor,
        inverse: Tensor,
        experts: Tensor,
        offsets: Tensor,
        valid: Tensor | None,
        activation: Activation,
        backend: str,
        dtype: torch.dtype,
    ) -> Tensor:
        tokens, top_k = weights.shape
        ctx.backend, ctx.activation = backend, activation
        gathered = x[order // top_k]
        up_low = None if up_a is None else grouped_mm(gathered, up_a.mT, offsets, backend)
        pre = _project(gathered, stack_tensor(up_weight), up_low, up_b, up_bias, experts, offsets, backend)
        hidden = activate(activation, pre)
        down_low = None if down_a is None else grouped_mm(hidden, down_a.mT, offsets, backend)
        rows = _project(hidden, stack_tensor(down_weight), down_low, down_b, down_bias, experts, offsets, backend)
        flat = mask_rows(rows, valid)[inverse].view(tokens, top_k, rows.shape[-1])
        out = (flat * weights.unsqueeze(-1)).sum(dim=1).to(dtype)

        up_tensor, down_tensor = isinstance(up_weight, Tensor), isinstance(down_weight, Tensor)
        ctx.build_up = None if up_tensor else up_weight
        ctx.build_down = None if down_tensor else down_weight
        ctx.save_for_backward(
            x, weights, pre, up_low, down_low, up_a, up_b, down_a, down_b, down_bias,
            up_weight if up_tensor else None, down_weight if down_tensor else None,
            order, inverse, experts, offsets, valid,
        )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable  # what was saved has no history: a second derivative would be wrong
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (
            x, weights, pre, up_low, down_low, up_a, up_b, down_a, down_b, down_bias,
            up_weight, down_weight, order, inverse, experts, offsets, valid,
        ) = ctx.saved_tensors  # fmt: skip
        backend, dtype = ctx.backend, x.dtype
        tokens, top_k = weights.shape
        need_x, need_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        need_up = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        source = order // top_k
        row_weight = weights.reshape(-1)[order].unsqueeze(-1)  # (S, 1), dtype of the routing weights

        d_rows = grads[0].to(dtype)[source]  # (S, H), before weighting
        hidden = activate(ctx.activation, pre)
        down_weight = ctx.build_down() if down_weight is None else down_weight
        d_hidden = grouped_mm(d_rows, down_weight, offsets, backend)
        del down_weight
        d_down_a: Tensor | None = None
        d_down_b: Tensor | None = None
        d_up_a: Tensor | None = None
        d_up_b: Tensor | None = None
        d_weights: Tensor | None = None
        d_x: Tensor | None = None
        if down_a is not None:
            d_low = grouped_mm(d_rows, down_b, offsets, backend)
            d_hidden = d_hidden + grouped_mm(d_low, down_a, offsets, backend)
            if ctx.needs_input_grad[9]:
                d_down_b = grouped_outer(d_rows, (down_low * row_weight).to(dtype), offsets, backend)
            if ctx.needs_input_grad[8]:
                d_down_a = grouped_outer((d_low * row_weight).to(dtype), hidden, offsets, backend)
        if need_w:
            wide = torch.promote_types(dtype, torch.float32)
            dots = (hidden * d_hidden).sum(dim=-1, dtype=wide)
            if down_bias is not None:
                dots = dots + (d_rows * down_bias[experts]).sum(dim=-1, dtype=wide)
            dots = mask_rows(dots.unsqueeze(-1), valid).squeeze(-1)
            d_weights = dots[inverse].view(tokens, top_k).to(weights.dtype)
        del hidden, d_rows

        if need_x or need_up:
            d_pre = activate_backward(ctx.activation, pre, (d_hidden * row_weight).to(dtype))
            del d_hidden
            d_low = None  # type: ignore[assignment]
            if up_a is not None:
                d_low = grouped_mm(d_pre, up_b, offsets, backend)
                if ctx.needs_input_grad[5]:
                    d_up_b = grouped_outer(d_pre, up_low, offsets, backend)
                if ctx.needs_input_grad[4]:
                    d_up_a = grouped_outer(d_low, x[source], offsets, backend)
            if need_x:
                up_weight = ctx.build_up() if up_weight is None else up_weight
                d_gathered = grouped_mm(d_pre, up_weight, offsets, backend)
                if d_low is not None:
                    d_gathered = d_gathered + grouped_mm(d_low, up_a, offsets, backend)
                d_x = unsort_and_sum(mask_rows(d_gathered, valid), inverse, tokens, top_k)
        return (
            d_x, d_weights, None, None, d_up_a, d_up_b, None, None, d_down_a, d_down_b,
            None, None, None, None, None, None, None, None,
        )  # fmt: skip


def expert_mlp(
    x: Tensor,
    weights: Tensor,
    routing: Routing,
    up: Projection,
    down: Projection,
    activation: Activation,
    backend: str,
    dtype: torch.dtype,
) -> Tensor:
    """Run the routed experts, `out[t] = sum_k w[t, k] expert(x[t])`.

    Args:
        x: `(T, H)` in the compute dtype. weights: `(T, k)` routing weights, any floating dtype.
        up, down: the two projections; their tensors in the compute dtype.
        activation: see `ops.activation`. backend: see `ops.grouped`. dtype: of the result.

    Returns: `(T, H)`. Differentiable in x, weights and the adapters, never in the frozen tensors.
    """
    return _ExpertMLP.apply(
        x, weights, *up, *down, routing.order, routing.inverse, routing.experts, routing.offsets, routing.valid,
        activation, backend, dtype,
    )  # fmt: skip
