"""A whole expert MLP with LoRA as one autograd function.

With X the gathered input (S, H), W frozen, A and B the adapters (a common scale multiplies every product with A, or in
the backward with B, and is left out here), w the routing weight of a row:

    forward    G = X W_guᵀ + (X A_guᵀ) B_guᵀ + b_gu     h = act(G)
               Y = h W_dᵀ + (h A_dᵀ) B_dᵀ + b_d         out[t] = sum_k w Y
    backward   with D the gathered gradient of out (S, H), before weighting:
               dh' = D W_d + (D B_d) A_d                dw = rowdot(h, dh') + rowdot(D, b_d)       (so Y is not kept)
               dB_d = Dᵀ (w h A_dᵀ)                     dA_d = (w D B_d)ᵀ h
               dG = act'(G, w dh')                      dB_gu = dGᵀ (X A_guᵀ)       dA_gu = (dG B_gu)ᵀ X
               dX = dG W_gu + (dG B_gu) A_gu

No dense delta of a weight and no weight gradient is ever formed. Kept for backward: the ungathered x (T, H), the
routing, G (S, N) and the two low-rank products (S, R); the gathered X and h are rebuilt. Where the graph is not kept
for another backward, dG takes the place of G.

The first projection runs before the function, which keeps what the backward needs, and the second one after it. A layer
under gradient checkpointing is recomputed up to the last tensor that is saved (`torch.utils.checkpoint`, early stop),
so its second projection runs once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import pieces
from .activation import Activation
from .linear import FrozenStack, first_order_only, may_overwrite_saved
from .routing import Routing


class Projection(NamedTuple):
    """One projection of all experts: what is frozen and what trains.

    Attributes:
        weight: `(E, N, K)` or what builds it. bias: `(E, N)` or `None`.
        a: `(E, R, K)`, b: `(E, N, R)`, or both `None`; R a `padded_rank` of the backend.
    """

    weight: FrozenStack
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scale: float = 1.0


def pieces_of(backend: str) -> ModuleType:
    """The module whose functions a backend runs; triton is imported only where it runs."""
    return _kernels() if backend == "triton" else pieces


@cache
def _kernels() -> ModuleType:
    from .triton import pieces as kernels

    return kernels


class _Call(NamedTuple):
    """What a call is made of besides the tensors that may need gradients; `pre` is G."""

    pre: Tensor
    up_low: Tensor | None
    down_low: Tensor | None
    up: Projection
    down: Projection
    routing: Routing
    activation: Activation
    backend: str
    dtype: torch.dtype


class _ExpertMLP(torch.autograd.Function):
    """Keeps what the backward needs of a call whose first half has run.

    Returns the result `(T, H)`: yet to be filled, or finished where it is given the hidden rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        up_a: Tensor | None,
        up_b: Tensor | None,
        down_a: Tensor | None,
        down_b: Tensor | None,
        call: _Call,
        hidden: Tensor | None,
    ) -> Tensor:
        up, down = call.up, call.down
        order, source, inverse, experts, offsets, top_k, valid = call.routing
        ctx.backend, ctx.activation, ctx.top_k = call.backend, call.activation, top_k
        ctx.up_scale, ctx.down_scale = up.scale, down.scale
        up_tensor, down_tensor = isinstance(up.weight, Tensor), isinstance(down.weight, Tensor)
        ctx.up_stack = None if up_tensor else up.weight
        ctx.down_stack = None if down_tensor else down.weight
        ctx.save_for_backward(
            x, weights, call.pre, call.up_low, call.down_low, up_a, up_b, down_a, down_b, down.bias,
            up.weight if up_tensor else None, down.weight if down_tensor else None,
            order, source, inverse, experts, offsets, valid,
        )  # fmt: skip
        out = torch.empty(x.shape, dtype=call.dtype, device=x.device)
        if hidden is not None:
            _finish([hidden], call.down_low, down, weights, call.routing, call.backend, out)
        return out

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (
            x, weights, pre, up_low, down_low, up_a, up_b, down_a, down_b, down_bias,
            up_weight, down_weight, order, source, inverse, experts, offsets, valid,
        ) = ctx.saved_tensors  # fmt: skip
        backend, run = ctx.backend, pieces_of(ctx.backend)
        need_x, need_weights, need_up_a, need_up_b, need_down_a, need_down_b, *_ = ctx.needs_input_grad
        need_up = need_up_a or need_up_b
        routing = Routing(order, source, inverse, experts, offsets, ctx.top_k, valid)

        d_out = grads[0].to(x.dtype)
        d_rows = run.gather(d_out, source)  # before weighting
        down_weight = run.operand(down_weight if ctx.down_stack is None else ctx.down_stack, len(source), True)
        # The transposed projection: B takes the place of A, A that of B.
        d_hidden, d_down_low = run.project(
            d_rows, down_weight, _mT(down_b), _mT(down_a), ctx.down_scale, None, None, routing, backend
        )
        del down_weight
        back_b = _mT(up_b) if need_x or need_up else None
        d_pre, d_up_low, dots, hidden = run.activate_rows_backward(
            ctx.activation, pre, d_hidden, weights, back_b, ctx.up_scale, routing, backend, may_overwrite_saved(),
            weights.dtype if down_bias is None else torch.promote_types(x.dtype, torch.float32),
        )  # fmt: skip
        del pre, d_hidden
        d_down_a: Tensor | None = None
        d_down_b: Tensor | None = None
        d_up_a: Tensor | None = None
        d_up_b: Tensor | None = None
        d_weights: Tensor | None = None
        d_x: Tensor | None = None
        if need_down_a or need_down_b:
            d_down_a, d_down_b = run.factor_gradients(
                (hidden, None), d_down_low, d_rows, down_low, weights, routing, backend
            )
        del hidden
        if need_weights:
            if down_bias is not None:
                of_bias = (d_out[source] * down_bias[experts]).sum(dim=-1, dtype=dots.dtype)
                dots = dots + pieces.unsort(of_bias, routing)
            d_weights = dots.view(weights.shape).to(weights.dtype)
        if need_x or need_up:
            up_weight = run.operand(up_weight if ctx.up_stack is None else ctx.up_stack, len(source), True)
            d_gathered, _ = run.project(
                (d_pre, None), up_weight, None, _mT(up_a), 1.0, d_up_low, None, routing, backend
            )
            del up_weight
            if need_up:
                rows = run.gather(x, source)
                d_up_a, d_up_b = run.factor_gradients(rows, d_up_low, (d_pre, None), up_low, None, routing, backend)
                del rows
            del d_pre
            if need_x:
                d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
                run.combine(d_gathered, None, routing, d_x)
        return d_x, d_weights, d_up_a, d_up_b, d_down_a, d_down_b, None, None


def _finish(
    halfway: list[Tensor],
    low: Tensor | None,
    down: Projection,
    weights: Tensor,
    routing: Routing,
    backend: str,
    out: Tensor,
) -> None:
    """The second projection and the weighted sum, into out; takes the hidden rows out of `halfway`."""
    run = pieces_of(backend)
    hidden = halfway.pop()
    weight = run.operand(down.weight, hidden.shape[0], False)
    rows, _ = run.project((hidden, None), weight, None, down.b, 1.0, low, down.bias, routing, backend)
    del hidden, weight
    if rows.shape[1] != out.shape[1]:
        raise ValueError(
            f"the experts take rows of {out.shape[1]} and give rows of {rows.shape[1]}: these must be equal"
        )
    run.combine(rows, weights, routing, out)


def _mT(factor: Tensor | None) -> Tensor | None:
    return None if factor is None else factor.mT


def expert_mlp(
    x: Tensor,
    weights: Tensor,
    routing: Routing,
    up: Projection,
    down: Projection | Callable[[], Projection],
    activation: Activation,
    backend: str,
    dtype: torch.dtype,
) -> Tensor:
    """Run the routed experts, `out[t] = sum_k w[t, k] expert(x[t])`.

    Args:
        x: `(T, H)` in the compute dtype. weights: `(T, k)` routing weights, any floating dtype.
        up, down: the two projections; their tensors in the compute dtype. What makes the second one is called while
            the device runs the first.
        activation: see `ops.activation`. backend: as `ops.backends.choose` gives it. dtype: of the result.

    Returns: `(T, H)`. Differentiable in x, weights and the adapters, never in the frozen tensors.
    """
    run, count = pieces_of(backend), routing.source.shape[0]
    with torch.no_grad():
        stack = run.operand(up.weight, count, False)
        rows = run.gather(x, routing.source)
        pre, up_low = run.project(rows, stack, up.a, up.b, up.scale, None, up.bias, routing, backend)
        del stack, rows
    second = down() if callable(down) else down
    with torch.no_grad():
        hidden, down_low = run.activate_rows(activation, pre, second.a, second.scale, routing, backend)
    call = _Call(pre, up_low, down_low, up, second, routing, activation, backend, dtype)
    halfway = [hidden]
    del hidden, pre
    if torch.compiler.is_compiling():  # a graph is not stopped halfway, and would not see who fills the result
        return _ExpertMLP.apply(x, weights, up.a, up.b, second.a, second.b, call, halfway.pop())
    if torch.is_grad_enabled():
        out = _ExpertMLP.apply(x, weights, up.a, up.b, second.a, second.b, call, None)
    else:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
    del call
    with torch.no_grad():
        _finish(halfway, down_low, second, weights, routing, backend, out)
    return out
