"""The pieces of an expert MLP as kernels; see `ops/pieces.py` for what each computes."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import pieces as plain
from ..activation import Activation, GatedSwish
from ..routing import Routing
from . import rowwise
from .outer import outer as _outer
from .project import project as _project
from .routing import route as _route

__all__ = ["activate_rows", "activate_rows_backward", "combine", "gather", "outer", "project", "route"]

Rows = plain.Rows


_COUNTED_ROWS = 65536  # above, a counting sort reads more counts than a radix sort moves rows (`benchmarks/pieces.py`)


def route(index: Tensor, num_experts: int, sentinels: bool) -> Routing:
    """Two kernels for all but very many rows."""
    sort = _route if index.numel() <= _COUNTED_ROWS else plain.route
    return sort(index, num_experts, sentinels)


def gather(x: Tensor, source: Tensor) -> Rows:
    """Nothing is gathered: the kernels read the rows where they are."""
    return x.contiguous(), source


def project(
    rows: Rows,
    weight: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    bias: Tensor | None,
    routing: Routing,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """One kernel or two: gather, base product, LoRA A, LoRA B, bias."""
    bias = None if bias is None else bias.contiguous()
    return _project(rows[0], rows[1], weight, a, b, scale, bias, routing.offsets)


def activate_rows(activation: Activation, pre: Tensor) -> Tensor:
    """One pass for a gated swish."""
    if isinstance(activation, GatedSwish):
        return rowwise.gated(activation, pre)
    return plain.activate_rows(activation, pre)


def activate_rows_backward(
    activation: Activation, pre: Tensor, d_hidden: Tensor, weights: Tensor, routing: Routing
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass for a gated swish."""
    if isinstance(activation, GatedSwish):
        return rowwise.gated_backward(activation, pre, d_hidden, weights.contiguous(), routing.order, routing.offsets)
    return plain.activate_rows_backward(activation, pre, d_hidden, weights, routing)


def outer(big: Rows, small: Tensor, weights: Tensor | None, routing: Routing, transposed: bool, backend: str) -> Tensor:
    """One kernel, gather and weight inside."""
    weights = None if weights is None else weights.contiguous()
    return _outer(big[0], big[1], small, weights, routing.order, routing.offsets, transposed)


def combine(rows: Tensor, weights: Tensor | None, routing: Routing, dtype: torch.dtype) -> Tensor:
    """One pass; rows of no expert count as zero."""
    weights = None if weights is None else weights.contiguous()
    return rowwise.combine(rows, routing.inverse, weights, routing.offsets, routing.top_k, dtype)
