"""The store of one projection's frozen weights, from what the layout says of it."""

from __future__ import annotations

from torch import nn

from .layouts import ExpertsSpec, ProjectionSpec
from .weights import ExpertWeight, open_modules, open_stacked


def open_store(base: nn.Module, spec: ExpertsSpec, projection: ProjectionSpec, name: str) -> ExpertWeight:
    """The store of one projection's frozen weights. Raises `ValueError` for a storage this version cannot read."""
    shape = (spec.num_experts, projection.out_features, projection.in_features)
    if not spec.experts:
        return open_stacked(base, [(part.path, part.transposed, part.flat) for part in projection.parts], shape, name)
    linears = [
        [base.get_submodule(f"{expert}.{part.path}".rstrip(".")) for part in projection.parts]
        for expert in spec.experts
    ]
    return open_modules(linears, shape, name)
