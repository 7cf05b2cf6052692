"""The pieces of an expert MLP as kernels; see `ops/pieces.py` for what each computes."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import pieces as plain
from ..activation import Activation, GatedSwish, activate
from ..linear import FrozenStack
from ..routing import Routing
from ..scaled import CodedStack, ScaledStack
from . import rowwise
from .outer import Factor, outer
from .probe import rows_on_codes
from .project import low_rank, multiplies
from .project import project as _project
from .routing import route as _route

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
]

Rows = plain.Rows


_COUNTED = 2**24  # rows times experts; above, a radix sort is faster than counting (`benchmarks/pieces.py`)


def route(index: Tensor, num_experts: int, sentinels: bool) -> Routing:
    """Two kernels for all but very many rows."""
    sort = _route if index.numel() * num_experts <= _COUNTED else plain.route
    return sort(index, num_experts, sentinels)


def gather(x: Tensor, source: Tensor) -> Rows:
    """Nothing is gathered: the kernels read the rows where they are."""
    return x.contiguous(), source


def operand(stack: FrozenStack, rows: int, transposed: bool) -> Tensor | ScaledStack:
    """The codes of a stack where so few rows an expert multiply them faster than they are dequantized."""
    if isinstance(stack, Tensor):
        return stack.mT if transposed else stack
    codes = _codes(stack, rows, transposed)
    return plain.operand(stack, rows, transposed) if codes is None else codes


def reads_codes(stack: FrozenStack, rows: int) -> bool:
    """Whether `operand` gives codes in the forward pass."""
    return _codes(stack, rows, False) is not None


def _codes(stack: FrozenStack, rows: int, transposed: bool) -> ScaledStack | None:
    codes = stack.codes() if isinstance(stack, CodedStack) else None
    codes = codes.mT if codes is not None and transposed else codes
    if codes is None or not multiplies(codes):
        return None
    return codes if rows <= rows_on_codes(codes.codes.device) * len(codes.codes) else None


def project(
    rows: Rows,
    weight: Tensor | ScaledStack,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    low: Tensor | None,
    bias: Tensor | None,
    routing: Routing,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """One kernel or two: gather, base product, LoRA A, LoRA B, bias."""
    bias = None if bias is None else bias.contiguous()
    return _project(rows[0], rows[1], weight, a, b, scale, bias, routing.offsets, low=low)


def activate_rows(
    activation: Activation, pre: Tensor, a: Tensor | None, scale: float, routing: Routing, backend: str
) -> tuple[Tensor, Tensor | None]:
    """One pass for a gated swish, or two with a high rank."""
    if isinstance(activation, GatedSwish):
        return rowwise.gated(activation, pre, a, scale, routing.offsets)
    hidden = activate(activation, pre).contiguous()
    return hidden, None if a is None else low_rank(hidden, a, scale, routing.offsets)


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
    """One pass for a gated swish, in place, or two with a high rank."""
    if not isinstance(activation, GatedSwish):
        d_pre, dots, hidden = plain.activation_gradients(activation, pre, d_hidden, weights, routing)
        d_pre, hidden = d_pre.contiguous(), hidden.contiguous()
        return d_pre, None if b is None else low_rank(d_pre, b, scale, routing.offsets), dots.to(dots_dtype), hidden
    weights, d_pre = weights.contiguous(), pre if overwrite else torch.empty_like(pre)
    dots, low = rowwise.gated_backward(
        activation, pre, d_hidden, weights, routing.order, routing.offsets, d_pre, b, scale, dots_dtype
    )
    return d_pre, low, dots, d_hidden


def factor_gradients(
    rows: Rows, d_low: Tensor, d_out: Rows, low: Tensor, weights: Tensor | None, routing: Routing, backend: str
) -> tuple[Tensor, Tensor]:
    """One kernel, gather and weight inside."""
    weights = None if weights is None else weights.contiguous()
    of_a, of_b = Factor(*rows, d_low, True), Factor(*d_out, low, False)
    return outer(of_a, of_b, weights, routing.order, routing.offsets)


def combine(rows: Tensor, weights: Tensor | None, routing: Routing, out: Tensor) -> None:
    """One pass; rows of no expert count as zero."""
    weights = None if weights is None else weights.contiguous()
    rowwise.combine(rows, routing.inverse, weights, routing.offsets, routing.top_k, out)
