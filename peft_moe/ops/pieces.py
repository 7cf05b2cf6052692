"""The pieces of an expert MLP in plain torch. `ops/triton/pieces.py` has the same ones as kernels.

Rows come as a pair `(tensor, source)`: the tensor itself is sorted by expert where `source` is `None`, otherwise row m
is `tensor[source[m]]`; a backend that gathers inside its kernels never forms the gathered tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import Activation, activate, activate_backward
from .grouped import grouped_mm, grouped_outer
from .linear import FrozenStack, stack_tensor
from .routing import Routing, mask_rows, route

__all__ = [
    "activate_rows",
    "activate_rows_backward",
    "combine",
    "factor_gradients",
    "gather",
    "operand",
    "project",
    "reads_codes",
    "route",
    "unsort",
]

Rows = tuple[Tensor, Tensor | None]


def gather(x: Tensor, source: Tensor) -> Rows:
    """`(T, H)` tokens and `(S,)` their row numbers, as rows."""
    return x[source], None


def operand(stack: FrozenStack, rows: int, transposed: bool) -> Tensor:
    """What `project` multiplies `rows` rows by: the `(E, N, K)` of a frozen stack, or its transpose."""
    weight = stack_tensor(stack)
    return weight.mT if transposed else weight


def reads_codes(stack: FrozenStack, rows: int) -> bool:
    """Whether `operand` takes the codes of a stack as they are."""
    return False


def project(
    rows: Rows,
    weight: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    low: Tensor | None,
    bias: Tensor | None,
    routing: Routing,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """`W x + B low + bias` of each row, and the low-rank product `low = scale A x` where it is not given.

    Args: weight `(E, N, K)`, a `(E, R, K)`, b `(E, N, R)`, bias `(E, N)`; any strides. Returns `(S, N)`, `(S, R)`.
    """
    x, offsets = rows[0], routing.offsets
    out = grouped_mm(x, weight.mT, offsets, backend)
    low = _low_rank(x, a, scale, routing, backend) if low is None else low
    if low is not None and b is not None:
        out = out + grouped_mm(low, b.mT, offsets, backend)
    return (out if bias is None else out + bias[routing.experts]), low


def _low_rank(x: Tensor, a: Tensor | None, scale: float, routing: Routing, backend: str) -> Tensor | None:
    if a is None:
        return None
    low = grouped_mm(x, a.mT, routing.offsets, backend)
    return low if scale == 1.0 else low * scale


def activate_rows(
    activation: Activation, pre: Tensor, a: Tensor | None, scale: float, routing: Routing, backend: str
) -> tuple[Tensor, Tensor | None]:
    """The activation, `(S, N)` -> `(S, I)`, and `low = scale A hidden` `(S, R)` of the projection after it."""
    hidden = activate(activation, pre)
    return hidden, _low_rank(hidden, a, scale, routing, backend)


def activate_rows_backward(
    activation: Activation,
    pre: Tensor,
    d_hidden: Tensor,
    weights: Tensor,
    b: Tensor | None,
    scale: float,
    routing: Routing,
    backend: str,
    overwrite: bool,
    dots_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Backward of the activation and of the routing weight.

    Args: pre `(S, N)`, d_hidden `(S, I)` before weighting, both sorted. weights `(T, k)`. b: `(E, R, N)`, B of the
        projection before, transposed, or `None`. overwrite: pre may be written into; d_hidden always may.
    Returns: d_pre `(S, N)`; `scale b d_pre` `(S, R)`; rowdot(hidden, d_hidden) `(S,)`, summed in fp32 at least and
        given in `dots_dtype`, in the order of weights, zero for rows of no expert; hidden `(S, I)`.
    """
    d_pre, dots, hidden = activation_gradients(activation, pre, d_hidden, weights, routing)
    return d_pre, _low_rank(d_pre, b, scale, routing, backend), dots.to(dots_dtype), hidden


def activation_gradients(
    activation: Activation, pre: Tensor, d_hidden: Tensor, weights: Tensor, routing: Routing
) -> tuple[Tensor, Tensor, Tensor]:
    """d_pre, the row dots and hidden, see `activate_rows_backward`."""
    hidden = activate(activation, pre)
    dots = (hidden * d_hidden).sum(dim=-1, dtype=torch.promote_types(pre.dtype, torch.float32))
    weighted = (d_hidden * _sorted(weights, routing)).to(pre.dtype)
    return activate_backward(activation, pre, weighted), unsort(dots, routing), hidden


def _sorted(weights: Tensor, routing: Routing) -> Tensor:
    return weights.reshape(-1)[routing.order].unsqueeze(-1)


def unsort(values: Tensor, routing: Routing) -> Tensor:
    """`(S,)` values of sorted rows -> those of `(T, k)` in flat order, zero for rows of no expert."""
    return mask_rows(values.unsqueeze(-1), routing.valid).squeeze(-1)[routing.inverse]


def factor_gradients(
    rows: Rows, d_low: Tensor, d_out: Rows, low: Tensor, weights: Tensor | None, routing: Routing, backend: str
) -> tuple[Tensor, Tensor]:
    """Of A and B: per expert `(w * d_low)ᵀ rows` `(E, R, K)` and `d_outᵀ (w * low)` `(E, N, R)`; zero without rows.

    Args: rows: of width K. d_out: of width N. d_low, low: `(S, R)`. weights: `(T, k)`, or `None` for ones.
    """
    if weights is not None:
        scale = _sorted(weights, routing)
        d_low, low = (d_low * scale).to(d_low.dtype), (low * scale).to(low.dtype)
    of_a = grouped_outer(d_low, rows[0], routing.offsets, backend)
    return of_a, grouped_outer(d_out[0], low, routing.offsets, backend)


def combine(rows: Tensor, weights: Tensor | None, routing: Routing, out: Tensor) -> None:
    """`out[t] = sum_k w[t, k] rows`, of rows sorted by expert: `(S, H)` into out `(T, H)`.

    Args: weights `(T, k)` or `None` for ones; the product is taken in the promoted dtype.
    """
    flat = mask_rows(rows, routing.valid)[routing.inverse].view(out.shape[0], routing.top_k, out.shape[1])
    out.copy_((flat if weights is None else flat * weights.unsqueeze(-1)).sum(dim=1))
