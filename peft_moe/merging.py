"""Merging adapters into the frozen experts: exact in fp32, rounded once, a few experts at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .adapter import factors, magnitude
from .layouts import ProjectionSpec
from .placement import check_merge

if TYPE_CHECKING:
    from .layer import MoELoraLayer

_CHUNK = 8  # experts whose fp32 weights are held at a time


def _wide(layer: MoELoraLayer, projection: ProjectionSpec) -> torch.dtype:
    """fp32, or fp64 for fp64 weights."""
    return torch.promote_types(layer.stores[projection.name].dtype, torch.float32)


def dora_delta(low: Tensor, size: Tensor, weight: Tensor, merged: Tensor | None = None) -> Tensor:
    """`(out, in)`: what a DoRA adapter adds to a weight.

    Args:
        low: `scaling * B A`. size: its magnitudes `(out,)`. weight: the base's.
        merged: the weight with what was merged before; `None`: nothing was.
    """
    norm = (weight + low).norm(dim=1)
    # Squares may leave the range where the sum does not: NaN is found by whoever checks, a row of zeros is not.
    scale = size / norm.where(norm.isfinite(), math.nan)
    return scale[:, None] * ((weight if merged is None else merged) + low) - weight


def _delta(
    layer: MoELoraLayer, projection: ProjectionSpec, pairs: dict[str, tuple[Tensor, Tensor]], expert: int
) -> Tensor | None:
    """`(out, in)`: what the adapters, one after the other, add to one expert. `None` where none of them adapts it.

    Args: pairs: name of an adapter -> its A `(E', r, in)` and B `(E', out, r)`, scaled.
    """
    wide = _wide(layer, projection)
    weight = merged = None
    total: Tensor | None = None
    for name, (a, b) in pairs.items():
        settings = layer.adapters[name]
        if expert not in settings.adapted(layer.spec.num_experts):
            continue
        position = expert if settings.experts is None else settings.experts.index(expert)
        low = b[position] @ a[position]
        if not settings.use_dora:
            total = low if total is None else total + low
            continue
        weight = layer.stores[projection.name].materialize([expert], wide)[0] if weight is None else weight
        merged = weight if total is None else weight + total
        size = magnitude(layer.projections, name, settings, projection)[position].to(wide)
        total = dora_delta(low, size, weight, merged)
    return total


@torch.no_grad()
def _deltas(
    layer: MoELoraLayer, projection: ProjectionSpec, names: Sequence[str]
) -> Iterator[tuple[list[int], Tensor]]:
    """(experts, `(E', out, in)` deltas) of one projection, a chunk of experts at a time."""
    wide = _wide(layer, projection)
    pairs = {
        name: factors(layer.projections, name, layer.adapters[name], layer.scaling[name], projection, wide)
        for name in names
        if projection.name in layer.adapters[name].projections
    }
    experts, deltas = [], []
    for expert in range(layer.spec.num_experts):
        found = _delta(layer, projection, pairs, expert)
        if found is not None:
            experts.append(expert)
            deltas.append(found)
        if len(experts) == _CHUNK or (experts and expert == layer.spec.num_experts - 1):
            yield experts, torch.stack(deltas)
            experts, deltas = [], []


def _adapted(layer: MoELoraLayer, names: Sequence[str]) -> list[ProjectionSpec]:
    """The projections that one of the adapters adapts: the weights of the others are not touched."""
    return [one for one in layer.spec.projections if any(one.name in layer.adapters[n].projections for n in names)]


def add_deltas(layer: MoELoraLayer, names: Sequence[str]) -> None:
    """Add the adapters to the base weights in place. Raises `ValueError` where offloading would lose them."""
    check_merge(layer)
    for projection in _adapted(layer, names):
        layer.stores[projection.name].add_(_deltas(layer, projection, names))


@torch.no_grad()
def check_finite(layer: MoELoraLayer, names: Sequence[str]) -> None:
    """Raise `ValueError`, naming module and expert, if merging would leave a value that is not finite."""
    check_merge(layer)
    for projection in _adapted(layer, names):
        store = layer.stores[projection.name]
        for experts, deltas in _deltas(layer, projection, names):
            merged = (store.materialize(experts, deltas.dtype) + deltas).to(store.dtype)
            finite = torch.isfinite(merged).flatten(1).all(dim=1).tolist()
            for expert, good in zip(experts, finite, strict=True):
                if not good:
                    raise ValueError(
                        f"NaNs detected in the merged weights. {layer.name}.{projection.name}: merging "
                        f"{', '.join(names)} leaves values of expert {expert} that are not finite in {store.dtype}; "
                        "the adapter seems broken. Nothing was changed."
                    )
