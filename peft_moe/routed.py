"""Few tokens: of packed experts, those alone are dequantized that have tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .ops.experts import Projection, pieces_of
from .ops.routing import Routing, compact

if TYPE_CHECKING:
    from .forward import Experts

#: The experts of a layer have to be this many times what can have tokens: gathering their codes costs a pass of its
#: own. `benchmarks/routed.py` measures where it pays.
MARGIN = 2


def pays(rows: int, experts: int) -> bool:
    """Whether to dequantize routed experts alone. Known without looking at the routing: no host synchronisation."""
    return 0 < rows and min(rows, experts) * MARGIN <= experts


def only_routed(
    layer: Experts, routing: Routing, projections: list[Projection], dtype: torch.dtype, backend: str
) -> tuple[Routing, list[Projection]]:
    """Routing and projections of the experts that have rows; those given, where that does not pay or cannot be done.

    Without gradients only (decoding): the backward pass would have to build and scatter the same selection.
    """
    experts = layer.spec.num_experts
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not pays(routing.experts.numel(), experts):
        return routing, projections
    stores: list[Any] = [layer.stores[one.name] for one in layer.spec.projections]
    if any(store.keep_built or not getattr(store, "builds_some", False) for store in stores):
        return routing, projections
    rows = routing.experts.numel()
    if all(pieces_of(backend).reads_codes(one.weight, rows) for one in projections):
        return routing, projections  # nothing is dequantized
    routing, slots = compact(routing, experts)
    return routing, [_pick(one, store, slots, dtype) for one, store in zip(projections, stores, strict=True)]


def _pick(projection: Projection, store: Any, slots: Tensor, dtype: torch.dtype) -> Projection:
    bias, a, b = (
        None if tensor is None else tensor.index_select(0, slots)
        for tensor in (projection.bias, projection.a, projection.b)
    )
    return Projection(lambda: store.build_some(slots).to(dtype), bias, a, b, projection.scale)
