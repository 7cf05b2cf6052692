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


def only_routed(layer: Experts, routing: Routing, dtype: torch.dtype, backend: str) -> tuple[Routing, Tensor | None]:
    """Routing among the experts that have rows, and which these are (see `compact`).

    The routing that is given and `None` where that does not pay or cannot be done. Without gradients only (decoding):
    the backward pass would have to build and scatter the same selection.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return routing, None
    experts, rows = layer.spec.num_experts, routing.experts.numel()
    stores: list[Any] = list(layer.stores.values())
    if not pays(rows, experts) or any(store.keep_built or not getattr(store, "builds_some", False) for store in stores):
        return routing, None
    run = pieces_of(backend)
    if all(store.dtype == dtype and run.reads_codes(store.frozen(), rows) for store in stores):
        return routing, None  # nothing is dequantized
    return compact(routing, experts)


def pick(projection: Projection, store: Any, slots: Tensor, dtype: torch.dtype) -> Projection:
    """The same for the experts of `slots` alone, whose weights are built when they are used."""
    bias, a, b = (
        None if tensor is None else tensor.index_select(0, slots)
        for tensor in (projection.bias, projection.a, projection.b)
    )
    return Projection(lambda: store.build_some(slots).to(dtype), bias, a, b, projection.scale)
